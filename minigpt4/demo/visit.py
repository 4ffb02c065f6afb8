"""One visitor's conversation, without the page around it.

Input: what the visitor typed and the files that were sent. Output: the answer as it grows. The page holds one `Visit`
for each visitor, so that visitors never see one another's turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock

from PIL import Image

from minigpt4.chat.session import Chat, Session
from minigpt4.processors.image import open_image

DESCRIBE = "Describe this image in detail."
"""What is asked when images come without a question."""


class Visit:
    """A visitor's session, and the question to ask again."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._session: Session | None = None
        self._question = ""
        self._turns_before = 0
        self._answering = Lock()

    @property
    def has_begun(self) -> bool:
        """Whether there is a conversation that new images would end."""
        return self._session is not None

    @property
    def is_answering(self) -> bool:
        """Whether an answer is growing; a second one at the same time would mix with it."""
        return self._answering.locked()

    def open(self, files: Sequence[str]) -> list[Image.Image]:
        """Return uploaded files as images.

        Raises:
            ImageError: one is no image, or is too large; the message has the name that the visitor gave it.
        """
        limit = self._chat.engine.loaded.image_processor.config.max_pixels
        return [open_image(Path(file).read_bytes(), Path(file).name, limit) for file in files]

    def ask(self, question: str, images: Sequence[Image.Image] = (), **settings: object) -> Iterator[str]:
        """Yield the answer so far, again and again until it is complete; images begin a new conversation.

        Raises:
            MiniGPT4Error: this cannot be answered, and why.
        """
        if images or self._session is None:
            self._session = self._chat.session(images)
        self._question = question
        self._turns_before = len(self._session.turns)
        yield from self._answer(self._session, settings)

    def ask_again(self, **settings: object) -> Iterator[str]:
        """Yield another answer to the last question, in the place of the first one."""
        if self._session is not None:
            self._session.keep(self._turns_before)
            yield from self._answer(self._session, settings)

    def _answer(self, session: Session, settings: dict[str, object]) -> Iterator[str]:
        answer = ""
        with self._answering:
            for text in session.stream(self._question, **settings):
                answer += text
                yield answer
