"""From a checked request to its answer: the work behind the HTTP.

Input: `ChatRequest`s, many at a time. Output: their texts, piece by piece, for asyncio. Reading images and waiting for
tokens block, and so happen in threads; the scheduler decodes all requests together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from minigpt4.chat.engine import Engine, Prompt
from minigpt4.chat.scheduler import Scheduler, Stream
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.errors import ContextLengthError, ConversationError, RequestError
from minigpt4.server.images import ImageReader
from minigpt4.server.request import ChatRequest
from minigpt4.server.section import ServerSection

_END = ""
"""What no piece of an answer is."""


class Work:
    """Answers requests with one model, and bounds how many are under way."""

    def __init__(self, loaded: LoadedModel, limits: ServerSection) -> None:
        self._engine = Engine(loaded)
        self._images = ImageReader(limits, loaded.image_processor.config.max_pixels)
        self._scheduler = Scheduler(self._engine, limits.max_rows)
        self._places = limits.max_rows + limits.max_waiting
        self._threads = ThreadPoolExecutor(self._places, thread_name_prefix="request")
        self.under_way = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places while a request is read and answered.

        Raises:
            RequestError: all are taken.
        """
        if self.under_way >= self._places:
            raise RequestError(
                f"{self.under_way} requests are under way, as many as this service takes; try again in a moment",
                status=429,
                code="too_many_requests",
            )
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    def job(self, request: ChatRequest) -> Job:
        """Return the job of answering `request`; it begins when it is entered."""
        return Job(lambda: self._submit(request), self._threads)

    def close(self) -> None:
        """End the decoding; answers that are not complete fail."""
        self._scheduler.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _submit(self, request: ChatRequest) -> Stream:
        """Read the images, and hand the prompt to the scheduler."""
        features = self._engine.query_features([self._images(image) for image in request.images])
        try:
            return self._scheduler.submit(Prompt(request.dialogue, features), request.settings, request.stop)
        except ContextLengthError as error:
            raise RequestError(str(error), param="messages", code="context_length_exceeded") from error
        except ConversationError as error:
            raise RequestError(str(error), param="messages") from error


class Job:
    """One request being answered: `async with` begins it, and frees its row however the block is left."""

    def __init__(self, submit: Callable[[], Stream], threads: ThreadPoolExecutor) -> None:
        self._submit = submit
        self._threads = threads
        self._stream: Stream | None = None
        self._left = False

    async def __aenter__(self) -> Stream:
        """Return the stream, once the scheduler has the prompt.

        Raises:
            RequestError: an image cannot be used, or the dialogue cannot be answered.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._begin)
        except BaseException:
            self._leave()
            raise

    async def __aexit__(self, *_error: object) -> None:
        self._leave()

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text as it grows.

        Raises:
            DecodingError: the model failed on this request.
        """
        pieces = iter(self._stream or ())
        while piece := await asyncio.get_running_loop().run_in_executor(self._threads, next, pieces, _END):
            yield piece

    def _begin(self) -> Stream:
        self._stream = self._submit()
        if self._left:  # while the images were read
            self._stream.cancel()
        return self._stream

    def _leave(self) -> None:
        self._left = True
        if self._stream is not None:
            self._stream.cancel()
