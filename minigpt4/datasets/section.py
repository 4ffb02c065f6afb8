"""The `datasets` section of a config."""

from __future__ import annotations

from dataclasses import dataclass

from minigpt4.registry import DATASETS, Component, component


@dataclass(frozen=True, kw_only=True)
class DatasetsSection:
    """Data sets by a name of your choice, each with a `type`."""

    train: dict[str, Component] = component(DATASETS, many=True)
    """What is trained on, mixed by weight."""
    validation: dict[str, Component] = component(DATASETS, many=True)
    """What the validation loss is taken over, in a fixed order."""
