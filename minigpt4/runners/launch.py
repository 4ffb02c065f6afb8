"""Processes, devices and random numbers: what a run needs around the training itself."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, gather_object, set_seed

from minigpt4.config.sections import RunSection
from minigpt4.devices import choose_device, choose_precision
from minigpt4.errors import ConfigError, TrainingError


def build_accelerator(run: RunSection, trackers: list[str], folder: Path) -> Accelerator:
    """Return the accelerator of a run, and seed every random number generator.

    Raises:
        TrainingError: torchrun started more processes than accelerate sees, so that each would train alone.
    """
    device = choose_device(run.device)
    # Accelerate keeps its first settings for the life of the process; a notebook's second run may want others.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=choose_precision(run.precision, device),
        log_with=trackers or None,
        project_dir=str(folder) if trackers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=run.collective_timeout_seconds))],
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise TrainingError(f"torchrun started {started} processes, but they see {accelerator.num_processes}")
    set_seed(run.seed)
    if not accelerator.is_main_process:
        logging.getLogger("minigpt4").setLevel(logging.WARNING)
    return accelerator


def recompute_activations(model: torch.nn.Module) -> None:
    """Make a transformers model recompute the activations of its layers in the backward pass.

    A layer does so only while its own flag says `training`, and a frozen model is in eval mode: so the flag is set on
    the layers that know the feature, and on nothing inside them, where it would turn dropout on. `train` and `eval`
    undo it.
    """
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # new and old name in transformers
    enable: Callable[[], None] = next(getattr(model, name) for name in names if hasattr(model, name))
    enable()
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = True


def gather_objects(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return `value` of every rank, in order of rank."""
    return list(gather_object([value])) if accelerator.num_processes > 1 else [value]


def random_state() -> dict[str, Any]:
    """Return this process's random state as plain values and tensors."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.accelerator.is_available():
        state["accelerator"] = torch.get_device_module().get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "accelerator" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["accelerator"])


@contextmanager
def log_file(file: Path) -> Iterator[None]:
    """Write the package's log to a file, too, while the block runs."""
    package = logging.getLogger("minigpt4")
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()


def make_folder(folder: Path) -> None:
    """Make the run folder, if it is not there.

    Raises:
        ConfigError: the disk refuses, or a file is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.output_dir: {folder} cannot be made: {error}") from error
