"""The parent classes of all data sets, and what their readers share.

Input: the settings of a data set. Output: an endless stream of `Example`s for the mixture. The order is a function of
(seed, source name, reader, readers, position), so a run that starts at a position sees what an uninterrupted run would
have seen. A sample that cannot be read is yielded as its error: the position always advances, and every skipped sample
is counted.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from minigpt4 import strict_json
from minigpt4.assets import resolve
from minigpt4.config.parts import SourceConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.errors import DataError, FeatureCacheError

WORDS_CUT = "text cut to max_words"


@dataclass(frozen=True)
class Example:
    """One sample before it is decoded and encoded.

    Attributes:
        id: where it comes from, for messages: `captions.jsonl:17`, `00012.tar/000120034`.
        images: paths or contents of image files.
        dialogue: the text about the images.
        altered: what reading it changed, by kind, with how often.
    """

    id: str
    images: tuple[bytes | Path, ...]
    dialogue: Dialogue
    altered: Mapping[str, int] = field(default_factory=dict)


Item = Example | DataError
"""One item of a stream: an example, or the error of the sample at this position."""


class Source(ABC):
    """A data set: endless streams for training, one pass in a fixed order for validation."""

    def __init__(self, config: SourceConfig, name: str) -> None:
        self.name = name
        self.weight = config.weight
        self.process_text = config.text.build()

    @classmethod
    def from_config(cls, config: Any, *, name: str) -> Self:
        """Build the source; `name` is its key in the config, used in messages and seeds."""
        return cls(config, name)

    @abstractmethod
    def stream(self, seed: int, reader: int, readers: int, start: int = 0) -> Iterator[Item]:
        """Return the endless stream of reader number `reader` of `readers`, from its position `start` on.

        Equal to the stream from 0 without its first `start` items.

        Raises:
            DataError: no sample of a whole epoch can be read.
        """

    @abstractmethod
    def in_order(self) -> Iterator[Item]:
        """Return one pass over the source, the same each time."""

    def digest(self) -> str:
        """Return a hash of the data without its images; empty if unknown."""
        return ""

    def expected_images(self) -> int | None:
        """Return about how many images the source has, for an estimate of time and disk space; None if unknown."""
        return None

    def captioned(self, text: str, place: str, prompt: str = "") -> Dialogue:
        """Return the dialogue of a caption, cleaned by this source's text processor.

        Raises:
            DataError: the cleaned caption is empty.
        """
        caption = self.process_text(text)
        if not caption:
            raise DataError(f"{place}: the caption is empty; write one or leave the sample out", cause="caption")
        return Dialogue((Turn(prompt, caption),))

    def guarded(self, read: Callable[[], Example], place: str) -> Item:
        """Return the example that `read` makes, or what is wrong with it: one sample never ends a stream."""
        before = getattr(self.process_text, "num_cut", 0)
        try:
            example = read()
        except Exception as error:
            return sample_error(error, f"{self.name}: {place}")
        num_cut = getattr(self.process_text, "num_cut", 0) - before
        return replace(example, altered={**example.altered, WORDS_CUT: num_cut}) if num_cut else example


class IndexedSource(Source):
    """A source of numbered examples: each epoch is a permutation of them, shared by the readers.

    Attributes:
        annotations: the file with the text of all examples, for `digest`.
    """

    annotations: Path | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def example(self, index: int, rng: random.Random) -> Example:
        """Return example `index`; random choices (an instruction, an order) use `rng`.

        Raises:
            DataError: this example cannot be used.
        """

    def place(self, index: int) -> str:
        """Return where example `index` stands, for messages."""
        return f"item {index + 1}"

    def expected_images(self) -> int | None:
        """See `Source.expected_images`: one for each example."""
        return len(self)

    def digest(self) -> str:
        """See `Source.digest`: the SHA-256 of the annotations."""
        if self.annotations is None:
            return ""
        with self.annotations.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    def stream(self, seed: int, reader: int, readers: int, start: int = 0) -> Iterator[Item]:
        """See `Source.stream`; each reader takes every `readers`-th item of the endless sequence of epochs."""
        current, order = -1, torch.empty(0)
        failed = 0
        for position in itertools.count(start):
            epoch, place = divmod(position * readers + reader, len(self))
            if epoch != current:
                current, order = epoch, permutation(len(self), seed, self.name, epoch)
            item = self._read(int(order[place]), f"{seed}/{self.name}/{epoch}")
            failed = failed + 1 if isinstance(item, DataError) else 0
            yield item
            if failed >= len(self):
                raise DataError(f"{self.name}: the last {failed} samples all failed; the last error: {item}")

    def in_order(self) -> Iterator[Item]:
        """See `Source.in_order`."""
        for index in range(len(self)):
            yield self._read(index, f"{self.name}/in order")

    def _read(self, index: int, seed: str) -> Item:
        return self.guarded(lambda: self.example(index, random.Random(f"{seed}/{index}")), self.place(index))


def sample_error(error: Exception, place: str) -> DataError:
    """Return the exception that one sample caused as the error it is skipped and counted with.

    Raises:
        MemoryError, FeatureCacheError: if this is the error: it says nothing about the sample.
    """
    if isinstance(error, DataError):
        return error
    if isinstance(error, (MemoryError, FeatureCacheError)):
        raise error
    cause = "text" if isinstance(error, UnicodeError) else type(error).__name__
    return DataError(f"{place}: cannot be used ({type(error).__name__}: {str(error)[:200]})", cause=cause)


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def data_hash(sources: Mapping[str, Source]) -> str:
    """Return a short hash of the training data: names, weights and digests of its sources."""
    identity = [(name, source.weight, source.digest()) for name, source in sorted(sources.items())]
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def permutation(length: int, *seed: object) -> Tensor:
    """Return a (length,) int64 permutation that depends on `seed` only."""
    digest = hashlib.sha256("/".join(map(str, seed)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(length, generator=generator)


def require(path: str | Path, kind: Literal["file", "folder"], name: str, key: str = "path") -> Path:
    """Return `path` (or the asset `asset:NAME`), the value of setting `key` of data set `name`.

    Raises:
        DataError: there is no file or folder, as `kind` says.
    """
    found = resolve(str(path))
    if not (found.is_file() if kind == "file" else found.is_dir()):
        raise DataError(f"{name}: {kind} {str(path)!r} not found; set {key} of this data set", cause="missing")
    return found


def read_json(file: Path) -> Any:
    """Return the content of a JSON file, or raise DataError."""
    try:
        return parse_json(file.read_bytes(), file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}", cause="row") from error


def parse_json(text: bytes, file: Path, first_line: int = 1) -> Any:
    """Return the value of a JSON text that begins in line `first_line` of `file`.

    Half a character (a lone surrogate) is found later, in the row that has it.

    Raises:
        DataError: it is not JSON; the message has file and line.
    """
    try:
        return strict_json.parse_json(text, check_text=False, allow_nan=True)
    except strict_json.JSONError as error:
        hint = "; a file with one row per line must be named .jsonl" if "Extra data" in error.problem else ""
        raise DataError(f"{file}:{first_line + error.line - 1}: {error.problem}{hint}", cause="row") from error


def shortened(names: list[str], separator: str = ", ") -> str:
    """Return the first three names for a message, and how many more there are."""
    return separator.join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
