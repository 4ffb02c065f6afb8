"""What happens on the page when a visitor sends, stops, regenerates or clears.

Input: what the page holds for this visitor: messages, `Visit`, the sliders. Output: the same, while the answer grows.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr

from minigpt4.chat.session import Chat, Picture
from minigpt4.demo.text import as_html
from minigpt4.errors import MiniGPT4Error, RequestError
from minigpt4.printable import printable
from minigpt4.processors.image import open_image

_log = logging.getLogger(__name__)
Message = dict[str, Any]
Shown = list[Message]
THUMBNAIL = (256, 256)
"""Largest size in which the picture of a conversation is kept; the model needs its features only."""
DESCRIBE = "Describe this image in detail."
"""The question if images come without one."""


class Visit:
    """The conversation of one visitor; the page holds one for each, so that visitors never see each other's turns."""

    def __init__(self, chat: Chat) -> None:
        self.session = chat.session()
        self.answering = Lock()
        """Held while an answer grows; a second one at the same time would mix with it."""
        self.question = ""
        self._images: Sequence[Picture] = ()
        self._turns_before = 0

    def ask(self, question: str, images: Sequence[Picture], settings: dict[str, Any]) -> Iterator[str]:
        """Yield the answer so far, repeatedly, until it is complete.

        Raises:
            MiniGPT4Error: the question cannot be answered, and why.
        """
        self.question, self._images, self._turns_before = question, images, len(self.session.turns)
        return self._answer(question, images, settings)

    def ask_again(self, settings: dict[str, Any]) -> Iterator[str]:
        """Yield another answer to the last question, in place of the first one."""
        if len(self.session.turns) > self._turns_before:
            return self._answer(self.session.undo(), (), settings)  # the session still has its images
        return self._answer(self.question, self._images, settings)

    def _answer(self, question: str, images: Sequence[Picture], settings: dict[str, Any]) -> Iterator[str]:
        answer = ""
        with self.answering:
            for text in self.session.stream(question, images, **settings):
                answer += text
                yield answer


Step = tuple[Any, Any, Visit | None]
"""What a handler returns: the text box, the messages, the visit."""


class Replies:
    """The handlers of one page; each call gets the visitor's own state."""

    def __init__(self, chat: Chat, settings: list[str], examples: list[tuple[str, str]]) -> None:
        """Take the model, the names of the sliders' settings, and the examples (image, question)."""
        self._chat = chat
        self._settings = settings
        self._examples = examples
        self._limits = chat.engine.loaded.config.server
        self._max_pixels = min(self._limits.max_pixels, chat.engine.loaded.image_processor.config.max_pixels)
        self._decoders = ThreadPoolExecutor(self._limits.images_at_once, thread_name_prefix="image")

    def send(self, message: Message, shown: Shown, visit: Visit | None, *values: float) -> Iterator[Step]:
        """Answer the message in the text box."""
        visit = visit or Visit(self._chat)
        text, files = message["text"].strip(), message["files"]
        if not text and not files:
            yield gr.skip(), gr.skip(), visit  # without a step Gradio would empty everything
            return
        if visit.answering.locked():
            gr.Info("The last question is still being answered: stop it first.")
            yield gr.skip(), gr.skip(), visit
            return
        try:
            self._check(text, files)
            images = [self._decoders.submit(self._picture, Path(file)).result() for file in files]
        except MiniGPT4Error as error:
            gr.Warning(as_html(printable(str(error))), title="This message cannot be used")
            yield _idle({"text": text, "files": []}), gr.skip(), visit
            return
        question = text or DESCRIBE
        asked = {"role": "user", "content": [*({"path": file} for file in files), as_html(question)]}
        answers = visit.ask(question, images, self._named(values))
        yield from self._grow(answers, [*shown, asked], visit, {"text": text, "files": files})

    def send_example(self, event: gr.SelectData, shown: Shown, visit: Visit | None, *values: float) -> Iterator[Step]:
        """Answer the example that was chosen."""
        image, question = self._examples[event.index]
        yield from self.send({"text": question, "files": [image]}, shown, visit, *values)

    def regenerate(self, shown: Shown, visit: Visit | None, *values: float) -> Iterator[Step]:
        """Answer the last question again."""
        if visit is None or not visit.question or visit.answering.locked():
            gr.Info("There is no complete answer to regenerate.")
            yield gr.skip(), gr.skip(), visit
            return
        while shown and shown[-1]["role"] == "assistant":
            shown = shown[:-1]
        yield from self._grow(visit.ask_again(self._named(values)), shown, visit, None)

    def stop(self, shown: Shown) -> tuple[Any, Shown]:
        """Keep the answer as far as it was shown; the page has cancelled the rest."""
        if shown and shown[-1]["role"] == "user":
            shown = [*shown, _said("")]
        return _idle(), shown

    def clear(self) -> tuple[Any, Shown, None]:
        """Start a new conversation."""
        return _idle({"text": "", "files": []}), [], None

    def _check(self, text: str, files: Sequence[str]) -> None:
        """Raise a RequestError if a message is larger than the service would accept."""
        limits = self._limits
        if len(text) > limits.max_text_characters:
            raise RequestError(f"the question is longer than {limits.max_text_characters:,} characters")
        if len(files) > limits.max_images:
            raise RequestError(f"there are {len(files)} images; at most {limits.max_images} are allowed")
        megabytes = sum(Path(file).stat().st_size for file in files) / 1e6
        if megabytes > limits.max_body_megabytes:
            raise RequestError(f"the files have {megabytes:.1f} MB; at most {limits.max_body_megabytes:g} are allowed")

    def _picture(self, file: Path) -> Picture:
        """Return the features of an image, and the image itself in a small size."""
        # Messages use the name that the visitor gave the file, not its path on this machine.
        image = open_image(file.read_bytes(), file.name, self._max_pixels)
        (picture,) = self._chat.session(image).pictures
        image.thumbnail(THUMBNAIL)  # after its features are known; in place
        return picture

    def _named(self, values: tuple[float, ...]) -> dict[str, Any]:
        """Return the decoding settings of the sliders; each answer is sampled with a new seed."""
        chosen: dict[str, Any] = dict(zip(self._settings, values, strict=True))
        if chosen["num_beams"] > 1:
            chosen["temperature"] = 0
        return {**chosen, "seed": secrets.randbits(31)}

    def _grow(self, answers: Iterator[str], shown: Shown, visit: Visit, asked: Message | None) -> Iterator[Step]:
        """Show the answer as it grows; if there is none, put the question back into the text box."""
        yield _busy(), [*shown, _said("…")], visit
        answer = ""
        try:
            for answer in answers:
                yield gr.skip(), [*shown, _said(answer)], visit
        except Exception as error:  # also errors of the device: the page must take the next question
            message = str(error)
            if not isinstance(error, MiniGPT4Error):
                _log.exception("an answer failed")
                message = "The model failed on this question; the log says why."
            gr.Warning(as_html(message), title="This question cannot be answered")
            yield _idle(asked), shown[:-1] if asked else shown, visit
            return
        forgotten = visit.session.last.forgotten_turns if visit.session.last else 0
        if forgotten:
            gr.Info(f"The oldest {forgotten} turns no longer fit the model's context; all images stay.")
        yield _idle(), [*shown, _said(answer or "(no answer)")], visit


def _said(text: str) -> Message:
    return {"role": "assistant", "content": as_html(text)}


def _busy() -> Any:
    """Return the text box while an answer grows: empty, and with a stop button."""
    return gr.update(value={"text": "", "files": []}, submit_btn=False, stop_btn=True)


def _idle(value: Message | None = None) -> Any:
    """Return the text box that takes a question; its text is replaced by `value`, if given."""
    buttons: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
    return gr.update(**buttons) if value is None else gr.update(value=value, **buttons)
