"""The `demo` section: what the page says about a model, and what it offers to ask."""

from __future__ import annotations

from dataclasses import dataclass

from minigpt4.registry import path_field


@dataclass(frozen=True, kw_only=True)
class DemoExample:
    """An image and a question about it, offered to the visitor."""

    image: str = path_field()
    """The image file; `shipped:` begins what travels with the package."""
    question: str
    """What is asked about it."""


@dataclass(frozen=True, kw_only=True)
class DemoSection:
    """What a visitor is told about the model."""

    about: str = ""
    """What the model can and cannot do, in Markdown; empty: the page says that nobody wrote it down."""
    examples: tuple[DemoExample, ...] = ()
    """Examples on the empty page."""
    visitors: int = 4
    """Visitors answered at the same time; the others wait in a queue, and see their place in it."""
    queue: int = 64
    """Visitors that may wait; the next one is told to come back."""

    def __post_init__(self) -> None:
        """Refuse numbers with which nobody is answered."""
        for name in ("visitors", "queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
