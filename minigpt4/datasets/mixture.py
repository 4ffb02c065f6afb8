"""Several sources as one stream, drawn by weight.

Input: built sources. Output: one endless stream of examples for the loader. Which source a position takes is
a pure function of (seed, reader, readers, position).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from minigpt4.datasets.source import Item, Source
from minigpt4.errors import DataError


class Mixture:
    """Sources and their shares (Original: a whole batch came from one source; here each sample is drawn)."""

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float] | None = None) -> None:
        """Mix `sources` by `weights`, by default those of their configs.

        Raises:
            DataError: there is no source, or a source has no positive weight.
        """
        if not sources:
            raise DataError("no data set to read: name at least one under datasets.train", cause="missing")
        self.sources = dict(sources)
        self.weights = {name: (weights or {}).get(name, source.weight) for name, source in self.sources.items()}
        for name, weight in self.weights.items():
            if not weight > 0:
                raise DataError(f"{name}: weight must be positive, found {weight}")

    def stream(self, seed: int, reader: int, readers: int, start: int = 0) -> Iterator[Item]:
        """Return what one of `readers` readers sees from its position `start` on, without end.

        Only the draws before `start` are repeated, not the reading.
        """
        draws = self._draws(seed, reader, readers)
        consumed = dict.fromkeys(self.sources, 0)
        for _ in range(start):
            consumed[next(draws)] += 1
        streams = {name: source.stream(seed, reader, readers, consumed[name]) for name, source in self.sources.items()}
        for name in draws:
            yield next(streams[name])

    def _draws(self, seed: int, reader: int, readers: int) -> Iterator[str]:
        generator = random.Random(f"{seed}/mixture/{reader}/{readers}")
        names, weights = list(self.weights), list(self.weights.values())
        while True:
            yield generator.choices(names, weights)[0]
