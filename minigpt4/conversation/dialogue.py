"""Dialogues before any template: turns of a question and an answer, and the instructions of prompt files.

An image stands in a question as `IMAGE_MARK`. Files spell that mark in several ways (`<Img><ImageHere></Img>` in the
published prompts, `<image>` in LLaVA's files); `normalise_marks` makes them one, so that a template alone decides what
surrounds an image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from minigpt4.config import shipped
from minigpt4.errors import ConversationError, DataError

IMAGE_MARK = "<ImageHere>"
"""The place of an image in a question, as the published prompt files spell it."""

_ANY_MARK = re.compile(r"<Img>\s*<ImageHere>\s*</Img>|<ImageHere>|<image>\n|\n<image>|<image>")


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        question: may hold `IMAGE_MARK`. Empty for a caption without a prompt (stage 1).
        answer: None where the model is to answer.
        answer_ids: the tokens of an answer that the model generated, without the end mark. The same text could be
            tokenised in another way. None for an answer that is only text.
    """

    question: str
    answer: str | None = None
    answer_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Dialogue:
    """Turns in order, and the system text before them (None: the template's own)."""

    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def num_image_marks(self) -> int:
        """Number of image marks in all questions."""
        return sum(turn.question.count(IMAGE_MARK) for turn in self.turns)


def normalise_marks(text: str) -> str:
    """Return `text` with every spelling of an image mark replaced by `IMAGE_MARK`."""
    return _ANY_MARK.sub(lambda m: IMAGE_MARK + (" " if m.group().startswith("<image>\n") else ""), text)


def images_first(question: str, num_images: int) -> str:
    """Return a question with `num_images` image marks in front of it."""
    return IMAGE_MARK * num_images + (" " if num_images > 0 and question else "") + question


def place_images(dialogue: Dialogue, num_images: int, sample_id: str) -> Dialogue:
    """Return the dialogue with as many image marks as there are images.

    A dialogue without marks gets them all at the start of its first question.

    Raises:
        ConversationError: the numbers of marks and images differ.
    """
    marks = dialogue.num_image_marks
    if marks == num_images:
        return dialogue
    if marks == 0:
        first, *others = dialogue.turns
        return replace(dialogue, turns=(replace(first, question=images_first(first.question, num_images)), *others))
    raise ConversationError(
        f"{sample_id}: the questions mention {marks} image(s), but the sample has {num_images}", cause="image count"
    )


def read_prompts(name_or_path: str) -> list[str]:
    """Return the instructions of a prompt file, one per line, without blank lines.

    Args:
        name_or_path: `alignment` for the shipped `prompts/alignment.txt`, or the path of a text file. Empty for a
            single, empty instruction.

    Raises:
        DataError: the file is missing, is not text, or has no instruction.
    """
    if not name_or_path:
        return [""]
    given = Path(name_or_path)
    file = given if given.is_file() else shipped("prompts", f"{name_or_path}.txt")
    if not file.is_file():
        names = ", ".join(sorted(f.stem for f in shipped("prompts").glob("*.txt"))) or "none"
        raise DataError(
            f"prompt file {name_or_path!r} not found; expected a path or a shipped name ({names})", cause="prompts"
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}", cause="prompts") from error
    prompts = [normalise_marks(line.strip()) for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{file}: the file has no prompt; write one instruction per line", cause="prompts")
    return prompts
