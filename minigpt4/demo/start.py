"""Starting the page: what has to be there before it is built.

Input: how to load the model, an address. Output: a served page. Gradio is imported only here and behind here.
"""

from __future__ import annotations

from collections.abc import Callable

from minigpt4.chat.session import Chat
from minigpt4.checkpoints.assemble import LoadedModel, check_files
from minigpt4.errors import MissingDependencyError, ServerError


def serve_page(load: Callable[[], tuple[LoadedModel, str]], *, host: str, port: int, share: bool) -> None:
    """Serve the page of the model that `load` loads and names, until interrupted.

    Raises:
        MissingDependencyError: gradio is not installed.
        ConfigError: an example image is missing.
        ServerError: the address cannot be had.
    """
    try:
        from minigpt4.demo.page import build_page, launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise MissingDependencyError("gradio", "the demo page", "demo") from error
    loaded, name = load()
    check_files(loaded.config, "demo")
    chat = Chat(loaded)
    try:
        launch(build_page(chat, name), chat, host=host, port=port, share=share)
    except OSError as error:
        raise ServerError(f"cannot serve the page on {host} port {port}: {error}") from error
