"""`python -m minigpt4 export`: from a trained checkpoint to each format, and its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minigpt4.cli import main
from minigpt4.errors import ExportError
from minigpt4.exports.linear_projector import LAYOUTS, as_two_layers
from tests.conformance.tiny import write_llm
from tests.exports.parts import with_qformer
from tests.runners.parts import train
from tests.towers import write_tower

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(tiny_values, tmp_path) -> Path:
    train(with_qformer(tiny_values), tmp_path / "run", total_steps=1)
    return (tmp_path / "run" / "checkpoints" / "latest").resolve()


def export(checkpoint: Path, to: str, out: Path, *more: str) -> int:
    return main(["export", str(checkpoint), "--to", to, "--out", str(out), *more])


def test_a_checkpoint_is_exported_in_every_format(checkpoint, pairs, tmp_path, capsys):
    trained = load_file(checkpoint / "model.safetensors")
    file = tmp_path / "out.pth"
    assert export(checkpoint, "published", file) == 0
    assert capsys.readouterr().out == f"{file}\n"
    content = torch.load(file, weights_only=True)  # plain tensors and values: any torch reads it
    assert content["model"].keys() == {"llama_proj.weight", "llama_proj.bias"}
    assert all(torch.equal(content["model"][name], tensor) for name, tensor in trained.items())
    assert content["config"]["model"]["prompt_template"] == "###Human: {} ###Assistant: "

    assert export(checkpoint, "huggingface", tmp_path / "hf") == 0
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(weights["language_projection.weight"], trained["llama_proj.weight"])
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Trained: llama_proj." in card
    assert "Training steps: 1. Conversation format: `vicuna_v0`" in card
    assert str(tmp_path) not in card

    question = ["--image", str(pairs / "image" / "0.jpg"), "--question", "What is it?"]
    assert export(checkpoint, "prompt-embeds", tmp_path / "prompt", *question) == 0
    assert sorted(path.name for path in (tmp_path / "prompt").iterdir()) == [
        "example.py",
        "prompt_embeds.pt",
        "request.json",
    ]


def test_existing_files_are_not_overwritten(checkpoint, tmp_path, capsys):
    for to in ("published", "huggingface", "prompt-embeds"):
        out = tmp_path / to
        out.touch()
        assert export(checkpoint, to, out, *(["--question", "Why?"] if to == "prompt-embeds" else [])) == 1
        assert "exists already" in capsys.readouterr().err
        assert out.read_bytes() == b""


def test_a_question_belongs_to_prompt_embeds(checkpoint, tmp_path, capsys):
    assert export(checkpoint, "published", tmp_path / "out.pth", "--question", "Why?") == 1
    assert "are options of --to prompt-embeds, not of published" in capsys.readouterr().err


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more was trained": (
        {"trainable": ["llama_proj", "resampler"]},
        r"loads llama_proj only, but this model also has trained resampler\.",
    ),
    "another encoder": (
        {"vision_encoder": {"type": "timm", "name": "test_vit", "weights": "random", "dtype": "float32"}},
        r"this model has TimmEncoder and QFormer \(trained with .*, it would fit --to llava\): use --to prompt-embeds",
    ),
    "another resampler": ({"resampler": {"type": "pool", "grid": 2}}, "this model has EvaViTG and Pool"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_the_published_code_cannot_use_is_an_error(tiny_values, write_config, tmp_path, capsys, case):
    change, message = REFUSED[case]
    file = write_config(with_qformer(tiny_values, **change))
    assert export(file, "published", tmp_path / "out.pth") == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not list(tmp_path.glob("*out.pth*"))


def test_a_pair_is_exported_with_the_projector_that_was_asked_for(tiny_values, write_config, tmp_path, capsys):
    write_llm("qwen3", tmp_path / "llm")
    tiny_values["model"] |= {
        "vision_encoder": {"type": "transformers", "path": str(write_tower("siglip", tmp_path / "tower"))},
        "resampler": {"type": "patches"},
        "language_model": {"path": str(tmp_path / "llm"), "dtype": "float32"},
    }
    tiny_values["conversation"] = {"template": "chatml"}
    file = write_config(tiny_values)
    for more, activation in (((), "linear"), (("--projector", "gelu"), "gelu")):
        out = tmp_path / activation
        assert export(file, "llava", out, *more) == 0
        assert json.loads((out / "config.json").read_text())["projector_hidden_act"] == activation
    assert export(file, "idefics3", tmp_path / "out", "--projector", "gelu") == 1
    assert "--projector is an option of --to llava, not of idefics3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_identity_needs_room_for_each_feature_twice():
    wide, narrow = torch.nn.Linear(9, 16), torch.nn.Linear(8, 16)
    with pytest.raises(ExportError, match=r"they are 9 and 16 wide: leave out --projector gelu"):
        as_two_layers(wide, "gelu")
    features = 4 * torch.randn(5, 8)
    for layout in LAYOUTS:
        activation, tensors = as_two_layers(narrow, layout)
        between = {"linear": lambda x: x, "gelu": torch.nn.functional.gelu}[activation]
        hidden = between(torch.nn.functional.linear(features, tensors["linear_1.weight"], tensors["linear_1.bias"]))
        found = torch.nn.functional.linear(hidden, tensors["linear_2.weight"], tensors["linear_2.bias"])
        torch.testing.assert_close(found, narrow(features), atol=5e-6, rtol=1e-5)
