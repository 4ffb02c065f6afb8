"""One decode loop for many clients: requests from any thread join and leave it between tokens.

Input: prompts, from any thread. Output: a `Stream` each. The server answers all its clients with one scheduler.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue

from torch import Tensor

from minigpt4.chat.answer import Answer, FinishReason
from minigpt4.chat.decoding.decoder import Decoder
from minigpt4.chat.engine import Engine, Prompt
from minigpt4.config.sections import ChatConfig
from minigpt4.errors import DecodingError

_log = logging.getLogger(__name__)


class Stream:
    """The answer to one request; iterating yields its text piece by piece, once."""

    def __init__(self, answer: Answer, embeds: Tensor) -> None:
        self._answer = answer
        self._embeds: Tensor | None = embeds
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._is_over = False
        self._cancelled = False
        self.prompt_tokens = len(embeds)

    def __iter__(self) -> Iterator[str]:
        """Yield the text as it is generated. Leaving the loop early cancels the answer.

        Raises:
            DecodingError: decoding this request failed.
        """
        try:
            while not self._is_over:
                piece = self._pieces.get()
                if piece is None:
                    self._is_over = True
                else:
                    yield piece
        finally:
            if not self._is_over:
                self.cancel()
        if self._answer.error is not None:
            raise self._answer.error

    def cancel(self) -> None:
        """End the answer at the next token; from any thread."""
        self._cancelled = True

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended: `stop`, `length`, `cancelled`, `error`; None until it is complete."""
        return self._answer.finish_reason

    @property
    def completion_tokens(self) -> int:
        """Number of tokens of the answer so far."""
        return len(self._answer.ids)

    def _forward(self) -> None:
        """Pass on new text and the end; called by the decoding thread only."""
        answer = self._answer
        if self._cancelled:
            answer.cancel()
        if new := answer.take():
            self._pieces.put(new)
        if answer.finish_reason is not None:
            self._embeds = None
            self._pieces.put(None)


class Scheduler:
    """Runs one decode loop in its own thread."""

    def __init__(self, engine: Engine, max_rows: int = 16) -> None:
        """Decode at most `max_rows` answers together; further requests wait."""
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, found {max_rows}")
        self.engine = engine
        self.max_rows = max_rows
        self._waiting: deque[Stream] = deque()
        self._active: list[Stream] = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    def submit(self, prompt: Prompt, settings: ChatConfig, stop: Sequence[str] = ()) -> Stream:
        """Ask for an answer; returns at once. The answer has as many tokens as the context leaves, at most.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer in the language model's context.
            ConversationError: the prompt cannot be rendered.
            DecodingError: the scheduler is closed, or the settings ask for beams.
        """
        if settings.num_beams > 1:
            raise DecodingError("a beam search cannot be decoded together with other answers; set num_beams to 1")
        embeds = self.engine.embeds(prompt, max_new_tokens=1)
        room = self.engine.context_length - len(embeds)
        settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, room))
        stream = Stream(self.engine.new_answer(settings, stop), embeds)
        with self._wake:
            if self._closed:
                raise DecodingError("the scheduler is closed")
            self._waiting.append(stream)
            self._wake.notify()
        return stream

    def close(self) -> None:
        """End the loop; incomplete answers fail."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        decoder = self._new_decoder()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._waiting or self._active)
                if self._closed:
                    break
            try:
                self._admit(decoder)
                decoder.step()
            except Exception as error:  # any error of the model or the device: these rows fail, the loop continues
                _log.exception("decoding failed")
                self._fail(self._active, error)
                decoder = self._new_decoder()
            self._forward()
        self._fail([*self._active, *self._waiting], DecodingError("the scheduler was closed"))

    def _new_decoder(self) -> Decoder:
        return Decoder(self.engine.loaded.model.language_model, self.engine.lock)

    def _admit(self, decoder: Decoder) -> None:
        """Admit one request per step, so that the other answers never wait for more than one prompt."""
        with self._wake:
            cancelled = [stream for stream in self._waiting if stream._cancelled]
            self._waiting = deque(stream for stream in self._waiting if not stream._cancelled)
            admitted = self._waiting.popleft() if self._waiting and len(self._active) < self.max_rows else None
        for stream in cancelled:
            stream._forward()
        if admitted is None or admitted._embeds is None:
            return
        self._active.append(admitted)
        try:
            decoder.join([admitted._answer], [admitted._embeds])
        except Exception as error:  # a prompt that is too large for the device; the other answers continue
            _log.exception("reading a prompt failed")
            admitted._answer.fail(error)
        admitted._embeds = None

    def _forward(self) -> None:
        """Pass on the new text, and remove the complete requests."""
        for stream in self._active:
            stream._forward()
        self._active = [stream for stream in self._active if stream.finish_reason is None]

    def _fail(self, streams: Sequence[Stream], error: Exception) -> None:
        for stream in streams:
            if stream.finish_reason is None:
                stream._answer.fail(error)
            stream._forward()
        self._active = []
