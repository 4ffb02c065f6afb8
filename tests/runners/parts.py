"""How these tests train: in this process, or in processes of their own that can be counted, joined and killed."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.config import load_config
from minigpt4.runners.train import TrainRunner
from tests.conftest import read_metrics

SERIES = ("step", "loss", "lr", "grad_norm", "samples", "tokens")

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "tests.runners.parts",
        "tests.checkpoints.parts",
        "minigpt4.cli",
        "minigpt4.datasets.aligned_pairs",
        "transformers.models.llama.modeling_llama",
    ]
)


def train(values: dict[str, Any], folder: Path, **run: Any) -> LoadedModel:
    """Train as `values` say, with some of `run` changed, into `folder`."""
    return TrainRunner.from_config(load_config(write(values, folder, **run))).run()


def write(values: dict[str, Any], folder: Path, **run: Any) -> Path:
    """Write the config of a run into `folder`."""
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**values, "run": {**values["run"], "output_dir": str(folder), **run}}))
    return file


def start_command(arguments: Sequence[str], environment: dict[str, str] | None = None) -> BaseProcess:
    """Start `python train.py ARGUMENTS` as a process; only the imports are shared with others."""
    process = PROCESSES.Process(target=_command, args=(list(arguments), environment or {}), daemon=False)
    process.start()
    return process


def _command(arguments: list[str], environment: dict[str, str]) -> None:
    from minigpt4.cli import main

    os.environ.update(environment)
    if output := environment.get("TEST_OUTPUT"):
        sys.stderr = open(output, "w", buffering=1)  # noqa: PTH123, SIM115
    sys.exit(main(["train", *arguments]))


def train_on_ranks(files: Sequence[Path], output: Path | None = None) -> list[int | None]:
    """Train on as many gloo ranks as there are files, each rank by its own file; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank, file in enumerate(files):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(files)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        if output:
            environment["TEST_OUTPUT"] = str(output.with_name(f"{output.name}{rank}"))
        ranks.append(start_command(["--cfg-path", str(file)], environment))
    for process in ranks:
        process.join(240)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in ranks]


def series(folder: Path) -> list[tuple[Any, ...]]:
    """Return what must not depend on interruptions: every training line without its seconds."""
    return [tuple(line[key] for key in SERIES) for line in read_metrics(folder) if "loss" in line]


def losses(folder: Path) -> Tensor:
    return torch.tensor([line["loss"] for line in read_metrics(folder) if "loss" in line], dtype=torch.float64)


def weights(folder: Path, step: str = "latest") -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "checkpoints" / step / "model.safetensors")


def assert_same_training(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(losses(one), losses(other), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights(one), weights(other), rtol=tolerance, atol=tolerance)
