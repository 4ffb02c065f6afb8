"""What every source of samples has in common: its config, its example, and the laws of its stream.

Input: a source's config. Output: an endless stream of `Example`s for the mixture. The order is a pure
function of (seed, source name, reader, readers, position), so a run that starts at a position sees what an
unbroken one would have seen. What cannot be read is yielded as the error it is: the position always advances
and nothing is lost in silence.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4.assets import resolve
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.errors import DataError
from minigpt4.registry import PROCESSORS, Component, component


def _plain_text() -> Component:
    return Component(PROCESSORS, "text", PROCESSORS.get("text").Config())


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What every data set can be told."""

    weight: float = 1.0
    """Share in the mixture, relative to the other data sets' weights."""
    text: Component = field(default_factory=_plain_text, metadata=component(PROCESSORS, default="text").metadata)
    """The text processor of this data set's captions and answers."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight must be a positive number, found {self.weight}")


@dataclass(frozen=True)
class Example:
    """One sample before it is decoded and encoded.

    Attributes:
        id: where it comes from, for messages: `captions.jsonl:17`, `00012.tar/000120034`.
        images: files or their bytes, not decoded yet.
        dialogue: what is said about them.
    """

    id: str
    images: tuple[bytes | Path, ...]
    dialogue: Dialogue


Item = Example | DataError
"""What streams yield: an example, or why there is none at this position."""


class Source(ABC):
    """A data set as endless streams for training, and as one pass in a fixed order for validation."""

    def __init__(self, config: SourceConfig, name: str) -> None:
        self.name = name
        self.weight = config.weight
        self.process_text = config.text.build()

    @classmethod
    def from_config(cls, config: Any, *, name: str) -> Source:
        """Build the source; `name` is its key in the config, used in messages and seeds."""
        return cls(config, name)

    @abstractmethod
    def stream(self, seed: int, reader: int, readers: int, start: int = 0) -> Iterator[Item]:
        """Return what one of `readers` readers sees, from its position `start` on, without end.

        Equal to dropping the first `start` items of the stream that starts at 0.

        Raises:
            DataError: not one sample of a whole epoch can be read.
        """

    @abstractmethod
    def in_order(self) -> Iterator[Item]:
        """Return one pass over the source, the same each time."""

    def digest(self) -> str:
        """Return a hash of what the source holds, images left out; empty where it cannot tell."""
        return ""

    def captioned(self, text: str, place: str, prompt: str = "") -> Dialogue:
        """Return the dialogue of a caption, cleaned by this source's text processor.

        Raises:
            DataError: nothing is left of the caption.
        """
        caption = self.process_text(text)
        if not caption:
            raise DataError(f"{place}: the caption is empty; write one or leave the sample out", cause="caption")
        return Dialogue((Turn(prompt, caption),))


class IndexedSource(Source):
    """A source whose examples have numbers: epoch after epoch, each a permutation shared out among the
    readers."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def example(self, index: int, draw: random.Random) -> Example:
        """Return example `index`; whatever is drawn for it (an instruction, an order) is drawn from `draw`.

        Raises:
            DataError: this example cannot be used.
        """

    def stream(self, seed: int, reader: int, readers: int, start: int = 0) -> Iterator[Item]:
        """See `Source.stream`; reader r takes every `readers`-th item of the endless sequence of epochs."""
        current, order = -1, torch.empty(0)
        failed = 0
        for position in _count(start):
            epoch, place = divmod(position * readers + reader, len(self))
            if epoch != current:
                current, order = epoch, permutation(len(self), seed, self.name, epoch)
            item = self._read(int(order[place]), f"{seed}/{self.name}/{epoch}")
            failed = failed + 1 if isinstance(item, DataError) else 0
            yield item
            if failed >= len(self):
                raise DataError(
                    f"{self.name}: none of the last {failed} samples could be read, as many as there are; "
                    f"the last one: {item}"
                )

    def in_order(self) -> Iterator[Item]:
        """See `Source.in_order`."""
        for index in range(len(self)):
            yield self._read(index, f"{self.name}/in order")

    def _read(self, index: int, seed: str) -> Item:
        try:
            return self.example(index, random.Random(f"{seed}/{index}"))
        except DataError as error:
            return error


def data_hash(sources: Mapping[str, Source]) -> str:
    """Return a short identity of training data: names, weights and digests of its sources."""
    told = [(name, source.weight, source.digest()) for name, source in sorted(sources.items())]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file of annotations."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def permutation(length: int, *seed: object) -> Tensor:
    """Return a (length,) int64 permutation that is a pure function of `seed`."""
    digest = hashlib.sha256("/".join(map(str, seed)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(length, generator=generator)


def _count(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1


def require_folder(path: str, name: str) -> Path:
    """Return `path` (or the asset `asset:NAME`), which must be a folder.

    Raises:
        DataError: it is not there.
    """
    folder = resolve(path)
    if not folder.is_dir():
        raise DataError(f"{name}: there is no folder {path!r}; set the path of this data set", cause="missing")
    return folder


def examples_of(names: list[str]) -> str:
    """Return the first few names for a message, and how many more there are."""
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
