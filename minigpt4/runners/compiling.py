"""The layers of the language model, compiled for the rows of a training run.

Input: a language model. Output: the same model, whose layers run as kernels that `torch.compile` made for each width of
a row. Layers share these kernels. On a CPU this needs a C++ compiler.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minigpt4.errors import ConfigError
from minigpt4.models.language_model import LanguageModel

_log = logging.getLogger(__name__)


def layers_of(llm: LanguageModel) -> list[nn.Module]:
    """Return what transformers calls the layers of a model.

    Raises:
        ConfigError: the model does not say what they are.
    """
    names = set(llm.model._no_split_modules or ())
    layers = [module for module in llm.model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(
            f"{type(llm.model).__name__} does not say what its layers are; set run.compile and "
            "run.shard_language_model to false"
        )
    return layers


@contextmanager
def compiled_layers(llm: LanguageModel, device: torch.device) -> Iterator[None]:
    """Run the layers of a language model compiled; where that cannot be done, say why and run them as they are.

    Args:
        llm: on `device`.
        device: of the run.

    Raises:
        ConfigError: the model does not say what its layers are.
    """
    layers: list[Any] = layers_of(llm)
    if problem := _why_not(device):
        _log.warning("run.compile: nothing is compiled, and the run continues without: %s", problem)
        yield
        return
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the method of the class is back


def _why_not(device: torch.device) -> str:
    """Return why a small function cannot be compiled for a device, or nothing."""

    def add_one(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.sin() + 1

    torch.compiler.reset()  # else an earlier result for this function would be used
    try:
        torch.compile(add_one, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, from the compiler of each device
        lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        reason = (lines or [type(error).__name__])[0]
        need = "a C++ compiler, such as g++, that CXX may name" if device.type == "cpu" else "triton and a C compiler"
        return f"{reason}. torch.compile needs {need}"
    return ""
