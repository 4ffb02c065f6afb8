"""The text of an answer: end marks and stop texts, however they are split, and the ids that are kept."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.chat.answer import Answer
from minigpt4.config.sections import ChatConfig
from tests.models import parts

ENCODER = parts.encoder()
TOKENIZER = ENCODER.tokenizer
PIECES = [*"ab!#", " ", "\n", "##", "###", "a b", "é", "🦜", "b\n", "#b"]


def spell(*pieces: tuple[str, bool]) -> list[int]:
    """Tokenise each piece alone, as the vocabulary has it or, where it says so, byte by byte."""
    ids: list[int] = []
    convert: Any = TOKENIZER.tokenizer.convert_tokens_to_ids
    for piece, in_bytes in pieces:
        if in_bytes:
            ids += convert([f"<0x{byte:02X}>" for byte in piece.encode()])
        else:
            ids += TOKENIZER.tokenize([(piece, False)])
    return ids


def grow(
    ids: list[int], stop: tuple[str, ...] = (), end_ids: tuple[int, ...] = (2,), most: int = 500
) -> tuple[list[str], Answer]:
    """Return the text after each token, and the answer."""
    answer = Answer(ENCODER, ChatConfig(max_new_tokens=most), end_ids, stop)
    shown = []
    for token in ids:
        answer.add(token)
        shown.append(answer.text)
        if answer.finish_reason:
            break
    return shown, answer


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(PIECES), st.booleans()), min_size=1, max_size=12),
    st.lists(st.sampled_from(["b\n", "!a", "🦜", "a b!"]), max_size=2, unique=True),
)
def test_marks_never_show_however_they_are_split(pieces, stop):
    ids = spell(*pieces)
    shown, answer = grow(ids, tuple(stop))
    whole = TOKENIZER.decode(ids, keep_special=True)
    places = [place for mark in ("###", *stop) if (place := whole.find(mark)) >= 0]
    if places:
        assert answer.finish_reason == "stop"
        assert answer.text == whole[: min(places)].strip()
    else:
        assert answer.finish_reason is None
        answer.cancel()
        assert whole.strip().startswith(answer.text)
    for earlier, later in zip(shown, [*shown[1:], answer.text], strict=True):
        assert later.startswith(earlier)  # what was shown is never taken back


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PIECES), st.booleans()), min_size=1, max_size=12), st.integers(1, 20))
def test_kept_ids_spell_the_answer(pieces, most):
    """Ended by its mark, by its length or by a stop text, and with any token across its end."""
    ids = spell(*pieces)
    _, answer = grow([*ids, 2], most=most)
    kept = answer.kept_ids()
    if "\ufffd" not in answer.text:  # bytes that are no character are decoded one way alone, another in a row
        assert TOKENIZER.decode(kept, keep_special=True).strip() == answer.text
    assert "###" not in TOKENIZER.decode(kept, keep_special=True)
    common = [a == b for a, b in zip(kept, ids, strict=False)]
    assert all(common[: len(kept) - 2])  # what the model chose, but for a straddling end


def test_an_end_token_ends_and_is_counted():
    shown, answer = grow([*spell(("a", True)), 2])
    assert shown == ["a", "a"]
    assert answer.finish_reason == "stop"
    assert len(answer.ids) == 2
    assert answer.kept_ids() == spell(("a", True))


@pytest.mark.parametrize(("most", "reason"), [(3, "length"), (4, "stop")])
def test_an_answer_that_is_full(most, reason):
    """The mark may come with the very last token."""
    _, answer = grow(spell(("a", True), ("###", True)), most=most)
    assert answer.finish_reason == reason
    assert answer.text == ("a" if reason == "stop" else "a##")


def test_half_a_character_shows_at_the_end_only():
    ids = spell(("a", True), ("🦜", True))
    assert grow(ids[:-1], most=4)[0] == ["a", "a", "a", "a\ufffd\ufffd\ufffd"]
    assert grow(ids)[0] == ["a", "a", "a", "a", "a🦜"]


def test_cancelling_keeps_what_was_shown():
    _, answer = grow(spell(("a", True), (" ", True), ("#", True)))
    answer.cancel()
    assert (answer.text, answer.finish_reason) == ("a", "cancelled")
    assert answer.kept_ids() == spell(("a", True))
    answer.cancel()
    assert answer.finish_reason == "cancelled"
