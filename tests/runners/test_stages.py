"""One stage after another: what trains may differ, and what an earlier stage trained stays with the model."""

from __future__ import annotations

import pytest
import torch

from minigpt4 import Chat, load_model
from minigpt4.errors import CheckpointError
from tests.runners.parts import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["llama_proj", "vision_encoder"], ["llama_proj"]),
        (["llama_proj"], ["llama_proj", "vision_encoder"]),
        (["llama_proj"], ["llama_proj", "lora"]),
    ],
)
def test_what_trains_may_differ_between_stages(tiny_values, tmp_path, first, second):
    tiny_values["model"]["trainable"] = first
    one = train(tiny_values, tmp_path / "one")
    tiny_values["model"] |= {"trainable": second, "init_from": str(tmp_path / "one/checkpoints/latest")}
    if "lora" in second:
        tiny_values["model"]["language_model"]["lora"] = {"rank": 2}
    two = train(tiny_values, tmp_path / "two")
    again = load_model(tmp_path / "two/checkpoints/latest", device="cpu")
    for name, tensor in two.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert Chat(again).session().ask("Hello?") == Chat(two).session().ask("Hello?")
    if "vision_encoder" in first:  # trained in stage 1, frozen in stage 2, and still what stage 1 made of it
        name = "vision_encoder.vit.cls_token"
        assert torch.equal(one.model.state_dict()[name], again.model.state_dict()[name])


def test_what_learns_is_held_in_float32(tiny_values, tmp_path):
    tiny_values["model"]["trainable"] = ["llama_proj", "lora", "vision_encoder"]
    tiny_values["model"]["vision_encoder"]["dtype"] = "bfloat16"
    tiny_values["model"]["language_model"] |= {"dtype": "bfloat16", "lora": {"rank": 2}}
    model = train(tiny_values, tmp_path / "run", total_steps=1).model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {p.dtype for n, p in model.named_parameters() if n.startswith("language_model") and "lora" not in n}
    assert frozen == {torch.bfloat16}


def test_other_settings_of_a_part_are_refused(tiny_values, tmp_path):
    """Weights alone do not tell: neither size nor tensors know the scale."""
    prefix = {"type": "prefix", "num_query_tokens": 2, "components": 4}
    tiny_values["model"]["resampler"] = prefix
    train(tiny_values, tmp_path / "one")
    tiny_values["model"]["init_from"] = str(tmp_path / "one/checkpoints/latest")
    tiny_values["model"]["resampler"] = prefix | {"scale": 0.5}
    with pytest.raises(CheckpointError, match=r"other settings of the resampler: scale 0\.2 \(yours: 0\.5\)"):
        train(tiny_values, tmp_path / "two")


def test_an_inherited_data_set_is_taken_away_with_null(tiny_values, tmp_path):
    tiny_values["datasets"]["train"]["gone"] = None
    assert train(tiny_values, tmp_path / "run", total_steps=1).config.datasets.train.keys() == {"pairs"}
