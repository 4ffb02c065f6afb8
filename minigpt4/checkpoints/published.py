"""The published names of tensors, and ours.

With `models/resampler.py`, which reads BLIP-2's Q-Former file, the only place that knows `visual_encoder`, `Qformer`
and `llama_model`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from minigpt4.models.resampler import qformer_name

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
