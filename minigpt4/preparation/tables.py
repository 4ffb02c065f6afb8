"""Rows of a table in any of the formats that `data pack` and `data validate` take.

Input: a JSON, JSONL, CSV, TSV or Parquet file. Output: numbered rows, about one at a time in memory, with the value
`{column: value}` or what is wrong with the row, and how far the file was read.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt4.datasets.rows import LINES, Row, stream_rows
from minigpt4.errors import DataError, MissingDependencyError
from minigpt4.strict_json import MAX_ITEM

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
ENDINGS = (".json", *LINES, *DELIMITERS, *PARQUET)
"""The endings of files with rows."""
BATCH = 256
"""Rows of a Parquet file that are in memory together."""


class Table:
    """The rows of one file.

    Attributes:
        file: the file.
        total: its size, in bytes or in rows.
        unit: what `total` and `position` count: `B` or `row`.
        position: how far the file was read.
    """

    def __init__(self, file: Path) -> None:
        """Take a file; nothing is read yet.

        Raises:
            DataError: the file is missing, or its ending is not one of `ENDINGS`.
        """
        self.file = file
        self.suffix = file.suffix.lower()
        if self.suffix not in ENDINGS:
            known = ", ".join(ENDINGS)
            raise DataError(f"{file}: the ending {self.suffix!r} is unknown; known: {known}", cause="row")
        if not file.is_file():
            raise DataError(f"{file}: file not found", cause="missing")
        self.total = file.stat().st_size
        self.unit = "row" if self.suffix in PARQUET else "B"
        self.position = 0

    def rows(self) -> Iterator[Row]:
        """Yield the rows, numbered by line (CSV, TSV: by the last line of a row) or by item.

        Raises:
            DataError: the file cannot be read, or not beyond a certain place; the message has it.
        """
        if self.suffix in PARQUET:
            yield from self._parquet()
            return
        try:
            with self.file.open("rb") as content:
                rows = self._csv(content) if self.suffix in DELIMITERS else stream_rows(self.file, content)
                for row in rows:
                    self.position = content.tell()
                    yield row
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read: {error}", cause="row") from error

    def place(self, number: int) -> str:
        """Return where a row stands, for messages."""
        is_item = self.suffix in (".json", *PARQUET)
        return f"{self.file} item {number}" if is_item else f"{self.file}:{number}"

    def _csv(self, content: io.BufferedReader) -> Iterator[Row]:
        start = content.peek(2)[:2]
        encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        csv.field_size_limit(MAX_ITEM)
        lines = io.TextIOWrapper(content, encoding, newline="")
        reader = csv.reader(lines, delimiter=DELIMITERS[self.suffix], strict=True)
        number = 0
        try:
            header = [name.strip() for name in next(reader, [])]
            self._check_header(header)
            for fields in reader:
                number = reader.line_num
                if len(fields) == len(header):
                    yield Row(number, b"", dict(zip(header, fields, strict=True)))
                elif fields:
                    problem = f"{len(fields)} fields, but the first line names {len(header)} columns"
                    yield Row(number, b"", DataError(f"{self.file}:{number}: {problem}", cause="row"))
        except csv.Error as error:
            raise DataError(f"{self.file}:{reader.line_num}: not valid {self.suffix[1:].upper()}: {error}") from error
        except UnicodeDecodeError as error:
            line = reader.line_num + error.object[: error.start].count(b"\n") + 1
            name = encoding.removesuffix("-sig").upper()
            raise DataError(
                f"{self.file}: not {name} text at about line {line} ({error.reason}); save it as UTF-8", cause="row"
            ) from error
        finally:
            lines.detach()

    def _check_header(self, header: list[str]) -> None:
        twice = {name for name in header if header.count(name) > 1}
        if not any(header):
            raise DataError(f"{self.file}: the file has no row; the first line must name the columns", cause="row")
        if twice:
            raise DataError(f"{self.file}:1: the column {min(twice)!r} occurs twice", cause="row")

    def _parquet(self) -> Iterator[Row]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise MissingDependencyError("pyarrow", f"reading {self.file.name}", "parquet") from error
        number = 0
        try:
            with parquet.ParquetFile(self.file) as table:
                self.total = table.metadata.num_rows
                for batch in table.iter_batches(batch_size=BATCH):
                    for value in batch.to_pylist():
                        number += 1
                        self.position = number
                        yield Row(number, b"", value)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            place = f"{self.file} behind item {number}" if number else self.file
            raise DataError(f"{place}: not a Parquet file, or it is damaged: {reason}", cause="row") from error


def shown(value: Any) -> str:
    """Return a value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
