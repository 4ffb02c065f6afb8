"""VQA accuracy over the answers of several people: the official script's rule, and VizWiz's.

The official rule is that of `vqaEval.py` (GT-Vision-Lab/VQA): each of ten people is left out once; the answer gets a
third of a point for each of the other nine who gave it, at most one; the ten results are averaged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from minigpt4.evaluation.scorers.answers import Row, normalise
from minigpt4.evaluation.statistics import Statistic, mean

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
PUNCTUATION = (*';/[]"{}()=+\\_-><@`,?!',)
"""The marks of the official script, in its order."""
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_SHORT_FORMS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've "
    "mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
    "there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're "
    "why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


def _contractions() -> dict[str, str]:
    """Return what the official script writes for short forms that lack an apostrophe, with its oddities."""
    table = {}
    for form in _SHORT_FORMS.split():
        parts = form.split("'")
        gaps = range(1, len(parts))
        if len(parts) <= 2:
            table["".join(parts)] = form
        else:  # one apostrophe is missing: couldn'tve, couldnt've
            for gap in gaps:
                table["'".join([*parts[: gap - 1], parts[gap - 1] + parts[gap], *parts[gap + 1 :]])] = form
    table |= {"somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}
    return table


CONTRACTIONS = _contractions()


def without_punctuation(text: str) -> str:
    """Return text without the official script's punctuation: removed next to a blank, else replaced by one."""
    found = text
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        is_loose = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if is_loose or has_number else " ")
    return _FULL_STOP.sub("", found)


def with_plain_words(text: str) -> str:
    """Return lower-case text with digits for numbers, without articles, and with apostrophes in short forms."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=200_000)
def _plain(text: str) -> str:
    return with_plain_words(without_punctuation(text))


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return the official accuracy of one answer, 0..1.

    Args:
        answer: of the model.
        people: the answers of the people who were asked, usually ten.
    """
    given = answer.replace("\n", " ").replace("\t", " ").strip()
    known = [each.replace("\n", " ").replace("\t", " ").strip() for each in people]
    if len(set(known)) > 1:
        known, given = [_plain(each) for each in known], _plain(given)
    known, given = [each.lower() for each in known], given.lower()
    matches = Counter(known)[given]
    if not known:
        return 0.0
    left_out = [min(1.0, (matches - (each == given)) / 3) for each in known]
    return sum(left_out) / len(left_out)


def official(rows: Sequence[Row]) -> list[Statistic]:
    """VQAv2, OK-VQA: the official accuracy over `truth.answers`, after lower-casing and dropping `<unk>`."""
    values = [vqa_accuracy(row["answer"].lower().replace("<unk>", "").strip(), row["truth"]["answers"]) for row in rows]
    return [mean("accuracy", values, "%")]


def vizwiz(rows: Sequence[Row]) -> list[Statistic]:
    """VizWiz, A-OKVQA's direct answers: min(people who gave the answer / 3, 1)."""
    values = []
    for row in rows:
        answer = normalise(row["answer"])
        values.append(min(1.0, sum(normalise(each) == answer for each in row["truth"]["answers"]) / 3))
    return [mean("accuracy", values, "%")]
