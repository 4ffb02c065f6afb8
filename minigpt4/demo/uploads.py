"""A limit on what one request to the page may send; Gradio limits each file, but not their number and sum."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_log = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class UploadLimit:
    """ASGI middleware: a request with a larger body is refused, or cut off if it did not say its length."""

    def __init__(self, app: App, most: int) -> None:
        """Pass requests of at most `most` bytes to `app`."""
        self._app = app
        self._most = most

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._most:
            _log.warning("an upload of more than %d bytes was refused (server.max_body_megabytes)", self._most)
            await send({"type": "http.response.start", "status": 413, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body", "body": b"the upload is too large"})
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message if size <= self._most else {"type": "http.disconnect"}

        await self._app(scope, counted, send)
