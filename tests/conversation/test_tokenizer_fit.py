"""The tokenizer's ids must have rows in the embedding."""

from __future__ import annotations

import pytest
from transformers import LlamaTokenizer

from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.errors import WeightsError
from tests import REFERENCE


@pytest.fixture
def tokenizer() -> TextTokenizer:
    """The reference tokenizer with an added padding token, as old Vicuna folders have it."""
    padded = LlamaTokenizer.from_pretrained(REFERENCE, local_files_only=True)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    return TextTokenizer(padded)


def test_a_padding_token_without_a_row_is_not_used(tokenizer):
    assert tokenizer.filler_id == 700
    tokenizer.fit(700)
    assert tokenizer.filler_id == tokenizer.eos_id


def test_a_padding_token_with_a_row_is_used(tokenizer):
    tokenizer.fit(701)
    assert tokenizer.filler_id == 700


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer):
    with pytest.raises(WeightsError, match="ids up to 699, but the language model's embedding has 500 rows"):
        tokenizer.fit(500)
