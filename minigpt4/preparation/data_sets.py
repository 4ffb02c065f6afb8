"""The data sets that a config or a path names, each as a stream of its rows.

Input: a config, or a folder, table or shard. Output: named sets whose items are what training reads: examples, and the
errors of rows that training skips. A file of rows is streamed, whatever its size.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import isfile  # a third of the time of Path.is_file, and a file may have millions of rows
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.config import Config
from minigpt4.config.parts import AlignedPairsConfig, ConversationsConfig, TextProcessorConfig, WebPairsConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.datasets.aligned_pairs import ANNOTATIONS, AlignedPairs
from minigpt4.datasets.conversations import Conversations, RowSurvey
from minigpt4.datasets.rows import LINES, place_of
from minigpt4.datasets.shard_index import differences
from minigpt4.datasets.source import Example, Source, is_file
from minigpt4.datasets.web_pairs import WebPairs
from minigpt4.errors import DataError
from minigpt4.preparation.pairs import FolderPairs, Keys, Pair, TablePairs, pairs_of
from minigpt4.preparation.tables import ENDINGS
from minigpt4.registry import Component
from minigpt4.strict_json import find_surrogate

SEED = 0
_PLAIN_KEYS = frozenset(("image", "caption", "id"))


class PlainRow(NamedTuple):
    """A row with one image and a caption that is certain to be used: the short form of its example."""

    number: int
    image: str
    caption: str


Entry = PlainRow | Example | DataError


@dataclass
class DataSet:
    """One data set, and what is known of it before its rows are read.

    Attributes:
        name: its key in the config, or the name of the path.
        kind: its `type`, or what the path is.
        place: where it is.
        source: what training reads, or pairs that have to be packed first.
        note: what the user should know of it.
    """

    name: str
    kind: str
    place: str
    source: Source | TablePairs | FolderPairs
    note: str = ""

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """Yield every row with its number: that of its line in a file of lines, else counted from 1.

        Raises:
            DataError: the set cannot be read any further, or training would not start with it.
        """
        if isinstance(self.source, Conversations):
            yield from _conversation_entries(self.source)
        elif isinstance(self.source, Source):
            yield from enumerate(self.source.in_order(), start=1)
        else:
            for number, item in enumerate(self.source.items(), start=1):
                yield number, _example(item) if isinstance(item, Pair) else item

    def faults(self) -> list[DataError]:
        """Return what is wrong with the files as a whole: shards that are not as their index says."""
        shards = self.source.shards if isinstance(self.source, WebPairs) else []
        return [DataError(line, cause="index") for line in differences(shards, whole=True)]

    def example(self, row: PlainRow) -> Example:
        """Return the example of a plain row."""
        if not isinstance(self.source, Conversations):
            raise TypeError("only files of rows have plain rows")
        rng = random.Random(f"{SEED}/{row.number}")
        dialogue = self.source.captioned(row.caption, str(row.number), rng.choice(self.source.prompts))
        return Example(self.place_of(row), (self.source.images / row.image,), dialogue)

    def place_of(self, row: PlainRow) -> str:
        """Return where a plain row stands: the id of its sample in training."""
        return place_of(Path(self.place).name, row.number)


def sets_of_config(config: Config) -> Iterator[DataSet | tuple[str, str, DataError]]:
    """Yield the data sets of a config; one that cannot be built is its name, its kind and what is wrong.

    Raises:
        DataError: there is none.
    """
    parts: dict[str, Component] = dict(config.datasets.train)
    parts |= {f"{name} (validation)": part for name, part in config.datasets.validation.items()}
    if not parts:
        raise DataError("the config has no data set: name at least one under datasets.train", cause="missing")
    for name, part in parts.items():
        try:
            if part.type == "conversations":
                source: Source = Conversations(part.config, name, hold_rows=False)
            else:
                source = part.build(name=name)
            yield DataSet(name, part.type, _place(part.config), source)
        except DataError as error:
            yield name, part.type, error


def set_of_path(path: Path, image_dir: Path | None = None) -> DataSet:
    """Return the data set at a path.

    Args:
        path: rows for `type: conversations` (`.json`, `.jsonl`), a folder of `type: aligned_pairs`, shards (`.tar`, or
            a folder of them), or what `data pack` takes: another table, or a folder of images and captions.
        image_dir: the folder that image paths of rows are relative to; by default the folder of the file.

    Raises:
        DataError: there is nothing at the path, or nothing of these.
    """
    name = path.name or str(path)
    suffix = path.suffix.lower()
    source: Source | TablePairs | FolderPairs
    if path.is_dir() and is_file(path / ANNOTATIONS):
        source = AlignedPairs.from_config(AlignedPairsConfig(path=str(path)), name=name)
        return DataSet(name, "aligned_pairs", str(path), source)
    shards = sorted(str(file) for file in path.glob("*.tar")) if path.is_dir() else []
    if shards or suffix == ".tar":
        source = WebPairs.from_config(WebPairsConfig(urls=shards or [str(path)]), name=name)
        return DataSet(name, "web_pairs", str(path), source)
    if is_file(path) and suffix in (".json", *LINES):
        settings = ConversationsConfig(path=str(path), image_dir=str(image_dir or ""), images="optional")
        return DataSet(name, "conversations", str(path), Conversations(settings, name, hold_rows=False))
    if path.is_dir() or (is_file(path) and suffix in ENDINGS):
        note = "Training does not read this as it is: write shards with data pack first."
        return DataSet(name, "pairs", str(path), pairs_of(path, Keys(), image_dir), note)
    if not path.exists():
        raise DataError(f"{path}: neither a config nor a file or folder of data was found", cause="missing")
    raise DataError(
        f"{path}: not data that is known: expected a folder, shards (.tar) or a table ({', '.join(ENDINGS)})",
        cause="row",
    )


def _conversation_entries(source: Conversations) -> Iterator[tuple[int, Entry]]:
    """Yield the rows of a file; those of the plain form without building anything."""
    survey = RowSurvey()
    text = source.config.text.config
    is_plain_text = type(text) is TextProcessorConfig and not text.max_words
    folder = f"{source.images}/"
    rng = random.Random(SEED)
    num_plain = 0
    for row in source.rows():
        value = row.value
        if type(value) is dict and is_plain_text and value.keys() <= _PLAIN_KEYS:
            image, caption = value.get("image"), value.get("caption")
            if (
                type(image) is str
                and type(caption) is str
                and image
                and not caption.isspace()
                and caption
                and (caption.isascii() or find_surrogate(caption) is None)
                and len(caption) < 100_000
                and isfile(image if image[0] == "/" else folder + image)  # noqa: PTH113
            ):
                num_plain += 1
                yield row.number, PlainRow(row.number, image, caption)
                continue
        survey.add(value)
        yield row.number, source.item(row, rng)
    survey.num_rows += num_plain
    survey.num_with_image += num_plain
    survey.check(source)
    source.unread = survey.unread_keys(source.annotations)


def _example(pair: Pair) -> Example:
    return Example(pair.place, (pair.image,), Dialogue((Turn("", pair.caption),)))


def _place(config: Any) -> str:
    urls = getattr(config, "urls", None)
    return ", ".join(urls) if urls else str(getattr(config, "path", ""))
