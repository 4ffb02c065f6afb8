"""The names of tensors in the published files and in transformers' BLIP-2, and their names in this package.

Input and output: names, in both directions. A name without a counterpart stays as it is. "Published" are the names of
`MiniGPT4` in the original code, which BLIP-2's files share; `eva_vit_g.pth` has them without `visual_encoder.`.
"Blip2" are the names of `Blip2ForConditionalGeneration`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Pairs = tuple[tuple[str, str], ...]
"""Their spelling and ours."""

_PUBLISHED_PREFIXES: Pairs = (
    ("visual_encoder.", "vision_encoder.vit."),
    ("ln_vision.", "vision_encoder.ln_vision."),
    ("query_tokens", "resampler.query_tokens"),
    ("Qformer.bert.embeddings.LayerNorm.", "resampler.qformer.layernorm."),
    ("Qformer.bert.", "resampler.qformer."),
    ("llama_model.", "language_model.model."),
)
_PUBLISHED_QFORMER: Pairs = (("attention.self.", "attention.attention."),)
_BLIP2_PREFIXES: Pairs = (
    ("vision_model.post_layernorm.", "vision_encoder.ln_vision."),
    ("vision_model.", "vision_encoder.vit."),
    ("query_tokens", "resampler.query_tokens"),
    ("qformer.", "resampler.qformer."),
    ("language_projection.", "llama_proj."),
    ("language_model.", "language_model.model."),
)
_BLIP2_VISION: Pairs = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("encoder.layers.", "blocks."),
    (".layer_norm", ".norm"),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.", ".attn."),
)
_BUFFERS = re.compile(r"embeddings\.position_ids$|rotary_emb\.inv_freq$")
_TEXT_BRANCH = re.compile(r"qformer\.(embeddings\.(word|position)_|encoder\.layer\.\d+\.(intermediate|output)\.)")


def from_published(name: str) -> str:
    """Return our name of a tensor, given its published name."""
    name = _with_prefix(name, _PUBLISHED_PREFIXES)
    return _replaced(name, _PUBLISHED_QFORMER) if name.startswith("resampler.") else name


def to_published(name: str) -> str:
    """Return the published name of a tensor, given ours."""
    if name.startswith("resampler."):
        name = _replaced(name, _reversed(_PUBLISHED_QFORMER))
    return _with_prefix(name, _reversed(_PUBLISHED_PREFIXES))


def from_blip2(name: str) -> str:
    """Return our name of a tensor, given its Blip2 name.

    Blip2 has one bias for queries, keys and values, `qkv.bias`, where EVA-ViT-g has `q_bias` and `v_bias`.
    """
    name = _with_prefix(name, _BLIP2_PREFIXES)
    return _replaced(name, _BLIP2_VISION) if name.startswith("vision_encoder.vit.") else name


def to_blip2(name: str) -> str:
    """Return the Blip2 name of a tensor, given ours; for a `q_bias` or a `v_bias`, that of the bias it is a part of."""
    if name.startswith("vision_encoder.vit."):
        name = re.sub(r"\.attn\.[qv]_bias$", ".attn.qkv.bias", name)
        name = _replaced(name, _reversed(_BLIP2_VISION))
    return _with_prefix(name, _reversed(_BLIP2_PREFIXES))


def is_buffer(published: str) -> bool:
    """Whether a published name is that of a buffer that every model computes itself."""
    return _BUFFERS.search(published) is not None


def is_text_branch(name: str) -> bool:
    """Whether a name of ours belongs to the Q-Former's text branch, which MiniGPT-4 does not use."""
    return _TEXT_BRANCH.search(name) is not None


def _with_prefix(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Return `name` with the first prefix of `pairs` that it has replaced."""
    old, new = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
    return new + name.removeprefix(old)


def _replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _reversed(pairs: Pairs) -> Pairs:
    return tuple((ours, theirs) for theirs, ours in pairs)
