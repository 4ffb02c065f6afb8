"""What people and models say to each other, before any template: turns of a question and an answer.

An image stands in a question as `IMAGE_MARK`. Files spell that mark in several ways (`<Img><ImageHere></Img>` in the
published prompts, `<image>` in LLaVA's files); `normalise_marks` makes them one, so a template alone decides what
surrounds an image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from minigpt4.errors import ConversationError

IMAGE_MARK = "<ImageHere>"
"""The one spelling of an image's place in a question (the published prompt files')."""

_ANY_MARK = re.compile(r"<Img>\s*<ImageHere>\s*</Img>|<ImageHere>|<image>\n|\n<image>|<image>")


@dataclass(frozen=True)
class Turn:
    """One exchange.

    Attributes:
        question: what is asked; may hold `IMAGE_MARK`. Empty for a caption without a prompt (stage 1).
        answer: what is answered, or None where the model is to answer.
        answer_ids: the tokens the model itself chose for that answer, without the end mark; another tokenisation of the
            same text would be something it never said. None for answers that are text alone.
    """

    question: str
    answer: str | None = None
    answer_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Dialogue:
    """Turns in order, and the system text before them (None: the template's own)."""

    turns: tuple[Turn, ...]
    system: str | None = None

    @classmethod
    def caption(cls, text: str) -> Dialogue:
        """A caption alone, as stage 1 trains it."""
        return cls((Turn("", text),))

    @property
    def num_image_marks(self) -> int:
        """How many images the questions mention."""
        return sum(turn.question.count(IMAGE_MARK) for turn in self.turns)


def normalise_marks(text: str) -> str:
    """Return `text` with every spelling of an image mark replaced by `IMAGE_MARK`."""
    return _ANY_MARK.sub(lambda m: IMAGE_MARK + (" " if m.group().startswith("<image>\n") else ""), text)


def place_images(dialogue: Dialogue, num_images: int, sample_id: str) -> Dialogue:
    """Return the dialogue with as many image marks as there are images.

    A dialogue without any mark gets them all at the start of its first question.

    Raises:
        ConversationError: marks and images differ in number; the message has both counts.
    """
    marks = dialogue.num_image_marks
    if marks == num_images:
        return dialogue
    if marks == 0:
        first = dialogue.turns[0]
        words = f" {first.question}" if first.question else ""
        opened = replace(first, question=IMAGE_MARK * num_images + words)
        return replace(dialogue, turns=(opened, *dialogue.turns[1:]))
    raise ConversationError(
        f"{sample_id}: the questions mention {marks} image(s), but the sample has {num_images}", cause="image count"
    )
