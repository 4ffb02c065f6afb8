"""Recomputed activations: less memory in the forward pass, another forward pass in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def recompute_activations(model: nn.Module) -> None:
    """Make a transformers model recompute the activations of its layers in the backward pass.

    A layer does so only while its own `training` flag is set, and a frozen model is in eval mode: so the flag is set on
    the layers that have the feature, and on nothing inside them, where it would turn dropout on. `train` and `eval`
    undo it.
    """
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # new and old name in transformers
    enable: Callable[[], None] = next(getattr(model, name) for name in names if hasattr(model, name))
    enable()
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = True
