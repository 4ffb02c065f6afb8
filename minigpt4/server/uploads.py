"""Receiving the bodies of requests: how large each one and all of them together may be, and how long they may take.

Input: requests. Output: their bodies. A body that is being received takes no place among the requests that are
answered; when all bodies together are too large, the one that began first and is still incomplete is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from minigpt4.config.sections import ServerConfig
from minigpt4.errors import RequestError

UNREAD_FACTOR = 4
"""A body up to this many times too large is still received and discarded: a client that is sending reads no answer."""


class Uploads:
    """Counts the bytes of all requests, from the first byte of the body to the end of the answer."""

    def __init__(self, limits: ServerConfig) -> None:
        self.limits = limits
        self.size = 0
        self.receiving: dict[Upload, None] = {}
        """The bodies that are incomplete, in the order in which they began."""

    @contextmanager
    def upload(self) -> Iterator[Upload]:
        """Give an upload, whose bytes are counted until the block ends."""
        upload = Upload(self)
        try:
            yield upload
        finally:
            upload.forget()


class Upload:
    """The body of one request."""

    def __init__(self, uploads: Uploads) -> None:
        self._all = uploads
        self._size = 0
        self._timer: asyncio.Timeout | None = None

    async def receive(self, request: Request) -> bytes:
        """Return the body.

        Raises:
            RequestError: it is too large, takes too long, or all bodies together are too large.
        """
        limits = self._all.limits
        most = int(limits.max_body_megabytes * 1e6)
        too_large = RequestError(
            f"the request is larger than {limits.max_body_megabytes:g} MB", status=413, code="request_too_large"
        )
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > UNREAD_FACTOR * most:
            raise too_large
        body, size = bytearray(), 0
        self._all.receiving[self] = None
        try:
            async with asyncio.timeout(limits.body_seconds) as self._timer:
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= most:
                        body += chunk
                        self._count(len(chunk))
                    elif size > UNREAD_FACTOR * most:
                        break
        except TimeoutError as error:
            raise RequestError("the request took too long to arrive", status=408) from error
        finally:
            self._all.receiving.pop(self, None)
        if size > most:
            raise too_large
        return bytes(body)

    def forget(self) -> None:
        """Count the bytes no longer."""
        self._all.size -= self._size
        self._size = 0

    def _count(self, size: int) -> None:
        """Count some more bytes, and make room for them."""
        if self not in self._all.receiving:
            raise TimeoutError  # given up, and this chunk came before the timer ran
        self._size += size
        self._all.size += size
        most = self._all.limits.max_total_megabytes
        while self._all.size > most * 1e6:
            other = next((each for each in self._all.receiving if each is not self), None)
            if other is None:
                message = f"the requests in progress have {most:g} MB, the limit of this service; try again in a moment"
                raise RequestError(message, status=429, code="too_many_requests")
            other.give_up()

    def give_up(self) -> None:
        """Refuse the rest of the body, and count its bytes no longer."""
        self._all.receiving.pop(self)
        self.forget()
        if self._timer is not None:
            self._timer.reschedule(0)
