"""The JSON reader: what it refuses, with the line, and that it agrees with Python's on everything else."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4 import strict_json
from minigpt4.strict_json import JSONError, find_surrogate, parse_json, stream_lines, stream_list

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


# Streams


class Counted(io.BytesIO):
    """A file that notes the largest number of bytes asked for at once."""

    largest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.largest = max(self.largest, size or 0)
        return super().read(size)


def streamed(data: bytes) -> list[Any]:
    return [item.value for item in stream_list(io.BytesIO(data), allow_nan=True)]


@given(values=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 0, 3]), chunk=st.integers(1, 30))
def test_a_streamed_list_is_the_whole_list(values: list[Any], indent: int | None, chunk: int) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_json, "_CHUNK", chunk)
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            items = list(stream_list(io.BytesIO(text.encode(encoding))))
            assert [item.value for item in items] == values
            assert [item.number for item in items] == list(range(1, len(values) + 1))
            assert [parse_json(item.text) for item in items] == values
            lines = text.split("\n")
            assert all(lines[item.line - 1].strip() for item in items)


@given(data=st.binary(max_size=40) | st.text('[]{},:"\\ud8a1eE-.NI \n', max_size=40).map(str.encode))
def test_streams_accept_and_refuse_what_the_reader_does(data: bytes) -> None:
    def whole() -> Any:
        value = parse_json(data, check_text=False, allow_nan=True)
        return value if isinstance(value, list) else JSONError

    def outcome(read: Any) -> Any:
        try:
            return repr(read())
        except JSONError:
            return repr(JSONError)

    for chunk in (1, 3, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(strict_json, "_CHUNK", chunk)
            assert outcome(lambda: streamed(data)) == outcome(whole)


def test_a_stream_holds_one_item_at_a_time() -> None:
    item = b'{"caption": "' + b"x" * 1000 + b'"},\n'
    file = Counted(b"[" + item * 20_000 + b"{}]")
    window = 0
    for number, found in enumerate(stream_list(file), start=1):
        assert found.line == number
        window = max(window, file.tell() - number * len(item))
    assert number == 20_001
    assert file.largest <= 2 * 1024**2
    assert window < 3 * 1024**2


@pytest.mark.parametrize(
    ("data", "line", "problem"),
    [
        (b'[{"a": 1},\n{"a" 2}]', 2, "not valid JSON: Expecting ':' delimiter"),
        (b'[{"a": 1}\n{"a": 2}]', 2, "not valid JSON: Expecting ',' delimiter"),
        (b'[{"a": 1},\n]', 2, "not valid JSON: Expecting value"),
        (b'[{"a": 1},\n{"a": "x', 2, "not valid JSON: Unterminated string"),
        (b'[1,\n2]\n[3]', 3, "not valid JSON: Extra data"),
        (b'[1,\n{"a": "caf\xe9"}]', 2, "not UTF-8 text"),
        (b'[1,\n{"b": 1, "b": 3}]', 2, "the key 'b' occurs twice in one object"),
        (b'\n{"a": 1}', 2, "must be a list, found '{\"a\": 1}'"),
        (b"", 1, "not valid JSON"),
        (b"[1,\n" + b"[" * 100_000, 2, "nested too deeply"),
    ],
)  # fmt: skip
def test_a_stream_names_the_line(data: bytes, line: int, problem: str) -> None:
    with pytest.raises(JSONError) as caught:
        streamed(data)
    assert problem in caught.value.problem
    assert caught.value.line == line


def test_lines_of_any_encoding() -> None:
    text = '{"a": "é\u2028"}\r\n\n{"b": 2}'
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        lines = list(stream_lines(io.BytesIO(text.encode(encoding))))
        assert [(number, parse_json(line)) for number, line in lines] == [(1, {"a": "é\u2028"}), (3, {"b": 2})]
    with pytest.raises(JSONError, match="line 2: not UTF-16 text"):
        list(stream_lines(io.BytesIO("{}\n".encode("utf-16") + b"\x00\xd8\x00\xd8\n\x00")))


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_ITEM", 1000)
    with pytest.raises(JSONError, match="line 2: a line of more than"):
        list(stream_lines(io.BytesIO(b"{}\n" + b"x" * 5000)))
    monkeypatch.setattr(strict_json, "_CHUNK", 100)
    with pytest.raises(JSONError, match="more than 1,000 characters, or a quote is missing"):
        streamed(b'[{"a": "' + b"x" * 10_000_000)
