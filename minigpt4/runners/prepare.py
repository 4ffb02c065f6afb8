"""What a run needs before its first step: numbers that make sense, batches, and groups of parameters.

Input: the config and the assembled model. Output: problems, loaders and groups for the runner.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from minigpt4.batch import Batch
from minigpt4.checkpoints.assemble import LoadedModel, check_files
from minigpt4.config import Config
from minigpt4.datasets.loader import BatchLoader, StreamPlan, build_loader, fixed_batches
from minigpt4.datasets.mixture import Mixture
from minigpt4.errors import ConfigError
from minigpt4.runners.snapshot import RunState

_LEAST = {"total_steps": 1, "global_batch_size": 1, "batch_size_per_rank": 1, "num_workers": 0, "keep_last": 1}
"""The least values that `run` can have for training."""
CALIBRATION_SAMPLES = 512
"""Training samples whose images a resampler's statistics are taken from."""


def check_run(config: Config) -> None:
    """Check all that can be checked without loading anything.

    Raises:
        ConfigError: every section, value, file and asset that is missing or makes no sense.
    """
    config.require("model", "conversation", "datasets", "run")
    problems = []
    try:
        check_files(config, "model", "datasets")
    except ConfigError as error:
        problems += error.problems
    for name, least in _LEAST.items():
        found = getattr(config.run, name)
        if found < least:
            problems.append(f"run.{name}: must be at least {least}, found {found}: pass --options run.{name}=N")
    if not config.datasets.train:
        problems.append("datasets.train: names no data set to train on")
    if problems:
        raise ConfigError(problems)


def training_batches(config: Config, loaded: LoadedModel, accelerator: Accelerator, state: RunState) -> BatchLoader:
    """Return this rank's part of the training data, from where `state` says it left off."""
    run = config.run
    sources = {name: part.build(name=name) for name, part in config.datasets.train.items()}
    plan = StreamPlan(
        seed=run.seed,
        batch_size=run.batch_size_per_rank,
        pad_id=loaded.encoder.tokenizer.filler_id,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=run.num_workers,
        positions=state.positions,
        consumed=state.progress.batches,
    )
    return build_loader(Mixture(sources), loaded.encoder, loaded.image_processor, plan)


def validation_batches(config: Config, loaded: LoadedModel) -> list[Batch]:
    """Return the batches of every validation, none without a validation set."""
    parts = config.datasets.validation
    if not parts:
        return []
    return list(
        fixed_batches(
            {name: part.build(name=name) for name, part in parts.items()},
            loaded.encoder,
            loaded.image_processor,
            samples=config.run.validation_samples,
            batch_size=max(2, config.run.batch_size_per_rank),  # one alone cannot swap its image
            pad_id=loaded.encoder.tokenizer.filler_id,
        )
    )


def calibrate(config: Config, loaded: LoadedModel) -> None:
    """Give a resampler that wants statistics of training images those of the first ones, the same on every rank."""
    if not loaded.model.resampler.calibrated:
        return
    batches = fixed_batches(
        {name: part.build(name=name) for name, part in config.datasets.train.items()},
        loaded.encoder,
        loaded.image_processor,
        samples=CALIBRATION_SAMPLES,
        batch_size=64,
        pad_id=loaded.encoder.tokenizer.filler_id,
    )
    pixels = [batch.pixel_values for batch in batches if batch.pixel_values is not None]
    loaded.model.calibrate(torch.cat(pixels).to(loaded.model.device))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices decay, vectors (biases, norms) do not.

    Raises:
        ConfigError: nothing trains.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    if not learning:
        raise ConfigError("model.trainable: nothing is left to train; name at least one part, such as llama_proj")
    return [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
