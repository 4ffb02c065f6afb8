"""The sections without an owner: `run` and `tracking`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minigpt4.registry import RUNNERS, name_field


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """What a runner does, how long, and where its output goes."""

    runner: str = name_field(RUNNERS, "train")
    """Name of the runner class."""
    output_dir: str
    """The run folder; a run that finds itself there goes on only with `resume`."""
    seed: int = 42
    """Seed of data order, initial weights and sampling."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; `auto` takes the accelerator if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; `auto` is bf16 on an accelerator that has it, fp32 elsewhere. fp16 needs one. With fp32
    nothing is cast: each part computes in the precision it is held in (`dtype` of its section)."""
    resume: bool = False
    """Go on from `checkpoints/latest` of `output_dir` if there is one."""

    total_steps: int = 0
    """Optimiser steps of the whole run."""
    global_batch_size: int = 1
    """Samples per optimiser step over all ranks; the accumulation follows from it."""
    batch_size_per_rank: int = 1
    """Samples per forward pass on one rank."""
    num_workers: int = 0
    """Data loader processes per rank; 0 reads in the training process."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step."""
    warmup_start_learning_rate: float = 1e-6
    """Learning rate at step 0."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    steps_per_epoch: int = 0
    """Only for `compat: published`, whose schedule restarts its warm-up with each epoch. 0: one epoch."""
    weight_decay: float = 0.05
    """AdamW weight decay of matrices; vectors (biases, norms) have none."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decays."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    gradient_checkpointing: bool = False
    """Recompute the language model's activations in the backward pass: less memory, a third more time."""
    shard_language_model: bool = False
    """Spread the frozen language model over the ranks (FSDP), for one that fills a GPU: each rank holds a part of every
    layer and gathers the rest when it is needed, which takes time."""

    log_every_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    save_every_steps: int = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: int = 3
    """Checkpoints kept; older ones are removed."""
    validate_every_steps: int = 0
    """Steps between two validations on `datasets.validation`, if there is one; 0: at the end only."""
    validation_samples: int = 256
    """Samples of the validation set used, the same ones each time."""

    max_skipped_fraction: float = 0.05
    """The run stops when more than this part of all samples had to be skipped (from 200 samples on)."""
    max_nonfinite_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite, each left out, before the run stops."""
    collective_timeout_seconds: int = 1800
    """How long a rank waits for the others before it gives up."""

    def __post_init__(self) -> None:
        """Refuse numbers that no run can use, all of them at once."""
        least = {
            "seed": 0,
            "total_steps": 0,
            "warmup_steps": 0,
            "global_batch_size": 1,
            "batch_size_per_rank": 1,
            "num_workers": 0,
            "keep_last": 1,
            "validation_samples": 1,
            "learning_rate": 0,
            "min_learning_rate": 0,
            "warmup_start_learning_rate": 0,
            "weight_decay": 0,
            "max_grad_norm": 0,
            "max_nonfinite_steps": 1,
        }
        wrong = [
            f"{name} must be at least {low}, found {getattr(self, name)}: pass --options run.{name}=N"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            wrong.append(f"adam_betas must lie in [0, 1), found {list(self.adam_betas)}")
        if wrong:
            raise ValueError("; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class TrackingSection:
    """Trackers besides `metrics.jsonl`, which is always written."""

    wandb: bool = False
    """Report to Weights & Biases (needs a login, or WANDB_MODE=offline)."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run folder."""
    project: str = "minigpt4"
    """Project name shown by the trackers."""
    run_name: str = ""
    """Run name shown by the trackers; the name of the run folder when empty."""
