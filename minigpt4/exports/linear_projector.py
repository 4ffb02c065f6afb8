"""A linear projector as two layers with an activation between them, for runtimes that know only those.

Input: `llama_proj`. Output: the two layers, and the name of the activation.

- `exact`: the activation is `linear`, and the second layer is the identity. Nothing is rounded.
- `gelu`: for runtimes without that activation. `gelu(x) - gelu(-x) = x`, so the first layer makes x and -x of every
  feature, and the second one applies the weights to their difference. It needs a hidden layer of 2 * Dv values.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from minigpt4.errors import ExportError
from minigpt4.models.projector import Mlp

Layout = Literal["exact", "gelu"]
LAYOUTS: tuple[Layout, ...] = ("exact", "gelu")


def as_two_layers(projector: nn.Module, layout: Layout) -> tuple[str, dict[str, Tensor]]:
    """Return the activation between two layers and their tensors `linear_1.*` and `linear_2.*`.

    Args:
        projector: an `Mlp`, which has the two layers, or a linear layer.
        layout: for a linear layer; both have a hidden layer as wide as the language model, as LLaVA has it.

    Raises:
        ExportError: the layout `gelu` does not fit because 2 * Dv is larger than Dl.
    """
    if isinstance(projector, Mlp):
        return "gelu", dict(projector.state_dict())
    linear: Any = projector
    wide, width = linear.weight.shape
    if layout == "gelu":
        if 2 * width > wide:
            raise ExportError(
                "a linear projector fits LLaVA's layers with GELU only if the features are at most half as wide as the "
                f"language model; they are {width} and {wide} wide: leave out --projector gelu"
            )
        return "gelu", gelu_layers(linear, hidden=wide)
    tensors = {"linear_1.weight": linear.weight, "linear_2.weight": torch.eye(wide).to(linear.weight)}
    if linear.bias is not None:
        tensors |= {"linear_1.bias": linear.bias, "linear_2.bias": torch.zeros_like(linear.bias)}
    return "linear", tensors


def gelu_layers(linear: nn.Linear, hidden: int) -> dict[str, Tensor]:
    """Return the tensors of the layout `gelu` with `hidden` values between the layers, at least 2 * Dv."""
    weight = linear.weight.detach()
    wide, width = weight.shape
    first, second = weight.new_zeros(hidden, width), weight.new_zeros(wide, hidden)
    first[:width], first[width : 2 * width] = torch.eye(width).to(weight), -torch.eye(width).to(weight)
    second[:, :width], second[:, width : 2 * width] = weight, -weight
    tensors = {"linear_1.weight": first, "linear_2.weight": second}
    if linear.bias is not None:
        tensors |= {"linear_1.bias": weight.new_zeros(hidden), "linear_2.bias": linear.bias.detach()}
    return tensors
