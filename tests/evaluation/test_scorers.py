"""Scorers against the reference implementations' figures and against hand-worked cases."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.evaluation.scorers.answers import exact, normalise, says_yes, yes_no
from minigpt4.evaluation.scorers.captions import captions, longest_common, rouge_l
from minigpt4.evaluation.scorers.choices import choices
from minigpt4.evaluation.scorers.tokens import tokenize
from minigpt4.evaluation.scorers.vqa import official, vizwiz, vqa_accuracy, with_plain_words, without_punctuation

CAPTIONS = [
    ("A man isn't riding a t-shirt, it's red.", ["A man rides a red bike.", "The man's bike is red!"]),
    ("Two (2) dogs & a cat; they're on a U.S. flag!", ["Two dogs and a cat sit on a flag.", "Dogs, cats: on a flag"]),
    ("a sign that says 'stop' on the street", ["A stop sign on the street.", "a red stop sign, next to a street"]),
    ("", ["A plate of food.", "Food on a plate"]),
    ('The child\'s "toy" costs $5.00', ["The child's toy costs $5.00.", "A toy."]),
    ("a a a a a a a a a a a a", ["A black-and-white photo of a cat.", "a cat"]),
]
BLEU = (0.5490196078323722, 0.3623358904694351, 0.2678325569424241, 0.21494972717561397)
ROUGE = (0.5236051502145923, 0.6421052631578947, 0.7331730769230769, 0.0, 1.0, 0.27477477477477474)
CIDER = (0.9846194242425611, 0.6586430629504443, 2.2766904420605307, 0.0, 5.375771135070751, 0.0)
"""Of pycocoevalcap 1.2 with its PTB tokenizer (Java), on CAPTIONS."""


def caption_rows(pairs=CAPTIONS):
    return [{"answer": answer, "truth": {"captions": known}} for answer, known in pairs]


def test_caption_scores_are_those_of_pycocoevalcap():
    found = {statistic.name: statistic for statistic in captions(caption_rows())}
    assert [found[f"BLEU-{n}"].value() for n in (1, 2, 3, 4)] == pytest.approx(BLEU, rel=1e-14)
    assert found["ROUGE-L"].each == pytest.approx(ROUGE, rel=1e-14)
    assert found["CIDEr-D"].each == pytest.approx(CIDER, rel=1e-13)
    assert found["words"].each.tolist() == [8, 11, 8, 0, 5, 12]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man isn't riding a t-shirt, it's red.", "a man is n't riding a t-shirt it 's red"),
        ("Two (2) dogs & a cat; they're on a U.S. flag!", "two -lrb- 2 -rrb- dogs & a cat they 're on a u.s. flag"),
        ("she can't... won't stop -- really?", "she ca n't wo n't stop really"),
        ("He cannot go, I'm sure he'd've known.", "he can not go i 'm sure he 'd 've known"),
        ("50% of 3/4 and/or café #1", "50 % of 3/4 and/or café # 1"),
        ("A black-and-white photo of Mr. Smith's 1,000 bikes", "a black-and-white photo of mr. smith 's 1,000 bikes"),
        ("", ""),
    ],
)
def test_words_are_those_of_the_ptb_tokenizer(caption, words):
    assert " ".join(tokenize(caption)) == words


def test_a_caption_equal_to_its_reference_has_the_best_scores():
    pairs = [(text, [text, "something else"]) for text in ("a red car on the road", "two small dogs in a garden")]
    found = {statistic.name: statistic.value() for statistic in captions(caption_rows(pairs))}
    assert found["BLEU-4"] == pytest.approx(1)
    assert found["ROUGE-L"] == pytest.approx(1)
    assert found["CIDEr-D"] == pytest.approx(5)  # 10 for the equal one, 0 for the other


@given(st.permutations(range(len(CAPTIONS))))
def test_the_order_of_captions_changes_nothing(order):
    one, other = captions(caption_rows()), captions(caption_rows([CAPTIONS[n] for n in order]))
    assert [s.value() for s in one] == pytest.approx([s.value() for s in other], rel=1e-12)


@given(st.lists(st.tuples(st.text(), st.lists(st.text(), min_size=1, max_size=3)), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_any_text_has_finite_scores(pairs):
    assert all(np.isfinite(s.value()) and s.value() >= 0 for s in captions(caption_rows(pairs)))


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_the_longest_common_subsequence_is_that_of_the_table(one, other):
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    assert longest_common(one, other) == table[-1][-1]
    assert rouge_l(one, [one]) == 1


@pytest.mark.parametrize(
    ("answer", "people", "value"),
    [
        ("cat", ["cat"] * 10, 1.0),
        ("cat", ["cat"] * 3 + ["dog"] * 7, 0.9),  # left out: 3 x 2/3 + 7 x 1
        ("cat", ["cat"] * 2 + ["dog"] * 8, 0.6),
        ("cat", ["cat"] + ["dog"] * 9, 0.3),
        ("cat", ["dog"] * 10, 0.0),
        ("The cat.", ["cat"] * 9 + ["dog"], 1.0),
        ("The cat.", ["cat"] * 10, 0.0),  # nothing is normalised where all agree
        ("two", ["2"] * 9 + ["3"], 1.0),
        ("dont", ["don't"] * 5 + ["do"] * 5, 1.0),
        ("", ["cat"] * 5 + ["dog"] * 5, 0.0),
    ],
)
def test_vqa_accuracy_is_that_of_the_official_rule(answer, people, value):
    assert vqa_accuracy(answer, people) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("1,000 bikes", "1000 bikes"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("5.5 feet.", "5.5 feet"),
        ("yes!", "yes "),
        ("t-shirt", "t shirt"),
    ],
)
def test_punctuation_is_that_of_the_official_script(text, plain):
    assert without_punctuation(text) == plain


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("A dog and the Cat", "dog and cat"),
        ("none", "0"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("ten oclock", "10 o'clock"),
        ("id've", "id've"),
    ],
)
def test_words_are_those_of_the_official_script(text, plain):
    assert with_plain_words(text) == plain


@given(st.text(), st.lists(st.text(), min_size=1, max_size=10), st.randoms())
def test_vqa_accuracy_does_not_depend_on_the_order_of_people(answer, people, random):
    mixed = people[:]
    random.shuffle(mixed)
    assert vqa_accuracy(answer, people) == pytest.approx(vqa_accuracy(answer, mixed))
    assert 0 <= vqa_accuracy(answer, people) <= 1


def test_vizwiz_leaves_nobody_out():
    rows = [{"answer": "Cat.", "truth": {"answers": ["cat"] * n + ["dog"] * (10 - n)}} for n in (0, 1, 2, 3, 10)]
    assert vizwiz(rows)[0].each == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert official(rows)[0].each == pytest.approx([0, 0.3, 0.6, 0.9, 0])


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, there is a dog.", True),
        ("No, there is not.", False),
        ("no", False),
        ("There is not a dog in the image.", False),
        ("Nothing like it.", True),  # only the words No, not, no
        ("NO", True),
        ("A dog. No cat.", True),  # the first sentence decides
        ("No.", False),
        ("No,", False),
        ("", True),
    ],
)
def test_yes_and_no_are_read_as_in_pope(answer, yes):
    assert says_yes(answer) == yes


def test_pope_scores_of_a_hand_worked_table():
    """3 hits, 2 false alarms, 1 miss, 4 right rejections."""
    pairs = [("yes", "yes")] * 3 + [("yes", "no")] * 2 + [("no", "yes")] + [("no", "no")] * 4
    found = {s.name: s.value() for s in yes_no([{"answer": a, "truth": {"answer": t}} for a, t in pairs])}
    assert found == pytest.approx({"accuracy": 0.7, "precision": 0.6, "recall": 0.75, "F1": 2 / 3, "yes": 0.5})


@pytest.mark.parametrize("text", ["Red", " red. ", "red .", "RED\n", "r ed"])
def test_answers_are_compared_without_case_blanks_and_full_stop(text):
    assert (normalise(text) == "red") == (text != "r ed")
    assert exact([{"answer": text, "truth": {"answer": "red"}}])[0].value() == (text != "r ed")


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


def test_choices_by_loss_per_token_and_per_position():
    row = {"truth": {"choices": ["a", "b c d"], "answer": "b c d"}, "losses": [1.0, 2.4], "tokens": [2, 6]}
    found = {s.name: s.value() for s in choices([{**row, "positions": [50, 54]}])}
    assert found == {"accuracy": 1.0, "published rule": 0.0}  # 0.5 and 0.4; 0.02 and 0.044


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_seconds():
    rows = [
        {"answer": f"yes {n % 7}", "truth": {"answer": "yes", "answers": ["yes", "no", f"yes {n % 5}"] * 3}}
        for n in range(100_000)
    ]
    started = time.monotonic()
    for scorer in (exact, yes_no, official, vizwiz):
        assert all(np.isfinite(s.value()) for s in scorer(rows))
    assert time.monotonic() - started < 30
