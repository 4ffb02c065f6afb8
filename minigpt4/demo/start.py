"""Starting the page. Gradio is imported only when everything else is checked."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from minigpt4.errors import MissingDependencyError, ServerError

if TYPE_CHECKING:
    from minigpt4.checkpoints.assemble import LoadedModel


def serve_page(load: Callable[[], LoadedModel], name: str, *, host: str, port: int, share: bool) -> None:
    """Serve the page of the model that `load` loads, called `name`, until interrupted.

    Raises:
        MissingDependencyError: gradio is not installed.
        ConfigError: an example image is missing.
        ServerError: the address cannot be used.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MissingDependencyError("gradio", "the demo page", "demo")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host.strip("[]"), port), family=family).close()
    except (OSError, OverflowError) as error:
        raise ServerError(f"cannot serve the page on {host} port {port}: {error}; choose another --port") from error
    loaded = load()
    from minigpt4.chat.session import Chat
    from minigpt4.checkpoints.assemble import check_files
    from minigpt4.demo.page import build_page, launch
    from minigpt4.devices import return_freed_memory

    return_freed_memory()
    check_files(loaded.config, "demo")
    chat = Chat(loaded)
    launch(build_page(chat, name), chat, host=host, port=port, share=share)
