"""The `processors` section of a config."""

from __future__ import annotations

from dataclasses import dataclass

from minigpt4.registry import PROCESSORS, Component, component


@dataclass(frozen=True, kw_only=True)
class ProcessorsSection:
    """What is done to images; text processors belong to each data set."""

    image: Component = component(PROCESSORS, default="image")
    """How an image becomes the tensor that the vision encoder takes."""
