"""How far a run is: counters that are saved, sums since the last line of metrics, and the block at its start."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from minigpt4.config.sections import RunSection
from minigpt4.errors import TrainingError
from minigpt4.models.freezing import count_parameters, precisions
from minigpt4.models.language_model import LanguageModel
from minigpt4.models.minigpt4 import MiniGPT4

_log = logging.getLogger(__name__)
CHECK_SKIPS_FROM = 200


@dataclass
class Progress:
    """Counters of a run, over all ranks; saved in every checkpoint.

    Attributes:
        step: optimiser steps done.
        batches: batches that each rank has consumed.
        samples: training samples seen.
        tokens: supervised tokens seen.
        skipped: samples left out, by cause.
        nonfinite_steps: steps left out because loss or gradient was not finite.
    """

    step: int = 0
    batches: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    nonfinite_steps: int = 0

    def state(self) -> dict[str, Any]:
        """Return plain values to save."""
        return {**asdict(self), "skipped": dict(self.skipped)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """Return the counters saved by `state`."""
        return cls(**{**state, "skipped": Counter(state["skipped"])})

    def check_skips(self, limit: float) -> None:
        """Raise TrainingError when more than the part `limit` of the samples read was skipped."""
        skipped = sum(self.skipped.values())
        read = self.samples + skipped
        if read >= CHECK_SKIPS_FROM and skipped > limit * read:
            causes = ", ".join(f"{cause}: {count}" for cause, count in self.skipped.most_common())
            raise TrainingError(
                f"{skipped} of {read} samples had to be skipped ({causes}), more than run.max_skipped_fraction "
                f"{limit}; the log has the first of each cause"
            )


@dataclass
class Window:
    """What happened since the last line of metrics; saved, so that a resumed run writes the very same lines.

    Attributes:
        loss: summed loss of the steps whose loss was finite.
        tokens: their supervised tokens.
        norm: gradient norm of the last step, before clipping.
        rate: learning rate of the last step.
        nonfinite_in_a_row: steps left out since the last good one.
        started: when the window was opened, on the monotonic clock in seconds.
    """

    loss: float = 0.0
    tokens: float = 0.0
    norm: float = 0.0
    rate: float = 0.0
    nonfinite_in_a_row: int = 0
    started: float = field(default_factory=time.monotonic)

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

    def state(self) -> dict[str, Any]:
        """Return plain values to save; the clock of another process means nothing."""
        return {name: value for name, value in asdict(self).items() if name != "started"}


def start_block(model: MiniGPT4, run: RunSection, world_size: int, accumulation: int, precision: str) -> str:
    """Return what a run says of itself at its start; `precision` is accelerate's name of the autocast, or `no`."""
    lines = [f"{'part':<16}{'trainable':>15}{'frozen':>17}  held in"]
    counts, held = count_parameters(model), precisions(model)
    for part, (trainable, frozen) in counts.items():
        lines.append(f"{part:<16}{trainable:>15,}{frozen:>17,}  {held[part]}")
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    lines.append(f"{'together':<16}{total[0]:>15,}{total[1]:>17,}")
    lines.append(
        f"global batch {run.global_batch_size} = {run.batch_size_per_rank} per rank x {world_size} rank(s) x "
        f"{accumulation} accumulated; {run.total_steps} steps; "
        f"{'no autocast' if precision == 'no' else f'autocast to {precision}'}; run folder {run.output_dir}"
    )
    return "\n".join(lines)


def accumulation_steps(run: RunSection, world_size: int) -> int:
    """Return how many batches per rank make one optimiser step.

    Raises:
        TrainingError: the global batch does not divide.
    """
    at_once = run.batch_size_per_rank * world_size
    if run.global_batch_size % at_once:
        raise TrainingError(
            f"run.global_batch_size {run.global_batch_size} is not a multiple of run.batch_size_per_rank "
            f"{run.batch_size_per_rank} x {world_size} rank(s); change one of the two"
        )
    return run.global_batch_size // at_once


def warn_of_guess(loss: float, llm: LanguageModel) -> None:
    """Say so if the mean loss of the first step, in nats, is that of a uniform guess over the vocabulary.

    The published code's best known trap: a loss that stays at 10.37, ln 32000, whatever it is trained on.
    """
    chance = math.log(llm.vocab_size)
    if abs(loss - chance) < 0.01 * chance:
        _log.warning(
            "the first loss %.4f is ln(vocabulary) %.4f, within 1 %%: such a language model is guessing: "
            "are the weights of %s right?",
            loss,
            chance,
            llm.source or "the language model",
        )
