"""The full-size models, built without memory on the meta device, have exactly the published names and shapes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.config.parts import EvaViTGConfig, MergeConfig, QFormerConfig
from minigpt4.models.freezing import count_parameters
from minigpt4.models.language_model import LanguageModel
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.models.resampler import Merge, QFormer
from minigpt4.models.vision import EvaViTG
from minigpt4.tensor_names import from_published, is_buffer
from tests import REFERENCE

pytestmark = pytest.mark.slow

KEYS = json.loads((REFERENCE / "full_size_keys.json").read_text())
SIZES = {"7b": (4096, 11008, 32), "13b": (5120, 13824, 40), "llama2_7b": (4096, 11008, 32)}


def build(released: str) -> MiniGPT4:
    hidden, intermediate, layers = SIZES[released]
    with torch.device("meta"):
        vision = EvaViTG(EvaViTGConfig(weights="random"))
        resampler = (
            Merge(MergeConfig(), vision)
            if released.startswith("llama2")
            else QFormer(QFormerConfig(weights="random"), vision.feature_dim)
        )
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=layers
        )
        return MiniGPT4(vision, resampler, LanguageModel(LlamaForCausalLM(config)))


def shapes(prefix: str, table: dict) -> dict[str, list[int]]:
    """Published names and shapes of a part, under our names."""
    return {from_published(f"{prefix}{name}"): shape for name, shape in table.items()}


@pytest.mark.parametrize("released", SIZES)
def test_names_and_shapes(released):
    model = build(released)
    ours = {name: list(t.shape) for name, t in model.state_dict().items() if not name.startswith("language_model.")}
    with_qformer = not released.startswith("llama2")
    expected = shapes("visual_encoder.", KEYS["visual_encoder"]) | shapes("ln_vision.", KEYS["ln_vision"])
    if with_qformer:
        table = {name: shape for name, shape in KEYS["Qformer"].items() if not is_buffer(name)}
        expected |= shapes("Qformer.", table) | {from_published("query_tokens"): KEYS["query_tokens"]}
    weight = KEYS["llama_proj"][f"vicuna_{released}" if with_qformer else "llama2_7b_no_qformer"]
    expected |= {"llama_proj.weight": weight, "llama_proj.bias": weight[:1]}
    assert ours == expected


def test_trainable_parameters_of_the_released_models():
    assert [count_parameters(build(name))["llama_proj"] for name in SIZES] == [
        (3_149_824, 0),
        (3_937_280, 0),
        (23_072_768, 0),
    ]
    assert count_parameters(build("7b"))["vision_encoder"] == (0, 985_894_528 + 2 * 1408)
