"""WebDataset shards of images and captions, as img2dataset writes them: stage 1's data.

Input: tar files on a local or mounted disk, read by the webdataset library. Output: examples of one image and
its caption. The library would swallow what it cannot read; here every fault becomes an item of the stream,
counted by cause.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset as wds
from braceexpand import braceexpand

from minigpt4.datasets.source import Example, Item, Source, SourceConfig, examples_of
from minigpt4.errors import DataError
from minigpt4.registry import path_field

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
RawSample = dict[str, Any]
"""A sample as webdataset groups it: one entry per file ending, besides `__key__` and `__url__`."""


class WebPairs(Source):
    """Image-text shards, permuted each epoch, shared out among readers, shuffled through a buffer."""

    @dataclass(frozen=True, kw_only=True)
    class Config(SourceConfig):
        """Which shards, and what of them."""

        urls: list[str] = path_field()
        """Paths of tar files; `{00000..00010}` and `*` are expanded."""
        caption_key: str = "caption"
        """The key of a sample's json file that holds the caption; without one, its txt file is the
        caption."""
        shuffle_buffer: int = 1000
        """Samples held for shuffling, per reader and not yet decoded; 0 keeps the order of the shards."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.shuffle_buffer < 0:
                raise ValueError(f"shuffle_buffer must be 0 or more, found {self.shuffle_buffer}")

    def __init__(self, config: Config, name: str) -> None:
        super().__init__(config, name)
        self.config = config
        self.shards = find_shards(config.urls, name)

    def digest(self) -> str:
        """See `Source.digest`: names and sizes of the shards, which may be terabytes."""
        sizes = [(Path(shard).name, Path(shard).stat().st_size) for shard in self.shards]
        return hashlib.sha256(repr(sizes).encode()).hexdigest()

    def stream(self, seed: int, reader: int, readers: int, start: int = 0) -> Iterator[Item]:
        """See `Source.stream`; items before `start` are read past, neither parsed nor decoded."""
        # Where shards are shared out, an epoch of this reader is one pass over its own; where their samples
        # are, a reader may find nothing in a small epoch, but never in as many epochs as there are readers.
        patience = readers if len(self.shards) < readers else 1
        barren = 0
        faults: Counter[str] = Counter()
        for epoch in itertools.count():
            useful = False
            for raw in self._epoch(seed, reader, readers, epoch):
                if start > 0:
                    start -= 1
                    useful = True
                    continue
                item = self._item(raw)
                if isinstance(item, DataError):
                    faults[item.cause] += 1
                useful = useful or isinstance(item, Example)
                yield item
            barren = 0 if useful else barren + 1
            if barren >= patience:
                found = ", ".join(f"{cause}: {count}" for cause, count in faults.most_common()) or "no sample at all"
                raise DataError(
                    f"{self.name}: a whole epoch of reader {reader} of {readers} has not one usable sample "
                    f"({found}); look at {self.shards[0]}"
                )

    def in_order(self) -> Iterator[Item]:
        """See `Source.in_order`."""
        for shard in self.shards:
            yield from map(self._item, _read_shard(shard))

    def _epoch(self, seed: int, reader: int, readers: int, epoch: int) -> Iterator[RawSample | DataError]:
        """Yield what one reader reads in one epoch, in its final order."""
        shards = list(self.shards)
        random.Random(f"{seed}/{self.name}/{epoch}").shuffle(shards)
        if len(shards) >= readers:
            own: Iterator[RawSample | DataError] = itertools.chain.from_iterable(
                map(_read_shard, shards[reader::readers])
            )
        else:  # too few to share out: every reader reads all and takes its part of the samples
            every = itertools.chain.from_iterable(map(_read_shard, shards))
            own = itertools.islice(every, (reader + epoch) % readers, None, readers)
        generator = random.Random(f"{seed}/{self.name}/{epoch}/{reader}/{readers}")
        return _shuffled(own, self.config.shuffle_buffer, generator)

    def _item(self, raw: RawSample | DataError) -> Item:
        if isinstance(raw, DataError):
            return raw
        place = f"{Path(raw['__url__']).name}/{raw['__key__']}"
        try:
            image = next((raw[key] for key in IMAGE_KEYS if key in raw), None)
            caption = self._caption(raw, f"{self.name}: {place}")
            if image is None:
                raise DataError(
                    f"{self.name}: {place}: no image, only {_files(raw)}; expected one of {', '.join(IMAGE_KEYS)}",
                    cause="missing image",
                )
            return Example(place, (image,), self.captioned(caption, f"{self.name}: {place}"))
        except DataError as error:
            return error

    def _caption(self, raw: RawSample, place: str) -> str:
        """Return the caption of a sample: the json file's if it has one, else the txt file."""
        try:
            fields = json.loads(raw["json"]) if "json" in raw else {}
            caption = fields.get(self.config.caption_key) if isinstance(fields, dict) else None
            if not caption and "txt" in raw:
                caption = raw["txt"].decode("utf-8")
        except ValueError as error:
            raise DataError(f"{place}: the caption cannot be read: {error}", cause="caption") from error
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(
                f"{place}: no text under {self.config.caption_key!r} of its json file, nor in a txt "
                f"file; the sample has {_files(raw)}",
                cause="caption",
            )
        return caption


def find_shards(urls: list[str], name: str) -> list[str]:
    """Return the shard files that `urls` mean, braces and globs expanded, each checked to exist.

    Raises:
        DataError: no url, a shard or pattern without a file, or an address that is not a local path.
    """
    if not urls:
        raise DataError(f"{name}: urls is empty; name at least one tar file", cause="missing")
    shards: list[str] = []
    missing: list[str] = []
    for url in urls:
        if "://" in url or url.startswith("pipe:"):
            raise DataError(f"{name}: {url!r} is not a local path; download or mount the shards first", cause="missing")
        try:
            paths = list(braceexpand(url))
        except ValueError as error:
            raise DataError(f"{name}: the braces of {url!r} do not close: {error}", cause="missing") from error
        for path in paths:
            found = _matching(path) if glob.has_magic(path) and not Path(path).is_file() else [path]
            files = [file for file in found if Path(file).is_file()]
            shards += files
            missing += [] if files else [path]
    if missing:
        total = len(missing) + len(shards)
        raise DataError(
            f"{name}: {len(missing)} of {total} shards are missing ({examples_of(missing)}); "
            "correct urls, or list only the shards you have",
            cause="missing",
        )
    return [str(Path(shard).absolute()) for shard in shards]


def _read_shard(shard: str) -> Iterator[RawSample | DataError]:
    """Yield the samples of one tar file, then its faults; all that is lost of a broken tar is one fault."""
    faults: list[Exception] = []

    def record(fault: Exception) -> bool:
        faults.append(fault)
        return True

    num_items, broken = 0, False
    for raw in wds.tarfile_to_samples(handler=record)([{"url": shard}]):
        num_items += 1
        yield raw
    if not faults and num_items and _lacks_end(shard):
        faults.append(EOFError("no end mark"))
    for fault in faults:
        duplicate = isinstance(fault, ValueError)
        if duplicate or not broken:
            num_items += 1
            yield _fault(shard, fault, duplicate)
        broken = broken or not duplicate
    if not num_items:
        yield DataError(f"{shard}: the shard holds no sample; list only full shards", cause="empty shard")


def _lacks_end(shard: str) -> bool:
    """Whether a plain tar file lacks the zeros at its end: cut between two members, it reads like a whole one."""
    if not shard.endswith(".tar"):
        return False
    with Path(shard).open("rb") as file:
        file.seek(-512, io.SEEK_END)
        return any(file.read())


def _fault(shard: str, fault: Exception, duplicate: bool) -> DataError:
    reason = str(fault.args[0]) if fault.args else type(fault).__name__
    if duplicate:
        return DataError(f"{shard}: {reason}; only the first one is used", cause="duplicate member")
    return DataError(
        f"{shard}: the tar file is damaged or cut short ({reason}); the rest of it is lost: fetch it again",
        cause="damaged shard",
    )


def _shuffled(
    items: Iterator[RawSample | DataError], size: int, generator: random.Random
) -> Iterator[RawSample | DataError]:
    """Yield items through a buffer of `size`, each time a random one of it."""
    if size < 2:
        yield from items
        return
    buffer: list[RawSample | DataError] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        index = generator.randrange(size)
        yield buffer[index]
        buffer[index] = item
    generator.shuffle(buffer)
    yield from buffer


def _files(raw: RawSample) -> str:
    """Return the file endings of a sample, for a message."""
    return ", ".join(sorted(key for key in raw if not key.startswith("__"))) or "nothing"


def _matching(pattern: str) -> list[str]:
    """Return the files that a pattern with `*` means, sorted."""
    absolute = Path(pattern).absolute()
    return sorted(str(path) for path in Path(absolute.anchor).glob(str(absolute.relative_to(absolute.anchor))))
