"""Crossed pairs of easy-VQA: the same questions, opposite answers, and a stream that can be continued anywhere."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from minigpt4.config.parts import CrossedVQAConfig
from minigpt4.datasets.crossed_vqa import GROUP, CrossedVQA
from minigpt4.datasets.easy_vqa import COLOURS, SHAPES
from minigpt4.datasets.source import Example, Item
from minigpt4.errors import DataError
from tests.datasets.parts import image_bytes

IMAGES = {n: (colour, shape) for n, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES)}
WORDINGS = {
    False: ("is there a {} shape?", "does the image contain a {}?"),
    True: ("is there not a {} shape?", "is no {} present?"),
}


def write_set(folder: Path, images: dict[int, tuple[str, str]] = IMAGES) -> Path:
    """Write a data set that has an image for each entry, and ask of the first about everything."""
    (folder / "train/images").mkdir(parents=True)
    rows = []
    for n, (colour, shape) in images.items():
        (folder / f"train/images/{n}.png").write_bytes(image_bytes(n, "PNG"))
        rows += [["what color is the shape?", colour, n], ["what shape is in the image?", shape, n]]
    for thing in (*COLOURS, *SHAPES):
        for negated, texts in WORDINGS.items():
            rows += [[text.format(thing), "yes" if (thing in images[0]) != negated else "no", 0] for text in texts]
    (folder / "train/questions.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("crossed"))


def source(folder: Path, **settings: Any) -> CrossedVQA:
    return CrossedVQA.from_config(CrossedVQAConfig(path=str(folder), **settings), name="pairs")


def examples(items: Any) -> list[Example]:
    found: list[Item] = list(items)
    assert all(isinstance(item, Example) for item in found), found
    return found  # type: ignore[return-value]


def asked(example: Example) -> dict[str, str]:
    """Return the yes/no questions of an example, with their answers."""
    return {turn.question: str(turn.answer) for turn in example.dialogue.turns if turn.answer in ("yes", "no")}


def test_a_group_has_an_image_of_each_colour_and_pairs_that_answer_each_question_both_ways(folder):
    items = examples(islice(source(folder).stream(1, 0, 1), 10 * GROUP))
    facts = [IMAGES[int(item.id.rpartition("/")[2])] for item in items]
    for start in range(0, len(items), GROUP):
        assert sorted(colour for colour, _ in facts[start : start + GROUP]) == sorted(COLOURS)
    for n in range(0, len(items), 2):
        one, other = asked(items[n]), asked(items[n + 1])
        assert list(one) == list(other)
        assert len(one) == 4
        assert all(one[text] != other[text] for text in one)
        assert sorted(one.values()) == ["no", "no", "yes", "yes"]
        for text, answer in one.items():
            thing = next(word for word in (*COLOURS, *SHAPES) if word in text.rstrip("?").split())
            is_negated = bool({"not", "no"} & set(text.split()))
            assert answer == ("yes" if (thing in facts[n]) != is_negated else "no")


def test_negation_comes_last(folder):
    def negated(item: Example) -> bool:
        return any({"not", "no"} & set(text.split()) for text in asked(item))

    items = examples(islice(source(folder, negated_after=5 * GROUP, negated=1.0).stream(1, 0, 1), 10 * GROUP))
    assert [negated(item) for item in items] == [False] * 5 * GROUP + [True] * 5 * GROUP
    readers = [
        examples(islice(source(folder, negated_after=4 * GROUP, negated=1.0).stream(1, r, 2), 4 * GROUP))
        for r in range(2)
    ]
    assert [negated(items[2 * GROUP - 1]) for items in readers] == [False, False]  # counted over all readers
    assert [negated(items[2 * GROUP]) for items in readers] == [True, True]


@pytest.mark.parametrize("start", [1, GROUP, 3 * GROUP + 5])
def test_a_stream_continues_from_any_position(folder, start):
    whole = examples(islice(source(folder, described=0.5).stream(7, 1, 2), start + 12))
    assert examples(islice(source(folder, described=0.5).stream(7, 1, 2, start), 12)) == whole[start:]


def test_readers_and_seeds_get_different_groups(folder):
    streams = [source(folder).stream(seed, reader, 2) for seed, reader in ((1, 0), (1, 1), (2, 0))]
    first = [[item.id for item in examples(islice(stream, 4 * GROUP))] for stream in streams]
    assert first[0] != first[1]
    assert first[0] != first[2]


def test_in_order_every_image_is_described_first_and_the_pass_is_the_same_each_time(folder):
    items = examples(source(folder).in_order())
    assert items == examples(source(folder).in_order())
    assert len(items) == len(IMAGES)
    for item in items:
        colour, shape = IMAGES[int(item.id.rpartition("/")[2])]
        assert f"a {colour} {shape}" in str(item.dialogue.turns[0].answer)


def test_shares_of_own_questions_and_descriptions(folder):
    bare = examples(islice(source(folder, what=0, described=0.0).stream(1, 0, 1), GROUP))
    assert all(len(item.dialogue.turns) == 4 for item in bare)
    full = examples(islice(source(folder, what=5, described=1.0).stream(1, 0, 1), GROUP))
    assert all(len(item.dialogue.turns) == 7 for item in full)


def test_too_few_images_for_pairs_are_an_error(tmp_path):
    lone = {n: facts for n, facts in IMAGES.items() if facts[0] != "teal" or facts[1] == "circle"}
    with pytest.raises(DataError, match=r"pairs: .*two shapes of every colour; train has 1 of teal"):
        source(write_set(tmp_path, lone))
