"""WebDataset shards of images and captions, as img2dataset writes them: the data of stage 1.

Input: tar files on a local or mounted disk, read by the webdataset library. Output: examples of one image and its
caption. The library skips what it cannot read; here every error becomes an item of the stream and is counted by cause.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import logging
import random
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import webdataset as wds
from braceexpand import braceexpand

from minigpt4.config.parts import WebPairsConfig
from minigpt4.datasets.shard_index import FILE as INDEX
from minigpt4.datasets.shard_index import differences
from minigpt4.datasets.source import Example, Item, Source, is_file, shortened
from minigpt4.errors import DataError
from minigpt4.strict_json import parse_json

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
MAX_TEXT = 1_000_000
"""Most bytes of the json and txt files of one sample."""
MAX_MEMBER = 256 * 1024**2
"""Most bytes of one file in a shard."""
MAX_ZEROS = 1024**2
"""Most zeros between two archives; more of them are a hole in a file."""
CHUNK = 1024**2
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
"""How gzip, bzip2, xz and Zstandard files begin."""
_META = re.compile(r"__[^/]*__($|/)")
MAX_SHARDS = 1_000_000
"""Most names that the braces of `urls` may stand for."""
_log = logging.getLogger(__name__)
RawSample = dict[str, Any]
"""A sample as webdataset groups it: one entry per file ending, and `__key__` and `__url__`."""
RawItem = RawSample | DataError


class WebPairs(Source):
    """Image-text shards: permuted each epoch, divided among the readers, shuffled in a buffer."""

    Config = WebPairsConfig

    def __init__(self, config: WebPairsConfig, name: str) -> None:
        super().__init__(config, name)
        self.config = config
        self.shards = find_shards(config.urls, name)
        differing = differences(self.shards)
        if differing:
            _log.warning(
                "%s: %d shards are not as %s says: %s", name, len(differing), INDEX, shortened(differing, "; ")
            )

    def digest(self) -> str:
        """See `Source.digest`: of the names and sizes of the shards, which may be terabytes."""
        sizes = [(Path(shard).name, Path(shard).stat().st_size) for shard in self.shards]
        return hashlib.sha256(repr(sizes).encode()).hexdigest()

    def expected_images(self) -> int:
        """See `Source.expected_images`: from the samples per byte in three of the shards."""
        some = sorted({0, len(self.shards) // 2, len(self.shards) - 1})
        counted = [_count_samples(self.shards[number]) for number in some]
        sampled = sum(Path(self.shards[number]).stat().st_size for number in some)
        total = sum(Path(shard).stat().st_size for shard in self.shards)
        return round(sum(counted) * total / sampled) if sampled else 0

    def stream(self, seed: int, reader: int, readers: int, start: int = 0) -> Iterator[Item]:
        """See `Source.stream`; items before `start` are read, but neither parsed nor decoded."""
        # With at least as many shards as readers, an epoch of this reader is one pass over its own shards. Otherwise
        # the readers divide the samples: one of them may get none in a small epoch, but not in `readers` epochs.
        allowed = readers if len(self.shards) < readers else 1
        empty_epochs = 0
        errors: Counter[str] = Counter()
        for epoch in itertools.count():
            useful = False
            for raw in self._epoch(seed, reader, readers, epoch):
                if start > 0:
                    start -= 1
                    useful = True
                    continue
                item = self._item(raw)
                if isinstance(item, DataError):
                    errors[item.cause] += 1
                useful = useful or isinstance(item, Example)
                yield item
            empty_epochs = 0 if useful else empty_epochs + 1
            if empty_epochs >= allowed:
                found = ", ".join(f"{cause}: {count}" for cause, count in errors.most_common()) or "no samples"
                raise DataError(
                    f"{self.name}: reader {reader} of {readers} found no usable sample in a whole epoch ({found}); "
                    f"check {self.shards[0]}"
                )

    def in_order(self) -> Iterator[Item]:
        """See `Source.in_order`."""
        for shard in self.shards:
            yield from map(self._item, _read_shard(shard))

    def _epoch(self, seed: int, reader: int, readers: int, epoch: int) -> Iterator[RawItem]:
        """Yield what one reader reads in one epoch, in its final order."""
        shards = list(self.shards)
        random.Random(f"{seed}/{self.name}/{epoch}").shuffle(shards)
        own = shards[reader::readers] if len(shards) >= readers else shards
        samples: Iterator[RawItem] = itertools.chain.from_iterable(map(_read_shard, own))
        if len(shards) < readers:  # every reader reads all shards and takes its part of the samples
            samples = itertools.islice(samples, (reader + epoch) % readers, None, readers)
        generator = random.Random(f"{seed}/{self.name}/{epoch}/{reader}/{readers}")
        return _shuffled(samples, self.config.shuffle_buffer, generator)

    def _item(self, raw: RawItem) -> Item:
        if isinstance(raw, DataError):
            return raw
        place = f"{Path(raw['__url__']).name}/{raw['__key__']}"
        return self.guarded(lambda: self._example(raw, place), place)

    def _example(self, raw: RawSample, place: str) -> Example:
        caption = self._caption(raw, f"{self.name}: {place}")
        images = [key for key in IMAGE_KEYS if key in raw]
        if len(images) != 1:
            found = f"found only {_files(raw)}" if not images else f"found {', '.join(images)}"
            raise DataError(
                f"{self.name}: {place}: expected an image ({', '.join(IMAGE_KEYS)}), {found}{_layout_hint(raw)}",
                cause="several images" if images else "missing image",
            )
        return Example(place, (raw[images[0]],), self.captioned(caption, f"{self.name}: {place}"))

    def _caption(self, raw: RawSample, place: str) -> str:
        """Return the caption of a sample: that of its json file if it has one, else its txt file."""
        size = len(raw.get("json", b"")) + len(raw.get("txt", b""))
        if size > MAX_TEXT:
            raise DataError(f"{place}: {size:,} bytes of text; more than {MAX_TEXT:,}", cause="text too large")
        try:
            fields = parse_json(raw["json"], check_text=False, allow_nan=True) if "json" in raw else {}
            caption = fields.get(self.config.caption_key) if isinstance(fields, dict) else None
            if not caption and "txt" in raw:
                caption = raw["txt"].decode("utf-8")
        except ValueError as error:
            raise DataError(f"{place}: the caption cannot be read: {error}", cause="caption") from error
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(
                f"{place}: the caption is missing: no text under {self.config.caption_key!r} in a json file, and no "
                f"txt file; the sample has {_files(raw)}{_layout_hint(raw)}",
                cause="caption",
            )
        return caption


def find_shards(urls: list[str], name: str) -> list[str]:
    """Return the shard files of `urls`, with braces and `*` expanded.

    Raises:
        DataError: `urls` is empty, a file is missing, or an address is not a local path.
    """
    if not urls:
        raise DataError(f"{name}: urls is empty; name at least one tar file", cause="missing")
    shards: list[str] = []
    missing: list[str] = []
    for url in urls:
        if "://" in url or url.startswith("pipe:"):
            raise DataError(f"{name}: {url!r} is not a local path; download or mount the shards first", cause="missing")
        try:
            paths = list(itertools.islice(braceexpand(url), MAX_SHARDS + 1)) if _is_expandable(url) else []
        except ValueError as error:
            raise DataError(f"{name}: the braces of {url!r} do not match: {error}", cause="missing") from error
        if not 0 < len(paths) <= MAX_SHARDS:
            raise DataError(f"{name}: the braces of {url[:80]!r} stand for too many names", cause="missing")
        for path in paths:
            found = _matching(path) if glob.has_magic(path) and not is_file(Path(path)) else [path]
            files = [file for file in found if is_file(Path(file))]
            shards += files
            missing += [] if files else [path]
    if missing:
        total = len(missing) + len(shards)
        raise DataError(
            f"{name}: {len(missing)} of {total} shards are missing ({shortened(missing)}); correct urls, or list only "
            "the shards that exist",
            cause="missing",
        )
    return [str(Path(shard).absolute()) for shard in shards]


def _is_expandable(url: str) -> bool:
    """Whether the braces of `url` can be expanded in bounded memory: braceexpand makes whole ranges and lists."""
    size = 1
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", url):
        if len(first) + len(last) > 40:
            return False
        size *= abs(int(last) - int(first)) + 1
    for choices in re.findall(r"\{([^{}]*,[^{}]*)\}", url):
        size *= choices.count(",") + 1
    return size <= MAX_SHARDS and url.count("{") <= 20


def _read_shard(shard: str) -> Iterator[RawSample | DataError]:
    """Yield the samples of one tar file, then an error for everything in it that could not be read.

    A sample that lost a file in a damaged place is that place's error, so that it counts once.
    """
    duplicates: list[Exception] = []
    faults: list[str] = []

    def record(error: Exception) -> bool:
        duplicates.append(error)
        return True

    def damaged(fault: str, lost: str) -> DataError:
        message = f"{shard}: the tar file is damaged or cut ({fault}); {lost} is lost: download it again"
        return DataError(message, cause="damaged shard")

    num_items = reported = 0
    for raw in wds.tariterators.group_by_keys(_members(shard, faults), handler=record):
        num_items += 1
        is_whole = raw.keys() & {*IMAGE_KEYS} and raw.keys() & {"json", "txt"}
        if reported < len(faults) and not is_whole:
            yield damaged(faults[reported], f"a file of {raw['__key__']!a}")
            reported += 1
        else:
            yield raw
    for error in duplicates:
        yield DataError(f"{shard}: {error.args[0]}; only the first one is used", cause="duplicate member")
    for fault in faults[reported:]:
        yield damaged(fault, "what was there")
    if not num_items + len(duplicates) + len(faults):
        yield DataError(f"{shard}: the shard has no sample; remove it from urls", cause="empty shard")


def _count_samples(shard: str) -> int:
    """Return the number of images in a shard, from its headers alone; those in front of any damage."""
    count = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                count += member.name.rpartition(".")[2].lower() in IMAGE_KEYS
    except (OSError, tarfile.TarError, EOFError, ValueError):
        return count
    return count


def _members(shard: str, faults: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar file as webdataset groups them, and add to `faults` what is between them.

    tarfile takes a damaged header for the end of the archive. With `ignore_zeros` it searches on, so that archives
    joined by `cat` are read whole; whatever is passed over must be the zeros of an end mark.
    """
    expected = 0  # where the next header must begin
    try:
        with Path(shard).open("rb") as file, tarfile.open(shard, "r:", ignore_zeros=True) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                _check_gap(file, expected, member.offset, faults)
                expected = tar.offset
                content = tar.extractfile(member) if member.isreg() else None
                if content is None or _META.match(member.name):
                    continue
                if member.size > MAX_MEMBER:
                    faults.append(f"{member.name!a} has {member.size:,} bytes, more than {MAX_MEMBER:,}")
                    continue
                yield {"fname": member.name, "data": content.read(), "__url__": shard}
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            if not expected and file.read(6).startswith(COMPRESSED):
                faults.append("it is compressed, which is not supported: decompress it, images hardly shrink")
            elif expected and size < expected + tarfile.BLOCKSIZE:
                faults.append("the end is missing")
            else:
                _check_gap(file, expected, size, faults)
    except (OSError, tarfile.TarError, EOFError, ValueError, zlib.error) as error:
        faults.append(str(error) or type(error).__name__)


def _check_gap(file: BinaryIO, start: int, end: int, faults: list[str]) -> None:
    """Add a fault unless the bytes from `start` to `end` are the zeros that end an archive."""
    file.seek(start)
    is_zero = all(not any(file.read(min(CHUNK, end - place))) for place in range(start, end, CHUNK))
    if not is_zero:
        faults.append(f"{end - start:,} bytes at {start:,} are not files of a tar archive")
    elif end - start > MAX_ZEROS:
        faults.append(f"{end - start:,} zeros at {start:,}")


def _shuffled(items: Iterator[RawItem], size: int, generator: random.Random) -> Iterator[RawItem]:
    """Yield items in a random order, through a buffer of `size` items."""
    if size < 2:
        yield from items
        return
    buffer: list[RawItem] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        index = generator.randrange(size)
        yield buffer[index]
        buffer[index] = item
    generator.shuffle(buffer)
    yield from buffer


def _layout_hint(raw: RawSample) -> str:
    """Return what to do about a sample that is incomplete because of the layout of its shard."""
    dotted = [key for key in raw if not key.startswith("__") and "." in key]
    if dotted:
        return (
            f". A sample's name ends at the first dot, so that {dotted[0]!r} is taken as a file ending: use no dots in "
            "file names but the last one"
        )
    return ". The files of one sample must stand next to each other in the tar file: write it with tar --sort=name"


def _files(raw: RawSample) -> str:
    """Return the file endings of a sample, for a message."""
    return ", ".join(sorted(key for key in raw if not key.startswith("__"))) or "nothing"


def _matching(pattern: str) -> list[str]:
    """Return the files that match a pattern with `*`, sorted."""
    absolute = Path(pattern).absolute()
    return sorted(str(path) for path in Path(absolute.anchor).glob(str(absolute.relative_to(absolute.anchor))))
