"""Tiny models of random tensors, so that a tensor that is missing or swapped is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minigpt4.checkpoints.assemble import LoadedModel, assemble
from minigpt4.config import config_from_values
from tests.conformance.tiny import QFORMER


def with_qformer(values: dict[str, Any], **model: Any) -> dict[str, Any]:
    """Return config values with a Q-Former after the encoder, and other changes of `model`."""
    return {**values, "model": {**values["model"], "resampler": QFORMER, **model}}


def noisy(values: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Build the model of a config and move every parameter away from zeros and ones."""
    loaded = assemble(config_from_values(dict(values), "test"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    loaded.model.to(dtype).eval()
    return loaded


def llm_folder(folder: Path, source: Path, **config: Any) -> Path:
    """Write a LLaMA of random weights with the tokenizer of `source` and other `config` values."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    values = LlamaConfig.from_pretrained(source).to_dict() | config
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder
