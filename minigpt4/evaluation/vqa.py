"""Visual question answering: compare the answers of a model with the known ones.

Input: questions, their images, and the answers of a model. Output: `VqaScore`, for all questions and by kind, with 95 %
intervals. The control with other images asks about an image of another colour and shape and keeps the expected answers:
a model that looks at its images falls to chance, one that guesses from the text scores the same as before.
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
class VqaQuestion:
    """One question about one image.

    Attributes:
        text: the question.
        answer: the expected answer.
        kind: the group of its score.
        image: the image file.
    """

    text: str
    answer: str
    kind: str
    image: Path


@dataclass(frozen=True)
class Accuracy:
    """Correct answers out of a number of questions."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The accuracy, 0..1; NaN without questions."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        if not self.total:
            return (math.nan, math.nan)
        z, n, p = 1.959964, self.total, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (max(0.0, centre - half), min(1.0, centre + half))

    def __str__(self) -> str:
        low, high = self.interval
        interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
        return f"{100 * self.value:5.1f} %  ({self.correct} of {self.total}; {interval})"


@dataclass(frozen=True)
class VqaScore:
    """The result: for all questions, by kind, and every answer.

    Attributes:
        overall: of all questions.
        by_kind: of the questions of each kind.
        answers: in the order of the questions.
        control: the result of the same questions about other images, if they were asked.
    """

    overall: Accuracy
    by_kind: dict[str, Accuracy]
    answers: list[str]
    control: VqaScore | None = None

    def table(self) -> str:
        """Return the result as lines of text, the control next to it."""
        rows = [("all questions", self.overall), *sorted(self.by_kind.items())]
        if self.control is None:
            return "\n".join(f"{name:<18}{rate}" for name, rate in rows)
        others = {"all questions": self.control.overall, **self.control.by_kind}
        lines = [f"{'':<18}{'their own images':<54}images of another colour and shape (control)"]
        lines += [f"{name:<18}{rate!s:<54}{others.get(name, '')!s}" for name, rate in rows]
        return "\n".join(line.rstrip() for line in lines)


def normalise(text: str) -> str:
    """Return an answer for comparison: lower case, no final full stop, single spaces."""
    return re.sub(r"\s+", " ", text).strip().rstrip(". ").lower()


def score(questions: Sequence[VqaQuestion], answers: Sequence[str]) -> VqaScore:
    """Compare answers with the expected ones by exact match after `normalise`."""
    results: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        results[question.kind].append(normalise(answer) == normalise(question.answer))
    by_kind = {kind: Accuracy(sum(found), len(found)) for kind, found in results.items()}
    overall = Accuracy(sum(each.correct for each in by_kind.values()), len(questions))
    return VqaScore(overall, by_kind, list(answers))


def draw(questions: Sequence[VqaQuestion], samples: int, seed: int) -> list[VqaQuestion]:
    """Return a fixed random sample of the questions, or all of them for `samples` 0, in their original order."""
    if not samples or samples >= len(questions):
        return list(questions)
    return [questions[n] for n in sorted(random.Random(seed).sample(range(len(questions)), samples))]


def with_other_images(
    questions: Sequence[VqaQuestion], facts: Mapping[Path, tuple[str | None, str | None]], seed: int
) -> list[VqaQuestion]:
    """Return each question about another image of the same questions, one that differs in every fact.

    Args:
        questions: the questions.
        facts: what is known of each image, such as its colour and its shape; None for unknown.
        seed: of the choice.

    Returns:
        The questions whose image has such a partner, with their expected answers. All questions about one image are
        asked about the same partner.
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
