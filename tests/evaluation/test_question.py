"""The sample drawn, and the controls: other images, a blank one, none."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.errors import DataError
from minigpt4.evaluation.question import Question, check_ids, data_hash, draw, with_images

COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square", None)
QUESTIONS = [
    Question(f"{n}{kind}", f"{n}.png", f"{kind}?", {"answer": "x"}, kind, Path(f"{n}.png"), facts=facts)
    for n, facts in enumerate((COLOURS[n % 3], SHAPES[n // 3 % 3]) for n in range(18))
    for kind in ("colour", "yes/no")
]


def test_a_sample_is_fixed_ordered_and_without_repeats():
    found = draw(QUESTIONS, 10, seed=3)
    assert found == draw(QUESTIONS, 10, seed=3)
    assert found != draw(QUESTIONS, 10, seed=4)
    places = [QUESTIONS.index(q) for q in found]
    assert places == sorted(set(places))
    assert len(places) == 10
    assert draw(QUESTIONS, 0, seed=3) == draw(QUESTIONS, 999, seed=3) == QUESTIONS


@pytest.mark.parametrize("seed", range(5))
def test_other_images_differ_in_every_fact_and_keep_the_answers(seed):
    found = with_images(QUESTIONS, "shuffled", seed)
    assert found == with_images(QUESTIONS, "shuffled", seed)
    facts = {q.image: q.facts for q in QUESTIONS}
    partners: dict[str, set[str]] = {}
    for question in found:
        assert all(
            a is not None and b is not None and a != b
            for a, b in zip(question.facts, facts[question.shown], strict=True)
        )
        assert question.source == Path(question.shown)
        partners.setdefault(question.image, set()).add(question.shown)
    assert all(len(p) == 1 for p in partners.values())
    assert len(found) == sum(None not in q.facts for q in QUESTIONS)  # where a fact is unknown, there is no partner


def test_without_facts_every_image_gets_another_one():
    plain = [Question(str(n), f"{n % 7}.png", "?", {}, source=Path(f"{n % 7}.png")) for n in range(20)]
    found = with_images(plain, "shuffled", 1)
    assert [q.id for q in found] == [q.id for q in plain]
    assert all(q.shown != q.image for q in found)
    assert with_images(plain[:1], "shuffled", 1) == []


def test_a_blank_image_is_grey_and_none_is_none():
    blank = with_images(QUESTIONS, "blank", 0)[0].source
    assert isinstance(blank, bytes)
    assert Image.open(io.BytesIO(blank)).getcolors() == [(224 * 224, (128, 128, 128))]
    assert with_images(QUESTIONS, "none", 0)[0].source is None
    assert with_images(QUESTIONS, "own", 0) == QUESTIONS


def test_the_data_hash_changes_with_text_truth_and_image(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"123")
    one = Question("1", "a.png", "what?", {"answer": "x"}, source=file)
    first = data_hash([one])
    assert first == data_hash([one])
    assert first != data_hash([Question("1", "a.png", "what?", {"answer": "y"}, source=file)])
    assert first != data_hash([Question("1", "a.png", "who?", {"answer": "x"}, source=file)])
    file.write_bytes(b"1234")
    assert first != data_hash([one])


def test_no_question_and_two_of_one_id_are_refused():
    with pytest.raises(DataError, match="my task: there is no question"):
        check_ids([], "my task")
    with pytest.raises(DataError, match="two questions have the id '0colour'"):
        check_ids([QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]], "my task")
