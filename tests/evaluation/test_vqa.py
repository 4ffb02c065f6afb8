"""Scores, intervals, the sample drawn, and the control with other images."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4.evaluation.vqa import Accuracy, VqaQuestion, draw, normalise, score, with_other_images

COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square", None)
FACTS = {Path(f"{n}.png"): (COLOURS[n % 3], SHAPES[n // 3 % 3]) for n in range(18)}
QUESTIONS = [
    VqaQuestion(f"question {n} {kind}", str(colour), kind, image)
    for n, (image, (colour, _)) in enumerate(FACTS.items())
    for kind in ("colour", "yes/no")
]


@pytest.mark.parametrize("given_", ["Red", " red. ", "red .", "RED\n", "r ed"])
def test_answers_are_compared_without_case_blanks_and_full_stop(given_):
    assert (normalise(given_) == "red") == (given_ != "r ed")


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


def test_score_counts_in_all_and_by_kind():
    answers = [q.answer.upper() + "." if q.kind == "colour" else "no" for q in QUESTIONS]
    found = score(QUESTIONS, answers)
    assert found.overall == Accuracy(18, 36)
    assert found.by_kind == {"colour": Accuracy(18, 18), "yes/no": Accuracy(0, 18)}
    assert found.answers == answers
    lines = found.table().splitlines()
    assert lines[0].startswith("all questions")
    assert "100.0 %  (18 of 18" in lines[1]
    with pytest.raises(ValueError, match="shorter"):
        score(QUESTIONS, answers[:-1])


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (900, 1000, 0.8799, 0.9171)],
)
def test_interval_is_wilsons(correct, total, low, high):
    assert Accuracy(correct, total).interval == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_holds_the_accuracy_and_stays_within_0_and_1(case):
    accuracy = Accuracy(*case)
    low, high = accuracy.interval
    assert 0 <= low <= accuracy.value + 1e-12
    assert accuracy.value - 1e-12 <= high <= 1


def test_no_questions_give_nan():
    assert math.isnan(Accuracy(0, 0).value)
    assert all(map(math.isnan, Accuracy(0, 0).interval))


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
    found = with_other_images(QUESTIONS, FACTS, seed)
    assert found == with_other_images(QUESTIONS, FACTS, seed)
    by_text = {q.text: q for q in QUESTIONS}
    partners: dict[Path, set[Path]] = {}
    for question in found:
        original = by_text[question.text]
        assert (question.answer, question.kind) == (original.answer, original.kind)
        pairs = list(zip(FACTS[original.image], FACTS[question.image], strict=True))
        assert all(a is not None and b is not None and a != b for a, b in pairs)
        partners.setdefault(original.image, set()).add(question.image)
    assert all(len(p) == 1 for p in partners.values())
    known = [q for q in QUESTIONS if None not in FACTS[q.image]]
    assert len(found) == len(known)  # an image of which something is unknown has no partner


def test_a_control_stands_next_to_the_score():
    asked = [VqaQuestion("what color is the shape?", "red", "colour", Path("1.png"))] * 4
    own, other = score(asked, ["red"] * 4), score(asked, ["red", "blue", "blue", "blue"])
    plain = own.table().splitlines()
    lines = replace(own, control=other).table().splitlines()
    assert "control" in lines[0]
    assert [line[:18].strip() for line in lines[1:]] == ["all questions", "colour"]
    for line, alone in zip(lines[1:], plain, strict=True):
        assert line.startswith(alone)
        assert "25.0 %  (1 of 4" in line
