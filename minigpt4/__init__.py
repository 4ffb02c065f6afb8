"""MiniGPT-4, rebuilt: a frozen image encoder and a frozen language model joined by one trained linear layer.

The public names below are imported on first use (PEP 562), so `import minigpt4` itself imports nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt4.chat.session import Chat
    from minigpt4.checkpoints.assemble import load_model
    from minigpt4.config import load_config
    from minigpt4.models.minigpt4 import MiniGPT4

    __version__: str

__all__ = ["Chat", "MiniGPT4", "__version__", "load_config", "load_model"]

_HOMES = {
    "Chat": "minigpt4.chat.session",
    "MiniGPT4": "minigpt4.models.minigpt4",
    "load_config": "minigpt4.config",
    "load_model": "minigpt4.checkpoints.assemble",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("minigpt4")
    except PackageNotFoundError:  # a source tree that was not installed
        return "0+source"
