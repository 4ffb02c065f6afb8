"""The detector of failed captions and poems: texts that fail in one way each, and texts that do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4.evaluation.scorers.failures import failures

GOOD = [
    "The image shows a man who stands next to a red car. He wears a hat, and he looks at the camera.",
    'The sign says "Stop." A dog (small and brown) sits in front of it, at 10:30 in the morning!',
    "Two people walk along the beach. The sky is blue – there are 3 clouds.",
]
REPETITIVE = [
    "The man wears a red hat. The car is blue. The man wears a red hat.",
    "a dog and a cat and a dog and a cat and a dog and a cat and a dog and a cat and a mouse.",
]
BROKEN = ["The image shows a man who stands next to a red car and he is", "There is a dog on the grass,"]
NONSENSE = ["", "yes.", "#### ## ;; 4x@ %% ## !! -- <<", "a � b � c � d � e � f � g �."]


@pytest.mark.parametrize(
    ("texts", "kind"),
    [(GOOD, ""), (REPETITIVE, "repetition"), (BROKEN, "breaking off"), (NONSENSE, "nonsense")],
)
def test_each_kind_of_failure_is_found_and_only_it(texts, kind):
    for text in texts:
        found = {s.name: s.value() for s in failures([{"answer": text}])}
        assert found["failure rate"] == bool(kind), text
        if kind:
            assert found[kind] == 1, text
        if kind in ("repetition", "breaking off"):
            assert sum(found.values()) == 2, text


def test_a_poem_needs_no_full_stop():
    poem = "The sun goes down behind the hill\nAnd all the quiet town is still"
    rows = [{"answer": poem, "kind": kind} for kind in ("poem", "caption")]
    assert failures(rows)[0].each.tolist() == [0, 1]
    assert failures([{"answer": poem + ",", "kind": "poem"}])[0].value() == 1


@given(st.text())
def test_any_text_is_judged(text):
    assert failures([{"answer": text}])[0].value() in (0, 1)
