"""Our tensors under the names of transformers' `Blip2ForConditionalGeneration`.

Input: a model of EVA-ViT-g, Q-Former and a causal LM. Output: (name, tensor) pairs, made one at a time.
Source: transformers' conversion of LAVIS' BLIP-2 files, checked against its module tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt4.models.minigpt4 import MiniGPT4

_VIT = "vision_encoder.vit."
_RENAMED = (
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.attn\.q_bias$", r"encoder.layers.\1.self_attn.qkv.bias"),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
_PREFIXES = {
    "vision_encoder.ln_vision.": "vision_model.post_layernorm.",
    "resampler.": "",
    "llama_proj.": "language_projection.",
}


def blip2_name(name: str) -> str:
    """Return the Blip2 name of a tensor outside the language model; that of `qkv.bias` for a `q_bias`."""
    if name.startswith(_VIT):
        inner = name.removeprefix(_VIT)
        for pattern, replacement in _RENAMED:
            inner, found = re.subn(f"^{pattern}", replacement, inner)
            if found:
                break
        return f"vision_model.{inner}"
    for ours, theirs in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def blip2_tensors(model: MiniGPT4, added_rows: Sequence[int] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under its Blip2 name; LoRA adapters are added into their layers.

    Nothing is copied but the three parts of each attention bias, layers with adapters, and, with `added_rows`, the
    embedding and the head; each copy lives as long as the caller holds it.

    Args:
        model: EVA-ViT-g, Q-Former, causal LM.
        added_rows: rows of the embedding and of the head that are repeated behind the last one.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if name.startswith("language_model.") or name.endswith(".attn.v_bias"):
            continue
        if name.endswith(".attn.q_bias"):  # one bias for query, key and value; keys have none
            tensor = torch.cat([tensor, torch.zeros_like(tensor), state[name.replace("q_bias", "v_bias")]])
        yield blip2_name(name), tensor
    yield from _language_model(model, added_rows)


def _language_model(model: MiniGPT4, added_rows: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    llm: Any = model.language_model.model
    vocabulary = {llm.get_input_embeddings().weight.data_ptr(), llm.get_output_embeddings().weight.data_ptr()}
    tied = llm.config.get_text_config().tie_word_embeddings
    for name, tensor in model.language_model.merged_tensors():
        if tied and name == "lm_head.weight":
            continue
        if added_rows and tensor.data_ptr() in vocabulary:
            tensor = torch.cat([tensor, tensor[list(added_rows)]])
        yield f"language_model.{name}", tensor
