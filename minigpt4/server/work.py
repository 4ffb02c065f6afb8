"""From a checked request to its answer: the work behind the HTTP.

Input: `ChatRequest`s, many at a time. Output: their texts, piece by piece, for asyncio. Reading images and waiting for
tokens block and therefore run in threads; the scheduler decodes all requests together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from threading import Event

from minigpt4.chat.engine import Engine, Prompt
from minigpt4.chat.scheduler import Scheduler, Stream
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.config.sections import ChatConfig, ServerConfig
from minigpt4.errors import ContextLengthError, ConversationError, RequestError
from minigpt4.server.images import ImageReader
from minigpt4.server.request import ChatRequest, read_request


class Work:
    """Answers requests with one model, and limits how many are in progress."""

    def __init__(self, loaded: LoadedModel, limits: ServerConfig) -> None:
        self._limits = limits
        self._engine = Engine(loaded)
        self._images = ImageReader(limits, loaded.image_processor)
        self._scheduler = Scheduler(self._engine, limits.max_rows)
        self._places = limits.max_rows + limits.max_waiting
        self._threads = ThreadPoolExecutor(self._places, thread_name_prefix="request")
        self.in_progress = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places while a request is read and answered.

        Raises:
            RequestError: all places are taken.
        """
        if self.in_progress >= self._places:
            raise RequestError(
                f"{self.in_progress} requests are in progress, the limit of this service; try again in a moment",
                status=429,
                code="too_many_requests",
            )
        self.in_progress += 1
        try:
            yield
        finally:
            self.in_progress -= 1

    async def read(self, body: bytes, defaults: ChatConfig) -> ChatRequest:
        """Return the request in `body`, read in a thread, since a large one takes a while.

        Raises:
            RequestError: the request is wrong or not supported.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, read_request, body, defaults, self._limits
        )

    @asynccontextmanager
    async def answer(self, request: ChatRequest) -> AsyncIterator[Stream]:
        """Give the answer to `request` as it grows; leaving the block, in whatever way, frees its row.

        Its images are read one after the other, and the remaining ones not at all once the block is left.

        Raises:
            RequestError: an image cannot be used, or the dialogue cannot be answered.
        """
        left = Event()
        submitted = self._threads.submit(self._submit, request, left)
        try:
            yield await asyncio.wrap_future(submitted)
        finally:
            left.set()
            submitted.add_done_callback(_cancel)  # the images may still be being read

    async def pieces(self, stream: Stream) -> AsyncIterator[str]:
        """Yield the text of an answer as it grows.

        Raises:
            DecodingError: the model failed on this request.
        """
        pieces = iter(stream)
        while piece := await asyncio.get_running_loop().run_in_executor(self._threads, next, pieces, ""):
            yield piece

    def close(self) -> None:
        """Stop decoding; answers that are not complete fail."""
        self._scheduler.close()
        self._images.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _submit(self, request: ChatRequest, left: Event) -> Stream:
        """Read the images, and give the prompt to the scheduler."""
        pixels = []
        for image in request.images:
            if left.is_set():
                raise CancelledError
            pixels.append(self._images(image))
        features = self._engine.query_features(pixels)
        try:
            return self._scheduler.submit(Prompt(request.dialogue, features), request.settings, request.stop)
        except ContextLengthError as error:
            raise RequestError(str(error), param="messages", code="context_length_exceeded") from error
        except ConversationError as error:
            raise RequestError(str(error), param="messages") from error


def _cancel(submitted: Future[Stream]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()
