"""Projectors: linear as before, the two layers of LLaVA-1.5, and checkpoints of either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from minigpt4 import load_model
from minigpt4.checkpoints.assemble import assemble
from minigpt4.config import config_from_values
from minigpt4.errors import CheckpointError, ConfigError
from tests.models import parts
from tests.runners.parts import train

NAMES = {
    "linear": {"llama_proj.weight", "llama_proj.bias"},
    "mlp": {f"llama_proj.linear_{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")},
}


def built(values: dict[str, Any], **projector: Any) -> Any:
    values = {**values, "model": {**values["model"], "projector": projector}}
    return assemble(config_from_values(values, "test")).model


def test_a_linear_projector_is_the_default_and_starts_with_the_same_weights(tiny_chat_values):
    plain = assemble(config_from_values(tiny_chat_values, "test")).model
    assert isinstance(plain.llama_proj, torch.nn.Linear)
    named = built(tiny_chat_values, type="linear", bias=True)
    assert plain.state_dict().keys() == named.state_dict().keys()
    assert all(torch.equal(t, named.state_dict()[name]) for name, t in plain.state_dict().items())
    without = built(tiny_chat_values, type="linear", bias=False)
    assert {n for n in without.state_dict() if n.startswith("llama_proj")} == {"llama_proj.weight"}


@torch.no_grad()
def test_an_mlp_is_that_of_llava(tiny_chat_values):
    model = built(tiny_chat_values, type="mlp")
    width, wide = model.resampler.feature_dim, model.language_model.hidden_size
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=width, num_attention_heads=2),
        text_config=LlamaConfig(hidden_size=wide, num_attention_heads=2),
    )
    theirs = LlavaMultiModalProjector(config)
    theirs.load_state_dict(model.llama_proj.state_dict())
    features = 3 * torch.randn(2, 4, width)
    torch.testing.assert_close(model.project(features), theirs(features))
    hidden = F.gelu(model.llama_proj.linear_1(features))
    torch.testing.assert_close(model.project(features), model.llama_proj.linear_2(hidden))
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize("kind", NAMES)
def test_a_checkpoint_has_the_projector_and_refuses_another_one(kind, tiny_values, tmp_path):
    tiny_values["model"]["projector"] = {"type": kind}
    trained = train(tiny_values, tmp_path / "run", total_steps=1).model
    latest = tmp_path / "run" / "checkpoints" / "latest"
    again = load_model(latest, device="cpu")
    assert again.manifest is not None
    assert set(again.manifest.trained) == NAMES[kind]
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
    other = "mlp" if kind == "linear" else "linear"
    with pytest.raises(CheckpointError, match=r"trained with a projector of .*; set model.projector as in training"):
        load_model(latest, [f"model.projector.type={other}"], device="cpu")
    with pytest.raises(CheckpointError, match=r"set model.projector as in training"):
        load_model(latest, ["model.projector.bias=false"], device="cpu")  # its bias would stay untrained


def test_a_config_from_before_there_was_a_choice_loads(tiny_values, tmp_path):
    trained = train(tiny_values, tmp_path / "run", total_steps=1).model
    file = tmp_path / "run" / "checkpoints" / "latest" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    start = next(n for n, line in enumerate(lines) if line.startswith("  projector:"))
    end = next(n for n in range(start + 1, len(lines)) if not lines[n].startswith("    "))
    file.write_text("".join(lines[:start] + lines[end:]))
    again = load_model(file.parent, device="cpu").model
    assert torch.equal(again.llama_proj.weight, trained.llama_proj.weight)


def test_an_unknown_projector_is_an_error(tiny_chat_values):
    with pytest.raises(ConfigError, match=r"unknown projector 'mpl'. Did you mean 'mlp'"):
        built(tiny_chat_values, type="mpl")


def test_models_may_be_built_without_a_projector_of_their_own():
    assert isinstance(parts.model().llama_proj, torch.nn.Linear)
