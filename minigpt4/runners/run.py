"""What a training run holds, and the order in which it is built.

Input: a `Config` and the accelerator. Output: a `Run`, ready for its first step or for the one after its checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from minigpt4.batch import Batch
from minigpt4.checkpoints.assemble import IMAGE_SIDE, LoadedModel, assemble, check_calibrated, check_files
from minigpt4.checkpoints.manifest import identify, stage_after
from minigpt4.checkpoints.store import CheckpointStore, write_whole
from minigpt4.config import Config
from minigpt4.config.sections import RunConfig
from minigpt4.datasets.source import Source, data_hash
from minigpt4.errors import ConfigError, TrainingError
from minigpt4.feature_cache.reader import FeatureCache
from minigpt4.models.attention import choose_attention, set_attention
from minigpt4.models.freezing import count_parameters, precisions
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.models.recompute import recompute_activations
from minigpt4.runners.batches import StepBatches, build_sources, training_batches, validation_batches
from minigpt4.runners.calibration import calibrate, start_projector
from minigpt4.runners.distributed import gather_objects, shard_language_model, wrap
from minigpt4.runners.metrics import MetricsLog
from minigpt4.runners.snapshot import Provenance, Snapshots
from minigpt4.runners.state import Speed, TrainingState

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a training run, on one rank. Only `state` changes, and what the parts themselves hold.

    Attributes:
        config: of the run.
        accelerator: processes, device and precision.
        loaded: the model with its encoder and image processor.
        wrapped: the model as training calls it, in DDP if there are several ranks.
        parameters: what is trained.
        optimizer: AdamW over `parameters`.
        batches: this rank's batches, a list for each step.
        validation: the batches of every validation; empty without a validation set.
        metrics: `metrics.jsonl` and the trackers.
        snapshots: writes checkpoints.
        state: counters, and the sums since the last line of metrics.
        started: when this process began to build the run, in seconds of the monotonic clock.
    """

    config: Config
    accelerator: Accelerator
    loaded: LoadedModel
    wrapped: nn.Module
    parameters: list[nn.Parameter]
    optimizer: AcceleratedOptimizer
    batches: StepBatches
    validation: list[Batch]
    metrics: MetricsLog
    snapshots: Snapshots
    state: TrainingState
    started: float

    @property
    def model(self) -> MiniGPT4:
        """The model itself."""
        return self.loaded.model


def check_run(config: Config) -> None:
    """Check everything that can be checked without loading anything.

    Raises:
        ConfigError: all sections, values, files and assets that are missing or make no sense.
    """
    problems = []
    try:
        check_files(config, "model", "datasets", "run", without=IMAGE_SIDE if config.datasets.feature_cache else ())
    except ConfigError as error:
        problems += error.problems
    if not config.run.output_dir:
        problems.append("run.output_dir: is required: set it in the YAML or pass --options run.output_dir=PATH")
    if config.run.total_steps < 1:
        problems.append("run.total_steps: must be at least 1: pass --options run.total_steps=N")
    if config.run.shard_language_model and "language_model" in config.model.trainable:
        problems.append("run.shard_language_model: shards a frozen language model, but model.trainable names it")
    trained = [part for part in config.model.trainable if part in ("vision_encoder", "resampler")]
    if config.datasets.feature_cache and trained:
        problems.append(
            f"datasets.feature_cache: cached features are those of frozen parts, but model.trainable names {trained[0]}"
        )
    projector = config.model.projector
    if config.model.start.ridge and (projector.type != "linear" or not projector.config.bias):
        problems.append(
            "model.start.ridge: sets one linear layer with a bias: set model.projector to {type: linear, bias: true} "
            "or model.start.ridge to 0"
        )
    for name in ("gradient_checkpointing", "shard_language_model"):
        if config.run.compile and getattr(config.run, name):
            problems.append(f"run.compile: cannot be combined with run.{name}; set one of them to false")
    if not config.datasets.train:
        problems.append("datasets.train: names no data set to train on")
    if problems:
        raise ConfigError(problems)


def find_resume_point(config: Config) -> Path | None:
    """Return the checkpoint to resume from, None to start a new run.

    Raises:
        ConfigError: the run folder already holds a run and `run.resume` is off.
        CheckpointError, WeightsError: all checkpoints are damaged.
    """
    store = _store(config.run)
    latest = store.latest()
    if latest is not None and not config.run.resume:
        raise ConfigError(
            f"run.output_dir: {config.run.output_dir} already holds a run, up to {latest.name}: pass --options "
            "run.resume=true to continue it, or run.output_dir=FOLDER for a new one"
        )
    return store.resumable()


def expects_images(config: Config) -> bool:
    """Whether a data set of the training is meant to have images: all are, unless they say `images: optional`."""
    return any(getattr(part.config, "images", "") != "optional" for part in config.datasets.train.values())


def build_run(config: Config, accelerator: Accelerator, checkpoint: Path | None) -> Run:
    """Build the parts of a run.

    Args:
        config: checked by `check_run`.
        accelerator: from `build_accelerator`, which also seeds.
        checkpoint: of this run, to resume from; None to start.

    Raises:
        MiniGPT4Error: what is wrong, and what to do.
    """
    started = time.monotonic()
    settings, folder = config.run, Path(config.run.output_dir)
    accumulation = accumulation_steps(settings, accelerator.num_processes)
    # Data before the model: a missing file is found in a second, a model takes minutes to load.
    sources, validation_sources = build_sources(config.datasets.train), build_sources(config.datasets.validation)
    features = open_features(config, [*sources.items(), *validation_sources.items()])
    loaded = assemble(config, features=features)
    images = loaded.image_processor if features is None else features
    model = loaded.model
    # The identity of the frozen parts before sharding: afterwards no rank has them whole.
    parts = identify(model, model.trained_names())
    # Sharding before the move: no device has to hold the whole language model.
    if settings.shard_language_model and accelerator.num_processes == 1:
        _log.warning("run.shard_language_model: there is only one rank, so nothing is sharded")
    elif settings.shard_language_model:
        shard_language_model(model, accelerator)
    model.to(accelerator.device)
    # After the move, for speed, and only for a new model: a checkpoint holds the results.
    if checkpoint is None and loaded.manifest is None:
        if features is None:  # else they hold the statistics
            calibrate(loaded, sources)
        start_projector(loaded, sources, images)
    set_training_mode(model, settings)
    # The optimiser after the move, since it keeps the parameters it is given; DDP after calibration, since it copies
    # the tensors of rank 0 to the others.
    groups = parameter_groups(model, settings.weight_decay)
    wrapped = wrap(model, accelerator)
    optimizer = accelerator.prepare(torch.optim.AdamW(groups, betas=settings.adam_betas, eps=settings.adam_eps))
    provenance = Provenance(parts, stage_after(loaded.manifest), data_hash(sources))
    snapshots = Snapshots(config, _store(settings), accelerator, model, optimizer, provenance)
    # Nothing in the run folder changes before the checkpoint is known to fit, and its state decides where data,
    # metrics and trackers continue.
    state = TrainingState(Speed(accelerator.device, accelerator.num_processes))
    if checkpoint is not None:
        snapshots.restore(checkpoint, state)
        if features is not None:
            check_calibrated(model, features, checkpoint)
    metrics = MetricsLog(accelerator, folder)
    metrics.forget_after(state.progress.step)
    if accelerator.is_main_process:
        write_whole(folder / "config.yaml", config.to_yaml())
    batches = training_batches(settings, accumulation, loaded, sources, images, accelerator, state)
    validation = validation_batches(settings, loaded, validation_sources, images)
    if checkpoint is None and settings.measure_attention:
        state.attention = chosen_attention(model, batches, accelerator)
    set_attention(model, state.attention)
    metrics.start(config.tracking, folder.name, config.values, state.progress.step)
    if accelerator.is_main_process:
        if settings.warmup_steps > settings.total_steps:
            _log.warning("run.warmup_steps %d is more than the %d steps", settings.warmup_steps, settings.total_steps)
        if not validation_sources:
            _log.warning("datasets.validation is empty: nothing will show whether the model uses its images")
        _log.info("%s", _summary(model, settings, accelerator, accumulation))
    return Run(
        config=config,
        accelerator=accelerator,
        loaded=loaded,
        wrapped=wrapped,
        parameters=[parameter for group in groups for parameter in group["params"]],
        optimizer=optimizer,
        batches=batches,
        validation=validation,
        metrics=metrics,
        snapshots=snapshots,
        state=state,
        started=started,
    )


def open_features(config: Config, sources: Sequence[tuple[str, Source]]) -> FeatureCache | None:
    """Return the feature cache that a config names, None if it names none.

    Raises:
        FeatureCacheError: it is incomplete, or its features are not those that the config would compute.
    """
    if not config.datasets.feature_cache:
        return None
    features = FeatureCache(config.datasets.feature_cache)
    features.check(config, [(name, source.digest()) for name, source in sources])
    _log.info("%s: query features of %d images, %s", features.folder, features.images, features.about)
    return features


def chosen_attention(model: MiniGPT4, batches: StepBatches, accelerator: Accelerator) -> dict[str, str]:
    """Return the faster attention kernel of each part that leaves the choice, measured by rank 0 on its first batch."""
    first = batches.peek() if accelerator.is_main_process else None
    chosen = choose_attention(model, first) if first is not None else {}
    if chosen:
        _log.info("attention, by measurement: %s", ", ".join(f"{part} {kernel}" for part, kernel in chosen.items()))
    shared: dict[str, str] = gather_objects(accelerator, chosen)[0]
    return shared


def accumulation_steps(run: RunConfig, world_size: int) -> int:
    """Return how many batches per rank make one optimiser step.

    Raises:
        TrainingError: the global batch size is not divisible.
    """
    at_once = run.batch_size_per_rank * world_size
    if run.global_batch_size % at_once:
        raise TrainingError(
            f"run.global_batch_size {run.global_batch_size} is not a multiple of run.batch_size_per_rank "
            f"{run.batch_size_per_rank} x {world_size} rank(s); change one of the two"
        )
    return run.global_batch_size // at_once


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices decay, vectors (biases, norms) do not.

    Raises:
        ConfigError: nothing is trained.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("model.trainable: is empty; name at least one part to train, such as llama_proj")
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def set_training_mode(model: MiniGPT4, run: RunConfig) -> None:
    """Set training mode, with recomputed activations if `run.gradient_checkpointing` is on."""
    model.train()
    if run.gradient_checkpointing:
        recompute_activations(model.language_model.model)


def _store(run: RunConfig) -> CheckpointStore:
    return CheckpointStore(Path(run.output_dir) / "checkpoints", run.keep_last)


def _summary(model: MiniGPT4, run: RunConfig, accelerator: Accelerator, accumulation: int) -> str:
    """Return the block at the start of a run: what is trained and frozen, the global batch, the steps, the folder."""
    lines = [f"{'part':<16}{'trainable':>15}{'frozen':>17}  held in"]
    counts, held = count_parameters(model), precisions(model)
    for part, (trainable, frozen) in counts.items():
        lines.append(f"{part:<16}{trainable:>15,}{frozen:>17,}  {held[part]}")
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    lines.append(f"{'total':<16}{total[0]:>15,}{total[1]:>17,}")
    precision = accelerator.mixed_precision
    lines.append(
        f"global batch {run.global_batch_size} = {run.batch_size_per_rank} per rank x {accelerator.num_processes} "
        f"rank(s) x {accumulation} accumulated; {run.total_steps} steps; "
        f"{'no autocast' if precision == 'no' else f'autocast to {precision}'}; run folder {run.output_dir}"
    )
    return "\n".join(lines)
