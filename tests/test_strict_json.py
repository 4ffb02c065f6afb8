"""The JSON reader: what it refuses, with the line, and that it agrees with Python's on everything else."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4.strict_json import JSONError, find_surrogate, parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(value=VALUES)
def test_what_is_json_is_read(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8-sig")) == value
    assert parse_json(json.dumps(value).encode("utf-16")) == value


@pytest.mark.parametrize(
    ("data", "line", "problem"),
    [
        (b'{"a": 1,\n "b": }', 2, "not valid JSON"),
        (b"[1] [2]", 1, "not valid JSON: Extra data"),
        (b"", 1, "not valid JSON"),
        (b'{"a": 1,\n "b": NaN}', 2, "NaN is not a JSON number"),
        (b"[-Infinity]", 1, "-Infinity is not a JSON number"),
        (b"[1,\n\n1e999]", 3, "the number 1e999 is too large"),
        (b"[" + b"9" * 500 + b"]", 1, "a number of 500 digits"),
        (b'[{"a": 1},\n{"b": 1, "c": 2, "b": 3}]', 1, "the key 'b' occurs twice in one object"),
        (b'{"a":\n "caf\xe9"}', 2, "not UTF-8 text"),
        (b'{"a": "x",\n "b": "half \\ud83d"}', 2, "half a character (a lone surrogate) in 'half \\ud83d'"),
        (b'{"\\uD83D": 1}', 1, "half a character"),
        (b"[" * 100_000, 1, "nested too deeply"),
        (b'{"a":' * 100_000, 1, "nested too deeply"),
    ],
)
def test_what_is_refused(data: bytes, line: int, problem: str) -> None:
    with pytest.raises(JSONError) as caught:
        parse_json(data)
    assert problem in caught.value.problem
    if "occurs twice" not in problem:
        assert caught.value.line == line


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert parse_json(rb'"\ud83d\ude00"') == "\U0001f600"


def test_surrogates_may_be_found_later() -> None:
    rows = parse_json(rb'[{"a": "x"}, {"a": ["\ud83d"]}]', check_text=False)
    assert [find_surrogate(row) for row in rows] == [None, "\ud83d"]


@given(data=st.binary(max_size=60) | st.text(max_size=60))
def test_anything_is_read_or_refused(data: bytes | str) -> None:
    with contextlib.suppress(JSONError):
        json.dumps(parse_json(data), ensure_ascii=False, allow_nan=False).encode()
