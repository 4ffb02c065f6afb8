"""Tensors of BLIP-2 under our names, from a published file or from a Hugging Face folder (`Salesforce/blip2-*`).

Input: a `.pth` file, or a folder of safetensors, sharded or not, with a language model inside that is never read.
Output: the tensors of one part of our model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.errors import WeightsError
from minigpt4.strict_json import parse_json
from minigpt4.tensor_names import from_blip2, from_published, to_blip2

if TYPE_CHECKING:  # a folder is recognised without torch
    from torch import Tensor

_VIT = "vision_encoder.vit."


def folder_config(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a folder saved by transformers; empty if there is none that can be read."""
    try:
        config = parse_json((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def is_blip2_folder(path: Path) -> bool:
    """Whether `path` is a folder whose `config.json` says BLIP-2."""
    return folder_config(path).get("model_type") in ("blip-2", "blip_2")


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """Return the tensors whose name in our model starts with `part`, under the rest of that name.

    Args:
        path: a published file or a BLIP-2 folder.
        part: `resampler.` for query tokens and Q-Former, `vision_encoder.ln_vision.` for the norm before them.

    Raises:
        WeightsError: the files are damaged.
    """
    from minigpt4.weights import read_tensors

    our_name = from_blip2 if is_blip2_folder(path) else from_published
    tensors = read_tensors(path, lambda name: our_name(name).startswith(part))
    return {our_name(name).removeprefix(part): tensor for name, tensor in tensors.items()}


def read_vit(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the image encoder under timm's names, which `eva_vit_g.pth` has.

    Args:
        path: a file such as `eva_vit_g.pth`, or a BLIP-2 folder.

    Raises:
        WeightsError: the files are damaged, or the encoder has a bias for keys, which EVA-ViT-g does not have.
    """
    import torch

    from minigpt4.weights import read_tensors

    if not is_blip2_folder(path):
        return read_tensors(path)
    tensors = read_part(path, _VIT)
    for name in [name for name in tensors if name.endswith("attn.qkv.bias")]:
        bias, place = tensors.pop(name), f"{path}: {to_blip2(_VIT + name)}"
        if bias.ndim != 1 or len(bias) % 3:
            raise WeightsError(f"{place} is {tuple(bias.shape)}, which is not a bias of queries, keys and values")
        query, key, value = bias.chunk(3)
        if torch.any(key != 0):
            raise WeightsError(
                f"{place} has a bias for keys, its middle third; EVA-ViT-g does not have one, so this is a different "
                "encoder"
            )
        prefix = name.removesuffix("qkv.bias")
        tensors |= {f"{prefix}q_bias": query, f"{prefix}v_bias": value}
    return tensors
