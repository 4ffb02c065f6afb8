"""Names of tensors in the published files and in transformers' BLIP-2: both directions, at full size."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, LlamaConfig

from minigpt4.tensor_names import from_blip2, from_published, is_buffer, is_text_branch, to_blip2, to_published
from tests import REFERENCE

KEYS = json.loads((REFERENCE / "full_size_keys.json").read_text())
PUBLISHED = [
    *(f"{part}.{name}" for part in ("visual_encoder", "ln_vision", "Qformer") for name in KEYS[part]),
    *("query_tokens", "llama_proj.weight", "llama_proj.bias"),
    *("llama_model.model.embed_tokens.weight", "llama_model.model.layers.31.mlp.up_proj.weight"),
]
NAMES = [name for name in PUBLISHED if not is_buffer(name)]


@pytest.fixture(scope="module")
def blip2() -> list[str]:
    """The names of all tensors in transformers' BLIP-2 of 39 blocks, 12 Q-Former layers and a LLaMA."""
    text = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=32, num_attention_heads=1)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(Blip2Config(text_config=text.to_dict()))
    return list(model.state_dict())


def test_every_published_name_has_one_of_ours_and_back():
    ours = [from_published(name) for name in NAMES]
    assert [to_published(name) for name in ours] == NAMES
    parts = {name.split(".")[0] for name in ours}
    assert parts == {"vision_encoder", "resampler", "llama_proj", "language_model"}


def test_every_blip2_name_has_one_of_ours_and_back(blip2):
    ours = [from_blip2(name) for name in blip2]
    assert [to_blip2(name) for name in ours] == blip2
    assert len(set(ours)) == len(blip2)


def test_published_and_blip2_names_meet_in_ours(blip2):
    """Both sets name the same tensors, except that EVA has two biases where Blip2 has one."""
    expected = {name for name in blip2 if not name.startswith("language_model.")}
    ours = {from_published(name) for name in NAMES if not name.startswith("llama_model.")}
    assert {to_blip2(name) for name in ours} == expected
    halves = [f"vision_encoder.vit.blocks.3.attn.{half}_bias" for half in "qv"]
    assert {to_blip2(name) for name in halves} == {"vision_model.encoder.layers.3.self_attn.qkv.bias"}


def test_a_name_without_a_counterpart_stays():
    for rename in (from_published, to_published, from_blip2, to_blip2):
        assert rename("t5_proj.weight") == "t5_proj.weight"


def test_buffers_and_the_text_branch_are_recognised():
    assert [name for name in PUBLISHED if is_buffer(name)] == ["Qformer.bert.embeddings.position_ids"]
    assert is_buffer("llama_model.model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not any(is_text_branch(from_published(name)) for name in NAMES)
    for unused in ("embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.bias"):
        assert is_text_branch(from_published(f"Qformer.bert.{unused}"))
    assert not is_text_branch(from_published("Qformer.bert.encoder.layer.0.output_query.dense.bias"))
