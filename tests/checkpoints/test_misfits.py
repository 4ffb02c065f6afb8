"""Files that do not belong together: each combination has its own message, before any weight is copied.

Every row of the tables goes through the command line: a change to good files, and the message. What a few kilobytes
show is reported before the language model is loaded (`EARLY`), the rest when its weights are compared (`LATE`).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import minigpt4.checkpoints.assemble as assembling
from benchmarks.rehearsal_files import architecture, options
from minigpt4.checkpoints.manifest import Manifest
from minigpt4.cli import main
from minigpt4.config import load_config
from minigpt4.models.language_model import LanguageModel
from minigpt4.runners.train import TrainRunner
from minigpt4.weights import read_tensors
from tests.checkpoints.published import QUICK
from tests.end_to_end.test_bad_input import check

pytestmark = pytest.mark.slow

Files = dict[str, Path]
Change = Callable[[Files], Any]
MARK = "was_here"


class Foreign:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


def tensors(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    """Return a function that changes the tensors of a released file, but not its optimiser and config."""

    def change_files(files: Files) -> None:
        content = torch.load(files[name], weights_only=True)
        nested = content.get("model", content)
        change(nested)
        torch.save(content, files[name])

    return change_files


def rename(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.update({new: content.pop(old)})


def write(name: str, content: bytes) -> Change:
    return lambda files: files[name].write_bytes(content)


def cut(name: str) -> Change:
    return lambda files: files[name].write_bytes(files[name].read_bytes()[: files[name].stat().st_size // 2])


def give(name: str, other: str) -> Change:
    """Return a function that passes one file in place of another."""
    return lambda files: files.update({name: files[other]})


def settings(*given: str) -> Change:
    return lambda files: list(given)


def llm_tensors(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Return a function that changes the tensors of the language model's folder and writes them to one file."""

    def change_files(files: Files) -> None:
        folder = files["vicuna_7b"]
        content = read_tensors(folder)
        for file in folder.glob("model*"):
            file.unlink()
        change(content)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})

    return change_files


def foreign_llm(files: Files) -> None:
    llm_tensors(lambda t: None)(files)
    (files["vicuna_7b"] / "model.safetensors").unlink()
    (files["vicuna_7b"] / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Foreign()}, protocol=2))


def shard(content: bytes) -> Change:
    return lambda files: (files["vicuna_7b"] / "model-00001-of-00002.safetensors").write_bytes(content)


PAGE = b"<!DOCTYPE html>\n<html><body>Sign in to download</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 47369169\n"
EARLY: list[tuple[str, Change, str]] = [
    (
        "hidden size",
        give("vicuna_7b", "vicuna_13b"),
        "trained with an LLM 32 wide (its file does not name it); yours is 40",
    ),
    (
        "template",
        settings("conversation.template=llama2"),
        "trained with the template 'vicuna_v0'; conversation.template is 'llama2'",
    ),
    (
        "no projection",
        tensors("minigpt4_7b", rename("llama_proj.weight", "proj.w")),
        "expected llama_proj.weight and llama_proj.bias, found llama_proj.bias, proj.w",
    ),
    (
        "more was trained",
        tensors("minigpt4_7b", lambda t: t.update(query_tokens=torch.ones(1))),
        "1 trained tensors besides llama_proj",
    ),
    ("truncated checkpoint", cut("minigpt4_7b"), "minigpt4_7b.pth: truncated or not a weight file"),
    ("web page for a checkpoint", write("minigpt4_7b", PAGE), "minigpt4_7b.pth: is a web page, not a weight file"),
    ("git-lfs pointer for a checkpoint", write("minigpt4_7b", POINTER), "minigpt4_7b.pth: is a git-lfs pointer"),
    (
        "foreign code in a checkpoint",
        write("minigpt4_7b", pickle.dumps({"model": Foreign()}, protocol=2)),
        "minigpt4_7b.pth: refused because it contains more than tensors and plain values",
    ),
    (
        "missing key",
        tensors("eva", lambda t: t.pop("cls_token")),
        "1 missing: cls_token (in the model, but not in the file",
    ),
    (
        "renamed key",
        tensors("eva", rename("blocks.1.norm1.weight", "blocks.1.layer_norm1.weight")),
        "1 renamed: blocks.1.layer_norm1.weight (for blocks.1.norm1.weight)",
    ),
    (
        "unexpected key",
        tensors("eva", lambda t: t.update(gamma=torch.ones(2))),
        "1 unexpected: gamma (in the file, but not in the model",
    ),
    (
        "misshapen key",
        tensors("blip2", lambda t: t.update(query_tokens=torch.ones(1, 5, 16))),
        "1 misfits: query_tokens is (1, 5, 16), should be (1, 4, 16) (same name, different shape",
    ),
    ("truncated encoder", cut("eva"), "eva_vit_g.pth: truncated or not a weight file"),
    ("web page for an encoder", write("eva", PAGE), "eva_vit_g.pth: is a web page"),
    (
        "foreign code in an encoder",
        write("eva", pickle.dumps(Foreign(), protocol=2)),
        "eva_vit_g.pth: refused because it contains more than tensors",
    ),
    (
        "encoder for a Q-Former",
        give("blip2", "eva"),
        "eva_vit_g.pth is EVA-CLIP ViT-g, the image encoder; pass it as model.vision_encoder.weights",
    ),
    ("Q-Former for an encoder", give("eva", "blip2"), "is BLIP-2's Q-Former; pass it as model.resampler.weights"),
    ("encoder for a checkpoint", give("minigpt4_7b", "eva"), "model.init_from: "),
    ("checkpoint for an encoder", give("eva", "minigpt4_7b"), "of an unusual size; pass it as model.init_from"),
    (
        "BLIP-2 for a language model",
        give("vicuna_7b", "blip2_hf"),
        "pass it as model.vision_encoder.weights or model.res",
    ),
    (
        "language model for BLIP-2",
        give("blip2", "vicuna_7b"),
        "language model (llama); pass it as model.language_model.path",
    ),
    (
        "Q-Former file without ln_vision",
        tensors("blip2", lambda t: [t.pop(f"ln_vision.{leaf}") for leaf in ("weight", "bias")]),
        "blip2_pretrained_flant5xxl.pth: has no ln_vision",
    ),
]
LLM: list[tuple[str, Change, str]] = [
    (
        "web page for a shard",
        shard(PAGE),
        "model-00001-of-00002.safetensors: is a web page",
    ),
    (
        "truncated shard",
        shard(b"0" * 100),
        "model-00001-of-00002.safetensors: truncated or not a safetensors file",
    ),
    (
        "foreign code in a language model",
        foreign_llm,
        "pytorch_model.bin: refused because it contains more than tensors and plain values",
    ),
    (
        "renamed key in a language model",
        llm_tensors(rename("model.norm.weight", "model.ln_f.weight")),
        "1 tensors missing or of another shape: model.norm.weight; 1 unexpected: model.ln_f.weight",
    ),
]
LATE: list[tuple[str, Change, str]] = [
    (
        "width of the query features",
        give("minigpt4_7b", "minigpt4_llama2"),
        "trained with a resampler 64 wide (its file does not name it); yours is 16 wide",
    ),
]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done: a language model loaded, trained weights copied."""
    done: list[str] = []
    load, strict = LanguageModel.from_config, assembling.load_strict  # type: ignore[attr-defined]
    watched = classmethod(lambda cls, config: (done.append("language model"), load(config))[1])
    monkeypatch.setattr(LanguageModel, "from_config", watched)
    monkeypatch.setattr(assembling, "load_strict", lambda *a, **k: (done.append("trained weights"), strict(*a, **k))[1])
    return done


def chat(files: Files, *more: str, config: str = "minigpt4_7b") -> int:
    return main(
        ["chat", "--cfg-path", config, "--question", "What?", "--options", *options(files, "7b"), *QUICK, *more]
    )


@pytest.mark.parametrize(("change", "message"), [r[1:] for r in EARLY], ids=[r[0] for r in EARLY])
def test_errors_before_anything_large_is_loaded(change, message, files, copied, capfd):
    given = change(files)
    status = chat(files, *(given if isinstance(given, list) else []))
    check(status, capfd.readouterr().err, message)
    assert not copied
    assert not Path(MARK).exists()


@pytest.mark.parametrize(("change", "message"), [r[1:] for r in LLM], ids=[r[0] for r in LLM])
def test_errors_in_the_files_of_a_language_model(change, message, files, copied, capfd):
    change(files)
    check(chat(files), capfd.readouterr().err, message)
    assert copied == ["language model"]
    assert not Path(MARK).exists()


@pytest.mark.parametrize(("change", "message"), [r[1:] for r in LATE], ids=[r[0] for r in LATE])
def test_errors_after_the_parts_are_loaded(change, message, files, copied, capfd):
    change(files)
    check(chat(files, "conversation.template=llama2"), capfd.readouterr().err, message)
    assert copied == ["language model"]


@pytest.fixture
def checkpoint(files, pairs, tmp_path) -> Path:
    """A checkpoint after one step from the released file."""
    run = {"total_steps": 1, "device": "cpu", "output_dir": tmp_path / "run"}
    given = [f"run.{key}={value}" for key, value in run.items()]
    given += ["datasets.train.pairs.type=aligned_pairs", f"datasets.train.pairs.path={pairs}"]
    TrainRunner.from_config(load_config("minigpt4_7b", [*options(files, "7b"), *given])).run()
    return tmp_path / "run" / "checkpoints" / "latest"


def vocabulary(folder: Path) -> None:
    """Add a row to the embedding and the head, as FastChat did for its padding token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(701, mean_resizing=False)
    model.save_pretrained(folder)


def weights(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.mul_(1.5)
    model.save_pretrained(folder)


OURS = {
    "vocabulary": (vocabulary, "trained with an LLM of 700 tokens"),
    "fingerprint": (
        weights,
        "trained with another language_model: of the same size, but its weights differ (fingerprint",
    ),
}


@pytest.mark.parametrize("kind", OURS)
def test_our_checkpoints_detect_more(kind, checkpoint, files, copied, capfd):
    change, message = OURS[kind]
    llm = files["vicuna_7b"]
    other = llm.with_name("other")
    shutil.copytree(llm, other)
    for stale in other.glob("model*.safetensors*"):
        shutil.copy(stale, stale.with_suffix(".bak"))
    change(other)
    capfd.readouterr()
    status = main(
        ["chat", "--cfg-path", str(checkpoint), "--question", "?", "--options", f"model.language_model.path={other}"]
    )
    check(status, capfd.readouterr().err, message)
    assert copied == ["language model"]


def test_a_checkpoint_of_the_first_format_still_loads(checkpoint, capfd):
    """Written before manifests had vocabulary, stage and data."""
    file = checkpoint / "manifest.json"
    old = json.loads(file.read_text()) | {"format": 1}
    for key in ("stage", "data"):
        del old[key]
    for part in old["parts"].values():
        del part["vocabulary"], part["parameters"]
    file.write_text(json.dumps(old))
    assert Manifest.read(checkpoint).stage == 0
    assert main(["chat", "--cfg-path", str(checkpoint), "--question", "?", "--options", *QUICK]) == 0


def test_each_row_has_its_own_message():
    messages = [row[2] for row in (*EARLY, *LATE)] + [message for _, message in OURS.values()]
    assert len(set(messages)) == len(messages) >= 20
    assert architecture()["model.vision_encoder.depth"] == 2
