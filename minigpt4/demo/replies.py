"""What happens on the page when a visitor sends, stops, regenerates or clears.

Input: what the page holds for this visitor: messages, `Visit`, the sliders. Output: the same, as the answer grows.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from typing import Any

import gradio as gr

from minigpt4.chat.session import Chat
from minigpt4.demo.visit import DESCRIBE, Visit
from minigpt4.errors import MiniGPT4Error

_log = logging.getLogger(__name__)
Message = dict[str, Any]
Shown = list[Message]
Step = tuple[Any, Any, Visit | None]
"""What a handler gives back: the text box, the messages, the visit."""


class Replies:
    """The handlers of one page; a visitor's own state comes in with each call."""

    def __init__(self, chat: Chat, settings: list[str], examples: list[tuple[str, str]]) -> None:
        """Take the model, the names of the sliders' settings, and the examples: image and question."""
        self._chat = chat
        self._settings = settings
        self._examples = examples

    def send(self, message: Message, shown: Shown, visit: Visit | None, *values: float) -> Iterator[Step]:
        """Answer what stands in the text box."""
        visit = visit or Visit(self._chat)
        text, files = message["text"].strip(), message["files"]
        if not text and not files:
            yield gr.skip(), gr.skip(), visit  # without a step Gradio would empty everything
            return
        if visit.is_answering:
            gr.Info("The last question is still being answered: stop it first.")
            yield gr.skip(), gr.skip(), visit
            return
        try:
            images = visit.open(files)
        except MiniGPT4Error as error:
            gr.Warning(str(error), title="This file cannot be used")
            yield _idle({"text": text, "files": []}), gr.skip(), visit
            return
        question = text or DESCRIBE
        asked = {"role": "user", "content": [*({"path": file} for file in files), question]}
        answers = visit.ask(question, images, **self._named(values))
        yield from self._grow(answers, [*shown, asked], visit, {"text": text, "files": files})

    def send_example(self, event: gr.SelectData, shown: Shown, visit: Visit | None, *values: float) -> Iterator[Step]:
        """Answer the example that was chosen."""
        image, question = self._examples[event.index]
        yield from self.send({"text": question, "files": [image]}, shown, visit, *values)

    def regenerate(self, shown: Shown, visit: Visit | None, *values: float) -> Iterator[Step]:
        """Answer the last question once more."""
        if visit is None or not visit.has_begun or visit.is_answering:
            gr.Info("There is no complete answer to regenerate.")
            yield gr.skip(), gr.skip(), visit
            return
        while shown and shown[-1]["role"] == "assistant":
            shown = shown[:-1]
        yield from self._grow(visit.ask_again(**self._named(values)), shown, visit, None)

    def stop(self, shown: Shown) -> tuple[Any, Shown]:
        """Keep what was said so far; the page has cancelled the answer."""
        if shown and shown[-1]["role"] == "user":
            shown = [*shown, _said("")]
        return _idle(), shown

    def clear(self) -> tuple[Any, Shown, None]:
        """Begin anew."""
        return _idle({"text": "", "files": []}), [], None

    def _named(self, values: tuple[float, ...]) -> dict[str, object]:
        """Return the decoding settings that the sliders ask for; each answer is sampled anew."""
        chosen: dict[str, Any] = dict(zip(self._settings, values, strict=True))
        if chosen["num_beams"] > 1:
            chosen["temperature"] = 0
        return {**chosen, "seed": secrets.randbits(31)}

    def _grow(self, answers: Iterator[str], shown: Shown, visit: Visit, asked: Message | None) -> Iterator[Step]:
        """Show the answer as it grows; where there can be none, give the question back."""
        yield _busy(), [*shown, _said("…")], visit
        answer = ""
        try:
            for answer in answers:
                yield gr.skip(), [*shown, _said(answer)], visit
        except Exception as error:  # also what a device raises: the page must take the next question
            if not isinstance(error, MiniGPT4Error):
                _log.exception("an answer failed")
            told = str(error) if isinstance(error, MiniGPT4Error) else "The model failed on this; the log says why."
            gr.Warning(told, title="This cannot be answered")
            yield _idle(asked), shown[:-1] if asked else shown, visit
            return
        if visit.forgotten_turns:
            gr.Info(f"The model does not see the oldest {visit.forgotten_turns} turns any more; all images stay.")
        yield _idle(), [*shown, _said(answer or "(no answer)")], visit


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _busy() -> Any:
    """Return the text box while an answer grows: empty, and with a stop button."""
    return gr.update(value={"text": "", "files": []}, submit_btn=False, stop_btn=True)


def _idle(value: Message | None = None) -> Any:
    """Return the text box that takes a question, with `value` in it or with what stands there."""
    buttons: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
    return gr.update(**buttons) if value is None else gr.update(value=value, **buttons)
