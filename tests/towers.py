"""Tiny vision towers of random weights on disk, as transformers saves them, each with its image processor's file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    ViTConfig,
)

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 90, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]

TOWERS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: AutoModel.from_config(CLIPVisionConfig(**SIZES, **IMAGE)),
    "whole clip": lambda: CLIPModel(CLIPConfig(vision_config={**SIZES, **IMAGE}, text_config=TEXT, projection_dim=8)),
    "siglip": lambda: AutoModel.from_config(SiglipVisionConfig(**SIZES, **IMAGE)),
    "whole siglip": lambda: SiglipModel(SiglipConfig(vision_config={**SIZES, **IMAGE}, text_config=TEXT)),
    "dinov2": lambda: AutoModel.from_config(Dinov2Config(**SIZES, **IMAGE)),
    "dinov2 with registers": lambda: AutoModel.from_config(Dinov2WithRegistersConfig(**SIZES, **IMAGE)),
    "dinov3": lambda: AutoModel.from_config(DINOv3ViTConfig(**SIZES, **IMAGE, num_register_tokens=2)),
    "vit": lambda: AutoModel.from_config(ViTConfig(**SIZES, **IMAGE)),
}
"""SigLIP 2 of a fixed size is a SigLIP to transformers."""


def write_tower(kind: str, folder: Path, **processor: Any) -> Path:
    """Write a tower whose every value is random, so that a missing or swapped tensor is noticed; return the folder."""
    torch.manual_seed(3)
    model = TOWERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    values = {"size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD, "resample": 2, **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder
