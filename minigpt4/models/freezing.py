"""Which parts of the model are trained, and which are frozen.

Input: the model and the names in `model.trainable`. Output: `requires_grad` of every parameter, and the numbers and
precisions of trainable and frozen parameters, which a run prints at its start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from torch import Tensor, nn

from minigpt4.errors import ConfigError

PARTS = ("vision_encoder", "resampler", "llama_proj", "language_model", "lora")
_LORA_MARK = ".lora_"


def part_of(parameter: str) -> str:
    """Return the part that a parameter belongs to; adapters in the language model are the part `lora`."""
    return "lora" if _LORA_MARK in parameter else parameter.split(".", 1)[0]


def frozen_tensors(module: nn.Module, part: str, trained: Collection[str]) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers of a part whose names in the model are not in `trained`, for its fingerprint.

    Adapters change neither the tensors of a part nor, here, their names: with and without them it is the same part.
    """
    return [
        (name.replace(".base_layer.", "."), tensor)
        for name, tensor in module.state_dict().items()
        if f"{part}.{name}" not in trained and part_of(f"{part}.{name}") != "lora"
    ]


def set_trainable(model: nn.Module, trainable: Sequence[str]) -> None:
    """Make the parts in `trainable` trainable, in float32, and freeze all others.

    Raises:
        ConfigError: a name is unknown, or the part has no parameters (for example LoRA with rank 0).
    """
    wrong = [name for name in trainable if name not in PARTS]
    if wrong:
        raise ConfigError(f"model.trainable: unknown part {wrong[0]!r}; the parts are {', '.join(PARTS)}")
    found = set()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in trainable)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # in half precision, small updates are lost to rounding
        found.add(part)
    empty = [name for name in trainable if name not in found]
    if empty:
        raise ConfigError(f"model.trainable: {empty[0]} has no parameters in this model")


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return `{part: (trainable, frozen)}`, numbers of parameters; each tensor counts once."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        trainable, frozen = counts.get(part_of(name), (0, 0))
        size = parameter.numel()
        counts[part_of(name)] = (trainable + size, frozen) if parameter.requires_grad else (trainable, frozen + size)
    return counts


def precisions(model: nn.Module) -> dict[str, str]:
    """Return `{part: precisions}` of the parameters, the most frequent one first."""
    held: dict[str, Counter[str]] = {}
    for name, parameter in model.named_parameters():
        held.setdefault(part_of(name), Counter())[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return {part: ", ".join(dtype for dtype, _ in counts.most_common()) for part, counts in held.items()}
