"""The one JSON reader, for annotations, captions, manifests, sessions and requests.

Input: bytes or text that may come from anybody. Output: plain values, or a `JSONError` with the line. What Python's
parser accepts and others do not, or what it fails on with an error of its own, is refused in one place: NaN and
infinity, numbers too large for a float or too long, keys that occur twice, text that is not Unicode, deep nesting.
"""

from __future__ import annotations

import codecs
import json
import math
from typing import Any

MAX_DIGITS = 400
"""Longest integer, in digits; more than any id or count has."""
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_SURROGATE = "\\ud"
"""Begins the escape of half a character; a pair of them is one character."""


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
        line = data[: error.start].count(b"\n") + 1
        raise JSONError(
            f"not {encoding.removesuffix('-sig').upper()} text ({error.reason}); save it as UTF-8", line
        ) from None


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
