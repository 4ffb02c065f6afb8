"""Guards against clients that connect and then send or read nothing: deadlines, and a cap on connections.

uvicorn has none of these before a request is complete. Each connection of the service is a `Connection`, which closes
itself; when there are too many, the one that has waited for longest without a complete request makes room.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt4.config.sections import ServerConfig

_log = logging.getLogger(__name__)
BACKLOG = 128
"""Connections that asyncio accepts at once; the cap is applied after that."""
_RESERVED_FILES = 3 * BACKLOG + 64
"""Files for connections that are accepted and not yet counted, and for everything else."""
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: 21\r\nRetry-After: 1\r\n"
    b"Connection: close\r\n\r\ntoo many connections\r\n"
)


def guarded(limits: ServerConfig) -> type[Connection]:
    """Return the class of the connections of a service with these limits, for uvicorn's option `http`."""
    return type("GuardedConnection", (Connection,), {"limits": limits, "most": allowed_connections(limits)})


def allowed_connections(limits: ServerConfig) -> int:
    """Return `limits.max_connections`, or fewer if this process may not open as many files.

    Running out of files would stop every connection, also those that are answered.
    """
    if sys.platform == "win32":
        return limits.max_connections
    import resource

    wanted = limits.max_connections + _RESERVED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits.max_connections
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    allowed = max(1, min(limits.max_connections, soft - min(_RESERVED_FILES, soft // 2)))
    if allowed < limits.max_connections:
        _log.warning(
            "server.max_connections: %d connections instead of %d, because this process may open only %d files "
            "(ulimit -n)",
            *(allowed, limits.max_connections, soft),
        )
    return allowed


class Connection(H11Protocol):
    """A connection that does not wait for ever for its client."""

    limits: ServerConfig
    most: int

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take what uvicorn passes."""
        super().__init__(*args, **options)
        self.waiting_since = self.loop.time()
        """When the last request was answered, or the connection made; while a request is answered, irrelevant."""
        self._header_deadline = _Deadline(self, "sent no complete request", "header_seconds")
        self._send_deadline = _Deadline(self, "did not read its answer", "send_seconds")

    @property
    def has_request(self) -> bool:
        """Whether a request is complete and not answered yet."""
        return self._has_header and not self.cycle.more_body

    @property
    def _has_header(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first header, and apply the cap."""
        super().connection_made(transport)
        self._watch_header()
        if len(self.connections) > self.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._watch_header()

    def on_response_complete(self) -> None:
        """Wait for the next request; uvicorn's `timeout_keep_alive` applies until its first byte."""
        self.waiting_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the deadlines."""
        self._header_deadline.cancel()
        self._send_deadline.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the deadline of a client that does not read its answer."""
        super().pause_writing()
        self._send_deadline.start()

    def resume_writing(self) -> None:
        """End that deadline."""
        self._send_deadline.cancel()
        super().resume_writing()

    def _watch_header(self) -> None:
        """Keep a deadline exactly while a header is incomplete."""
        if self._has_header or self.transport.is_closing():
            self._header_deadline.cancel()
        else:
            self._header_deadline.start()

    def _make_room(self) -> None:
        """Close the connection that has waited for longest; if all are being answered, refuse this one."""
        waiting = [each for each in self.connections if isinstance(each, Connection) and not each.has_request]
        longest = min(waiting, key=lambda each: each.waiting_since)
        if longest is self:
            self.transport.write(_BUSY)
            self.transport.close()
        else:
            longest.give_up("made room for another one", "max_connections")

    def give_up(self, reason: str, setting: str) -> None:
        """Close the connection at once, without an answer."""
        _log.warning("a connection was closed: it %s (server.%s)", reason, setting)
        self.connections.discard(self)
        self.transport.abort()


class _Deadline:
    """A time after which a connection is given up."""

    def __init__(self, connection: Connection, reason: str, setting: str) -> None:
        self._connection, self._reason, self._setting = connection, reason, setting
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Count from now, unless it is counting already."""
        if self._timer is None:
            seconds: float = getattr(self._connection.limits, self._setting)
            give_up = self._connection.give_up
            self._timer = self._connection.loop.call_later(seconds, give_up, self._reason, self._setting)

    def cancel(self) -> None:
        """Count no longer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
