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
    """Control: ask each question about another image, one for which the right answer differs."""
    output: str = ""
    """File for the result and every answer, as JSON lines; empty writes none."""
    seed: int = 42
    """Seed of the sample of questions and of the shuffle."""
