"""A decode step of a LLaMA without what transformers does around it in every layer and step.

With one token per row, a pass is a matter of reading the weights once; masks, repeated key heads, output objects and
many Python frames per layer come on top. Here is the same arithmetic on the model's own norms and linear layers
(adapters and all) and the same cache. Every other architecture, and every prompt, takes the model's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from minigpt4.chat.decoding.cache import RowCache


def is_plain_llama(model: PreTrainedModel) -> bool:
    """Return whether `llama_step` computes what the model's own forward does."""
    return type(model) is LlamaForCausalLM


def llama_step(
    model: PreTrainedModel, cache: RowCache, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None
) -> Tensor:
    """Feed one token per row and return the logits (B, V).

    Args:
        model: a model that `is_plain_llama`.
        cache: of the rows; the token's column is added.
        input_ids: (B, 1).
        position_ids: (B, 1).
        mask: (B, C) bool over all columns, the new one included, false at padding; None without padding.
    """
    body: Any = model.model
    config = model.config
    rows, kv_heads = len(input_ids), config.num_key_value_heads
    # Query heads that share a key head stand where attention has its query positions: nothing is repeated.
    shape = (rows, kv_heads, config.num_attention_heads // kv_heads, -1)
    hidden = body.embed_tokens(input_ids)
    cos, sin = (t.unsqueeze(1) for t in body.rotary_emb(hidden, position_ids=position_ids))
    half = cos.shape[-1] // 2
    turned = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    visible = None if mask is None else mask[:, None, None]
    for layer, buffer in zip(body.layers, cache.buffers, strict=True):
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query = attention.q_proj(normed).view(shape)
        key = attention.k_proj(normed).view(rows, kv_heads, 1, -1)
        value = attention.v_proj(normed).view(rows, kv_heads, 1, -1)
        keys, values = buffer.update(key * cos + key.roll(half, -1) * turned, value)
        query = query * cos + query.roll(half, -1) * turned
        seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=attention.scaling)
        hidden = hidden + attention.o_proj(seen.reshape(rows, 1, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits: Tensor = model.lm_head(body.norm(hidden))
    return logits[:, -1]
