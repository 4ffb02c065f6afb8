"""One question of a task, and the sets of images it is asked about.

Input: the layouts of data sets. Output: `Question`s for the asking loop; their `truth` is stored with each answer, so
that answers can be scored again without data and model.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt4.errors import DataError

OWN, SHUFFLED, BLANK, NONE = "own", "shuffled", "blank", "none"
BLANK_SIZE = 224
"""Height and width of the blank image, in pixels; the image processor resizes it."""


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        id: unique within its task.
        image: name of the image; questions about one image are one cluster of the intervals.
        text: what the model is asked.
        truth: what the scorer compares the answer with, as JSON values.
        kind: the group of its score; empty for none.
        source: file or content of the image; None asks without an image.
        shown: name of the image that is shown instead of its own, in the control.
        facts: what is known of the image, such as its colour; a shuffled image differs in all of them.
    """

    id: str
    image: str
    text: str
    truth: Mapping[str, Any]
    kind: str = ""
    source: Path | bytes | None = None
    shown: str = ""
    facts: tuple[str | None, ...] = field(default=(), compare=False)

    @property
    def choices(self) -> Sequence[str]:
        """The texts that are ranked by likelihood; empty for a question that is answered freely."""
        found: Sequence[str] = self.truth.get("choices", ())
        return found


def draw(questions: Sequence[Question], samples: int, seed: int) -> list[Question]:
    """Return a fixed random sample of the questions, or all of them for `samples` 0, in their original order."""
    if not samples or samples >= len(questions):
        return list(questions)
    return [questions[n] for n in sorted(random.Random(seed).sample(range(len(questions)), samples))]


def with_images(questions: Sequence[Question], images: str, seed: int) -> list[Question]:
    """Return the questions about their `own` images, or as one of the controls.

    Args:
        questions: the questions of a task.
        images: `own`, `shuffled`, `blank` or `none`.
        seed: of the shuffle.

    Returns:
        The questions, with their expected answers. `shuffled` leaves out questions about an image that differs from no
        other image in all facts.
    """
    if images == SHUFFLED:
        return _with_other_images(questions, seed)
    if images == BLANK:
        grey = _grey_image()
        return [replace(question, source=grey, shown=BLANK) for question in questions]
    if images == NONE:
        return [replace(question, source=None, shown=NONE) for question in questions]
    return list(questions)


def _with_other_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """Return each question about another image of the same questions; all about one image get the same other image."""
    of = {question.image: question for question in questions}
    order = random.Random(seed).sample(sorted(of), len(of))
    partner: dict[str, Question] = {}
    for place, image in enumerate(order):
        for step in range(1, len(order)):
            other = of[order[(place + step) % len(order)]]
            if all(
                a is not None and b is not None and a != b for a, b in zip(of[image].facts, other.facts, strict=True)
            ):
                partner[image] = other
                break
    return [
        replace(question, source=partner[question.image].source, shown=partner[question.image].image)
        for question in questions
        if question.image in partner
    ]


def _grey_image() -> bytes:
    """Return a uniform grey picture, as the bytes of a PPM file."""
    import io

    content = io.BytesIO()
    Image.new("RGB", (BLANK_SIZE, BLANK_SIZE), (128, 128, 128)).save(content, "PPM")
    return content.getvalue()


def data_hash(questions: Sequence[Question]) -> str:
    """Return a short hash of questions: ids, texts, truths, and name and size in bytes of every image."""
    digest = hashlib.sha256()
    sizes: dict[str, int] = {}
    for question in questions:
        if question.image not in sizes:
            sizes[question.image] = _size(question.source)
        row = [question.id, question.image, sizes[question.image], question.text, question.kind, question.truth]
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _size(source: Path | bytes | None) -> int:
    if isinstance(source, Path):
        return source.stat().st_size if source.is_file() else -1
    return len(source or b"")


def check_ids(questions: Sequence[Question], place: str) -> None:
    """Raise DataError if there is no question, or two have the same id."""
    if not questions:
        raise DataError(f"{place}: there is no question in it; is this the right file?", cause="row")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(f"{place}: two questions have the id {question.id!r}; ids must be unique", cause="row")
        seen.add(question.id)
