"""Intervals and tests: bootstrap clustered by image, a paired test for two models, the smallest detectable difference.

Every score is a formula of sums over questions: accuracy of (right, asked), BLEU of n-gram counts, F1 of hits and
misses. So a resample of images is one matrix product, for all scores at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 2000
"""Bootstrap resamples of an interval, and random swaps of a paired test."""
DETECTABLE = 1.959964 + 0.841621
"""Standard errors that a difference must have to be found at the 5 % level, two-sided, with a probability of 80 %."""
_CELLS = 20_000_000
"""Most random numbers held at once."""


@dataclass(frozen=True)
class Statistic:
    """One score of some questions.

    Attributes:
        name: such as `accuracy`.
        columns: (N, K) what each question adds to the K sums.
        formula: from sums (..., K) to values (...).
        unit: `%` if values are fractions, shown times 100; empty otherwise.
        each: (N,) the score of each question alone where there is one, for the best and the worst; else None.
    """

    name: str
    columns: Array
    formula: Callable[[Array], Array]
    unit: str = ""
    each: Array | None = None

    def value(self) -> float:
        """Return the score of all questions."""
        return float(self.formula(self.columns.sum(axis=0)))

    def of(self, chosen: NDArray[np.bool_]) -> Statistic:
        """Return the same score of some of the questions; `chosen` is (N,)."""
        each = None if self.each is None else self.each[chosen]
        return Statistic(self.name, self.columns[chosen], self.formula, self.unit, each)


def ratio(sums: Array) -> Array:
    """Return the first of two sums divided by the second, NaN where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(sums[..., 1] == 0, np.nan, sums[..., 0] / sums[..., 1])
    return found


def mean(name: str, values: Sequence[float] | Array, unit: str = "") -> Statistic:
    """Return the mean of one number per question."""
    column = np.asarray(values, dtype=np.float64)
    return Statistic(name, np.stack([column, np.ones_like(column)], axis=1), ratio, unit, column)


def share(name: str, part: Sequence[float] | Array, whole: Sequence[float] | Array, unit: str = "%") -> Statistic:
    """Return the sum of `part` divided by the sum of `whole`, such as right answers by answers."""
    return Statistic(name, np.stack([np.asarray(part, float), np.asarray(whole, float)], axis=1), ratio, unit)


def clusters(images: Sequence[str]) -> NDArray[np.int64]:
    """Return (N,) the number of each question's image, counted in order of first use."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(image, len(numbers)) for image in images], dtype=np.int64)


def _by_cluster(columns: Array, cluster: NDArray[np.int64]) -> Array:
    """Return (C, K) the sums of `columns` (N, K) in each cluster."""
    total = int(cluster.max()) + 1 if len(cluster) else 0
    return np.stack([np.bincount(cluster, column, total) for column in columns.T], axis=1)


def _resampled(sums: Array, seed: int) -> Array:
    """Return (RESAMPLES, K) sums over as many clusters as there are, drawn with replacement."""
    number = len(sums)
    generator = np.random.default_rng(seed)
    found = np.empty((RESAMPLES, sums.shape[1]))
    step = max(1, _CELLS // max(number, 1))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = generator.integers(0, number, (size, number), dtype=np.int32)
        counts = np.stack([np.bincount(row, minlength=number) for row in drawn])
        found[start : start + size] = counts @ sums
    return found


def intervals(statistics: Sequence[Statistic], cluster: NDArray[np.int64], seed: int = 0) -> list[tuple[float, float]]:
    """Return the 95 % percentile interval of each statistic, over resamples of whole clusters (images).

    A resample in which a score is undefined is left out; with fewer than two clusters, both limits are NaN.
    """
    if len(np.unique(cluster)) < 2:
        return [(float("nan"), float("nan"))] * len(statistics)
    found = []
    for statistic, drawn in _drawn(statistics, cluster, seed):
        values = statistic.formula(drawn)
        values = values[np.isfinite(values)]
        low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (np.nan, np.nan)
        if statistic.unit == "%" and low == high and low in (0.0, 1.0):
            low, high = _wilson(float(low), len(np.unique(cluster)))
        found.append((float(low), float(high)))
    return found


def _wilson(rate: float, number: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a rate among `number` images.

    Where all answers are right, or all wrong, resampling cannot show that the next one may differ.
    """
    z = 1.959964
    centre = (rate + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * np.sqrt(rate * (1 - rate) / number + z * z / (4 * number * number))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def _drawn(statistics: Sequence[Statistic], cluster: NDArray[np.int64], seed: int) -> Sequence[tuple[Statistic, Array]]:
    """Return each statistic with its resampled sums (RESAMPLES, K): the same images for all."""
    every = np.concatenate([statistic.columns for statistic in statistics], axis=1)
    drawn = _resampled(_by_cluster(every, cluster), seed)
    ends = np.cumsum([statistic.columns.shape[1] for statistic in statistics])
    return [
        (statistic, drawn[:, end - statistic.columns.shape[1] : end])
        for statistic, end in zip(statistics, ends, strict=True)
    ]


@dataclass(frozen=True)
class Difference:
    """A score of two models on the same questions.

    Attributes:
        name: of the score.
        unit: see `Statistic.unit`.
        first: of model A.
        second: of model B.
        low: lower limit of the 95 % interval of B - A.
        high: upper limit.
        p_value: probability of such a difference or a larger one if the models were the same: the answers of A and B
            are swapped at random, image by image.
        detectable: the difference that a test of this size finds in 80 % of all cases; NaN where no answer differs.
        questions: number of questions that both answered.
        num_images: number of their images.
    """

    name: str
    unit: str
    first: float
    second: float
    low: float
    high: float
    p_value: float
    detectable: float
    questions: int
    num_images: int


def compare(first: Statistic, second: Statistic, cluster: NDArray[np.int64], seed: int = 0) -> Difference:
    """Compare a score of two models.

    Args:
        first: of model A, one row per question.
        second: of model B, the same questions in the same order.
        cluster: (N,) the image of each question; see `clusters`.
        seed: of the resamples and swaps.
    """
    a, b = _by_cluster(first.columns, cluster), _by_cluster(second.columns, cluster)
    width, number = a.shape[1], len(a)
    drawn = _resampled(np.concatenate([a, b], axis=1), seed)
    differences = second.formula(drawn[:, width:]) - first.formula(drawn[:, :width])
    differences = differences[np.isfinite(differences)]
    observed = float(second.formula(b.sum(axis=0)) - first.formula(a.sum(axis=0)))
    generator = np.random.default_rng([seed, 1])
    swapped: list[Array] = []
    step = max(1, _CELLS // max(number, 1))
    for start in range(0, RESAMPLES, step):
        swaps = generator.integers(0, 2, (min(step, RESAMPLES - start), number)).astype(np.float64)
        moved = swaps @ (b - a)
        swapped.append(second.formula(b.sum(axis=0) - moved) - first.formula(a.sum(axis=0) + moved))
    chance = np.concatenate(swapped)
    as_large = int((np.abs(chance) >= abs(observed) - 1e-12).sum())
    few = len(differences) < 2
    low, high = (np.nan, np.nan) if few else np.percentile(differences, [2.5, 97.5])
    return Difference(
        name=first.name,
        unit=first.unit,
        first=first.value(),
        second=second.value(),
        low=float(low),
        high=float(high),
        p_value=(as_large + 1) / (RESAMPLES + 1),
        detectable=float("nan") if few or not differences.any() else float(DETECTABLE * differences.std(ddof=1)),
        questions=len(cluster),
        num_images=number,
    )
