"""Visual question answering: ask each question alone, compare the answer with the known one.

Input: questions, their images, and the answers a model gave. Output: `VqaScore`, in all and by kind of question, with
95 % intervals. The shuffle control asks about an image of another colour and shape and keeps the original answers: a
model that looks at its images falls to chance, one that reads answers off the text scores the same as before.
"""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Asked:
    """One question about one image.

    Attributes:
        text: the question.
        answer: the right answer.
        kind: group it is counted under.
        image: file of the image.
    """

    text: str
    answer: str
    kind: str
    image: Path


@dataclass(frozen=True)
class Rate:
    """Right answers out of a number asked."""

    right: int
    asked: int

    @property
    def value(self) -> float:
        """Accuracy, 0..1; NaN for nothing asked."""
        return self.right / self.asked if self.asked else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        if not self.asked:
            return (math.nan, math.nan)
        z, n, p = 1.959964, self.asked, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (max(0.0, centre - half), min(1.0, centre + half))

    def __str__(self) -> str:
        low, high = self.interval
        interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
        return f"{100 * self.value:5.1f} %  ({self.right} of {self.asked}; {interval})"


@dataclass(frozen=True)
class VqaScore:
    """The result: in all, by kind, and every answer given."""

    overall: Rate
    by_kind: dict[str, Rate]
    answers: list[str]

    def table(self) -> str:
        """Return the result as lines of text."""
        rows = [("all questions", self.overall), *sorted(self.by_kind.items())]
        return "\n".join(f"{name:<18}{rate}" for name, rate in rows)


def normalise(text: str) -> str:
    """Return an answer for comparison: lower case, no final full stop, single blanks."""
    return re.sub(r"\s+", " ", text).strip().rstrip(". ").lower()


def score(questions: Sequence[Asked], answers: Sequence[str]) -> VqaScore:
    """Compare answers with the right ones by exact match after `normalise`."""
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for question, answer in zip(questions, answers, strict=True):
        asked[question.kind] += 1
        right[question.kind] += normalise(answer) == normalise(question.answer)
    by_kind = {kind: Rate(right[kind], asked[kind]) for kind in asked}
    return VqaScore(Rate(sum(right.values()), sum(asked.values())), by_kind, list(answers))


def draw(questions: Sequence[Asked], samples: int, seed: int) -> list[Asked]:
    """Return a fixed random sample of the questions, or all of them for `samples` 0, in their original order."""
    if not samples or samples >= len(questions):
        return list(questions)
    return [questions[n] for n in sorted(random.Random(seed).sample(range(len(questions)), samples))]


def with_other_images(
    questions: Sequence[Asked], facts: Mapping[Path, tuple[str | None, str | None]], seed: int
) -> list[Asked]:
    """Return each question about another image of the same list, one that differs in every fact.

    Args:
        questions: what is asked.
        facts: what is known of each image, such as its colour and its shape.
        seed: of the choice.

    Returns:
        The questions whose image found a partner; `answer` stays that of the original image. All questions about one
        image are asked about the same partner.
    """
    generator = random.Random(seed)
    images = sorted({question.image for question in questions})
    partner: dict[Path, Path] = {}
    for image in images:
        known = facts[image]
        for other in generator.sample(images, len(images)):
            if all(a is not None and b is not None and a != b for a, b in zip(known, facts[other], strict=True)):
                partner[image] = other
                break
    return [replace(question, image=partner[question.image]) for question in questions if question.image in partner]
