"""Hugging Face BLIP-2 folders (`Salesforce/blip2-*`) as a source of the image encoder and the Q-Former.

Input: a folder of safetensors, sharded or not, with a language model inside that is never read. Output: tensors under
the names of `eva_vit_g.pth`, of `ln_vision`, and of our Q-Former.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.weights import read_tensors

_VISION = "vision_model."
_NORM = "vision_model.post_layernorm."
_TO_EVA = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("encoder.layers.", "blocks."),
    (".layer_norm", ".norm"),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.", ".attn."),
)
_QFORMER = re.compile(r"query_tokens$|qformer\.")


def is_blip2_folder(path: Path) -> bool:
    """Whether `path` is a folder whose `config.json` says BLIP-2."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in ("blip-2", "blip_2")


def read_encoder(folder: Path) -> dict[str, Tensor]:
    """Return the image encoder's tensors as `eva_vit_g.pth` names them.

    Raises:
        WeightsError: the files are damaged, or the encoder has a bias for keys, which EVA-ViT-g has not.
    """
    tensors = read_tensors(folder, lambda name: name.startswith(_VISION) and not name.startswith(_NORM))
    renamed: dict[str, Tensor] = {}
    for theirs, tensor in tensors.items():
        name = theirs.removeprefix(_VISION)
        for folders, ours in _TO_EVA:
            name = name.replace(folders, ours)
        if name.endswith("attn.qkv.bias"):
            query, key, value = _thirds(tensor, f"{folder}: {theirs}")
            if torch.any(key != 0):
                raise WeightsError(
                    f"{folder}: {theirs} has a bias for keys, its middle third; EVA-ViT-g has none, so this is "
                    "another encoder"
                )
            at = name.removesuffix("qkv.bias")
            renamed |= {f"{at}q_bias": query, f"{at}v_bias": value}
        else:
            renamed[name] = tensor
    return renamed


def read_ln_vision(path: Path) -> dict[str, Tensor]:
    """Return `weight` and `bias` of `ln_vision`, from a BLIP-2 folder or a published file."""
    prefix = _NORM if is_blip2_folder(path) else "ln_vision."
    found = read_tensors(path, lambda name: name.startswith(prefix))
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def read_qformer(folder: Path) -> dict[str, Tensor]:
    """Return query tokens and Q-Former of a BLIP-2 folder, which names them as we do."""
    return read_tensors(folder, lambda name: _QFORMER.match(name) is not None)


def _thirds(bias: Tensor, place: str) -> tuple[Tensor, ...]:
    if bias.ndim != 1 or len(bias) % 3:
        raise WeightsError(f"{place} is {tuple(bias.shape)}, which is not the bias of queries, keys and values")
    return bias.chunk(3)
