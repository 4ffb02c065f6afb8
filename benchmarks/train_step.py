"""Seconds of a training step on this machine: `python benchmarks/train_step.py [--other CHECKOUT]`, one JSON line.

Trains a tiny model (the files of `rehearsal_files.py`) and the mini model (`python -m minigpt4 assets mini`) for a few
steps, each run a process of its own. With `--other`, the same runs are made in a second checkout, such as a git
worktree of an older commit, in alternation, since the load of a machine changes; the ratio is this checkout's time over
the other's. Times are medians over the lines of `metrics.jsonl`, without the first ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.rehearsal import write_shard
from benchmarks.rehearsal_files import architecture, write_all

ROOT = Path(__file__).parents[1]
WARM_UP_LINES = 2
"""Lines of metrics that do not count: the first step, and the first interval."""


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--other", type=Path, help="a second checkout to compare with")
    parser.add_argument("--models", nargs="+", choices=["tiny", "mini"], default=["tiny", "mini"])
    parser.add_argument("--intervals", type=int, default=6, help="measured intervals of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each model in each checkout")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "passive"}
    checkouts = {"this": ROOT, **({"other": arguments.other.resolve()} if arguments.other else {})}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            config, options, every = describe(model, Path(folder))
            steps = every * (arguments.intervals + WARM_UP_LINES)
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
            for number in range(arguments.rounds):
                for name in list(checkouts)[:: 1 if number % 2 == 0 else -1]:
                    output = Path(folder) / f"{model}-{name}-{number}"
                    run = [f"run.output_dir={output}", f"run.total_steps={steps}", f"run.log_every_steps={every}"]
                    runs[name] += train(checkouts[name], config, [*options, *run])[WARM_UP_LINES:]
            found[model] = summarise(runs, every)
    print(json.dumps(found))


def describe(model: str, folder: Path) -> tuple[str, list[str], int]:
    """Return the config of a model, its options, and the steps of one interval: two micro-batches to a step."""
    batch = ["run.device=cpu", "run.save_every_steps=0", "run.num_workers=0", "run.warmup_steps=0"]
    if model == "mini":
        batch += ["run.global_batch_size=8", "run.batch_size_per_rank=4", "run.validation_samples=2"]
        return "configs/mini_stage1.yaml", batch, 1
    files = write_all(folder / "files", only=["eva", "blip2", "vicuna_7b"])
    write_shard(folder / "00000.tar", samples=64)
    options = {
        **architecture("tiny"),
        "model.vision_encoder.weights": files["eva"],
        "model.resampler.weights": files["blip2"],
        "model.language_model.path": files["vicuna_7b"],
        "datasets.train.laion.urls": f"[{folder / '00000.tar'}]",
        "datasets.train.cc_sbu.urls": f"[{folder / '00000.tar'}]",
        "run.global_batch_size": 8,
        "run.batch_size_per_rank": 4,
    }
    return "configs/stage1_pretrain.yaml", [*batch, *(f"{key}={value}" for key, value in options.items())], 20


def train(checkout: Path, config: str, options: Sequence[str]) -> list[dict[str, Any]]:
    """Train in a checkout; return the lines of metrics."""
    output = Path(next(option.partition("=")[2] for option in options if option.startswith("run.output_dir=")))
    command = [sys.executable, "train.py", "--cfg-path", config, "--options", *options]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def summarise(runs: dict[str, list[dict[str, Any]]], every: int) -> dict[str, Any]:
    """Return milliseconds for each checkout, and how they compare."""
    times = {name: 1000 * statistics.median(line["seconds"] / every for line in lines) for name, lines in runs.items()}
    found: dict[str, Any] = {f"{name}_step_ms": round(value, 2) for name, value in times.items()}
    if "other" in runs:
        losses = [[line["loss"] for line in lines] for lines in runs.values()]
        found |= {"ratio": round(times["this"] / times["other"], 3), "same_losses": losses[0] == losses[1]}
    return found


if __name__ == "__main__":
    main()
