"""Which attention kernel is the faster one here: found by timing both on the shapes of a batch.

Input: a model and a batch. Output: `sdpa` or `eager` for the language model and the image encoder. On a GPU, sdpa is
faster and needs less memory, so nothing is measured. On a CPU it depends on precision, length and instruction set: with
short rows in bfloat16, the backward pass of sdpa can take several times as long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt4.batch import Batch
from minigpt4.models.minigpt4 import MiniGPT4

CLEARLY_FASTER = 0.9
"""Eager attention is chosen if it takes less than this share of the time of sdpa."""
ROUNDS = 5
"""Measurements of each kernel, in alternation, behind one that does not count."""
LARGEST = 2**26
"""Most attention scores of a measurement; larger batches are measured with fewer rows."""


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one layer.

    Attributes:
        rows: B or I.
        heads: of the queries.
        kv_heads: of keys and values.
        tokens: T or P.
        head_dim: width of a head.
        dtype: of queries, keys and values.
        masked: whether the mask is a tensor; otherwise it is causal or none.
        causal: whether a token attends to no later one.
        trained: whether a backward pass follows.
    """

    rows: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype
    masked: bool = False
    causal: bool = False
    trained: bool = False


def open_attention(model: MiniGPT4, batch: Batch) -> dict[str, AttentionShape]:
    """Return the parts of a model whose attention kernel can be chosen, with what they compute for a batch."""
    shapes = {}
    llm, encoder = model.language_model, model.vision_encoder
    if llm.attention_is_open:
        config: Any = llm.model.config.get_text_config()
        heads = config.num_attention_heads
        shapes["language_model"] = AttentionShape(
            rows=batch.input_ids.shape[0],
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            tokens=batch.input_ids.shape[1],
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=llm.dtype,
            masked=batch.has_structure,
            causal=True,
            trained=True,
        )
    layers: list[Any] = _fused_layers(encoder)
    if layers and batch.pixel_values is not None and layers[0].fused_attn:
        heads = layers[0].num_heads
        shapes["vision_encoder"] = AttentionShape(
            rows=len(batch.pixel_values),
            heads=heads,
            kv_heads=heads,
            tokens=encoder.num_patches,
            head_dim=encoder.feature_dim // heads,
            dtype=next(encoder.parameters()).dtype,
            trained="vision_encoder" in model.trainable,
        )
    return shapes


def choose_attention(model: MiniGPT4, batch: Batch) -> dict[str, str]:
    """Return `sdpa` or `eager` for each part of a model on a CPU whose kernel is not set; empty on other devices."""
    if model.device.type != "cpu":
        return {}
    shapes = open_attention(model, batch)
    return {part: "eager" if _eager_is_faster(shape) else "sdpa" for part, shape in shapes.items()}


def set_attention(model: MiniGPT4, chosen: Mapping[str, str]) -> None:
    """Make the parts of a model use the kernels chosen for them."""
    if "language_model" in chosen:
        model.language_model.model.set_attn_implementation(chosen["language_model"])
    if "vision_encoder" in chosen:
        for layer in _fused_layers(model.vision_encoder):
            layer.fused_attn = chosen["vision_encoder"] == "sdpa"


def _fused_layers(encoder: nn.Module) -> list[Any]:
    """Return timm's attention layers, each with a flag that selects sdpa."""
    return [m for m in encoder.modules() if hasattr(m, "fused_attn") and hasattr(m, "num_heads")]


def _eager_is_faster(shape: AttentionShape) -> bool:
    rows = max(1, min(shape.rows, LARGEST // (shape.heads * shape.tokens**2)))
    query = torch.randn(rows, shape.heads, shape.tokens, shape.head_dim).to(shape.dtype)
    key, value = torch.randn(2, rows, shape.kv_heads, shape.tokens, shape.head_dim).to(shape.dtype)
    inputs = [tensor.requires_grad_(shape.trained) for tensor in (query, key, value)]
    is_later = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool).triu(1)
    mask = torch.zeros(rows, 1, shape.tokens, shape.tokens, dtype=shape.dtype)
    mask = mask.masked_fill(is_later, torch.finfo(shape.dtype).min) if shape.causal else mask
    kernels = {
        "eager": lambda: _eager(query, key, value, mask if shape.causal else None),
        "sdpa": lambda: _sdpa(query, key, value, mask if shape.masked else None, shape.causal and not shape.masked),
    }
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(ROUNDS + 1):
        for name, kernel in kernels.items():
            times[name].append(_seconds(kernel, inputs if shape.trained else []))
    eager, sdpa = (statistics.median(times[name][1:]) for name in ("eager", "sdpa"))
    return eager < CLEARLY_FASTER * sdpa


def _seconds(kernel: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    started = time.perf_counter()
    with torch.set_grad_enabled(bool(inputs)):
        found = kernel()
    if inputs:
        torch.autograd.grad(found.sum(), inputs)
    return time.perf_counter() - started


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute as transformers' `eager_attention_forward` does."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
