"""Using a checkpoint: chat from every one, stage 2 from stage 1, and an own message for each mismatch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import minigpt4.checkpoints.assemble as assembling
from minigpt4 import Chat, load_model
from minigpt4.checkpoints.manifest import Manifest
from minigpt4.errors import CheckpointError, MiniGPT4Error, WeightsError
from tests.runners.parts import train

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(tiny_values, tmp_path) -> Path:
    train(tiny_values, tmp_path / "run", total_steps=2)
    return (tmp_path / "run" / "checkpoints" / "latest").resolve()


def test_every_checkpoint_chats_also_without_the_training_data(tiny_values, pairs, tmp_path):
    shutil.copytree(pairs, tmp_path / "data")
    tiny_values["datasets"]["train"]["pairs"]["path"] = str(tmp_path / "data")
    model = train(tiny_values, tmp_path / "run", save_every_steps=1, keep_last=9).model
    shutil.rmtree(tmp_path / "data")
    image = pairs / "image" / "0.jpg"
    weights = []
    for step in (1, 2, 3, 4):
        loaded = load_model(tmp_path / "run" / "checkpoints" / f"step_{step}", device="cpu")
        assert isinstance(Chat(loaded).session(images=[image]).ask("What is this?"), str)
        assert loaded.manifest is not None
        assert loaded.manifest.step == step
        weights.append(loaded.model.llama_proj.weight)
    assert torch.equal(weights[-1], model.llama_proj.weight)
    assert not torch.equal(weights[0], weights[1])


def test_stage_2_starts_from_stage_1_with_another_template(tiny_values, checkpoint, tmp_path):
    before = load_file(checkpoint / "model.safetensors")
    tiny_values["model"]["init_from"] = str(checkpoint.parent / "latest")
    tiny_values["conversation"]["template"] = "llama2"
    still = {"learning_rate": 0.0, "warmup_start_learning_rate": 0.0}
    loaded = train(tiny_values, tmp_path / "two", total_steps=1, min_learning_rate=0.0, **still)
    assert all(torch.equal(loaded.model.trained_state()[name], tensor) for name, tensor in before.items())
    manifest = Manifest.read(tmp_path / "two" / "checkpoints" / "latest")
    assert (manifest.template, manifest.step) == ("llama2", 1)
    shutil.rmtree(checkpoint.parent)  # stage 2 does not need stage 1 any more
    load_model(tmp_path / "two" / "checkpoints" / "latest", device="cpu")


def test_another_template_than_in_training_is_an_error(checkpoint):
    with pytest.raises(
        CheckpointError, match=r"trained with the template 'vicuna_v0'; conversation\.template is 'llama2'"
    ):
        load_model(checkpoint, options=["conversation.template=llama2"])


def test_options_override_what_a_checkpoint_was_saved_with(checkpoint):
    assert load_model(checkpoint, options=["chat.max_new_tokens=2"], device="cpu").config.chat.max_new_tokens == 2


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_config(folder: Path, **parts: dict[str, Any]) -> None:
    file = folder / "config.yaml"
    values = yaml.safe_load(file.read_text())
    for part, changes in parts.items():
        values["model"][part] |= changes
    file.write_text(yaml.safe_dump(values))


def edit_tensors(folder: Path, change: Any) -> None:
    """Write other tensors, and no checksum: the file is as it was saved."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")
    edit_json(folder / "manifest.json", checksums={})


def rename(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("llama_proj", "proj"): tensor for name, tensor in tensors.items()}


MISFITS = {
    "other language model of the same size": (
        lambda folder, other: edit_config(folder, language_model={"path": str(other)}),
        r"another language_model: of the same size, but its weights differ \(fingerprint",
    ),
    "other width": (
        lambda folder, other: edit_config(folder, vision_encoder={"embed_dim": 32}),
        "trained with a vision_encoder 16 wide .*yours is 32 wide",
    ),
    "other encoder": (
        lambda folder, other: edit_config(folder, vision_encoder={"depth": 1}),
        r"other settings of the vision_encoder: depth 2 \(yours: 1\)",
    ),
    "other resampler": (
        lambda folder, other: edit_json(
            folder / "manifest.json", parts=other_part(folder, "resampler", type="Qformer")
        ),
        "trained with the resampler Qformer; yours is",
    ),
    "missing tensor": (
        lambda folder, other: edit_tensors(folder, lambda t: {"llama_proj.bias": t["llama_proj.bias"]}),
        r"does not agree with manifest\.json: llama_proj\.weight is missing$",
    ),
    "renamed tensor": (
        lambda folder, other: edit_tensors(folder, rename),
        r"agree with manifest\.json: .*llama_proj\.bias is missing, .*proj\.weight is unexpected",
    ),
    "misshapen tensor": (
        lambda folder, other: edit_tensors(
            folder, lambda t: t | {"llama_proj.bias": t["llama_proj.bias"][1:].contiguous()}
        ),
        r"does not agree with manifest\.json: llama_proj\.bias is \[31\], should be \[32\]$",
    ),
    "renamed in the manifest too": (
        lambda folder, other: (
            edit_tensors(folder, rename),
            edit_json(folder / "manifest.json", trained={"proj.weight": [32, 64], "proj.bias": [32]}),
        ),
        r"has trained proj\.bias, proj\.weight, which this model does not have",
    ),
    "truncated weights": (
        lambda folder, other: cut(folder / "model.safetensors"),
        r"model\.safetensors: truncated or not a safetensors file",
    ),
    "weights missing": (lambda folder, other: (folder / "model.safetensors").unlink(), "no such weight file"),
    "damaged manifest": (lambda folder, other: cut(folder / "manifest.json"), r"manifest\.json: damaged"),
    "manifest of another kind": (
        lambda folder, other: (folder / "manifest.json").write_text("[1]"),
        r"manifest\.json: damaged",
    ),
    "manifest with a wrong value": (
        lambda folder, other: edit_json(folder / "manifest.json", trained={"llama_proj.bias": "32"}),
        r"manifest\.json: damaged: trained\.llama_proj\.bias: .*valid list",
    ),
    "later format": (
        lambda folder, other: edit_json(folder / "manifest.json", format=99),
        "format 99, but this version reads up to 2; upgrade minigpt4",
    ),
    "config missing": (lambda folder, other: (folder / "config.yaml").unlink(), r"config\.yaml is missing"),
    "config damaged": (lambda folder, other: (folder / "config.yaml").write_text("model: ["), r"config\.yaml"),
    "config empty": (lambda folder, other: (folder / "config.yaml").write_text(""), r"model\.\w+\.\w+ is required"),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def other_part(folder: Path, part: str, **changes: Any) -> dict[str, Any]:
    parts = json.loads((folder / "manifest.json").read_text())["parts"]
    return {**parts, part: {**parts[part], **changes}}


@pytest.mark.parametrize("kind", MISFITS)
def test_each_mismatch_has_its_own_message_before_any_weight_is_copied(kind, checkpoint, other_llm, monkeypatch):
    change, message = MISFITS[kind]
    change(checkpoint, other_llm)
    copied = []
    real = assembling.load_strict  # type: ignore[attr-defined]
    monkeypatch.setattr(assembling, "load_strict", lambda *a, **k: (copied.append(1), real(*a, **k))[1])
    with pytest.raises(MiniGPT4Error, match=message):
        load_model(checkpoint, device="cpu")
    assert not copied


def test_a_folder_that_is_not_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: manifest\.json is missing"):
        load_model(tmp_path)


def test_init_from_must_name_a_checkpoint(tiny_values, tmp_path):
    tiny_values["model"]["init_from"] = str(tmp_path)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        train(tiny_values, tmp_path / "run")


def test_a_wrong_shape_names_the_tensor(checkpoint):
    edit_tensors(checkpoint, lambda t: {**t, "llama_proj.bias": torch.zeros(3)})
    edit_json(checkpoint / "manifest.json", trained={"llama_proj.weight": [32, 64], "llama_proj.bias": [3]})
    with pytest.raises(WeightsError, match=r"llama_proj\.bias is \(3,\), should be \(32,\)"):
        load_model(checkpoint, device="cpu")
