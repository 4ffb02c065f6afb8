"""The file of answers: one line that says what made them, then one line of JSON for each answer.

Input: answers, batch by batch, from one process or several ranks. Output: a file that holds the same bytes whether or
not the job was killed in between, and however many ranks took part; a file that anything else made is set aside.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4.errors import DataError
from minigpt4.strict_json import parse_json

_log = logging.getLogger(__name__)
Row = dict[str, Any]
Key = tuple[str, str, str]
FORMAT = 1


def key_of(row: Mapping[str, Any]) -> Key:
    """Return what identifies a row: its task, the set of images, the id of its question."""
    return (row["task"], row["images"], row["id"])


def line_of(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a file name that is not text
        return (json.dumps(row) + "\n").encode()


def read_answers(file: Path) -> tuple[Row, list[Row]]:
    """Return the first line of an answer file and its rows; an incomplete last line is left out.

    Raises:
        DataError: it is not an answer file; the message has file and line.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    lines = content.split(b"\n")[:-1]
    rows = [_parsed(line, file, number) for number, line in enumerate(lines, start=1)]
    if not rows or rows[0].get("answers_format") != FORMAT:
        raise DataError(
            f"{file}:1: not the answers of this version's `evaluate`: the first line has no answers_format {FORMAT}"
        )
    for number, row in enumerate(rows[1:], start=2):
        missing = [name for name in ("task", "images", "id", "image", "truth") if name not in row]
        if missing:
            raise DataError(f"{file}:{number}: the row has no {missing[0]!r}; evaluate again")
    return rows[0], rows[1:]


def _parsed(line: bytes, file: Path, number: int) -> Row:
    try:
        row = parse_json(line, check_text=False)
    except ValueError as error:
        raise DataError(f"{file}:{number}: not a line of JSON; evaluate again") from error
    if not isinstance(row, dict):
        raise DataError(f"{file}:{number}: not a JSON object; evaluate again")
    return row


class AnswerFile:
    """The answers of one job, in one file, or in memory for an empty path."""

    def __init__(self, path: Path | None, head: Row, batches: Sequence[Sequence[Key]], rank: int = 0) -> None:
        """Describe the job.

        Args:
            path: the file; None keeps the answers in memory.
            head: the first line: what made the answers.
            batches: the keys of each batch, in order; a batch is written as a whole.
            rank: of this process; ranks above 0 write files of their own, which `finish` joins.
        """
        self.path = path
        self.head = head
        self.batches = batches
        self.rank = rank
        self._rows: dict[Key, Row] = {}
        self._file: Any = None

    def parts(self) -> list[Path]:
        """Return the files of all ranks that exist, the file itself first."""
        if self.path is None:
            return []
        own = [self.path] if self.path.is_file() else []
        return own + sorted(self.path.parent.glob(f"{self.path.name}.rank*"))

    def recover(self) -> None:
        """Read what an earlier run answered; write it, in order and without incomplete batches, into one file.

        A file with another first line is renamed to `NAME.1`, `NAME.2`, ...; rank 0 calls this before all ranks open
        the job.

        Raises:
            DataError: a file cannot be read or written.
        """
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found: dict[Key, Row] = {}
        for part in self.parts():
            try:
                head, rows = read_answers(part)
                same = head == self.head
            except DataError:
                head, rows, same = {}, [], False
            if same:
                found |= {key_of(row): row for row in rows}
            elif part.stat().st_size:
                self._set_aside(part, head)
        self._rows = {key: found[key] for batch in self.batches if all(key in found for key in batch) for key in batch}
        self._rewrite()
        if self._rows:
            total = sum(map(len, self.batches))
            _log.info("%s: has %d of %d answers, continuing", self.path, len(self._rows), total)

    def open(self) -> None:
        """Read what is there, and open the file of this rank for appending."""
        if self.path is None:
            return
        self._rows = {key_of(row): row for row in read_answers(self.path)[1]}
        own = self.path if self.rank == 0 else self.path.with_name(f"{self.path.name}.rank{self.rank}")
        self._file = own.open("ab", buffering=0)
        if self.rank:
            self._file.truncate(0)
            self._file.write(line_of(self.head))

    def waiting(self) -> list[int]:
        """Return the numbers of the batches that are not answered yet."""
        return [n for n, batch in enumerate(self.batches) if any(key not in self._rows for key in batch)]

    def add(self, rows: Sequence[Row]) -> None:
        """Keep the answers of a batch, on disk when this returns."""
        self._rows |= {key_of(row): row for row in rows}
        if self._file is not None:
            self._file.write(b"".join(map(line_of, rows)))
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file of this rank."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, others: Sequence[Sequence[Row]] = ()) -> list[Row]:
        """Return all rows in order, those of other ranks included, and leave one file; rank 0 calls this."""
        self.close()
        for rows in others:
            self._rows |= {key_of(row): row for row in rows}
        if self.path is not None:
            self._rewrite()
        return list(self.in_order())

    def in_order(self) -> Iterator[Row]:
        """Yield the rows of this rank in the order of the job."""
        return (self._rows[key] for batch in self.batches for key in batch if key in self._rows)

    def _rewrite(self) -> None:
        """Replace the file by one with all rows in order, in one step, and remove those of other ranks."""
        if self.path is None:
            return
        content = b"".join(map(line_of, [self.head, *self.in_order()]))
        if not self.path.is_file() or self.path.read_bytes() != content:
            new = self.path.with_name(self.path.name + ".new")
            with new.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        for part in self.parts()[1:]:
            part.unlink()

    def _set_aside(self, part: Path, head: Row) -> None:
        differing = [name for name in self.head if head.get(name) != self.head[name]] if head else []
        number = 1
        while (aside := part.with_name(f"{part.name}.{number}")).exists():
            number += 1
        part.rename(aside)
        what = f"with other {', '.join(differing)}" if differing else "by an earlier version or another program"
        _log.warning("%s: was made %s; it is now %s", part, what, aside.name)
