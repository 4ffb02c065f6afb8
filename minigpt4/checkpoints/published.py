"""The published names of tensors, and ours; and the file that the published code loads.

With `models/resampler.py`, which reads BLIP-2's Q-Former file, the only place that knows `visual_encoder`, `Qformer`
and `llama_model`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4.errors import ExportError
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.models.resampler import Merge, QFormer, qformer_name
from minigpt4.models.vision import EvaViTG

_PREFIXES = {
    "visual_encoder.": "vision_encoder.vit.",
    "ln_vision.": "vision_encoder.ln_vision.",
    "llama_model.": "language_model.model.",
}
_BUFFERS = re.compile(r"embeddings\.position_ids$|rotary_emb\.inv_freq$")


def our_name(published: str) -> str:
    """Return our name of a tensor given its published one."""
    if published == "query_tokens" or published.startswith("Qformer."):
        return f"resampler.{qformer_name(published)}"
    for theirs, ours in _PREFIXES.items():
        if published.startswith(theirs):
            return ours + published.removeprefix(theirs)
    return published


def is_buffer(published: str) -> bool:
    """Whether a tensor is a buffer that every model computes itself."""
    return _BUFFERS.search(published) is not None


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return published tensors under our names, without the buffers that every model computes itself."""
    return {our_name(name): tensor for name, tensor in tensors.items() if not is_buffer(name)}


def save_published(model: MiniGPT4, path: Path, about: Mapping[str, Any]) -> None:
    """Write a `.pth` for `ckpt:` of the published code's configs: `llama_proj` alone, float32, under `model`.

    Source: `runner_base.py`, which writes model, optimizer, config, scaler and epoch; a model's `from_config` reads
    `model` only, so the optimizer and the scaler are left out.

    Args:
        model: where only `llama_proj` was trained.
        path: must not exist.
        about: plain values, kept under `config`.

    Raises:
        ExportError: the published code cannot use this model, or `path` exists or cannot be written.
    """
    _check_published(model)
    if path.exists():
        raise ExportError(f"{path}: exists already; name a new file")
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in model.trained_state().items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": tensors, "config": dict(about), "epoch": 0}, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError to torch
        raise ExportError(f"{path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _check_published(model: MiniGPT4) -> None:
    more = sorted({name for name in model.learnt_names() if not name.startswith("llama_proj.")})
    if more:
        raise ExportError(
            f"the published code loads llama_proj alone, but this model has also learnt {', '.join(more[:3])}"
            f"{', ...' if len(more) > 3 else ''}: use --to huggingface, or keep the checkpoint as it is"
        )
    encoder, resampler = type(model.vision_encoder), type(model.resampler)
    if encoder is not EvaViTG or resampler not in (QFormer, Merge):
        raise ExportError(
            "the published code knows EVA-ViT-g with a Q-Former, or with four patches joined; this model has "
            f"{encoder.__name__} and {resampler.__name__}: keep the checkpoint, or use --to prompt-embeds"
        )
