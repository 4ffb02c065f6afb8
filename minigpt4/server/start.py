"""Starting the service: address, key, model, and an orderly end.

Input: an address, the file of the key, and how to load the model. Output: a service that runs until it is stopped.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.errors import MissingDependencyError, ServerError

if TYPE_CHECKING:
    import uvicorn

    from minigpt4.checkpoints.assemble import LoadedModel
    from minigpt4.server.service import Service

_log = logging.getLogger(__name__)
KEY_VARIABLE = "MINIGPT4_API_KEY"


def serve(load: Callable[[], LoadedModel], name: str, *, host: str, port: int, key_file: str = "") -> None:
    """Serve a model until SIGINT or SIGTERM; answers in progress are finished first.

    Args:
        load: loads the model; called when everything else is checked.
        name: the name of the model for clients.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        key_file: file with the key that clients must send; without it, the variable MINIGPT4_API_KEY is used.

    Raises:
        MissingDependencyError: starlette or uvicorn is not installed.
        ServerError: the address or the key cannot be used.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette"):
            raise
        raise MissingDependencyError(error.name, "the server", "serve") from error
    key = read_key(key_file)
    with bind(host, port) as listener:
        loaded = load()
        from minigpt4.devices import return_freed_memory
        from minigpt4.server.service import Service

        return_freed_memory()
        service = Service(loaded, name, key)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
        _log.info("serving %s at %s (%s)", name, address, "with a key" if key else "without a key")
        if not key and not is_loopback(host):
            _log.warning("every machine that reaches %s can use this service: set a key with --api-key-file", host)
        for library in ("uvicorn", "asyncio"):  # their errors go where ours do, escaped and counted
            logging.getLogger(library).handlers[:] = logging.getLogger("minigpt4").handlers
        uvicorn.Server(configure(service)).run(sockets=[listener])


def configure(service: Service) -> uvicorn.Config:
    """Return how uvicorn runs a service: with guarded connections, and without a log of its own."""
    import uvicorn

    from minigpt4.server.connections import BACKLOG, guarded

    return uvicorn.Config(
        service.app(),
        http=guarded(service.limits),
        backlog=BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=max(1, round(service.limits.shutdown_seconds)),
    )


def read_key(file: str) -> str:
    """Return the key in `file`, or in the environment; empty if there is none.

    Raises:
        ServerError: the file cannot be read, or does not hold a valid key.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if file:
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServerError(f"{file}: the key cannot be read: {error}") from error
        if not key:
            raise ServerError(f"{file}: the file is empty; write a key into it")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ServerError(f"{file or KEY_VARIABLE}: a key must be printable ASCII without spaces")
    return key


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; it does not listen yet.

    Raises:
        ServerError: the address cannot be used.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        if listener is not None:
            listener.close()
        message = f"cannot listen on {host} port {port}: {error}; choose another address with --host and --port"
        raise ServerError(message) from error
    return listener


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
