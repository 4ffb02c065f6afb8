"""The published implementation's numbers, and our model with its weights.

`MINIGPT4_REFERENCE_DIR` names another set of the same layout; sizes and cases are read from its `meta.json`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.config.parts import EvaViTGConfig, MergeConfig, QFormerConfig
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.models.language_model import LanguageModel
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.models.resampler import Merge, QFormer, Resampler
from minigpt4.models.vision import EvaViTG
from minigpt4.tensor_names import from_published, is_buffer
from minigpt4.weights import load_strict

OWN_COPY = Path(__file__).parent.parent / "data" / "reference"
REFERENCE = Path(os.environ.get("MINIGPT4_REFERENCE_DIR") or OWN_COPY)
META: dict[str, Any] = json.loads((REFERENCE / "meta.json").read_text())
TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}


def reference(name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one file of the set; the test is skipped where the set has no such file."""
    path = REFERENCE / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{REFERENCE} has no {path.name}")
    return load_file(path)


def build(variant: str) -> MiniGPT4:
    """Build the small model of the set, `qformer` or `no_qformer`, with the published weights, in float32."""
    sizes = META["config"]
    vision = EvaViTG(
        EvaViTGConfig(
            weights="random",
            image_size=sizes["vit"]["img_size"],
            patch_size=sizes["vit"]["patch_size"],
            embed_dim=sizes["vit"]["embed_dim"],
            depth=sizes["vit"]["depth"],
            num_heads=sizes["vit"]["num_heads"],
            mlp_ratio=sizes["vit"]["mlp_ratio"],
        )
    )
    if variant == "qformer":
        q = sizes["qf"]
        resampler: Resampler = QFormer(
            QFormerConfig(
                weights="random",
                num_query_tokens=sizes["nq"],
                hidden_size=q["hidden_size"],
                num_hidden_layers=q["num_hidden_layers"],
                num_attention_heads=q["num_attention_heads"],
                intermediate_size=q["intermediate_size"],
            ),
            vision.feature_dim,
        )
    else:
        resampler = Merge(MergeConfig(), vision)
    known = {k: v for k, v in sizes["llm"].items() if k in LlamaConfig().to_dict()}
    model = MiniGPT4(vision, resampler, LanguageModel(LlamaForCausalLM(LlamaConfig(**known))))
    published = reference(f"weights_{variant}")
    tensors = {from_published(name): tensor for name, tensor in published.items() if not is_buffer(name)}
    load_strict(model, tensors, source=f"weights_{variant}")
    return model.eval()


@pytest.fixture(scope="session")
def models() -> dict[str, MiniGPT4]:
    """Both variants that the set has."""
    return {v: build(v) for v in ("qformer", "no_qformer") if (REFERENCE / f"weights_{v}.safetensors").is_file()}


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    """The set's own SentencePiece model."""
    return TextTokenizer.from_path(REFERENCE / "tokenizer.model")
