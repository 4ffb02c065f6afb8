"""The plan of a run: what it will need on which device, and what to change where it does not fit.

Input: a config, devices, and the share of their peak that a step reaches. Output: a `Plan`. No weight is read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.batch import Batch
from minigpt4.config import Config
from minigpt4.devices import DEVICE_MEMORY_GIB, choose_device, matmul_flops, peak_flops, resident_memory_now
from minigpt4.errors import ConfigError
from minigpt4.feature_cache.layout import entry_bytes
from minigpt4.models.freezing import count_parameters
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.planning.model import model_without_weights, parameter_bytes, step_bytes, step_flops
from minigpt4.planning.rows import Rows, from_cache, rows_of
from minigpt4.registry import Component

GIB = 2**30
UTILISATION = 0.4
"""The default share of a device's dense bfloat16 peak. With it, the paper's stage 1 (13B, four A100) takes 11 hours
(published: 10), and 400 steps of its stage 2 (one A100) take 7.5 minutes (published: 7)."""
GPU_LIBRARIES = int(0.8 * GIB)
"""What a CUDA context and its libraries take on a device in addition to tensors: 0.5 to 1 GiB, an assumption."""
HEAP_SHARE = 0.3
"""Of activations on a CPU: what the heap of the C library holds between blocks in use. In runs of the mini model the
process held 1.25 to 1.45 times its activations, and with heaps turned off (`MALLOC_MMAP_THRESHOLD_`) 1.0 times."""
ROOM = 0.97
"""The part of a device's memory that a run can have."""
THIS_CPU = "this CPU"
ADAM_BYTES = 8
"""Of AdamW's two moments in float32, per trained parameter."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DevicePlan:
    """A run on devices of one kind.

    Attributes:
        name: of the device.
        peak_flops: operations per second it can reach.
        memory_gib: its memory; None if that is the machine's.
        fits: whether one rank fits into it; None if unknown.
        hours: of the whole run; None without `run.total_steps`.
        seconds_per_step: of an optimiser step.
    """

    name: str
    peak_flops: float
    memory_gib: float | None
    fits: bool | None
    hours: float | None
    seconds_per_step: float


@dataclass(frozen=True)
class Change:
    """A change that saves memory.

    Attributes:
        option: what to pass.
        memory_gib: what one device then needs.
    """

    option: str
    memory_gib: float


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        parameters: trainable and frozen parameters of each part.
        ranks: number of devices.
        memory: bytes on one device, by what holds them.
        libraries: bytes of a process without model and data: of this one on a CPU, an assumption on a GPU.
        rows: where the lengths of rows come from.
        flops_per_step: of an optimiser step, over all ranks.
        steps: optimiser steps.
        samples: training samples seen in all steps.
        epochs: passes over the training data; None if its size is not known.
        utilisation: share of the peak that was assumed.
        devices: the run on each kind of device.
        cache_bytes: size of a feature cache of the training data; None if the number of images is not known.
        cache_bytes_per_image: the same for one image.
        checkpoint_bytes: size of the checkpoints that are kept.
        changes: what would save memory, if the run does not fit into a device that was named.
        problems: what is wrong with the config.
    """

    parameters: dict[str, tuple[int, int]]
    ranks: int
    memory: dict[str, int]
    libraries: int
    rows: str
    flops_per_step: float
    steps: int
    samples: int
    epochs: float | None
    utilisation: float
    devices: list[DevicePlan]
    cache_bytes: int | None
    cache_bytes_per_image: int
    checkpoint_bytes: int
    changes: list[Change]
    problems: list[str]

    @property
    def peak_bytes(self) -> int:
        """The most memory that one rank takes, libraries included."""
        return sum(self.memory.values()) + self.libraries

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes}


def make_plan(
    config: Config,
    devices: Sequence[str] = (),
    *,
    ranks: int = 1,
    utilisation: float = UTILISATION,
    memory_gib: float = 0.0,
) -> Plan:
    """Return the plan of a run.

    Args:
        config: the run's; paths of weights and data may be missing or empty, that of the language model may not.
        devices: names such as A100; none for the device of the config and a few others.
        ranks: number of devices.
        utilisation: share of the peak that a step reaches.
        memory_gib: memory of a device, if it is not the usual size.

    Raises:
        ConfigError: a device is unknown, or the language model is not named.
        MiniGPT4Error: the model cannot be built.
    """
    if devices and THIS_CPU not in devices:
        config = _with_fast_dtypes(config)
    if not config.model.language_model.config.path:
        raise ConfigError(
            "model.language_model.path: is required: pass --options model.language_model.path=FOLDER; of the files in "
            "it, only config.json is needed, and the tokenizer for exact lengths"
        )
    on_cpu = choose_device(config.run.device).type == "cpu" and not devices
    named = list(devices) or ([THIS_CPU] if on_cpu else []) + ["A100", "H100", "4090"]
    unknown = [name for name in named if name != THIS_CPU and peak_flops(name) is None]
    if unknown:
        raise ConfigError(f"--device: unknown device {unknown[0]!r}; known: {', '.join(DEVICE_MEMORY_GIB)}")
    measured = _Measured.of(config)
    # After the step on the meta device, which has loaded all that a real one loads.
    libraries = resident_memory_now() if on_cpu else GPU_LIBRARIES
    memory = measured.memory(config, ranks)
    if on_cpu:
        memory["heap"] = round(HEAP_SHARE * measured.activation_bytes)
    run, needed = config.run, sum(memory.values()) + libraries
    flops_per_step = measured.flops * run.global_batch_size / run.batch_size_per_rank
    plans = []
    for name in named:
        peak = matmul_flops(measured.model.language_model.dtype) if name == THIS_CPU else peak_flops(name) or 0.0
        size = None if name == THIS_CPU else memory_gib or _memory_of(name)
        seconds = flops_per_step / (ranks * peak * utilisation)
        hours = run.total_steps * seconds / 3600 if run.total_steps else None
        plans.append(
            DevicePlan(name, peak, size, None if size is None else needed <= ROOM * size * GIB, hours, seconds)
        )
    too_small = [plan.memory_gib for plan in plans if plan.fits is False and plan.memory_gib]
    per_image = entry_bytes(measured.model.num_query_tokens, measured.model.resampler.feature_dim, torch.bfloat16)
    samples, images = run.total_steps * run.global_batch_size, measured.rows.images
    trained = sum(trainable for trainable, _ in count_parameters(measured.model).values())
    return Plan(
        parameters=count_parameters(measured.model),
        ranks=ranks,
        memory=memory,
        libraries=libraries,
        rows=measured.rows.origin,
        flops_per_step=flops_per_step,
        steps=run.total_steps,
        samples=samples,
        epochs=samples / images if images else None,
        utilisation=utilisation,
        devices=plans,
        cache_bytes=images * per_image if images is not None else None,
        cache_bytes_per_image=per_image,
        checkpoint_bytes=trained * (4 + ADAM_BYTES) * run.keep_last,
        changes=list(_changes(config, measured, ranks, libraries)) if too_small else [],
        problems=_problems(config, ranks),
    )


@dataclass(frozen=True)
class _Measured:
    """What was measured on a model without weights."""

    model: MiniGPT4
    rows: Rows
    flops: int
    activation_bytes: int
    batch_bytes: int

    @classmethod
    def of(cls, config: Config, rows: Rows | None = None) -> _Measured:
        """Measure a step of a config, on rows that are known or as its data has them."""
        model = model_without_weights(config.model)
        rows = rows or rows_of(config, model)
        is_cached, recompute = bool(config.datasets.feature_cache), config.run.gradient_checkpointing
        typical, widest = (from_cache(b, model) if is_cached else b for b in (rows.typical, rows.widest))
        flops = step_flops(model, typical, recompute=recompute)
        return cls(model, rows, flops, step_bytes(model, widest, recompute=recompute), _bytes_of(widest))

    def memory(self, config: Config, ranks: int) -> dict[str, int]:
        """Return bytes on one device by what holds them."""
        parts: dict[str, nn.Module] = (
            {}
            if config.datasets.feature_cache
            else {
                "vision_encoder": self.model.vision_encoder,
                "resampler": self.model.resampler,
            }
        )
        held = {name: parameter_bytes(part) for name, part in parts.items()}
        held["llama_proj"] = parameter_bytes(self.model.llama_proj)
        llm = self.model.language_model
        held["language_model"] = parameter_bytes(llm)
        if config.run.shard_language_model and ranks > 1:
            held["language_model"] = held["language_model"] // ranks + 2 * _largest_layer(llm)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {
            **held,
            "optimiser": ADAM_BYTES * trained,
            "activations and gradients": self.activation_bytes,
            "batches": 2 * self.batch_bytes,  # the next one is read ahead
        }


def _changes(config: Config, measured: _Measured, ranks: int, libraries: int) -> Iterator[Change]:
    """Yield what would save memory, one change at a time."""
    run, llm_is_trained = config.run, "language_model" in config.model.trainable

    def changed(option: str, new: Config, known: _Measured | None = None) -> Change:
        memory = (known or _Measured.of(new, measured.rows)).memory(new, ranks)
        return Change(option, (sum(memory.values()) + libraries) / GIB)

    if not run.gradient_checkpointing:
        new = dataclasses.replace(config, run=dataclasses.replace(run, gradient_checkpointing=True))
        yield changed("run.gradient_checkpointing=true", new)
    size = run.batch_size_per_rank
    while size > 1 and size % 2 == 0:
        size //= 2
        share = size / run.batch_size_per_rank
        scaled = dataclasses.replace(
            measured,
            activation_bytes=round(measured.activation_bytes * share),
            batch_bytes=round(measured.batch_bytes * share),
        )
        if size in (1, run.batch_size_per_rank // 2, run.batch_size_per_rank // 8):
            yield changed(f"run.batch_size_per_rank={size}", config, scaled)
    if not config.datasets.feature_cache and not {"vision_encoder", "resampler"} & set(config.model.trainable):
        new = dataclasses.replace(config, datasets=dataclasses.replace(config.datasets, feature_cache="FOLDER"))
        yield changed("datasets.feature_cache=FOLDER, after python -m minigpt4 cache", new)
    vision: Component = config.model.vision_encoder
    if getattr(vision.config, "dtype", "") == "float32" and not config.datasets.feature_cache:
        half = dataclasses.replace(vision, config=dataclasses.replace(vision.config, dtype="bfloat16"))
        new = dataclasses.replace(config, model=dataclasses.replace(config.model, vision_encoder=half))
        yield changed("model.vision_encoder.dtype=bfloat16", new)
    if not run.shard_language_model and not llm_is_trained:
        new = dataclasses.replace(config, run=dataclasses.replace(run, shard_language_model=True))
        shards = max(2, ranks)
        memory = measured.memory(new, shards)
        yield Change(f"run.shard_language_model=true on {shards} devices", (sum(memory.values()) + libraries) / GIB)


def _with_fast_dtypes(config: Config) -> Config:
    """Return a config whose `dtype: auto` is bfloat16, as on GPUs since Ampere; this machine may choose another."""
    parts: dict[str, Any] = {}
    for name in ("vision_encoder", "resampler", "language_model"):
        part: Component = getattr(config.model, name)
        if getattr(part.config, "dtype", "") == "auto":
            parts[name] = dataclasses.replace(part, config=dataclasses.replace(part.config, dtype="bfloat16"))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **parts))


def _problems(config: Config, ranks: int) -> list[str]:
    """Return what is wrong with the sizes of a run."""
    run, problems = config.run, []
    at_once = run.batch_size_per_rank * ranks
    if run.global_batch_size % at_once:
        problems.append(
            f"run.global_batch_size {run.global_batch_size} is not a multiple of run.batch_size_per_rank "
            f"{run.batch_size_per_rank} x {ranks} rank(s); change one of the two"
        )
    if not run.total_steps:
        problems.append("run.total_steps: is not set, so the length of the run is not known")
    return problems


def _memory_of(name: str) -> float | None:
    words = set(name.replace("-", " ").split())
    return next((size for known, size in DEVICE_MEMORY_GIB.items() if words.issuperset(known.split())), None)


def _largest_layer(module: nn.Module) -> int:
    """Return the bytes of the largest layer of the longest list of layers."""
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList) and len(child)]
    layers = max(lists, key=len, default=nn.ModuleList())
    return max((parameter_bytes(layer) for layer in layers), default=0)


def _bytes_of(batch: Batch) -> int:
    return sum(t.numel() * t.element_size() for t in vars(batch).values() if isinstance(t, Tensor))
