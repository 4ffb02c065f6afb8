"""Rows of annotation files, read one after another in bounded memory.

Input: a `.json` file with a list or a `.jsonl` file with one row per line. Output: numbered rows with their text and
value. Training, `data validate` and `data pack` read through this module, so that they accept and refuse the same
files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from minigpt4.errors import DataError
from minigpt4.strict_json import JSONError, parse_json, stream_lines, stream_list

LINES = (".jsonl", ".ndjson")
"""The endings of files with one row per line."""


class Row(NamedTuple):
    """One row: its number (that of its line, or of its item), its text in JSON, and its value or what is wrong."""

    number: int
    text: str | bytes
    value: Any


def is_lines(file: Path) -> bool:
    """Whether a file has one row per line; else it holds a list."""
    return file.suffix.lower() in LINES


def place_of(file: str | Path, number: int) -> str:
    """Return where row `number` of a file stands, for messages: `rows.jsonl:17`, `rows.json item 17`."""
    return f"{file}:{number}" if is_lines(Path(file)) else f"{file} item {number}"


def stream_rows(file: Path, content: BinaryIO | None = None) -> Iterator[Row]:
    """Yield the rows of a file, about one at a time in memory.

    A line that is not JSON is a row whose value is a `DataError`: the lines behind it can still be read.

    Args:
        file: its ending says what is in it, see `is_lines`.
        content: the open file, for a caller that shows how far it was read; by default the file is opened.

    Raises:
        DataError: the file cannot be read, or not beyond a certain place; the message has it.
    """
    try:
        if content is None:
            with file.open("rb") as opened:
                yield from stream_rows(file, opened)
        elif is_lines(file):
            for number, text in stream_lines(content):
                yield Row(number, text, _value(text, file, number))
        else:
            for item in stream_list(content, allow_nan=True):
                yield Row(item.number, item.text, item.value)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}", cause="row") from error
    except JSONError as error:
        problem = error.problem.replace("must be a list,", "must be a list of rows,")
        is_hint_needed = "list of rows" in problem or "Extra data" in problem
        hint = "; a file with one row per line must be named .jsonl" if is_hint_needed else ""
        raise DataError(f"{file}:{error.line}: {problem}{hint}", cause="row") from error


def _value(text: bytes, file: Path, number: int) -> Any:
    try:
        return parse_json(text, check_text=False, allow_nan=True)
    except JSONError as error:
        return DataError(f"{file}:{number}: {error.problem}", cause="row")
