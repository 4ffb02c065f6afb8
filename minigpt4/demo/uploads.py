"""Limits on what the page is sent: by one request, and by all visitors together. Gradio limits each file alone."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class UploadLimit:
    """ASGI middleware: a request with a larger body is refused, or cut off if it did not say its length.

    Files are refused too while the folder of uploads is full.
    """

    def __init__(self, app: App, most: int, folder: Path, most_kept: int) -> None:
        """Pass requests of at most `most` bytes to `app`, and files while `folder` has less than `most_kept` bytes."""
        self._app = app
        self._most = most
        self._folder = folder
        self._most_kept = most_kept

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._most:
            _log.warning("an upload of more than %d bytes was refused (server.max_body_megabytes)", self._most)
            await _refuse(send, 413, b"the upload is too large")
            return
        if scope["method"] == "POST" and scope["path"].endswith("/upload"):
            kept = await asyncio.to_thread(_bytes_in, self._folder)
            if kept > self._most_kept:
                _log.warning("an upload was refused: %d bytes are kept (demo.max_kept_megabytes)", kept)
                await _refuse(send, 507, b"the page keeps too many uploads; try again in an hour")
                return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message if size <= self._most else {"type": "http.disconnect"}

        await self._app(scope, counted, send)


async def _refuse(send: Send, status: int, message: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": message})


def _bytes_in(folder: Path) -> int:
    """Return the size of all files below a folder; files that vanish meanwhile count as nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).stat().st_size
            except OSError:
                continue
    return total
