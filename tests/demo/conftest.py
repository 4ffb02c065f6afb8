"""The page of a tiny model in real headless Chromium; where no browser is installed, these tests skip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from PIL import Image

from minigpt4.chat.session import Chat
from minigpt4.checkpoints.assemble import LoadedModel, load_model

ABOUT = "It answers with noise."


@pytest.fixture(scope="session")
def loaded(tiny_chat_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny random model with long answers."""
    folder = tmp_path_factory.mktemp("page")
    Image.new("RGB", (40, 40), "red").save(folder / "example.png")
    values = {
        **tiny_chat_values,
        "chat": {"max_new_tokens": 200},
        "demo": {
            "about": ABOUT,
            "examples": [{"image": str(folder / "example.png"), "question": "What is in the example?"}],
        },
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_model(file, device="cpu")


@pytest.fixture(scope="session")
def address(loaded: LoadedModel) -> Iterator[str]:
    """The page of the model, served in a thread."""
    pytest.importorskip("gradio")
    from minigpt4.demo.page import build_page, launch

    chat = Chat(loaded)
    page = build_page(chat, "tiny")
    yield launch(page, chat, host="127.0.0.1", port=None, share=False, wait=False)
    page.close()


@pytest.fixture
def visit(browser, address: str) -> Iterator[Callable[[], object]]:
    """Return a function that opens the page as a new visitor, and check that nothing outside was requested."""
    contexts = []
    foreign: list[str] = []

    def note(request) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            foreign.append(request.url)

    def open_page():
        context = browser.new_context()
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", note)
        page.goto(address, wait_until="domcontentloaded")
        page.wait_for_selector("#message textarea")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert foreign == []
