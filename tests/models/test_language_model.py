"""Causal LMs of transformers: loading, and messages for folders that cannot be loaded."""

from __future__ import annotations

import builtins
import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from minigpt4.config.parts import LanguageModelConfig, LoraConfig
from minigpt4.datasets.collate import collate
from minigpt4.devices import choose_device
from minigpt4.errors import ConfigError, MissingDependencyError, WeightsError
from minigpt4.models.language_model import LanguageModel
from tests.models import parts
from tests.models.parts import CLOSE, FAMILIES


@pytest.fixture
def folder(tiny_llm, tmp_path):
    """A copy of the tiny LLaMA that a test may damage."""
    return shutil.copytree(tiny_llm, tmp_path / "llm")


def load(folder, **settings) -> LanguageModel:
    return LanguageModel.from_config(LanguageModelConfig(path=str(folder), **{"dtype": "float32", **settings}))


@pytest.mark.parametrize("family", FAMILIES)
def test_embeds_and_ids_give_the_same_logits(family):
    llm = parts.language_model(family)
    ids = torch.randint(3, parts.VOCABULARY, (2, 7))
    with torch.no_grad():
        found = llm(llm.embed(ids), torch.ones(2, 7, dtype=torch.bool))
        torch.testing.assert_close(found, llm.model(input_ids=ids, use_cache=False).logits, **CLOSE)
    assert found.shape == (2, 7, llm.vocab_size)
    assert llm.embed(ids).shape == (2, 7, llm.hidden_size)
    assert llm.context_length == 256


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_is_loaded_in_the_configured_precision(tiny_llm, dtype):
    llm = load(tiny_llm, dtype=dtype)
    assert llm.dtype == getattr(torch, dtype)
    assert {p.dtype for p in llm.parameters()} == {llm.dtype}
    assert (llm.hidden_size, llm.vocab_size, llm.source) == (32, 700, str(tiny_llm))


def test_a_folder_without_config(tmp_path):
    with pytest.raises(
        WeightsError, match=r"no config\.json found; set the path to a folder saved by transformers or to a \.gguf"
    ):
        load(tmp_path)


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=f"{file}: truncated or not a safetensors file"):
        load(folder)


def test_weights_that_are_a_web_page(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(WeightsError, match=f"{folder}/pytorch_model.bin: is a web page"):
        load(folder)


def test_missing_and_misshapen_tensors_are_named(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 tensors missing or of another shape: model.layers.1.mlp.up_proj"):
        load(folder)


def test_an_unknown_model_type_is_an_error(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(WeightsError, match="cannot be loaded as a causal language model"):
        load(folder)


def test_a_model_without_a_head_is_an_error():
    with pytest.raises(WeightsError, match="LlamaModel has no output embeddings; a causal LM is required"):
        LanguageModel(parts.language_model().model.model)


def test_adapters_are_added_to_the_target_modules(tiny_llm):
    llm = load(tiny_llm, lora=LoraConfig(rank=2, target_modules=["k_proj"]))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, _ in llm.named_parameters() if ".lora_" in name}
    assert adapted == {"k_proj"}
    # Also if only one of several is unknown, which peft passes over in silence.
    message = r"target_modules: llama has no layer 'c_attn'; its linear layers are down_proj, .*, lm_head, o_proj, q"
    for targets in (["c_attn"], ["q_proj", "c_attn"]):
        with pytest.raises(WeightsError, match=message):
            load(tiny_llm, lora=LoraConfig(rank=2, target_modules=targets))


def test_adapters_need_peft(tiny_llm, monkeypatch):
    real = builtins.__import__

    def without_peft(name, *rest, **named):
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(MissingDependencyError, match=r"lora needs the package 'peft': pip install 'minigpt4\[lora\]'"):
        load(tiny_llm, lora=LoraConfig(rank=2))


def test_the_head_is_left_alone_after_an_error():
    llm = parts.language_model()
    with pytest.raises(RuntimeError):
        llm(torch.zeros(1, 3, 5), None, at=torch.zeros(1, dtype=torch.int64))
    head = llm.model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    assert not head._forward_pre_hooks


def test_layers_that_cannot_keep_the_parts_of_a_row_apart_are_named():
    llm = parts.language_model()
    llm.model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match=r"llama has layers of linear_attention, so .*isolate_turns to false"):
        llm.structured_masks(collate(parts.samples(), 0))
    bloom = LanguageModel(BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2)))
    with pytest.raises(ConfigError, match="bloom does not accept position_ids"):
        bloom.attention_kinds()
    neo = GPTNeoConfig(
        vocab_size=9, hidden_size=8, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    with pytest.raises(ConfigError, match="gpt_neo has layers of local attention"):
        LanguageModel(GPTNeoForCausalLM(neo)).attention_kinds()


def test_merged_tensors_are_the_model_with_its_adapters_in_it():
    llm = parts.language_model()
    plain = copy.deepcopy(llm.model)
    llm.add_lora(LoraConfig(rank=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
    ids = torch.randint(3, parts.VOCABULARY, (1, 7))
    with torch.no_grad():
        expected = llm(llm.embed(ids), None)
        assert not torch.allclose(plain(input_ids=ids).logits, expected, **CLOSE)
        plain.load_state_dict(dict(llm.merged_tensors()))  # strict: exactly the names of the model without adapters
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, **CLOSE)


def test_auto_is_the_precision_that_is_fast_on_this_machine(tmp_path):
    parts.language_model().model.save_pretrained(tmp_path)
    loaded = LanguageModel.from_config(LanguageModelConfig(path=str(tmp_path), dtype="auto"))
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512") or choose_device().type != "cpu"
    assert loaded.dtype == (torch.bfloat16 if wide else torch.float32)
