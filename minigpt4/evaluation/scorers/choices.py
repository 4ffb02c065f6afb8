"""Multiple choice by likelihood: which choice has the smallest loss per token, and by the published rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minigpt4.evaluation.scorers.answers import Row, normalise
from minigpt4.evaluation.statistics import Statistic, mean


def best_choice(losses: Sequence[float], lengths: Sequence[int]) -> int:
    """Return the choice with the smallest loss divided by its length; the first of equal ones."""
    return int(np.argmin(np.asarray(losses) / np.asarray(lengths)))


def choices(rows: Sequence[Row]) -> list[Statistic]:
    """Accuracy of the most likely choice.

    `accuracy` divides the loss of a choice by the number of its tokens, the end mark included. `published rule` divides
    it by the length of the whole row, as the published code does when it averages over all positions (`multi_select`),
    so that it hardly depends on the length of a choice.
    """
    found = {"accuracy": "tokens", "published rule": "positions"}
    return [
        mean(name, [_is_right(row, best_choice(row["losses"], row[lengths])) for row in rows], "%")
        for name, lengths in found.items()
    ]


def _is_right(row: Row, chosen: int) -> bool:
    return normalise(row["truth"]["choices"][chosen]) == normalise(row["truth"]["answer"])
