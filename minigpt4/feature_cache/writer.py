"""Writing a feature cache: killed at any instant, it continues where it stopped, without a lost entry.

Input: features with the hash of their image. Output: the shards and the index of a cache. An interrupted shard keeps
its complete entries: what was written after the last of them is cut off.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from minigpt4.errors import FeatureCacheError
from minigpt4.feature_cache.layout import (
    CONTENT,
    END,
    FORMAT,
    INDEX,
    PARTIAL,
    SHARD,
    Entry,
    entries,
    member,
)

SHARD_BYTES = 256 * 1024**2
"""Bytes after which a new shard begins."""


class FeatureWriter:
    """Adds entries to the cache in a folder, which one process at a time may do.

    Attributes:
        known: the hashes of the images that have an entry.
        recovered: entries that were there from an earlier run.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._entries: list[Entry] = []
        self._number = 0
        self._file: BinaryIO | None = None
        self._written = 0
        self._recover()
        self.known = {entry.digest for entry in self._entries}
        self.recovered = len(self.known)

    def add(self, digest: bytes, features: Tensor) -> None:
        """Append the features (Q, Dq) of an image, unless it has an entry.

        Raises:
            OSError: the disk is full.
        """
        if digest in self.known:
            return
        content = member(digest, features)
        if self._file is None:
            self._file = self._path(PARTIAL).open("ab", buffering=0)
        self._file.write(content)
        self.known.add(digest)
        self._written += len(content)
        if self._written >= self.shard_bytes:
            self._complete()

    def finish(self, content: dict[str, Any]) -> None:
        """Complete the last shard, and write the index and the description of what is in the cache."""
        if self._file is not None:
            self._complete()
        found = [each for number in range(self._number) for each in entries(self._shard(number), number)]
        missing = self.known - {entry.digest for entry in found}
        if missing:
            raise FeatureCacheError(f"{self.folder}: {len(missing)} entries that were written cannot be read back")
        rows = np.array([_row(entry) for entry in found], dtype=np.uint64).reshape(len(found), 5)
        order = np.lexsort((rows[:, 1], rows[:, 0])) if len(found) else np.zeros(0, dtype=np.int64)
        partial = self.folder / (INDEX + PARTIAL)
        with partial.open("wb") as file:
            np.save(file, np.ascontiguousarray(rows[order].T))
        _replace(partial, self.folder / INDEX)
        write_json(self.folder / CONTENT, {"format": FORMAT, **content})

    def close(self) -> None:
        """Close the shard that is being written; its entries are kept."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _recover(self) -> None:
        """Find the entries of complete shards, and of one that was interrupted."""
        while self._shard(self._number).is_file():
            self._entries += entries(self._shard(self._number), self._number)
            self._number += 1
        partial = self._path(PARTIAL)
        if not partial.is_file():
            return
        kept = list(entries(partial, self._number, check=True))
        end = kept[-1].offset + kept[-1].size if kept else 0
        self._written = end + -end % 512
        with partial.open("r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(bytes(-end % 512))  # the zeros up to the next block may be missing
        self._entries += kept
        if kept:
            self._file = partial.open("ab", buffering=0)

    def _complete(self) -> None:
        """End the shard, put it on the disk, and give it its name."""
        if self._file is None:
            return
        self._file.write(END)
        self.close()
        _replace(self._path(PARTIAL), self._shard(self._number))
        self._number += 1
        self._written = 0

    def _shard(self, number: int) -> Path:
        return self.folder / SHARD.format(number)

    def _path(self, suffix: str) -> Path:
        return self.folder / (SHARD.format(self._number) + suffix)


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON file; killed at any instant, it is the new one or the old one."""
    partial = file.with_name(file.name + PARTIAL)
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    _replace(partial, file)


def _replace(partial: Path, file: Path) -> None:
    with partial.open("rb") as content:
        os.fsync(content.fileno())
    partial.replace(file)


def _row(entry: Entry) -> tuple[int, int, int, int, int]:
    """Return an entry as numbers: both halves of the hash, shard, offset and size."""
    return (
        int.from_bytes(entry.digest[:8], "big"),
        int.from_bytes(entry.digest[8:], "big"),
        entry.shard,
        entry.offset,
        entry.size,
    )
