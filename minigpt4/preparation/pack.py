"""`data pack`: pairs of images and captions into WebDataset shards with an index.

Input: a folder or a table of pairs. Output: a folder of tar files, `index.json` with counts and checksums, and
`rejected.jsonl` with every row that was left out. Equal input gives equal bytes. The job can be killed at any instant:
whole shards are noted in a journal, and the same command continues behind the last of them.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from tqdm import tqdm

from minigpt4.datasets.shard_index import FILE, Shard, ShardIndex, read_index, sha256_of
from minigpt4.datasets.web_pairs import MAX_MEMBER
from minigpt4.errors import DataError, ImageError
from minigpt4.preparation.pairs import FolderPairs, Keys, Pair, TablePairs, pairs_of
from minigpt4.processors.image import open_image
from minigpt4.strict_json import JSONError, parse_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JOURNAL = "unfinished.jsonl"
REJECTED = "rejected.jsonl"
ENDINGS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "AVIF": "avif",
}
"""PIL's names of the formats whose files are packed as they are; others become PNG."""
MIN_ROWS = 200
"""Rows after which too many rejected ones end the job; a shorter source is judged at its end."""
SHOWN = 3


@dataclass(frozen=True)
class PackSettings:
    """What decides the content of the shards.

    Attributes:
        keys: where a row has its image and its caption.
        samples_per_shard: most samples of one tar file.
        check_images: decode every image, and leave out those that training could not decode.
    """

    keys: Keys = field(default_factory=Keys)
    samples_per_shard: int = 10_000
    check_images: bool = True


@dataclass
class _State:
    """What the journal says: where the next shard begins, and what was left out before."""

    next_row: int = 0
    shards: list[Shard] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    rejected_bytes: int = 0

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def pack(
    source: Path,
    out: Path,
    settings: PackSettings,
    *,
    image_dir: Path | None = None,
    max_rejected: float = 0.05,
) -> ShardIndex:
    """Write the pairs of `source` as shards into the folder `out`, and return their index.

    Args:
        source: a folder of images and captions, or a JSON, JSONL, CSV, TSV or Parquet file.
        out: a new folder, or one that an interrupted job with the same source and settings has begun.
        settings: what decides the content of the shards.
        image_dir: the folder that image paths of a table are relative to; by default the folder of the table.
        max_rejected: the job ends when more than this fraction of the rows was left out, judged from `MIN_ROWS` rows
            on and at the end; the fraction does not decide what is written.

    Raises:
        DataError: the source cannot be read, `out` holds something else, or too many rows cannot be used.
    """
    if settings.samples_per_shard < 1:
        raise DataError(f"--samples-per-shard must be at least 1, found {settings.samples_per_shard}")
    pairs = pairs_of(source, settings.keys, image_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return _Packing(pairs, out, settings, max_rejected).run()
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error}; the same command continues") from error


class _Packing:
    """One job; see `pack`."""

    def __init__(self, pairs: TablePairs | FolderPairs, out: Path, settings: PackSettings, max_rejected: float) -> None:
        self.pairs = pairs
        self.out = out
        self.settings = settings
        self.max_rejected = max_rejected
        self.made_from: dict[str, Any] = {**pairs.identity(), "settings": asdict(settings)}
        self.state = _State()

    def run(self) -> ShardIndex:
        """Pack what is not packed yet."""
        finished = self._finished()
        if finished is not None:
            (self.out / JOURNAL).unlink(missing_ok=True)
            return finished
        with (self.out / JOURNAL).open("a+b") as journal:
            _lock(journal, self.out)
            self._resume(journal)
            with (self.out / REJECTED).open("ab") as rejected:
                rejected.truncate(self.state.rejected_bytes)
                self._write_shards(journal, rejected)
        index = ShardIndex(tuple(self.state.shards), self.state.rejected, self.made_from)
        self._judge(index.samples, at_end=True)
        if not index.rejected:
            (self.out / REJECTED).unlink()
        _replace(self.out / FILE, index.to_json().encode())
        (self.out / JOURNAL).unlink()
        return index

    def _finished(self) -> ShardIndex | None:
        """Return the index if the folder holds this job's whole result.

        Raises:
            DataError: it holds another one.
        """
        index = read_index(self.out)
        if index is None:
            if (self.out / FILE).exists():
                raise DataError(f"{self.out}: has an {FILE} of another program; choose another --out")
            return None
        if _plain(index.made_from) != _plain(self.made_from):
            raise DataError(
                f"{self.out}: already holds {len(index.shards)} shards made from {index.made_from.get('source')!r} "
                f"with {index.made_from.get('settings')}; choose another --out"
            )
        return index

    def _resume(self, journal: BinaryIO) -> None:
        """Read the journal, and remove what was written behind it."""
        journal.seek(0)
        content = journal.read()
        whole = content[: content.rfind(b"\n") + 1]
        first, *lines = whole.splitlines() or [b""]
        try:
            if first and parse_json(first) != _plain(self.made_from):
                raise DataError(
                    f"{self.out}: an unfinished job of another source or with other settings; choose another --out"
                )
            for line in lines:
                values = parse_json(line)
                shard = Shard(**values["shard"])
                file = self.out / shard.file
                if not file.is_file() or file.stat().st_size != shard.bytes:
                    raise DataError(f"{file}: is not as the interrupted job left it; choose another --out")
                self.state.shards.append(shard)
                self.state.rejected = Counter(values["rejected"])
                self.state.rejected_bytes, self.state.next_row = values["rejected_bytes"], values["next_row"]
        except (JSONError, KeyError, TypeError) as error:
            raise DataError(f"{self.out / JOURNAL}: is damaged ({error}); choose another --out") from error
        if not first:
            others = [file.name for file in self.out.glob("*.tar")]
            if others:
                raise DataError(f"{self.out}: already has tar files ({others[0]}); choose another --out")
        journal.truncate(len(whole))
        if not first:
            journal.write(_line(self.made_from))
        _sync(journal)
        for leftover in self.out.glob("*.partial"):
            leftover.unlink()

    def _write_shards(self, journal: BinaryIO, rejected: BinaryIO) -> None:
        state = self.state
        with _Bar(self.pairs) as bar:
            items = enumerate(self.pairs.items(), start=1)
            for _ in islice(items, state.next_row):  # read again, but no image is opened
                bar.update(state)
            samples = self._samples(items, rejected, bar)
            while True:
                name = f"{len(state.shards):05d}.tar"
                count = write_shard(self.out / f"{name}.partial", islice(samples, self.settings.samples_per_shard))
                if not count:
                    (self.out / f"{name}.partial").unlink()
                    return
                partial = self.out / f"{name}.partial"
                shard = Shard(name, count, partial.stat().st_size, sha256_of(partial))
                partial.replace(self.out / name)
                _sync_folder(self.out)
                _sync(rejected)
                state.shards.append(shard)
                state.rejected_bytes = rejected.tell()
                entry = {
                    "shard": asdict(shard),
                    "next_row": state.next_row,
                    "rejected": dict(state.rejected),
                    "rejected_bytes": state.rejected_bytes,
                }
                journal.write(_line(entry))
                _sync(journal)

    def _samples(
        self, items: Iterator[tuple[int, Pair | DataError]], rejected: BinaryIO, bar: _Bar
    ) -> Iterator[tuple[str, str, bytes, bytes]]:
        """Yield key, ending, image and json file of every sample; what cannot be used is noted."""
        number = self.state.samples
        for row, item in items:
            self.state.next_row = row
            bar.update(self.state, number)
            try:
                if isinstance(item, DataError):
                    raise item
                ending, image = packed_image(item, self.settings.check_images)
            except DataError as error:
                self.state.rejected[error.cause] += 1
                rejected.write(_line({"row": row, "cause": error.cause, "message": str(error)}))
                rejected.flush()
                self._judge(number)
                continue
            fields = json.dumps({"caption": item.caption, "source": item.place}, ensure_ascii=False)
            yield f"{number:09d}", ending, image, fields.encode()
            number += 1

    def _judge(self, samples: int, at_end: bool = False) -> None:
        """Raise if too many rows were left out."""
        count = sum(self.state.rejected.values())
        rows = count + samples
        if at_end and not rows:
            raise DataError("the source has no row", cause="row")
        if count <= self.max_rejected * rows and (samples or not at_end):
            return
        if not at_end and rows < MIN_ROWS:
            return
        with (self.out / REJECTED).open("rb") as lines:
            first = [json.loads(line)["message"] for line in islice(lines, SHOWN) if line.endswith(b"\n")]
        causes = ", ".join(f"{cause}: {number}" for cause, number in self.state.rejected.most_common())
        advice = "correct them, or raise --max-rejected" if samples else "correct them"
        raise DataError(
            f"{count} of {rows} rows cannot be used ({causes}); {advice}; all are in {self.out / REJECTED}, the first: "
            + "; ".join(first),
            cause="row",
        )


class _Bar:
    """A progress bar over the size of the source."""

    def __init__(self, pairs: TablePairs | FolderPairs) -> None:
        self._pairs = pairs
        _, total, unit = pairs.progress
        self._bar = tqdm(total=total or None, unit=unit, unit_scale=True, desc="pack", disable=None)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, state: _State, samples: int = 0) -> None:
        """Show how far the source was read."""
        if self._bar.disable:
            return
        position, total, _ = self._pairs.progress
        self._bar.total = total or None
        self._bar.set_postfix(pairs=samples, rejected=sum(state.rejected.values()), refresh=False)
        self._bar.update(position - self._bar.n)


def packed_image(pair: Pair, check: bool = True) -> tuple[str, bytes]:
    """Return the ending and the content of a pair's image as it is packed: unchanged, or as PNG.

    Args:
        pair: the pair.
        check: decode the image.

    Raises:
        ImageError: it cannot be read, or training could not decode it.
    """
    name = str(pair.image) if isinstance(pair.image, Path) else f"{pair.place}: the image"
    if isinstance(pair.image, Path):
        try:
            size = pair.image.stat().st_size
            if size > MAX_MEMBER:
                raise ImageError(f"{name}: {size:,} bytes, more than {MAX_MEMBER:,}", cause="image too large")
            content = pair.image.read_bytes()
        except OSError as error:
            raise ImageError(f"{name}: cannot be read: {error}") from error
    else:
        content = pair.image
    if not content:
        raise ImageError(f"{name}: the file is empty; leave it out")
    picture = None
    if check:
        picture = open_image(content, name)
    try:
        with Image.open(io.BytesIO(content)) as opened:
            ending = ENDINGS.get(opened.format or "")
    except Exception as error:
        raise ImageError(f"{name}: this is not an image, or its format is not supported by PIL") from error
    if ending is not None:
        return ending, content
    converted = io.BytesIO()
    (picture or open_image(content, name)).save(converted, "PNG")
    return "png", converted.getvalue()


def write_shard(file: Path, samples: Iterator[tuple[str, str, bytes, bytes]]) -> int:
    """Write a tar file of samples: key, ending of the image, image, json file. Return their number.

    Names, order and content alone decide the bytes: times, owners and modes are constant.
    """
    count = 0
    with file.open("wb") as raw, tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, ending, image, fields in samples:
            for suffix, content in ((ending, image), ("json", fields)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))
            count += 1
    with file.open("rb") as written:
        os.fsync(written.fileno())
    return count


def _plain(values: Mapping[str, Any]) -> Any:
    """Return values as they are after they were written and read."""
    return json.loads(json.dumps(values))


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the names of a folder's files survive a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(file: Path, content: bytes) -> None:
    """Write a file in one step."""
    new = file.with_name(f"{file.name}.partial")
    with new.open("wb") as opened:
        opened.write(content)
        _sync(opened)
    new.replace(file)
    _sync_folder(file.parent)


def _lock(file: BinaryIO, out: Path) -> None:
    """Keep two jobs from writing the same folder."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise DataError(f"{out}: another job writes this folder; wait for it, or choose another --out") from error
