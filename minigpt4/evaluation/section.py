"""The `evaluation` section."""

from __future__ import annotations

from dataclasses import dataclass

from minigpt4.registry import path_field


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """Visual question answering by exact match on easy-VQA's test split."""

    path: str = path_field("asset:easy-vqa")
    """Folder of the easy-VQA set."""
    samples: int = 0
    """Questions asked, the same ones each time; 0 asks all."""
    batch_size: int = 32
    """Questions answered together."""
    max_new_tokens: int = 8
    """Longest answer in tokens."""
    shuffle_images: bool = False
    """Control: ask each question about an image of another colour and another shape, and keep the right answer."""
    device: str = "auto"
    """Where to compute; `auto` takes the accelerator if there is one."""
    output: str = ""
    """File for the result and every answer, as JSON lines; empty writes none."""
    seed: int = 42
    """Seed of the sample of questions and of the shuffle."""

    def __post_init__(self) -> None:
        """Refuse numbers that no evaluation can use."""
        for name, least in {"samples": 0, "batch_size": 1, "max_new_tokens": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")
