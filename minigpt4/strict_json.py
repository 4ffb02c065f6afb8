"""The one JSON reader, for annotations, captions, manifests, sessions and requests.

Input: bytes or text that may come from anybody, whole or as a stream of any size. Output: plain values, or a
`JSONError` with the line. What Python's parser accepts and others do not, or what it fails on with an error of its own,
is refused in one place: NaN and infinity, numbers too large for a float or too long, keys that occur twice, text that
is not Unicode, deep nesting.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

MAX_DIGITS = 400
"""Longest integer, in digits; more than any id or count has."""
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_SURROGATE = "\\ud"
"""Begins the escape of half a character; a pair of them is one character."""


MAX_ITEM = 64 * 1024**2
"""Longest line or list item that is read from a stream, in characters."""
_CHUNK = 1024**2
_SPACE = re.compile(r"[ \t\r\n]*")
_NEAR = 16
"""An error this close to the end of what was read, in characters, may come from what is missing behind it."""


class JSONError(ValueError):
    """Text that is not JSON as this reader accepts it.

    Attributes:
        problem: what is wrong, without the line.
        line: where, counted from 1 in the text that was given.
    """

    def __init__(self, problem: str, line: int = 1) -> None:
        super().__init__(f"line {line}: {problem}")
        self.problem = problem
        self.line = line


def parse_json(data: bytes | str, *, check_text: bool = True, allow_nan: bool = False) -> Any:
    """Return the value of a JSON document.

    Args:
        data: text, or bytes in UTF-8 (with or without a byte order mark) or in UTF-16 with one.
        check_text: refuse half a character (a lone surrogate); else `find_surrogate` finds them later, row by row.
        allow_nan: accept NaN and infinity, which programs write into fields that are not read here.

    Raises:
        JSONError: it is not valid JSON, or has something in it that no reader should pass on.
    """
    text = _decode(data) if isinstance(data, bytes) else data
    try:
        value = (_NAN_DECODER if allow_nan else _DECODER).decode(text)
    except json.JSONDecodeError as error:
        raise JSONError(f"not valid JSON: {error.msg}", error.lineno) from error
    except RecursionError as error:
        raise JSONError("nested too deeply") from error
    except _RefusedError as error:
        raise JSONError(str(error), _line_of(text, error.token)) from error
    if check_text and _SURROGATE in text.lower() and (found := find_surrogate(value)) is not None:
        raise JSONError(f"half a character (a lone surrogate) in {found[:40]!r}", _line_of(text, _SURROGATE))
    return value


def find_surrogate(value: Any) -> str | None:
    """Return a text in `value`, keys included, with a lone surrogate, which cannot be written as UTF-8, or None."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                return item
        elif isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
    return None


class ListItem(NamedTuple):
    """One item of a list that is read piece by piece: its number and first line, both from 1, its text and value."""

    number: int
    line: int
    text: str
    value: Any


def stream_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the text, in UTF-8, of every line that is not blank, holding one of them at a time.

    Args:
        file: of lines in UTF-8, or in UTF-16 with a byte order mark; the marks are left out.

    Raises:
        JSONError: a line is longer than `MAX_ITEM` bytes, or is not UTF-16.
    """
    lines: Iterator[bytes] = iter(lambda: file.readline(MAX_ITEM), b"")
    if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.seek(0)
        lines = _utf16_lines(file)
    else:
        file.seek(0)
    for number, line in enumerate(lines, start=1):
        if len(line) >= MAX_ITEM:
            raise JSONError(f"a line of more than {MAX_ITEM:,} bytes", number)
        text = line.removeprefix(codecs.BOM_UTF8).strip()
        if text:
            yield number, text


def stream_list(file: BinaryIO, *, allow_nan: bool = False) -> Iterator[ListItem]:
    """Yield the items of a JSON list of any size, holding about one of them at a time.

    The items are what `parse_json(..., check_text=False)` gives. What is wrong with the text is found when the items
    before it have been yielded.

    Args:
        file: the whole document is a list, in UTF-8 or in UTF-16 with a byte order mark.
        allow_nan: accept NaN and infinity.

    Raises:
        JSONError: it is not a list, not valid JSON, or an item is longer than `MAX_ITEM` characters.
    """
    window = _Window(file, _NAN_DECODER if allow_nan else _DECODER)
    if window.character() != "[":
        shown = window.text[window.place :][:60]
        raise JSONError(f"must be a list, found {shown!r}" if shown else "not valid JSON: Expecting value", window.line)
    window.advance(1)
    has_item = window.character() != "]"
    number = 0
    while has_item:
        number += 1
        line = window.line
        value, text = window.value()
        yield ListItem(number, line, text, value)
        has_item = window.character() == ","
        if has_item:
            window.advance(1)
            window.character()
    if window.character() != "]":
        raise JSONError("not valid JSON: Expecting ',' delimiter", window.line)
    window.advance(1)
    if window.character():
        raise JSONError("not valid JSON: Extra data", window.line)


class _Window:
    """The part of a document that is in memory; `place` is where reading has come to, and `line` its line."""

    def __init__(self, file: BinaryIO, decoder: json.JSONDecoder) -> None:
        mark = file.read(3)
        file.seek(0)
        self.encoding = next((name for bom, name in _BOMS if mark.startswith(bom)), "utf-8")
        self.text, self.place, self.line = "", 0, 1
        self._file = file
        self._decoder = decoder
        self._bytes = codecs.getincrementaldecoder(self.encoding)()
        self._at_end = False

    def character(self) -> str:
        """Skip white space, and return the character behind it; empty at the end of the document."""
        while True:
            match = _SPACE.match(self.text, self.place)
            self.advance((match.end() if match else 0) - self.place)
            if self.place < len(self.text) or self._at_end:
                return self.text[self.place : self.place + 1]
            self._read(_CHUNK)

    def advance(self, length: int) -> None:
        """Pass over `length` characters."""
        self.line += self.text.count("\n", self.place, self.place + length)
        self.place += length

    def value(self) -> tuple[Any, str]:
        """Read one value, and return it with its text."""
        size = _CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                is_near_end = error.pos >= len(self.text) - _NEAR or error.msg.startswith("Unterminated string")
                if self._at_end or not is_near_end:
                    line = self.line + self.text.count("\n", self.place, error.pos)
                    raise JSONError(f"not valid JSON: {error.msg}", line) from error
            except RecursionError as error:
                raise JSONError("nested too deeply", self.line) from error
            except _RefusedError as error:
                line = _line_of(self.text[self.place :], error.token) + self.line - 1
                raise JSONError(str(error), line) from error
            else:
                if end + _NEAR <= len(self.text) or self._at_end:  # else a number may continue, as `1e` does
                    text = self.text[self.place : end]
                    self.advance(end - self.place)
                    return value, text
            if len(self.text) - self.place > MAX_ITEM:
                raise JSONError(f"an item of more than {MAX_ITEM:,} characters, or a quote is missing", self.line)
            self._read(size)
            size *= 2

    def _read(self, size: int) -> None:
        """Forget what was passed, and read `size` bytes more."""
        self.text, self.place = self.text[self.place :], 0
        data = self._file.read(size)
        self._at_end = not data
        try:
            self.text += self._bytes.decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            before = self.text.count("\n") + error.object[: error.start].count(b"\n")
            raise _encoding_error(self.encoding, error, self.line + before) from None


class _RefusedError(ValueError):
    """A value that is refused while parsing; `token` finds its line."""

    def __init__(self, problem: str, token: str) -> None:
        super().__init__(problem)
        self.token = token


def _decode(data: bytes) -> str:
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _encoding_error(encoding, error, data[: error.start].count(b"\n") + 1) from None


def _encoding_error(encoding: str, error: UnicodeDecodeError, line: int) -> JSONError:
    return JSONError(f"not {encoding.removesuffix('-sig').upper()} text ({error.reason}); save it as UTF-8", line)


def _utf16_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file in UTF-16, in UTF-8."""
    reader = io.TextIOWrapper(file, "utf-16", newline="\n")
    number = 1
    try:
        while line := reader.readline(MAX_ITEM):
            yield line.encode("utf-8", "surrogatepass")
            number += 1
    except UnicodeDecodeError as error:
        before = error.object[: error.start].count(b"\n")
        raise _encoding_error("utf-16", error, number + before) from None
    finally:
        reader.detach()


def _line_of(text: str, token: str) -> int:
    return text[: max(0, text.lower().find(token.lower()))].count("\n") + 1


def _integer(token: str) -> int:
    if len(token) > MAX_DIGITS:
        raise _RefusedError(f"a number of {len(token)} digits", token)
    return int(token)


def _number(token: str) -> float:
    value = float(token)
    if not math.isfinite(value):
        raise _RefusedError(f"the number {token[:40]} is too large", token)
    return value


def _constant(token: str) -> Any:
    raise _RefusedError(f"{token} is not a JSON number", token)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RefusedError(f"the key {twice[:40]!r} occurs twice in one object", json.dumps(twice))
    return found


_DECODER = json.JSONDecoder(
    parse_int=_integer, parse_float=_number, parse_constant=_constant, object_pairs_hook=_object
)
_NAN_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_number, object_pairs_hook=_object)
