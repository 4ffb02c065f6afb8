"""Several sources as one stream, drawn by weight.

Input: built sources. Output: one endless stream of examples for the loader. The source of a position is a function of
(seed, reader, readers, position).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from minigpt4.datasets.source import Item, Source
from minigpt4.errors import DataError


class Mixture:
    """Sources mixed by their `weight`, sample by sample (Original: each batch comes from one source)."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        """Mix `sources`.

        Raises:
            DataError: there is no source.
        """
        if not sources:
            raise DataError("no data set to read: name at least one under datasets.train", cause="missing")
        self.sources = dict(sources)

    def stream(self, seed: int, reader: int, readers: int, start: int = 0) -> Iterator[Item]:
        """Return the endless stream of reader number `reader` of `readers`, from its position `start` on.

        Only the draws before `start` are repeated; nothing before it is read.
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
        names, weights = list(self.sources), [source.weight for source in self.sources.values()]
        while True:
            yield generator.choices(names, weights)[0]
