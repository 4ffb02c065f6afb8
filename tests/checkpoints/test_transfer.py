"""A projection moved to another language model: through the shared words, or refused where it cannot be."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4 import load_model
from minigpt4.checkpoints.transfer import word_map
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.errors import CheckpointError
from minigpt4.models.language_model import LanguageModel, load_causal_lm
from tests.conformance.tiny import byte_tokenizer
from tests.runners.parts import train

WIDTH = 48


@pytest.fixture(scope="module")
def mapped_llm(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """Folder of a wider language model whose embeds are an affine map of the tiny one's, and that map."""
    folder = tmp_path_factory.mktemp("mapped") / "llm"
    shutil.copytree(tiny_llm, folder)
    values = LlamaConfig.from_pretrained(tiny_llm).to_dict() | {"hidden_size": WIDTH, "head_dim": 12}
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig.from_dict(values))
    weight, bias = torch.randn(WIDTH, 32), torch.randn(WIDTH)
    old = load_causal_lm(tiny_llm, "float32").get_input_embeddings()(torch.arange(700))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(old @ weight.T + bias)
    model.save_pretrained(folder)
    return folder, weight, bias


@pytest.fixture
def moved_values(tiny_values: dict[str, Any], tiny_llm: Path, mapped_llm: Any, tmp_path: Path) -> dict[str, Any]:
    """Values of a run with the wider model that starts from a checkpoint trained with the tiny one."""
    train(tiny_values, tmp_path / "old", total_steps=2)
    tiny_values["model"]["language_model"]["path"] = str(mapped_llm[0])
    tiny_values["model"] |= {
        "init_from": str(tmp_path / "old/checkpoints/latest"),
        "start": {"trained_with": str(tiny_llm)},
    }
    return tiny_values


def test_the_projection_is_the_old_one_times_the_map_and_the_log_says_so(moved_values, mapped_llm, tmp_path, caplog):
    still = {"total_steps": 1, "learning_rate": 0.0, "warmup_start_learning_rate": 0.0}
    with caplog.at_level(logging.INFO, "minigpt4"):
        moved = train(moved_values, tmp_path / "new", **still).model.llama_proj
    (line,) = [text for text in caplog.messages if "llama_proj is moved" in text]
    assert str(mapped_llm[0]) in line
    assert "R² 1.00" in line
    old = load_model(tmp_path / "old/checkpoints/latest", device="cpu").model.llama_proj
    _, weight, bias = mapped_llm
    features = torch.randn(20, old.in_features)
    torch.testing.assert_close(moved(features), old(features) @ weight.T + bias, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_of_the_new_model_is_its_own(moved_values, tiny_llm, tmp_path, caplog):
    """It is loaded as it is, resumed, and needs the old language model no more."""
    trained = train(moved_values, tmp_path / "new", total_steps=2, save_every_steps=1).model.llama_proj.weight.clone()
    caplog.clear()
    moved_values["model"]["init_from"] = str(tmp_path / "new/checkpoints/latest")
    again = train(moved_values, tmp_path / "next", total_steps=1, learning_rate=0.0, warmup_start_learning_rate=0.0)
    assert torch.equal(again.model.llama_proj.weight, trained)
    assert not [text for text in caplog.messages if "is moved" in text]
    file = tmp_path / "new/checkpoints/latest/config.yaml"
    file.write_text(file.read_text().replace(f"trained_with: {tiny_llm}", "trained_with: /no/such/folder"))
    assert "/no/such/folder" in file.read_text()
    loaded = load_model(tmp_path / "new/checkpoints/latest", device="cpu")
    assert torch.equal(loaded.model.llama_proj.weight, trained)


def test_without_the_key_another_language_model_is_refused(moved_values, tmp_path):
    del moved_values["model"]["start"]
    with pytest.raises(CheckpointError, match="trained with an LLM 32 wide"):
        train(moved_values, tmp_path / "new")


def test_it_must_be_the_language_model_of_the_checkpoint(moved_values, other_llm, tmp_path):
    moved_values["model"]["start"]["trained_with"] = str(other_llm)
    with pytest.raises(CheckpointError, match="trained with another language_model"):
        train(moved_values, tmp_path / "new")


def test_what_was_trained_inside_a_language_model_stays_there(moved_values, tiny_llm, mapped_llm, tmp_path):
    lora = {**moved_values, "model": {**moved_values["model"], "trainable": ["llama_proj", "lora"]}}
    lora["model"] |= {"language_model": {"path": str(tiny_llm), "dtype": "float32", "lora": {"rank": 2}}, "start": {}}
    lora["model"]["init_from"] = ""
    train(lora, tmp_path / "lora", total_steps=1)
    moved_values["model"]["init_from"] = str(tmp_path / "lora/checkpoints/latest")
    with pytest.raises(CheckpointError, match=r"trained 8 tensors inside its language model \(language_model\.model"):
        train(moved_values, tmp_path / "new")


def test_vocabularies_without_shared_words_are_refused(tiny_llm):
    llm = LanguageModel(load_causal_lm(tiny_llm, "float32"), source="tiny")
    single = TextTokenizer(byte_tokenizer(eos_token="</s>"))
    with pytest.raises(CheckpointError, match=r"share \d+ words, too few"):
        word_map(llm, TextTokenizer.from_path(tiny_llm), llm, single)


def test_words_are_the_same_in_sentencepiece_and_byte_level_vocabularies(tiny_llm):
    words = TextTokenizer.from_path(tiny_llm).words(700)
    assert any(word.startswith(" ") and word[1:].isalpha() for word in words)
    assert not any(word.startswith("<") for word in words)
    assert max(words.values()) < 700
    assert max(TextTokenizer.from_path(tiny_llm).words(300).values()) < 300
