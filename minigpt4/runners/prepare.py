"""What a run needs before its first step: numbers that make sense, batches, and groups of parameters.

Input: the config and the assembled model. Output: problems, loaders and groups for the runner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from minigpt4.batch import Batch
from minigpt4.checkpoints.assemble import LoadedModel, check_files
from minigpt4.config import Config
from minigpt4.config.sections import RunSection
from minigpt4.datasets.loader import BatchLoader, StreamPlan, build_loader, fixed_batches
from minigpt4.datasets.mixture import Mixture
from minigpt4.datasets.source import Source
from minigpt4.errors import ConfigError
from minigpt4.registry import Component
from minigpt4.runners.snapshot import RunState

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
    if config.run.total_steps < 1:
        problems.append("run.total_steps: must be at least 1: pass --options run.total_steps=N")
    if config.run.shard_language_model and "language_model" in config.model.trainable:
        problems.append("run.shard_language_model: spreads a frozen language model, and model.trainable names it")
    if not config.datasets.train:
        problems.append("datasets.train: names no data set to train on")
    if problems:
        raise ConfigError(problems)


def build_sources(parts: Mapping[str, Component]) -> dict[str, Source]:
    """Build data sets, which checks that they are there and can be read; cheap beside a model, so it goes first.

    Raises:
        DataError: a set is missing, empty or damaged.
    """
    return {name: part.build(name=name) for name, part in parts.items()}


def training_batches(
    run: RunSection, loaded: LoadedModel, sources: Mapping[str, Source], accelerator: Accelerator, state: RunState
) -> BatchLoader:
    """Return this rank's part of the training data, from where `state` says it left off."""
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


def validation_batches(run: RunSection, loaded: LoadedModel, sources: Mapping[str, Source]) -> list[Batch]:
    """Return the batches of every validation, none without a validation set."""
    size = max(2, run.batch_size_per_rank)  # one alone cannot swap its image
    return _first_batches(loaded, sources, run.validation_samples, size) if sources else []


def calibrate(loaded: LoadedModel, sources: Mapping[str, Source]) -> None:
    """Give a resampler that wants statistics of training images those of the first ones, the same on every rank."""
    if not loaded.model.resampler.calibrated:
        return
    batches = _first_batches(loaded, sources, CALIBRATION_SAMPLES, 64)
    pixels = [batch.pixel_values for batch in batches if batch.pixel_values is not None]
    if not pixels:
        raise ConfigError("model.resampler: none of the first training samples has an image to calibrate on")
    loaded.model.calibrate(torch.cat(pixels).to(loaded.model.device))


def _first_batches(loaded: LoadedModel, sources: Mapping[str, Source], samples: int, size: int) -> list[Batch]:
    """Return the first samples of the sources, in order."""
    return list(
        fixed_batches(
            sources,
            loaded.encoder,
            loaded.image_processor,
            samples=samples,
            batch_size=size,
            pad_id=loaded.encoder.tokenizer.filler_id,
        )
    )


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
