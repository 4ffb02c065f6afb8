"""Files of the published layouts: import, a step of training, export, and every tensor is unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks.rehearsal_files import architecture, write_all
from minigpt4 import load_model
from minigpt4.exports.formats import write
from minigpt4.exports.huggingface.folder import export_huggingface
from minigpt4.exports.published import export_published
from minigpt4.models.resampler import QFormer
from minigpt4.weights import read_tensors
from tests.runners.parts import train

pytestmark = pytest.mark.slow

KINDS = {"7b": "vicuna_7b", "13b": "vicuna_13b", "llama2": "llama2"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("rehearsal"))


@pytest.fixture
def trained(request, tiny_values, files, tmp_path):
    """A model of rehearsal files after a step of training, loaded from its checkpoint."""
    kind = request.param
    sizes = OmegaConf.to_object(OmegaConf.from_dotlist([f"{key}={value}" for key, value in architecture().items()]))
    model: Any = sizes["model"]  # type: ignore[index,call-overload]
    model["vision_encoder"] |= {"type": "eva_vit_g", "weights": str(files["eva"])}
    if kind == "llama2":
        model["resampler"] = {"type": "merge"}
    else:
        model["vision_encoder"]["ln_vision_weights"] = str(files["blip2"])
        model["resampler"] |= {"type": "qformer", "weights": str(files["blip2"])}
    model["language_model"] = {"path": str(files[KINDS[kind]]), "dtype": "bfloat16"}
    template = "llama2" if kind == "llama2" else "vicuna_v0"
    train({**tiny_values, "model": model, "conversation": {"template": template}}, tmp_path / "run", total_steps=1)
    return load_model(tmp_path / "run" / "checkpoints" / "latest", device="cpu")


@pytest.mark.parametrize("trained", KINDS, indirect=True)
def test_a_published_file_contains_what_was_trained(trained, tmp_path):
    export_published(trained.model, trained.conversation.training_template, tmp_path / "out.pth")
    found = read_tensors(tmp_path / "out.pth")
    assert found.keys() == {"llama_proj.weight", "llama_proj.bias"}
    assert all(torch.equal(tensor, trained.model.state_dict()[name]) for name, tensor in found.items())
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


@pytest.mark.parametrize("trained", KINDS, indirect=True)
def test_exports_are_imported_again_bit_by_bit(trained, tmp_path, files):
    """The published file as `model.init_from`; the Hugging Face folder as encoder and Q-Former."""
    write(trained, "published", tmp_path / "out.pth")
    options = [f"model.init_from={tmp_path / 'out.pth'}"]
    if type(trained.model.resampler) is QFormer:
        write(trained, "huggingface", tmp_path / "out")
        parts = ("vision_encoder.weights", "vision_encoder.ln_vision_weights", "resampler.weights")
        options += [f"model.{part}={tmp_path / 'out'}" for part in parts]
    again = load_model(tmp_path / "run" / "config.yaml", options, device="cpu")
    expected = trained.model.state_dict()
    found = again.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("trained", ["7b", "13b"], indirect=True)
def test_a_hugging_face_folder_has_the_published_numbers_under_the_names_of_blip2(trained, files, tmp_path):
    export_huggingface(trained, tmp_path / "out", shard_bytes=30_000)
    out = read_tensors(tmp_path / "out")
    blip2 = read_tensors(files["blip2_hf"], lambda name: not name.startswith("language_"))
    assert blip2.keys() == {name for name in out if not name.startswith("language_")}
    assert all(torch.equal(out[name], tensor) for name, tensor in blip2.items())

    llm = read_tensors(files[KINDS["7b" if trained.model.language_model.hidden_size == 32 else "13b"]])
    inner = {n.removeprefix("language_model."): t for n, t in out.items() if n.startswith("language_model.")}
    assert inner.keys() == llm.keys()
    for name, tensor in llm.items():
        rows = len(tensor)
        assert torch.equal(inner[name][:rows], tensor), name
        grown = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert len(inner[name]) == rows + grown

    proj = trained.model.llama_proj
    assert torch.equal(out["language_projection.weight"], proj.weight)
    assert torch.equal(out["language_projection.bias"], proj.bias)
