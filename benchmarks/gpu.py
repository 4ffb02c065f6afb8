"""Training and chat at full size on one NVIDIA GPU: prints one JSON line per row, then a table.

    python benchmarks/gpu.py [--seconds 300] [--steps 10] [--only NAME ...] [--out FILE]
    python benchmarks/gpu.py --tiny          # the same rows on the CPU, with a model of a few thousand parameters

Needs no network, data set or weights: EVA-ViT-g, the Q-Former and LLaMA are made on the device with random weights. So
times and memory are real; losses and answers are not. Batches are on the device before the clock starts.

`published_*` rows run the same weights the way MiniGPT-4's published code does: eager attention, logits of every
position, loss through `labels=`, autocast; the whole LLM and the ViT's linear layers in half precision, everything else
in float32. `times_published` is a row's rate over that of `published_fp16` (as shipped) in the same run,
`times_published_bf16` over that of the same code in bfloat16.

`flops` are the model FLOPs of a step, counted by `torch.utils.flop_counter` on our plain step (all of the attention
matrix, no recomputation, no adapters); those of chat are 2 x parameters per token. `mfu` is `flops` over the time and
the bfloat16 matmul rate measured at the start. `peak_gib` is `torch.cuda.max_memory_allocated`. A row that fails has an
`error`, and the others run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import timm
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size import (
    BF16,
    PROMPT,
    TINY,
    WAYS,
    Sizes,
    Step,
    Way,
    hold,
    make_batch,
    make_images,
    make_model,
)
from minigpt4.batch import Batch
from minigpt4.chat.decoding.decoder import Decoder
from minigpt4.models.language_model import LanguageModel
from minigpt4.models.minigpt4 import MiniGPT4

GIB = 2**30
ROW_SECONDS = 6.0
Found = dict[str, Any]


@dataclass
class Bench:
    """The run: where, how long, and what was found so far."""

    device: torch.device
    sizes: Sizes
    warmup: int = 3
    steps: int = 10
    deadline: float = math.inf
    only: list[str] = field(default_factory=list)
    out: Path | None = None
    rows: list[Found] = field(default_factory=list)
    flops: dict[tuple[Any, ...], int] = field(default_factory=dict)
    rate: float = math.inf
    """FLOP/s of a large bfloat16 matmul."""
    bandwidth: float = math.inf
    """Bytes per second of a copy, read and written."""
    model: Any = None
    llm: str = ""
    """The language model in `model`: 7b, 13b, or empty for none, or one that a row has changed for good."""

    def row(self, name: str, measure: Callable[[Bench], Found], llm: str = "7b", group: str = "") -> None:
        """Measure and print a row, unless `--only` leaves it out.

        Args:
            name: of the row.
            measure: returns its numbers.
            llm: the language model that it needs, built if it is not there; empty for none.
            group: rows of a group are compared with its published ones.
        """
        if llm and self.only and not any(part in name for part in self.only):
            return
        if llm not in ("", self.llm):
            self.emit(f"build_{llm}", self.attempt(partial(build, llm=llm)))
        found: Found = self.attempt(measure) if llm in ("", self.llm) else {"error": "its model could not be built"}
        if group:
            found["group"] = group
            for base, key in (("published_fp16", "times_published"), ("published_bf16", "times_published_bf16")):
                rates = [_rate(row) for row in self.rows if row.get("group") == group and base in row["name"]]
                if rates and rates[0] and _rate(found):
                    found[key] = round(_rate(found) / rates[0], 3)
        self.emit(name, found)

    def attempt(self, measure: Callable[[Bench], Found]) -> Found:
        """Return what `measure` finds, or an `error` instead."""
        started = time.monotonic()
        if started > self.deadline:
            return {"error": "not started: --seconds are spent"}
        try:
            self.free()
            found = measure(self)
        except Exception as error:  # one row that fails must not end the others
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        if self.device.type == "cuda" and "error" not in found:
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        return {**found, "row_seconds": round(time.monotonic() - started, 2)}

    def emit(self, name: str, found: Found) -> None:
        """Print a row at once, and append it to the file."""
        self.rows.append({"name": name, **found})
        line = json.dumps(self.rows[-1])
        print(line, flush=True)
        if self.out:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def free(self) -> None:
        """Give back the memory that the last row left, and take the peak from here."""
        if self.model is not None:
            self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def times(self, *parts: Callable[[], object]) -> list[float]:
        """Return the median milliseconds of each part on the device's clock; the parts run in order, step by step.

        Steps that take long are fewer, down to three behind the warm-up.
        """
        marks: list[list[Any]] = []
        started = time.monotonic()
        while len(marks) < self.warmup + self.steps:
            if len(marks) >= self.warmup + 3 and time.monotonic() - started > ROW_SECONDS:
                break
            marks.append([self.mark()])
            for part in parts:
                part()
                marks[-1].append(self.mark())
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        spans = [[_milliseconds(*pair) for pair in itertools.pairwise(step)] for step in marks[self.warmup :]]
        return [statistics.median(column) for column in zip(*spans, strict=True)]

    def mark(self) -> Any:
        """Return this moment in the device's work."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mfu(self, flops: float, milliseconds: float) -> float:
        """Return the share of the measured matmul rate."""
        return round(flops / (milliseconds / 1000) / self.rate, 4)


def _milliseconds(start: Any, end: Any) -> float:
    return (end - start) * 1000 if isinstance(start, float) else start.elapsed_time(end)


def _rate(row: Found) -> float:
    return row.get("samples_per_second") or row.get("tokens_per_second") or 0.0


def machine(device: torch.device) -> Found:
    """Return what the numbers depend on."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / GIB, 1) if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "transformers": transformers.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def matmul(bench: Bench) -> Found:
    """Measure the bfloat16 matmul rate on random numbers, long enough for the clocks to settle."""
    size, times = bench.sizes.matmul, 20
    left, right, product = (torch.randn(size, size, device=bench.device, dtype=BF16) for _ in range(3))
    (milliseconds,) = bench.times(lambda: [torch.mm(left, right, out=product) for _ in range(times)])
    bench.rate = times * 2 * size**3 / (milliseconds / 1000)
    return {"size": size, "milliseconds": round(milliseconds / times, 4), "tflops": round(bench.rate / 1e12, 4)}


def copy(bench: Bench) -> Found:
    """Measure a copy from device memory to device memory."""
    source = torch.randn(bench.sizes.copied // 4, device=bench.device)
    target = torch.empty_like(source)
    (milliseconds,) = bench.times(lambda: target.copy_(source))
    bench.bandwidth = 2 * bench.sizes.copied / (milliseconds / 1000)
    return {"milliseconds": round(milliseconds, 4), "gb_per_second": round(bench.bandwidth / 1e9, 2)}


def build(bench: Bench, llm: str) -> Found:
    """Make the model on the device; image encoder and Q-Former are kept from the one before."""
    parts = () if bench.model is None else (bench.model.vision_encoder, bench.model.resampler)
    bench.model, bench.llm = None, ""
    bench.free()
    model = make_model(bench.sizes, llm, bench.device, parts)
    bench.model, bench.llm = model, llm
    names = ("vision_encoder", "resampler", "llama_proj", "language_model")
    return {"parameters": {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in names}}


def prepare(bench: Bench, way: Way, stage: str, rows: int = 0, cached: bool = False) -> tuple[Batch, int]:
    """Return a batch, by default of the published number of rows, and the FLOPs of a step on it, as ours needs them."""
    hold(bench.model, way)
    rows = rows or bench.sizes.batch[stage]
    counted = min(rows, len(bench.sizes.answers[stage]))
    key = (bench.llm, stage, counted, cached)
    if key not in bench.flops:
        few = make_batch(bench.model, bench.sizes, stage, counted, cached=cached)
        with FlopCounterMode(display=False) as counter, way.context(bench.device):
            bench.model(few).backward()
        bench.model.zero_grad()
        bench.flops[key] = counter.get_total_flops()
    batch = make_batch(bench.model, bench.sizes, stage, rows, cached=cached, trim=not way.published)
    return batch, bench.flops[key] * rows // counted


def time_step(bench: Bench, way: Way, batch: Batch, flops: int) -> Found:
    """Time optimiser steps."""
    (milliseconds,) = bench.times(Step(bench.model, way, batch))
    return {
        "batch": len(batch),
        "positions": batch.input_ids.shape[1],
        "milliseconds": round(milliseconds, 2),
        "samples_per_second": round(len(batch) / milliseconds * 1000, 2),
        "text_tokens_per_second": round(batch.num_supervised / milliseconds * 1000, 1),
        "flops": flops,
        "flops_by": "flop_counter",
        "mfu": bench.mfu(flops, milliseconds),
    }


def train(
    bench: Bench, way: str, stage: str, rows: int = 0, cached: bool = False, checkpointing: bool = False
) -> Found:
    """Time a stage, with or without recomputing the language model's activations in the backward pass."""
    batch, flops = prepare(bench, WAYS[way], stage, rows, cached)
    if checkpointing:
        from minigpt4.models.recompute import recompute_activations

        recompute_activations(bench.model.language_model.model)
    return time_step(bench, WAYS[way], batch, flops)


def train_largest(bench: Bench, way: str, **settings: bool) -> Found:
    """Time stage 1 with the largest batch, a power of two, that fits."""
    rows = bench.sizes.largest
    while True:
        try:
            return train(bench, way, "stage1", rows, **settings)
        except RuntimeError:  # OutOfMemoryError, or a library's own word for it
            if rows == 1:
                raise
        rows //= 2
        bench.free()  # here the frames of the failed step are gone


def train_lora(bench: Bench) -> Found:
    """Time stage 2 with adapters of rank 8 in the language model."""
    way, model = WAYS["bf16_lora"], bench.model
    batch, flops = prepare(bench, way, "stage2")
    bench.llm = ""
    model.language_model.add_lora(dataclasses.replace(LanguageModel.Config(path="-").lora, rank=8))
    with torch.device(bench.device):
        bench.model = MiniGPT4(model.vision_encoder, model.resampler, model.language_model, ("llama_proj", "lora"))
    learning = sum(parameter.numel() for parameter in bench.model.parameters() if parameter.requires_grad)
    return {**time_step(bench, way, batch, flops), "trainable_parameters": learning}


def train_fsdp(bench: Bench) -> Found:
    """Time stage 1 with the language model's layers sharded over one rank, as the train runner shards them."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    batch, flops = prepare(bench, WAYS["bf16"], "stage1")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    backend, limit = "nccl" if bench.device.type == "cuda" else "gloo", timedelta(seconds=60)
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
    try:
        bench.llm, llm = "", bench.model.language_model.model
        mesh = distributed.device_mesh.init_device_mesh(bench.device.type, (1,))
        for layer in llm.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(llm, mesh=mesh, ignored_params={p for p in llm.parameters() if not isinstance(p, DTensor)})
        return time_step(bench, WAYS["bf16"], batch, flops)
    finally:
        distributed.destroy_process_group()


def profile(bench: Bench, way: str) -> Found:
    """Time the parts of a stage-1 step from pixels."""
    batch, _ = prepare(bench, WAYS[way], "stage1")
    model, step = bench.model, Step(bench.model, WAYS[way], batch)
    cached, held = dataclasses.replace(batch, pixel_values=None), {}

    def vision_encoder() -> None:
        with torch.no_grad(), step.way.context(bench.device):
            held["patches"] = model.vision_encoder(batch.pixel_values)

    def qformer() -> None:
        with torch.no_grad(), step.way.context(bench.device):
            cached.query_features = model.resampler(held["patches"])

    def llm_forward() -> None:  # with llama_proj in front and the loss behind
        with step.way.context(bench.device):
            held["loss"] = model(cached) / step.tokens

    def llm_backward() -> None:
        held.pop("loss").backward()

    parts, flops = (vision_encoder, qformer, llm_forward, llm_backward, step.update), []
    for part in parts:
        with FlopCounterMode(display=False) as counter:
            part()
        flops.append(counter.get_total_flops())
    spans = bench.times(*parts)
    table = {
        part.__name__: {"milliseconds": round(span, 2), "share": round(span / sum(spans), 4), "mfu": bench.mfu(n, span)}
        for part, span, n in zip(parts, spans, flops, strict=True)
    }
    return {"batch": len(batch), "milliseconds": round(sum(spans), 2), "flops_by": "flop_counter", "parts": table}


@dataclass
class Tokens:
    """An answer of a given length, without text, for the decode loop; greedy."""

    limit: int
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    settings: Any = field(default_factory=lambda: SimpleNamespace(temperature=0.0, repetition_penalty=1.0))

    def add(self, token: int) -> None:
        """Take the next token."""
        self.ids.append(token)
        self.finish_reason = "length" if len(self.ids) == self.limit else None

    def fail(self, error: Exception) -> None:
        """Fail as a row."""
        raise error


def chat(bench: Bench, way: str, rows: int) -> Found:
    """Time `rows` answers decoded together: the first token from the pixels on, and the rate of those after it.

    Ours is the decode loop of the chat engine, without tokenizer; the published way is `generate` of transformers.
    """
    model, new_tokens = bench.model, bench.sizes.new_tokens
    hold(model, WAYS[way])
    before, after = PROMPT["chat"]
    ids = torch.randint(3, bench.sizes.vocab_size, (rows, before + after), device=bench.device)
    pixels, answer = make_images(model, rows), _generate if WAYS[way].published else _decode

    def prompt() -> Tensor:
        image_embeds, tokens = model.encode_images(pixels), model.language_model.embed(ids)
        return torch.cat([tokens[:, :before], image_embeds.to(tokens.dtype), tokens[:, before:]], dim=1)

    with torch.inference_mode(), WAYS[way].context(bench.device):
        answer(model, prompt, new_tokens)
        timed = [answer(model, prompt, new_tokens) for _ in range(max(1, bench.steps // 3))]
    first, rest = (statistics.median(column) for column in zip(*timed, strict=True))
    rate = rows * (new_tokens - 1) / rest
    weights = list(model.language_model.parameters())
    flops = 2 * sum(weight.numel() for weight in weights)
    read = sum(weight.numel() * weight.element_size() for weight in weights)
    return {
        "batch": rows,
        "positions": ids.shape[1] + model.num_query_tokens,
        "first_token_milliseconds": round(first * 1000, 2),
        "milliseconds": round(rows / rate * 1000, 3),
        "tokens_per_second": round(rate, 2),
        "flops": flops,
        "flops_by": "formula: 2 x parameters of the language model per token",
        "mfu": bench.mfu(flops, 1000 / rate),
        "bandwidth_share": round(rate / rows * read / bench.bandwidth, 4),
    }


def _decode(model: MiniGPT4, prompt: Callable[[], Tensor], new_tokens: int) -> tuple[float, float]:
    """Return the seconds to the first token and from there to the last; each token is read on the host."""
    started = time.perf_counter()
    decoder, embeds = Decoder(model.language_model), prompt()
    answers: list[Any] = [Tokens(new_tokens) for _ in embeds]
    decoder.join(answers, list(embeds))
    first = time.perf_counter()
    while not decoder.is_idle:
        decoder.step()
    return first - started, time.perf_counter() - first


class Clock:
    """A streamer for `generate`: the moments at which the prompt's ids and each token came."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, _: Tensor) -> None:
        """Note the moment; the token is on the host."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def _generate(model: MiniGPT4, prompt: Callable[[], Tensor], new_tokens: int) -> tuple[float, float]:
    """Return the same seconds of `generate`."""
    started, clock, embeds = time.perf_counter(), Clock(), prompt()
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "streamer": clock}
    llm: Any = model.language_model.model
    llm.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    _, first, *_, last = clock.moments
    return first - started, last - first


def measure(bench: Bench) -> None:
    """Measure every row: the published ones of a group first, and those that need a fresh model last."""
    bench.row("matmul", matmul, llm="")
    bench.row("copy", copy, llm="")
    for way in ("published_fp16", "published_bf16", "bf16", "bf16_autocast", "fp16_scaler", "bf16_eager"):
        bench.row(f"stage1_{way}", partial(train, way=way, stage="stage1"), group="stage1")
    bench.row("stage1_cached_bf16", partial(train, way="bf16", stage="stage1", cached=True), group="stage1")
    for way in ("bf16", "bf16_eager", "bf16_autocast"):
        bench.row(f"stage1_parts_{way}", partial(profile, way=way))
    for way in ("published_fp16", "published_bf16", "bf16", "bf16_autocast"):
        bench.row(f"stage2_{way}", partial(train, way=way, stage="stage2"), group="stage2")
    for group, rows in (("chat", 1), ("chat_batch", bench.sizes.batch["chat"])):
        for way in ("published_fp16", "bf16"):
            bench.row(f"{group}_{way}", partial(chat, way=way, rows=rows), group=group)
    checkpointing = partial(train, way="bf16", stage="stage1", checkpointing=True)
    bench.row("stage1_checkpointing_bf16", checkpointing, group="stage1")
    for way in ("published_fp16", "bf16"):
        bench.row(f"largest_{way}", partial(train_largest, way=way), group="largest")
    bench.row("largest_cached_bf16", partial(train_largest, way="bf16", cached=True), group="largest")
    bench.row("largest_checkpointing_bf16", partial(train_largest, way="bf16", checkpointing=True), group="largest")
    bench.row("stage2_lora_bf16", train_lora, group="stage2")
    for way in ("published_fp16", "bf16"):
        bench.row(f"13b_largest_{way}", partial(train_largest, way=way), llm="13b", group="13b")
    bench.row("stage1_fsdp_bf16", train_fsdp, group="stage1")


COLUMNS = ("batch", "milliseconds", "samples_per_second", "tokens_per_second", "mfu", "peak_gib", "times_published")


def table(rows: list[Found]) -> str:
    """Return the rows as text, the parts of a step below their row."""
    lines = [("name", *COLUMNS)]
    for row in rows:
        parts = {f"  {name}": part for name, part in row.get("parts", {}).items()}
        for name, found in ({row["name"]: row} | parts).items():
            mark = " (error)" if "error" in found else ""
            lines.append((name + mark, *(str(found.get(column, "")) for column in COLUMNS)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)) for line in lines)


def main() -> None:
    """Run all rows."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--seconds", type=float, default=300, help="no row starts after so many")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a row, after the warm-up")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="rows whose names have one of these in it"
    )
    parser.add_argument("--out", type=Path, help="file to append the lines to")
    arguments = parser.parse_args()
    if not (arguments.tiny or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --tiny runs on the CPU")
    bench = Bench(
        device=torch.device("cpu" if arguments.tiny else "cuda"),
        sizes=TINY if arguments.tiny else Sizes(),
        warmup=1 if arguments.tiny else 3,
        steps=arguments.steps,
        deadline=started + arguments.seconds,
        only=arguments.only,
        out=arguments.out,
    )
    if arguments.tiny:
        torch.set_num_threads(1)  # more only wait for one another
    gc.freeze()  # what was imported need not be looked at after every row
    torch.manual_seed(0)
    bench.emit("machine", machine(bench.device))
    measure(bench)
    print(table(bench.rows))


if __name__ == "__main__":
    main()
