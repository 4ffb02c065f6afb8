"""What changes during a run: counters that are saved, sums since the last line of metrics, and the speed."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from minigpt4.batch import Batch
from minigpt4.devices import peak_flops, peak_memory_gb, resident_memory_gb
from minigpt4.errors import TrainingError
from minigpt4.runners.stopping import StopRequest

CHECK_SKIPS_FROM = 200
"""Samples read before too many skipped ones end a run."""
CHECK_LEARNING_FROM = (10, 200)
"""Steps and samples without a gradient or an image before a run ends; a shorter run is checked at its last step."""


@dataclass
class Progress:
    """Counters of a run, over all ranks; saved in every checkpoint.

    Attributes:
        step: optimiser steps done.
        batches: batches that each rank has consumed.
        samples: training samples seen.
        tokens: supervised tokens seen.
        images: images seen.
        skipped: skipped samples, by cause.
        altered: samples used but cut or changed, by cause.
        nonfinite_steps: steps skipped because loss or gradient was not finite.
        has_gradient: whether the gradient of any step was not exactly zero.
    """

    step: int = 0
    batches: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    altered: Counter[str] = field(default_factory=Counter)
    nonfinite_steps: int = 0
    has_gradient: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values to save."""
        return {**asdict(self), "skipped": dict(self.skipped), "altered": dict(self.altered)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """Return the counters saved by `to_dict`; an earlier version did not count images and gradients."""
        earlier = {"images": values["samples"], "has_gradient": True, "altered": {}}
        values = {**earlier, **values}
        return cls(**{**values, "skipped": Counter(values["skipped"]), "altered": Counter(values["altered"])})

    def check_learning(self, total_steps: int, *, expects_images: bool) -> None:
        """Raise TrainingError when many steps, or all of the run, had no gradient, or no image though images are meant.

        Args:
            total_steps: of the run.
            expects_images: whether the data sets are meant to have images.
        """
        steps, samples = CHECK_LEARNING_FROM
        if self.has_gradient and (self.images or not expects_images):
            return
        if self.step < total_steps and (self.step < steps or self.samples < samples):
            return
        what = "" if self.has_gradient else ", and the gradient was exactly zero in every step: nothing is trained"
        why = (
            "check model.trainable and the weights"
            if self.images
            else "check image_dir and how the rows name their images; to train on texts alone, train lora"
        )
        seen = f"{self.images} images" if self.images else "not one image"
        raise TrainingError(f"step {self.step}: {self.samples} samples had {seen}{what}; {why}")

    def summary(self) -> str:
        """Return in one line what was trained on, and what was not or not as it was."""

        def causes(counts: Counter[str]) -> str:
            listed = ", ".join(f"{cause}: {count}" for cause, count in counts.most_common())
            return f"{sum(counts.values())} ({listed})" if listed else "none"

        return (
            f"up to step {self.step}: {self.samples} samples with {self.images} images trained on; samples skipped: "
            f"{causes(self.skipped)}; samples altered: {causes(self.altered)}; steps skipped: {self.nonfinite_steps}"
        )

    def check_skips(self, limit: float) -> None:
        """Raise TrainingError when more than the fraction `limit` of the samples read was skipped."""
        skipped = sum(self.skipped.values())
        read = self.samples + skipped
        if read >= CHECK_SKIPS_FROM and skipped > limit * read:
            causes = ", ".join(f"{cause}: {count}" for cause, count in self.skipped.most_common())
            raise TrainingError(
                f"{skipped} of {read} samples had to be skipped ({causes}), more than run.max_skipped_fraction "
                f"{limit}; the log has the first of each cause"
            )


@dataclass
class Interval:
    """Sums since the last line of metrics; saved, so that a resumed run writes the same lines.

    Attributes:
        loss: summed loss of the steps whose loss was finite.
        tokens: their supervised tokens.
        norm: gradient norm of the last step, before clipping.
        rate: learning rate of the last step.
        nonfinite_in_a_row: steps skipped since the last good one.
    """

    loss: float = 0.0
    tokens: float = 0.0
    norm: float = 0.0
    rate: float = 0.0
    nonfinite_in_a_row: int = 0

    @property
    def mean_loss(self) -> float:
        """Nats per supervised token; NaN if no step had a finite loss."""
        return self.loss / self.tokens if self.tokens else math.nan

    def add(self, loss: float, tokens: float, norm: float, rate: float) -> None:
        """Add a step; a loss that is not finite does not count."""
        if math.isfinite(loss):
            self.loss += loss
            self.tokens += tokens
        self.norm, self.rate = norm, rate


@dataclass
class Speed:
    """Work since the last line of metrics and the time it took; not saved, since it is the work of one process.

    Attributes:
        device: of this rank.
        ranks: number of ranks.
        samples: training samples, over all ranks.
        positions: positions in the rows, over all ranks: text, image positions and padding.
        waited: seconds in which this rank read batches.
        started: when the interval began, in seconds of the monotonic clock.
        flops_per_position: floating-point operations, measured in the first batch; 0 where the peak is not known.
    """

    device: torch.device
    ranks: int = 1
    samples: int = 0
    positions: int = 0
    waited: float = 0.0
    started: float = field(default_factory=time.monotonic)
    flops_per_position: float = 0.0

    def restart(self) -> None:
        """Begin a new interval."""
        self.samples = self.positions = 0
        self.waited, self.started = 0.0, time.monotonic()

    @contextmanager
    def measure(self, batch: Batch) -> Iterator[None]:
        """Count the operations of the block, which computes `batch`, unless that is done or of no use."""
        if self.flops_per_position or peak_flops(self.device) is None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops_per_position = counter.get_total_flops() / batch.input_ids.numel()

    def metrics(self) -> dict[str, float | None]:
        """Return the values that a line of metrics has about speed and memory."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        peak, flops = peak_flops(self.device), self.flops_per_position * self.positions / seconds
        values = {
            "seconds": seconds,
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": self.positions / seconds,
            "data_wait": min(self.waited / seconds, 1.0),
            "mfu": flops / (peak * self.ranks) if peak and flops else None,
            "peak_memory_gb": peak_memory_gb(self.device),
            "rss_gb": resident_memory_gb(),
        }
        return {name: None if value is None else round(value, 3) for name, value in values.items()}


@dataclass
class TrainingState:
    """All that changes during a run, on this rank.

    Attributes:
        speed: see `Speed`.
        progress: counters over all ranks.
        interval: sums since the last line of metrics.
        positions: items that each reader of this rank has consumed.
        given: batches of its current group that each reader of this rank has given.
        skipped: samples that this rank skipped since the ranks last added them up in `progress`.
        altered: samples that this rank used but cut or changed since then.
        stop: the signal that asks the run to stop.
        attention: the attention kernel of each part for which the run chose one; saved.
    """

    speed: Speed
    progress: Progress = field(default_factory=Progress)
    interval: Interval = field(default_factory=Interval)
    positions: dict[int, int] = field(default_factory=dict)
    given: dict[int, int] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    altered: Counter[str] = field(default_factory=Counter)
    stop: StopRequest = field(default_factory=StopRequest)
    attention: dict[str, str] = field(default_factory=dict)

    def count(self, batches: Sequence[Batch], samples: int) -> None:
        """Count the batches of a step; `samples` is their number over all ranks."""
        self.progress.samples += samples
        self.speed.samples += samples
        self.progress.batches += len(batches)
        for batch in batches:
            self.skipped.update(batch.skipped)
            self.altered.update(batch.altered)
            self.positions[batch.reader] = batch.position
            self.given[batch.reader] = batch.given
