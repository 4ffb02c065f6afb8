"""The index of a folder of shards: how many samples, bytes and which checksum each tar file has.

`data pack` writes it next to the shards as `index.json`. Training compares the shards with it when it starts, by name
and size; `data validate` compares the checksums, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.errors import DataError
from minigpt4.strict_json import JSONError, parse_json

FILE = "index.json"
FORMAT = "minigpt4 shards 1"


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, the number of its samples, its size in bytes, and the SHA-256 of its content."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """All shards of a folder, in order.

    Attributes:
        shards: the tar files.
        rejected: rows that were left out when the shards were written, by cause.
        made_from: what the shards were made from: the name and checksum of the source, and the settings.
    """

    shards: tuple[Shard, ...]
    rejected: Mapping[str, int] = field(default_factory=dict)
    made_from: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def to_json(self) -> str:
        """Return the content of the file; equal indexes give equal text."""
        values = {
            "format": FORMAT,
            "samples": self.samples,
            "rejected": dict(sorted(self.rejected.items())),
            "made_from": dict(self.made_from),
            "shards": [asdict(shard) for shard in self.shards],
        }
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def read_index(folder: Path) -> ShardIndex | None:
    """Return the index of a folder, or None if it has none, or an `index.json` of another program.

    Raises:
        DataError: the index is damaged.
    """
    file = folder / FILE
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}", cause="index") from error
    try:
        values = parse_json(content)
        if not isinstance(values, dict) or not str(values.get("format", "")).startswith("minigpt4 shards"):
            return None
        if values["format"] != FORMAT:
            raise DataError(f"{file}: has the format {values['format']!r}, expected {FORMAT!r}", cause="index")
        shards = tuple(
            Shard(str(one["file"]), int(one["samples"]), int(one["bytes"]), str(one["sha256"]))
            for one in values["shards"]
        )
        return ShardIndex(shards, dict(values["rejected"]), dict(values["made_from"]))
    except (JSONError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, JSONError) and FORMAT.encode() not in content:
            return None
        raise DataError(
            f"{file}: the index of the shards is damaged ({error}); copy it again, or remove it", cause="index"
        ) from error


def differences(shards: Iterable[str], *, whole: bool = False) -> list[str]:
    """Return how shards differ from the indexes in their folders, one line each; folders without one are left out.

    Args:
        shards: absolute paths of tar files.
        whole: also compare the checksums, for which every byte is read.

    Raises:
        DataError: an index is damaged.
    """
    folders: dict[Path, set[str]] = {}
    for path in map(Path, shards):
        folders.setdefault(path.parent, set()).add(path.name)
    found = []
    for folder, names in folders.items():
        index = read_index(folder)
        if index is None:
            continue
        known = {shard.file for shard in index.shards}
        found += [f"{folder / name}: is not in {FILE}" for name in sorted(names - known)]
        for shard in index.shards:
            problem = _difference(folder / shard.file, shard, whole)
            if problem:
                found.append(f"{folder / shard.file}: {problem}")
    return found


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _difference(file: Path, shard: Shard, whole: bool) -> str:
    try:
        size = file.stat().st_size
        if size != shard.bytes:
            return f"has {size:,} bytes, expected {shard.bytes:,}: the copy is not complete, copy it again"
        if whole and sha256_of(file) != shard.sha256:
            return "has another checksum: it was damaged or changed, copy it again"
    except FileNotFoundError:
        return f"is missing; it has {shard.samples:,} of {FILE}'s samples"
    except OSError as error:
        return f"cannot be read: {error}"
    return ""
