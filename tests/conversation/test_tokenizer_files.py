"""A language model folder without its tokenizer, or with one that loses text, is refused before weights are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minigpt4.checkpoints.assemble import load_model
from minigpt4.checkpoints.inspection import inspect
from minigpt4.conversation.tokenizer import PLAIN_SENTENCE, TextTokenizer
from minigpt4.errors import WeightsError
from tests.conformance import tiny
from tests.conversation.parts import LLAMA
from tests.runners.parts import train, write


def without_tokenizer(folder: Path, *kept: str) -> None:
    """Remove the tokenizer files, as a folder of `model.save_pretrained` alone has none (case 05)."""
    for file in [*folder.glob("token*"), *folder.glob("*.jinja"), *folder.glob("special_tokens*")]:
        if file.name not in kept:
            file.unlink()


@pytest.mark.parametrize("family", tiny.LLMS)
def test_a_folder_without_its_tokenizer_is_refused(family, tmp_path):
    tiny.write_llm(family, tmp_path)
    assert "tokenizer: included" in str(inspect(tmp_path))
    TextTokenizer.from_path(tmp_path).fit(300 if family != "llama" else 700)

    without_tokenizer(tmp_path, "tokenizer_config.json")  # transformers makes an empty tokenizer of it
    with pytest.raises(WeightsError, match=f"{tmp_path}: (no usable tokenizer|the tokenizer does not preserve text)"):
        TextTokenizer.from_path(tmp_path)

    without_tokenizer(tmp_path)
    with pytest.raises(WeightsError, match=f"no tokenizer in {tmp_path}: .*; copy the tokenizer files"):
        TextTokenizer.from_path(tmp_path)
    assert "tokenizer: MISSING" in str(inspect(tmp_path))
    assert not inspect(tmp_path).options


def test_training_and_chat_refuse_it_before_they_read_the_weights(tiny_values, tmp_path):
    llm = tmp_path / "llm"
    tiny.write_llm("gemma2", llm)
    without_tokenizer(llm)
    (llm / "model.safetensors").write_bytes(b"not read")
    tiny_values["model"]["language_model"]["path"] = str(llm)
    with pytest.raises(WeightsError, match=f"no tokenizer in {llm}"):
        train(tiny_values, tmp_path / "run")
    with pytest.raises(WeightsError, match=f"no tokenizer in {llm}"):
        load_model(write(tiny_values, tmp_path / "chat"), device="cpu")


def saved(core: Tokenizer, folder: Path) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    return folder


def test_a_tokenizer_that_loses_text_is_refused_and_one_that_writes_lower_case_is_not(tmp_path):
    words = ["<unk>", *sorted(set(PLAIN_SENTENCE.lower().replace(",", " ,").replace(".", " .").split()))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    assert TextTokenizer.from_path(saved(core, tmp_path / "lower")).tokenize([("THE cat", False)])
    core.normalizer = normalizers.Sequence([])
    with pytest.raises(WeightsError, match=r"does not preserve text: 'The cat .*' comes back as '<unk> cat"):
        TextTokenizer.from_path(saved(core, tmp_path / "cased"))


def test_a_tokenizer_much_smaller_than_the_embedding_is_refused():
    LLAMA.fit(1400)
    with pytest.raises(
        WeightsError, match=r"the tokenizer has 700 tokens, but .* has 32000 rows: tokenizer and weights"
    ):
        LLAMA.fit(32000)
