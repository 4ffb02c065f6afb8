"""A conversation about images: `Chat(model).session(images=[...]).ask("What is this?")`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from minigpt4.chat.engine import Engine, Prompt
from minigpt4.chat.section import ChatSection
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn
from minigpt4.processors.image import ImageSource


class Chat:
    """Makes sessions with one loaded model."""

    def __init__(self, loaded: LoadedModel, settings: ChatSection | None = None) -> None:
        """Use `settings`, or the `chat` section of the config the model was loaded from."""
        self.engine = Engine(loaded)
        self.settings = settings or loaded.config.chat

    def session(self, images: Sequence[ImageSource] = (), system: str | None = None) -> Session:
        """Start a conversation about `images` (paths, bytes or PIL images; may be none).

        Raises:
            ImageError: an image cannot be read.
        """
        return Session(self.engine, self.settings, images, system)


class Session:
    """One conversation: its images' features, computed once, and its turns so far."""

    def __init__(
        self, engine: Engine, settings: ChatSection, images: Sequence[ImageSource] = (), system: str | None = None
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.features = engine.query_features(images)
        self.dialogue = Dialogue((), system)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns answered so far."""
        return self.dialogue.turns

    def ask(self, question: str, **settings: object) -> str:
        """Return the answer to `question`; keywords override the decoding settings for this turn."""
        return "".join(self.stream(question, **settings))

    def stream(self, question: str, **settings: object) -> Iterator[str]:
        """Yield the answer to `question` as it grows; the turn is kept when the answer is complete."""
        asked = replace(self.dialogue, turns=(*self.turns, Turn(self._with_images(question))))
        answer = ""
        for text in self.engine.stream(Prompt(asked, self.features), replace(self.settings, **settings)):  # type: ignore[arg-type]
            answer += text
            yield text
        self.dialogue = replace(asked, turns=(*self.turns, replace(asked.turns[-1], answer=answer)))

    def keep(self, turns: int) -> None:
        """Forget all but the first `turns` turns, to ask again from there."""
        self.dialogue = replace(self.dialogue, turns=self.turns[:turns])

    def _with_images(self, question: str) -> str:
        """Put the images in front of the first question, unless it places them itself."""
        if self.turns or self.features is None or IMAGE_MARK in question:
            return question
        words = f" {question}" if question else ""
        return IMAGE_MARK * len(self.features) + words
