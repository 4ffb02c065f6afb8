"""Stage 1 and chat at full size on one machine: `python benchmarks/rehearsal.py FOLDER`, one JSON line.

Writes the files of `rehearsal_files.py` (EVA-ViT-g, Q-Former, a 7B LLaMA in bf16: 16 GB) and one shard of images into
FOLDER, unless they exist. Then runs `train.py --cfg-path configs/stage1_pretrain.yaml` for a few steps and
`python -m minigpt4 chat` in separate processes and reads their peak resident memory. They are stopped when the machine
has less than 1.5 GiB of memory left. Weights are random: times and memory are realistic, losses and answers are not.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.rehearsal_files import architecture, write_all

ROOT = Path(__file__).parents[1]
FILES = ("eva", "blip2", "vicuna_7b", "minigpt4_7b")
LEAST_AVAILABLE = 1.5
"""GiB of free memory below which the rehearsal is stopped."""
CHAT_CONFIG = "minigpt4_7b"
QUESTION = "What is this?"


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="1 is faster if other programs use the machine")
    parser.add_argument("--jobs", nargs="+", choices=["train", "chat"], default=["train", "chat"])
    arguments = parser.parse_args()
    files = _files(arguments.folder, arguments.size)
    shard = arguments.folder / "00000.tar"
    write_shard(shard, samples=max(8, arguments.batch * arguments.steps))
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    sizes = {} if arguments.size == "full" else architecture(arguments.size)
    model = [
        f"model.vision_encoder.weights={files['eva']}",
        f"model.resampler.weights={files['blip2']}",
        f"model.language_model.path={files['vicuna_7b']}",
        *(f"{key}={value}" for key, value in sizes.items()),
    ]
    found: dict[str, Any] = {"size": arguments.size, "threads": arguments.threads}
    if "train" in arguments.jobs:
        found |= rehearse_training(arguments, model, shard)
    if "chat" in arguments.jobs:
        found |= rehearse_chat(arguments, model, files["minigpt4_7b"])
    print(json.dumps(found))


def rehearse_training(arguments: argparse.Namespace, model: Sequence[str], shard: Path) -> dict[str, float]:
    """Run stage 1 for a few steps; return seconds and gibibytes."""
    run = arguments.folder / f"run-{int(time.time())}"
    options = [
        *model,
        f"datasets.train.laion.urls=[{shard}]",
        f"datasets.train.cc_sbu.urls=[{shard}]",
        "run.num_workers=0",
        f"run.total_steps={arguments.steps}",
        f"run.global_batch_size={arguments.batch}",
        f"run.batch_size_per_rank={arguments.batch}",
        "run.log_every_steps=1",
        f"run.output_dir={run}",
    ]
    seconds, peak = _run(["train.py", "--cfg-path", "configs/stage1_pretrain.yaml", "--options", *options])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["seconds"] for line in lines if "loss" in line]
    return {
        "train_total_seconds": round(seconds, 1),
        "train_load_seconds": round(seconds - sum(steps), 1),
        "train_step_seconds": round(steps[-1], 1),
        "train_peak_gib": peak,
        "first_loss": round(lines[0]["loss"], 3),
    }


def rehearse_chat(arguments: argparse.Namespace, model: Sequence[str], start: Path) -> dict[str, float]:
    """Ask one question on the command line, and again in a process that measures the times."""
    image = arguments.folder / "image.png"
    Image.effect_noise((300, 200), 80).save(image)
    options = [*model, f"model.init_from={start}", f"chat.max_new_tokens={arguments.new_tokens}", "chat.temperature=0"]
    chat = ["-m", "minigpt4", "chat", "--cfg-path", CHAT_CONFIG, "--device", "cpu", "--options", *options]
    _, peak = _run([*chat, "--image", str(image), "--question", QUESTION])
    timed = arguments.folder / "chat.json"
    _run(
        [
            "-c",
            "import sys; from benchmarks.rehearsal import time_chat; time_chat(*sys.argv[1:])",
            timed,
            image,
            *options,
        ]
    )
    return {**json.loads(timed.read_text()), "chat_peak_gib": peak}


def time_chat(output: str, image: str, *options: str) -> None:
    """Load, ask, and write the seconds of loading and of the first token, and the tokens per second after it.

    The time of the first token includes encoding the image and reading the prompt.
    """
    from minigpt4 import load_model
    from minigpt4.chat.answer import Answer
    from minigpt4.chat.decoding.decoder import Decoder
    from minigpt4.chat.engine import Engine, Prompt
    from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn

    started = time.monotonic()
    loaded = load_model(CHAT_CONFIG, options, device="cpu")
    ready = time.monotonic()
    engine, settings = Engine(loaded), loaded.config.chat
    prompt = Prompt(Dialogue((Turn(f"{IMAGE_MARK} {QUESTION}"),)), engine.query_features([image]))
    answer = Answer(loaded.conversation, settings, end_ids=())  # always max_new_tokens tokens
    decoder = Decoder(loaded.model.language_model)
    decoder.join([answer], [engine.embeds(prompt, settings.max_new_tokens)])
    first = time.monotonic()
    while not decoder.is_idle:
        decoder.step()
    if len(answer.ids) < 2:
        sys.exit(f"the answer ended after {len(answer.ids)} token(s) ({answer.text!r}): nothing to time")
    numbers = {
        "chat_load_seconds": round(ready - started, 1),
        "chat_first_token_seconds": round(first - ready, 1),
        "chat_tokens_per_second": round((len(answer.ids) - 1) / (time.monotonic() - first), 2),
    }
    Path(output).write_text(json.dumps(numbers))


def write_shard(path: Path, samples: int) -> None:
    """Write a webdataset shard of noise images with captions."""
    draw = np.random.default_rng(0)
    with tarfile.open(path, "w") as shard:
        for number in range(samples):
            picture = io.BytesIO()
            Image.fromarray(draw.integers(0, 255, (224, 224, 3), dtype=np.uint8)).save(picture, "JPEG")
            caption = f"picture {number}".encode()
            for suffix, content in (("jpg", picture.getvalue()), ("txt", caption)):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def _files(folder: Path, size: str) -> dict[str, Path]:
    """Return the rehearsal files; a file with their paths is written when all of them are complete."""
    note = folder / "files.json"
    if not note.is_file():
        files = write_all(folder / "files", size, FILES)
        note.write_text(json.dumps({name: str(path) for name, path in files.items()}))
    return {name: Path(path) for name, path in json.loads(note.read_text()).items()}


def _run(arguments: Sequence[str | Path]) -> tuple[float, float]:
    """Run python with `arguments` in the project; return its seconds and its peak resident memory in GiB."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=sys.stderr)
    threading.Thread(target=_watch, args=(process,), daemon=True).start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, arguments[:3]))} ended with status {process.returncode}")
    return time.monotonic() - started, _gibibytes(usage)


def _gibibytes(usage: resource.struct_rusage) -> float:
    """Return `ru_maxrss` in GiB; its unit is KiB on Linux and bytes on macOS."""
    return round(usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20), 2)


def _watch(process: subprocess.Popen[bytes]) -> None:
    """Kill the process when the machine runs out of memory (on Linux only)."""
    meminfo = Path("/proc/meminfo")
    while meminfo.is_file() and process.returncode is None:
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        if int(available.split()[1]) / 2**20 < LEAST_AVAILABLE:
            process.kill()
        time.sleep(0.5)


if __name__ == "__main__":
    main()
