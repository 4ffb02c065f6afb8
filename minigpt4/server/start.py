"""Starting the service: address, key, and a quiet end.

Input: an address, where the key is, and how to load the model. Output: a service that runs until it is told to stop.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.errors import MissingDependencyError, ServerError

_log = logging.getLogger(__name__)
KEY_VARIABLE = "MINIGPT4_API_KEY"


def serve(load: Callable[[], tuple[LoadedModel, str]], *, host: str, port: int, key_file: str = "") -> None:
    """Serve a model until SIGINT or SIGTERM; answers in progress are finished first.

    Args:
        load: loads the model and says its name; called when everything else is known to be right.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        key_file: file with the key that clients need; without it, the variable MINIGPT4_API_KEY.

    Raises:
        MissingDependencyError: starlette or uvicorn is not installed.
        ServerError: the address or the key cannot be used.
    """
    try:
        import uvicorn

        from minigpt4.server.service import Service
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette"):
            raise
        raise MissingDependencyError(error.name, "the server", "serve") from error
    key = read_key(key_file)
    with bind(host, port) as listener:
        loaded, name = load()
        service = Service(loaded, name, key)
        config = uvicorn.Config(
            service.app(),
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=max(1, round(service.limits.shutdown_seconds)),
        )
        address = f"http://{_in_url(host)}:{listener.getsockname()[1]}/v1"
        _log.info("serving %s at %s (%s)", name, address, "with a key" if key else "without a key")
        if not key and not is_loopback(host):
            _log.warning("anybody who reaches %s can use this service: set a key with --api-key-file", host)
        uvicorn.Server(config).run(sockets=[listener])


def read_key(file: str) -> str:
    """Return the key in `file`, or in the environment; empty when there is none.

    Raises:
        ServerError: the file cannot be read, or holds no usable key.
    """
    if not file:
        key, place = os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE
    else:
        place = file
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServerError(f"{file}: the key cannot be read: {error}") from error
        if not key:
            raise ServerError(f"{file}: is empty; write a key into it")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ServerError(f"{place}: a key is printable ASCII without blanks")
    return key


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; it does not listen yet.

    Raises:
        ServerError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ServerError(f"cannot listen on {host} port {port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ServerError(
            f"cannot listen on {host} port {port}: {error}; choose others with --host and --port"
        ) from error
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
