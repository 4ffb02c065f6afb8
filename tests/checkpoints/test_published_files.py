"""Files of the published layouts: what is in them, that they load bit for bit, and training from them."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Blip2Config, Blip2QFormerModel, Blip2VisionModel

from benchmarks.rehearsal_files import SIZES, architecture, eva_shapes, options, qformer_shapes
from minigpt4 import Chat, load_config, load_model
from minigpt4.checkpoints.manifest import Manifest
from minigpt4.checkpoints.released import RELEASES, Release
from minigpt4.config.parts import EvaViTGConfig, QFormerConfig
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.errors import CheckpointError, WeightsError
from minigpt4.models.resampler import QFormer
from minigpt4.models.vision import EvaViTG
from minigpt4.runners.train import TrainRunner
from minigpt4.weights import read_tensors
from tests import REFERENCE
from tests.checkpoints.published import RELEASED, load
from tests.models.parts import pixels

pytestmark = pytest.mark.slow

FULL = SIZES["full"]
SECTION: dict[str, dict[str, Any]] = {part: {} for part in ("vision_encoder", "resampler")}
for key, value in architecture().items():
    _, part, name = key.split(".")
    SECTION[part][name] = value


def encoder(weights: Path, norm: Path | str = "", dtype: Any = "float32") -> EvaViTG:
    config = EvaViTGConfig(weights=str(weights), ln_vision_weights=str(norm), dtype=dtype, **SECTION["vision_encoder"])
    return EvaViTG.from_config(config)


def qformer(weights: Path) -> QFormer:
    config = QFormerConfig(weights=str(weights), dtype="float32", **SECTION["resampler"])
    return QFormer.from_config(config, EvaViTG(EvaViTGConfig(weights="random", **SECTION["vision_encoder"])))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_full_size_files_have_the_published_names_shapes_and_sizes():
    keys = json.loads((REFERENCE / "full_size_keys.json").read_text())
    eva, blip2 = eva_shapes(FULL), qformer_shapes(FULL)
    used = {name: list(s) for name, s in eva.items() if not name.startswith(("blocks.39.", "norm.", "head."))}
    assert used == keys["visual_encoder"]
    expected = {f"Qformer.{name}": s for name, s in keys["Qformer"].items() if not name.endswith("position_ids")}
    expected |= {f"ln_vision.{name}": s for name, s in keys["ln_vision"].items()} | {
        "query_tokens": keys["query_tokens"]
    }
    assert {name: list(s) for name, s in blip2.items()} == expected
    numbers = sum(math.prod(s) for s in blip2.values()) + 4096 * 768 + 4096  # and t5_proj
    assert 4 * numbers == 433_259_520
    assert 2 * sum(math.prod(s) for s in eva.values()) == pytest.approx(2.0252e9, rel=1e-4)


def test_the_blip2_folder_is_one_that_transformers_reads(written):
    tensors = {n: t for f in written["blip2_hf"].glob("*.safetensors") for n, t in load_file(f).items()}
    config: Any = Blip2Config.from_pretrained(written["blip2_hf"])
    parts: dict[str, Any] = {
        "vision_model.": Blip2VisionModel(config.vision_config),
        "qformer.": Blip2QFormerModel(config.qformer_config),
    }
    for prefix, model in parts.items():
        model.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    ours = encoder(written["blip2_hf"])
    theirs = parts["vision_model."].eval()
    theirs.post_layernorm = torch.nn.Identity()
    images = pixels(2, 0)
    torch.testing.assert_close(ours.eval().vit.forward_features(images), theirs(images).last_hidden_state)


@pytest.mark.parametrize("norm", ["blip2", "blip2_hf", ""])
def test_encoder_and_qformer_are_the_same_from_either_source(norm, written):
    ln_vision = written[norm] if norm else ""
    one, other = encoder(written["eva"], ln_vision), encoder(written["blip2_hf"], ln_vision)
    assert same(one, other)
    assert torch.equal(one.ln_vision.weight, torch.ones(16)) == (not norm)
    file = torch.load(written["eva"], weights_only=True)
    for name, tensor in one.vit.state_dict().items():
        assert torch.equal(tensor, file[name].float()), name
    assert same(qformer(written["blip2"]), qformer(written["blip2_hf"]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_encoder_built_without_memory_is_one_built_with_it(dtype, written):
    """Constants that are in no file, such as EVA's missing bias of keys, are set too."""
    filled = encoder(written["eva"], written["blip2"], dtype)
    plain = EvaViTG(EvaViTGConfig(weights="random", **SECTION["vision_encoder"]))
    plain.load_state_dict({name: t.float() for name, t in filled.state_dict().items()})
    plain.vit.to(getattr(torch, dtype))
    assert {t.dtype for t in filled.vit.parameters()} == {getattr(torch, dtype)}
    assert torch.equal(filled.eval()(pixels(2, 0)), plain.eval()(pixels(2, 0)))
    assert filled.vit.cls_token.untyped_storage().filename is None  # its own memory: the file may change


def test_the_language_model_in_a_blip2_folder_is_not_read(files):
    places = json.loads((files["blip2_hf"] / "model.safetensors.index.json").read_text())["weight_map"]
    expected = {file for name, file in places.items() if not name.startswith("language_")}
    for file in set(places.values()) - expected:
        (files["blip2_hf"] / file).unlink()
    assert expected != set(places.values())
    encoder(files["blip2_hf"], files["blip2_hf"])
    qformer(files["blip2_hf"])


def test_an_encoder_with_a_bias_for_keys_is_an_error(files):
    for file in files["blip2_hf"].glob("*.safetensors"):
        tensors = load_file(file)
        if (name := "vision_model.encoder.layers.1.self_attn.qkv.bias") in tensors:
            tensors[name][20] = 0.5
            save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.qkv\.bias has a bias for keys.*a different encoder"):
        encoder(files["blip2_hf"])


@pytest.mark.parametrize("released", RELEASED)
def test_the_released_models_load_and_chat(released, written):
    loaded = load(written, released)
    tensors = read_tensors(written[f"minigpt4_{released}"])
    for name in ("weight", "bias"):
        assert torch.equal(getattr(loaded.model.llama_proj, name), tensors[f"llama_proj.{name}"])
    assert loaded.config.compat == "published"
    assert (loaded.manifest.stage, loaded.manifest.template) == (2, "llama2" if released == "llama2" else "vicuna_v0")
    assert isinstance(Chat(loaded).session(images=[Image.new("RGB", (30, 40))]).ask("What is this?"), str)


def test_stage_1_files_load_with_a_warning_about_the_template(written, caplog):
    files = {**written, "minigpt4_7b": written["minigpt4_7b_stage1"]}
    loaded = load(files)
    assert (loaded.manifest.stage, loaded.manifest.template) == (1, "plain")
    assert "was trained with captions only and is used with the template 'vicuna_v0'" in caplog.text


def test_a_released_file_alone_selects_its_config(written, monkeypatch):
    given = [option for option in options(written, "7b") if not option.startswith("model.init_from")]
    with pytest.raises(CheckpointError, match=r"sizes are not those of a released model; set model\.init_from"):
        load_model(written["minigpt4_7b"], given)
    monkeypatch.setitem(RELEASES, (32, 16), Release("minigpt4_7b", "Vicuna-tiny", "QFormer"))
    # The encoder of a released model is 1408 wide; this one is not.
    with pytest.raises(CheckpointError, match=r"trained with a vision_encoder 1408 wide \(EVA-ViT-g\); yours is 16"):
        load_model(written["minigpt4_7b"], given, device="cpu")


def test_imported_trained_a_step_and_imported_again(written, pairs, tmp_path, caplog):
    """What was trained from a released file loads bit for bit, and its manifest says where it comes from."""
    caplog.set_level(logging.INFO)
    run = {"total_steps": 1, "global_batch_size": 2, "batch_size_per_rank": 2, "device": "cpu", "warmup_steps": 9}
    data = {"type": "aligned_pairs", "path": pairs}
    given = options(written, "7b") + [f"run.{key}={value}" for key, value in run.items()]
    given += [f"datasets.train.pairs.{key}={value}" for key, value in data.items()]
    config = load_config("minigpt4_7b", [*given, f"run.output_dir={tmp_path}/run", "compat=ours"])
    before = read_tensors(written["minigpt4_7b"])["llama_proj.weight"]
    trained = TrainRunner.from_config(config).run().model
    assert "run.warmup_steps 9 is more than the 1 steps" in caplog.text
    assert not torch.equal(trained.llama_proj.weight, before)
    checkpoint = tmp_path / "run" / "checkpoints" / "latest"
    again = load_model(checkpoint, device="cpu")
    assert same(again.model, trained)
    manifest = Manifest.read(checkpoint)
    assert manifest.stage == 3
    assert len(manifest.data) == 16
    llm = manifest.parts["language_model"]
    assert (llm.width, llm.vocabulary, llm.parameters) == (
        32,
        700,
        sum(p.numel() for p in trained.language_model.parameters()),
    )


def test_a_language_model_with_wrong_weights_is_named_in_a_warning(written, pairs, tmp_path, caplog):
    data = ["datasets.train.pairs.type=aligned_pairs", f"datasets.train.pairs.path={pairs}"]

    def train(files: dict[str, Path], name: str) -> None:
        run = ["run.total_steps=1", "run.device=cpu", f"run.output_dir={tmp_path / name}"]
        TrainRunner.from_config(load_config("minigpt4_7b", [*options(files, "7b"), *data, *run])).run()

    train(written, "one")
    assert "the language model is guessing" not in caplog.text
    folder = tmp_path / "llm"
    folder.mkdir()
    for file in written["vicuna_7b"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for file in folder.glob("*.safetensors"):
        save_file({n: t * (1e-6 if n == "lm_head.weight" else 1) for n, t in load_file(file).items()}, file)
    train({**written, "vicuna_7b": folder}, "two")
    assert f"the language model is guessing; check the weights of {folder}" in caplog.text


def test_vicuna_folders_of_both_sizes_tokenise_alike(written):
    """32,000 rows, or 32,001 with the [PAD] that FastChat added: only the filler differs."""
    texts = [("###Human: <Img>", True), ("</Img> What is this? ###Assistant: ", True)]
    plain, padded = (TextTokenizer.from_path(written[name]) for name in ("vicuna_7b", "vicuna_13b"))
    padded.fit(701)
    assert (plain.bos_id, plain.eos_id) == (padded.bos_id, padded.eos_id) == (1, 2)
    assert (plain.filler_id, padded.filler_id) == (2, 700)
    assert all(plain.tokenize([run]) == padded.tokenize([run]) for run in texts)
    padded.fit(700)
    assert padded.filler_id == 2


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LLaMATokenizer"])
def test_folders_of_the_first_conversions_get_their_special_tokens_back(tokenizer_class, files):
    expected = TextTokenizer.from_path(files["vicuna_7b"])
    settings = {"tokenizer_class": tokenizer_class, "bos_token": "", "eos_token": "", "unk_token": ""}
    (files["vicuna_7b"] / "tokenizer_config.json").write_text(json.dumps(settings))
    (files["vicuna_7b"] / "special_tokens_map.json").write_text("{}")
    found = TextTokenizer.from_path(files["vicuna_7b"])
    assert (found.bos_id, found.eos_id) == (1, 2)
    for text in ("###Human: <Img>", "</Img> Describe this. ###Assistant: ", "A dog.###"):
        assert found.tokenize([(text, True)]) == expected.tokenize([(text, True)])


def test_torch_files_of_old_language_models_load(files):
    places: dict[str, str] = {}
    for number, file in enumerate(sorted(files["vicuna_7b"].glob("*.safetensors"))):
        tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
        torch.save(tensors, files["vicuna_7b"] / f"pytorch_model-{number}.bin")
        places |= dict.fromkeys(tensors, f"pytorch_model-{number}.bin")
        file.unlink()
    (files["vicuna_7b"] / "model.safetensors.index.json").unlink()
    index = {"metadata": {}, "weight_map": places}
    (files["vicuna_7b"] / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert load(files).model.language_model.vocab_size == 700
