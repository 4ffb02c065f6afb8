"""The failures that the paper's Table 3 counts by hand: repetition, breaking off, nonsense; here by stated rules.

The rules find what can be seen in the text alone. Whether a text fits its image is not among them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from minigpt4.evaluation.scorers.answers import Row
from minigpt4.evaluation.statistics import Statistic, mean

LEAST_WORDS = 5
"""A description or poem with fewer words is nonsense."""
REPEATED_SENTENCE = 4
"""Words from which on a sentence may occur only once."""
REPEATED_RUN = 3
"""Times that one run of four words may occur."""
ODD_WORDS = 0.2
"""Share of words without a letter, with mixed letters and digits, or with a broken character, that makes nonsense."""
_SENTENCE = re.compile(r"[^.!?\n]+")
_END = re.compile(r"[.!?…]['\"”’)\]]*$")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*[.,;:!?…\"'”’)]*|[\"'“‘(]+[^\W\d_]+.*|\d+(?:[.,:]\d+)*%?[.,;:!?]*")


def is_repetitive(text: str) -> bool:
    """Return whether a sentence of at least four words occurs twice, or four words in a row more than three times."""
    sentences = [" ".join(each.lower().split()) for each in _SENTENCE.findall(text)]
    long = Counter(each for each in sentences if len(each.split()) >= REPEATED_SENTENCE)
    words = text.lower().split()
    runs = Counter(zip(*(words[n:] for n in range(4)), strict=False))
    return max(long.values(), default=0) > 1 or max(runs.values(), default=0) > REPEATED_RUN


def breaks_off(text: str, *, is_poem: bool = False) -> bool:
    """Return whether the text ends inside a sentence; a poem may end without a full stop, in a word."""
    end = text.rstrip()
    if is_poem:
        return bool(end) and not (_END.search(end) or end[-1].isalpha())
    return bool(end) and _END.search(end) is None


def is_nonsense(text: str) -> bool:
    """Return whether a text has fewer than five words, or a fifth of its words are none."""
    words = text.split()
    odd = sum(_WORD.fullmatch(word) is None for word in words if word not in {"-", "–", "—", "&"})
    return len(words) < LEAST_WORDS or odd > ODD_WORDS * len(words)


def failures(rows: Sequence[Row]) -> list[Statistic]:
    """Return the share of answers that fail, and of each kind of failure; poems are rows of kind `poem`."""
    found = {
        "repetition": [is_repetitive(row["answer"]) for row in rows],
        "breaking off": [breaks_off(row["answer"], is_poem=row.get("kind") == "poem") for row in rows],
        "nonsense": [is_nonsense(row["answer"]) for row in rows],
    }
    fails = [any(each) for each in zip(*found.values(), strict=True)]
    return [mean("failure rate", fails, "%"), *(mean(name, values, "%") for name, values in found.items())]
