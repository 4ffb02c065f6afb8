"""One visitor's conversation, without the page around it.

Input: what the visitor typed and the files that were sent. Output: the answer as it grows. The page holds one `Visit`
for each visitor, so that visitors never see one another's turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock

from PIL import Image

from minigpt4.chat.session import Chat
from minigpt4.processors.image import open_image

DESCRIBE = "Describe this image in detail."
"""What is asked when images come without a question."""


class Visit:
    """A visitor's session, and what is to be asked again."""

    def __init__(self, chat: Chat) -> None:
        self._session = chat.session()
        self._max_pixels = chat.engine.loaded.image_processor.config.max_pixels
        self._question = ""
        self._images: Sequence[Image.Image] = ()
        self._turns_before = 0
        self._answering = Lock()

    @property
    def has_begun(self) -> bool:
        """Whether anything was asked."""
        return bool(self._question)

    @property
    def is_answering(self) -> bool:
        """Whether an answer is growing; a second one at the same time would mix with it."""
        return self._answering.locked()

    @property
    def forgotten_turns(self) -> int:
        """How many of the oldest turns did not fit the context of the last answer."""
        return self._session.last.forgotten_turns if self._session.last else 0

    def open(self, files: Sequence[str]) -> list[Image.Image]:
        """Return uploaded files as images.

        Raises:
            ImageError: one is no image, or is too large; the message has the name that the visitor gave it.
        """
        return [open_image(Path(file).read_bytes(), Path(file).name, self._max_pixels) for file in files]

    def ask(self, question: str, images: Sequence[Image.Image] = (), **settings: object) -> Iterator[str]:
        """Yield the answer so far, again and again until it is complete.

        Raises:
            MiniGPT4Error: this cannot be answered, and why.
        """
        self._question, self._images = question, images
        self._turns_before = len(self._session.turns)
        return self._answer(question, images, settings)

    def ask_again(self, **settings: object) -> Iterator[str]:
        """Yield another answer to the last question, in the place of the first one."""
        if len(self._session.turns) > self._turns_before:
            return self._answer(self._session.undo(), (), settings)  # its images are still there
        return self._answer(self._question, self._images, settings)

    def _answer(self, question: str, images: Sequence[Image.Image], settings: dict[str, object]) -> Iterator[str]:
        answer = ""
        with self._answering:
            for text in self._session.stream(question, images, **settings):
                answer += text
                yield answer
