"""Rows that occur more than once, among any number of rows in bounded memory.

Input: a value of each row, as it is read. Output: groups of row numbers. The values are compared by 64-bit hashes, so
that two different ones among a million rows are taken as equal once in forty million files.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Hashable, Iterator

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 1_000_000
"""Hashes that are compared at once; for more of them, the file is read several times."""
_BUFFER = 65_536


class Repeats:
    """Finds equal values; their hashes are kept in a temporary file of 16 bytes per value."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._buffer = array("q")
        self.count = 0

    def add(self, number: int, value: Hashable) -> None:
        """Note the value of row `number`."""
        buffer = self._buffer
        buffer.append(hash(value))
        buffer.append(number)
        self.count += 1
        if len(buffer) >= _BUFFER:
            self._flush()

    def groups(self) -> Iterator[list[int]]:
        """Yield the numbers of rows with equal values, at least two, each group sorted."""
        self._flush()
        parts = max(1, -(-self.count // AT_ONCE))
        for part in range(parts):
            pairs = self._pairs(part, parts)
            order = np.lexsort((pairs[:, 1], pairs[:, 0]))
            pairs = pairs[order]
            edges = np.flatnonzero(np.diff(pairs[:, 0])) + 1
            starts, ends = np.r_[0, edges], np.r_[edges, len(pairs)]
            for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
                yield pairs[start:end, 1].tolist()

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()

    def _flush(self) -> None:
        self._file.seek(0, 2)
        self._file.write(self._buffer.tobytes())
        self._buffer = array("q")

    def _pairs(self, part: int, parts: int) -> NDArray[np.int64]:
        """Return hash and row number (N, 2) of the values whose hash belongs to a part."""
        self._file.seek(0)
        kept = [np.empty((0, 2), dtype=np.int64)]
        while data := self._file.read(16 * _BUFFER):
            block = np.frombuffer(data, dtype=np.int64).reshape(-1, 2)
            kept.append(block[block[:, 0].astype(np.uint64) % np.uint64(parts) == part])
        return np.concatenate(kept)
