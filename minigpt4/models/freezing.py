"""What trains and what does not: declared by name, applied once, shown at start.

Input: the model and the names under `model.trainable`. Output: `requires_grad` set everywhere, and the numbers and
precisions of trainable and frozen parameters that the start-up block prints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from minigpt4.errors import ConfigError

PARTS = ("vision_encoder", "resampler", "llama_proj", "language_model", "lora")
_LORA_MARK = ".lora_"


def part_of(parameter: str) -> str:
    """Return the part a parameter belongs to; adapters inside the language model are the part `lora`."""
    return "lora" if _LORA_MARK in parameter else parameter.split(".", 1)[0]


def set_trainable(model: nn.Module, trainable: Sequence[str]) -> None:
    """Let the parts named in `trainable` learn, in float32, and freeze everything else.

    Raises:
        ConfigError: a name is not a part, or the part has no parameters (LoRA without a rank, say).
    """
    wrong = [name for name in trainable if name not in PARTS]
    if wrong:
        raise ConfigError(f"model.trainable: unknown part {wrong[0]!r}; the parts are {', '.join(PARTS)}")
    found = set()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in trainable)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # half-precision weights would round small updates away
        found.add(part)
    empty = [name for name in trainable if name not in found]
    if empty:
        raise ConfigError(f"model.trainable: {empty[0]} has no parameters in this model")


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return `{part: (trainable, frozen)}` numbers of parameters, each tensor counted once."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        trainable, frozen = counts.get(part_of(name), (0, 0))
        size = parameter.numel()
        counts[part_of(name)] = (trainable + size, frozen) if parameter.requires_grad else (trainable, frozen + size)
    return counts


def precisions(model: nn.Module) -> dict[str, str]:
    """Return `{part: precisions}` in which the parameters are held, the one of most numbers first."""
    held: dict[str, Counter[str]] = {}
    for name, parameter in model.named_parameters():
        held.setdefault(part_of(name), Counter())[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return {part: ", ".join(dtype for dtype, _ in counts.most_common()) for part, counts in held.items()}
