"""`python -m minigpt4 inspect`: its output for each kind of file, and its errors."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minigpt4.checkpoints.inspection import check_kinds, inspect
from minigpt4.checkpoints.released import RELEASES
from minigpt4.cli import main
from minigpt4.config import config_from_values, shipped
from minigpt4.errors import ConfigError
from tests.checkpoints.test_misfits import PAGE, Foreign
from tests.towers import write_tower

KINDS = {
    "eva": ("EVA-CLIP ViT-g, the image encoder", ["3 blocks 16 wide", "28 x 28", "float16"], "vision_encoder.weights"),
    "blip2": (
        "BLIP-2's Q-Former",
        ["2 layers 16 wide with 4 queries; ln_vision included", "24 wide"],
        "resampler.weights",
    ),
    "blip2_hf": (
        "Hugging Face BLIP-2",
        ["4 queries; its language model (t5) is not used"],
        "resampler.weights",
    ),
    "vicuna_13b": (
        "language model (llama)",
        ["3 layers 40 wide, 701 tokens", "tokenizer: included"],
        "language_model.path",
    ),
    "minigpt4_7b": (
        "MiniGPT-4 checkpoint of an unusual size",
        ["16 wide to a language model 32", "stage 2"],
        "init_from",
    ),
    "minigpt4_7b_stage1": ("MiniGPT-4 checkpoint", ["stage 1", "5 epoch(s)", "2 buffers"], "init_from"),
}


@pytest.mark.parametrize("name", KINDS)
def test_published_files_are_explained(name, written, capsys):
    what, facts, option = KINDS[name]
    assert main(["inspect", str(written[name])]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{written[name]}: {what}")
    assert all(fact in shown for fact in facts), shown
    assert f"model.{option}={written[name]}" in shown.splitlines()[-1]


@pytest.mark.parametrize("shape", RELEASES, ids=[release.config for release in RELEASES.values()])
def test_the_released_sizes_name_model_and_config(shape, tmp_path):
    projection = {"llama_proj.weight": torch.zeros(shape), "llama_proj.bias": torch.zeros(shape[0])}
    torch.save({"model": projection}, tmp_path / "released.pth")
    shown = str(inspect(tmp_path / "released.pth"))
    assert f"MiniGPT-4 checkpoint for {RELEASES[shape].language_model}" in shown
    assert f"--cfg-path {RELEASES[shape].config} --options model.init_from={tmp_path}" in shown
    assert "unknown stage" in shown


@pytest.mark.parametrize(("width", "rows", "which"), [(4096, 32001, "7B"), (5120, 32000, "13B")])
def test_a_vicuna_folder_is_recognised_by_its_config(width, rows, which, tmp_path):
    config = f'{{"model_type": "llama", "hidden_size": {width}, "vocab_size": {rows}, "num_hidden_layers": 32}}'
    (tmp_path / "config.json").write_text(config)
    save_file({"model.norm.weight": torch.zeros(width)}, tmp_path / "model.safetensors")
    shown = str(inspect(tmp_path))
    assert f"fits the released MiniGPT-4 {which}" in shown
    assert "Vicuna must be v0" in shown
    assert "tokenizer: MISSING" in shown


def test_our_checkpoints_are_explained_from_folder_file_and_run(tmp_path):
    kept = shipped("eval_configs", "mini")
    shown = str(inspect(kept))
    for fact in ("step 600 of 600", "template chatml", "7200 samples, 229256 tokens", "asset:smollm2-135m-instruct"):
        assert fact in shown
    assert str(inspect(kept / "model.safetensors")) == shown
    shutil.copytree(kept, tmp_path / "checkpoints" / "latest")
    assert "run folder; its newest checkpoint is" in str(inspect(tmp_path))


def test_a_gguf_file_is_recognised_by_its_header(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_tensor("output.weight", torch.zeros(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shown = str(inspect(tmp_path / "model.gguf"))
    assert "GGUF language model (llama)" in shown
    assert "tiny: 2 layers 32 wide" in shown
    assert "1 tensors, mostly F32" in shown
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:40])
    assert main(["inspect", str(tmp_path / "cut.gguf")]) == 1
    assert "cut.gguf: truncated or not a GGUF file" in capsys.readouterr().err


def shard_missing(files: dict[str, Path]) -> Path:
    next(files["vicuna_7b"].glob("*.safetensors")).unlink()
    return files["vicuna_7b"]


def shard_cut(files: dict[str, Path]) -> Path:
    shard = next(files["vicuna_7b"].glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    return files["vicuna_7b"]


def foreign_llm(files: dict[str, Path]) -> Path:
    for shard in files["vicuna_7b"].glob("model*"):
        shard.unlink()
    (files["vicuna_7b"] / "pytorch_model.bin").write_bytes(pickle.dumps(Foreign(), protocol=2))
    return files["vicuna_7b"]


def written_as(content: bytes):
    def write(files: dict[str, Path]) -> Path:
        files["eva"].write_bytes(content)
        return files["eva"]

    return write


def empty(files: dict[str, Path]) -> Path:
    folder = files["eva"].with_name("empty")
    folder.mkdir()
    return folder


UNUSABLE = {
    "web page": (written_as(PAGE), "is a web page, not a weight file"),
    "truncated": (lambda files: written_as(files["eva"].read_bytes()[:9000])(files), "truncated or not a weight file"),
    "foreign code": (written_as(pickle.dumps(Foreign(), protocol=2)), "refused because it contains more than tensors"),
    "shard missing": (shard_missing, "1 of 2 shards are missing, the first: model-0000"),
    "shard cut": (shard_cut, "truncated or not a safetensors file"),
    "language model with foreign code": (
        foreign_llm,
        "pytorch_model.bin: refused because it contains more than tensors",
    ),
    "empty folder": (empty, "has neither manifest.json nor a config.json with a model_type"),
    "no file": (lambda files: Path("gone.pth"), "gone.pth: no such weight file"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_files_are_errors(kind, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change, message = UNUSABLE[kind]
    path = change(files)
    assert main(["inspect", str(path)]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "was_here").exists()


def test_one_unusable_path_does_not_hide_the_others(files, capsys):
    assert main(["inspect", "gone.pth", str(files["eva"]), "lost.pth"]) == 1
    shown = capsys.readouterr()
    assert "the image encoder" in shown.out
    assert "gone.pth: no such weight file" in shown.err
    assert "lost.pth: no such weight file" in shown.err


def test_a_single_tensor_is_recognised_by_its_shape(tmp_path):
    torch.save(torch.zeros(7, 32), tmp_path / "prompt_embeds.pt")
    assert "prompt embeds, as `export --to prompt-embeds` writes them" in str(inspect(tmp_path / "prompt_embeds.pt"))
    torch.save(torch.zeros(7), tmp_path / "lone.pt")
    assert "a single tensor of 7, which cannot be used" in str(inspect(tmp_path / "lone.pt"))


def test_weights_of_another_model_are_named_by_their_tensors(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "resnet.pth")
    found = inspect(tmp_path / "resnet.pth")
    assert found.options == ()
    assert "weights of an unknown model" in str(found)
    assert "its first tensors: conv1.weight" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eva", "blip2", "minigpt4_7b"])
def test_no_tensor_missing_or_misshapen_breaks_the_inspection(name, written, tmp_path):
    content = torch.load(written[name], weights_only=True)
    tensors = content.get("model", content)
    for changed in tensors:
        for other in ({}, {changed: torch.ones(1)}, {changed: torch.tensor(1.0)}):
            torch.save({k: t for k, t in tensors.items() if k != changed} | other, tmp_path / "changed.pth")
            assert str(inspect(tmp_path / "changed.pth")).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "family"), [("whole clip", "clip"), ("siglip", "siglip_vision_model"), ("dinov2",) * 2]
)
def test_a_vision_tower_is_explained_and_is_not_a_language_model(kind, family, tmp_path, tiny_chat_values):
    write_tower(kind, tmp_path / "tower")
    found = inspect(tmp_path / "tower")
    assert found.what == f"vision tower ({family})"
    assert found.options == ("model.vision_encoder.path",)
    assert "3 blocks 16 wide; images of 32 pixels, patches of 8" in found.facts[0]
    model = {**tiny_chat_values["model"], "language_model": {"path": str(tmp_path / "tower")}}
    with pytest.raises(ConfigError, match=r"tower is vision tower \(.*; pass it as model.vision_encoder.path"):
        check_kinds(config_from_values({**tiny_chat_values, "model": model}, "test"))
