"""Short answers: exact match, and yes or no."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minigpt4.evaluation.statistics import Array, Statistic, mean, ratio, share

Row = Mapping[str, Any]
"""One answer: `answer`, `truth`, `image`, and what else the answer file holds."""
_NO = {"No", "not", "no"}


def normalise(text: str) -> str:
    """Return an answer for comparison: lower case, no final full stop, single spaces."""
    return re.sub(r"\s+", " ", text).strip().rstrip(". ").lower()


def exact(rows: Sequence[Row]) -> list[Statistic]:
    """Accuracy: the answer equals `truth.answer`, after `normalise`."""
    return [mean("accuracy", [normalise(row["answer"]) == normalise(row["truth"]["answer"]) for row in rows], "%")]


def says_yes(answer: str) -> bool:
    """Return whether POPE's rule reads an answer as yes: no `No`, `not` or `no` among the words of its first sentence.

    The first sentence ends at the first full stop, and commas are removed. So an empty answer is a yes.
    """
    return not _NO & set(answer.split(".")[0].replace(",", "").split(" "))


def yes_no(rows: Sequence[Row]) -> list[Statistic]:
    """POPE: accuracy, precision, recall and F1 of `yes`, and the share of answers that are yes."""
    said = np.array([says_yes(row["answer"]) for row in rows], dtype=float)
    true = np.array([normalise(row["truth"]["answer"]) == "yes" for row in rows], dtype=float)
    hits = said * true
    one = np.ones_like(said)
    return [
        mean("accuracy", said == true, "%"),
        share("precision", hits, said),
        share("recall", hits, true),
        Statistic("F1", np.stack([hits, said, true], axis=1), _f1, "%"),
        share("yes", said, one),
    ]


def _f1(sums: Array) -> Array:
    """Return 2 PR / (P + R) = 2 hits / (said + true)."""
    return ratio(np.stack([2 * sums[..., 0], sums[..., 1] + sums[..., 2]], axis=-1))
