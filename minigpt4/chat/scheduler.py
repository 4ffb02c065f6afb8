"""Many people, one decode loop: requests of any thread join and leave it between tokens.

Input: prompts, from any thread. Output: a `Stream` each. The server answers all its clients through one scheduler.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from types import TracebackType

from torch import Tensor

from minigpt4.chat.answer import Answer, FinishReason
from minigpt4.chat.decoding.loop import Decoder
from minigpt4.chat.engine import Engine, Prompt
from minigpt4.chat.section import ChatSection
from minigpt4.errors import DecodingError

_log = logging.getLogger(__name__)


class Stream:
    """The answer to one request; iterating yields its text piece by piece, once."""

    def __init__(self, answer: Answer, embeds: Tensor) -> None:
        self._answer = answer
        self._embeds: Tensor | None = embeds
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._sent = ""
        self._over = False
        self._cancelled = False
        self.prompt_tokens = len(embeds)

    def __iter__(self) -> Iterator[str]:
        """Yield text as it comes; stop text and end mark never show. Leaving the loop early cancels.

        Raises:
            DecodingError: the model failed on this request.
        """
        try:
            while not self._over:
                piece = self._pieces.get()
                if piece is None:
                    self._over = True
                else:
                    yield piece
        finally:
            if not self._over:
                self.cancel()
        if self._answer.error is not None:
            raise self._answer.error

    def cancel(self) -> None:
        """End the answer where it is, within a token; from any thread."""
        self._cancelled = True

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended: `stop`, `length`, `cancelled`, `error`; None while it grows."""
        return self._answer.finish_reason

    @property
    def completion_tokens(self) -> int:
        """How many tokens the answer has so far."""
        return len(self._answer.ids)

    def _forward(self) -> None:
        """Hand on what is new, and the end; called by the decoding thread alone."""
        answer = self._answer
        if self._cancelled:
            answer.cancel()
        if len(answer.text) > len(self._sent):
            self._pieces.put(answer.text[len(self._sent) :])
            self._sent = answer.text
        if answer.finish_reason is not None:
            self._embeds = None
            self._pieces.put(None)


class Scheduler:
    """Runs one decode loop in one thread of its own, and lets requests in and out between tokens."""

    def __init__(self, engine: Engine, max_rows: int = 16) -> None:
        """Decode at most `max_rows` answers together; the others wait for their turn."""
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

    def submit(self, prompt: Prompt, settings: ChatSection, stop: Sequence[str] = ()) -> Stream:
        """Ask for an answer; returns at once.

        Raises:
            ContextLengthError: prompt and answer do not fit the language model's context together.
            ConversationError: the prompt cannot be rendered.
            DecodingError: the scheduler is closed, or beams are asked for.
        """
        if settings.num_beams > 1:
            raise DecodingError("a beam search cannot join other answers; set num_beams to 1")
        stream = Stream(self.engine.new_answer(settings, stop), self.engine.embeds(prompt, settings.max_new_tokens))
        with self._wake:
            if self._closed:
                raise DecodingError("the scheduler is closed")
            self._waiting.append(stream)
            self._wake.notify()
        return stream

    def close(self) -> None:
        """End the loop; answers that are not complete fail."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
            except Exception as error:  # whatever a model or a device raises: these rows are lost, the service is not
                _log.exception("decoding failed")
                self._fail(self._active, error)
                decoder = self._new_decoder()
            self._forward()
        self._fail([*self._active, *self._waiting], DecodingError("the scheduler was closed"))

    def _new_decoder(self) -> Decoder:
        return Decoder(self.engine.loaded.model.language_model, self.engine.lock)

    def _admit(self, decoder: Decoder) -> None:
        """Let one request in; one per step, so that those who are reading never wait longer than for one prompt."""
        gone: list[Stream] = []
        staying: deque[Stream] = deque()
        with self._wake:
            for stream in self._waiting:
                (gone if stream._cancelled else staying).append(stream)
            entering = staying.popleft() if staying and len(self._active) < self.max_rows else None
            self._waiting = staying
        for stream in gone:
            stream._forward()
        if entering is None or entering._embeds is None:
            return
        self._active.append(entering)
        try:
            decoder.join([entering._answer], [entering._embeds])
        except Exception as error:  # a prompt that is too much for the device; those who are in go on
            _log.exception("reading a prompt failed")
            entering._answer.fail(error)
        entering._embeds = None

    def _forward(self) -> None:
        """Hand on what the step gave, and forget the requests that are done."""
        for stream in self._active:
            stream._forward()
        self._active = [stream for stream in self._active if stream.finish_reason is None]

    def _fail(self, streams: Sequence[Stream], error: Exception) -> None:
        for stream in streams:
            if stream.finish_reason is None:
                stream._answer.fail(error)
            stream._forward()
        self._active = []
