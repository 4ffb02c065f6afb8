"""Small tokenizers of unlike kinds, and a reader of labels."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minigpt4.batch import IGNORE
from minigpt4.config.sections import ConversationConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.conversation.encoder import ConversationEncoder, Encoded
from minigpt4.conversation.tokenizer import TextTokenizer
from tests import REFERENCE

LLAMA = TextTokenizer.from_path(REFERENCE / "tokenizer.model")
MARKS = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>", "[INST]", "[/INST]", "<|assistant|>"]


def byte_tokenizer(
    chat_template: str | None = None, *, bos: str | None = None, eos: str | None = "<|im_end|>", special: bool = True
) -> TextTokenizer:
    """Return a byte-level tokenizer without merges whose turn marks are added tokens, special ones or not."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([mark for mark in (bos, eos) if mark and (special or mark not in MARKS)])
    core.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in MARKS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos if special else None)
    tokenizer.chat_template = chat_template
    return TextTokenizer(tokenizer)


def encoder(tokenizer: TextTokenizer = LLAMA, compat: str = "ours", **settings: Any) -> ConversationEncoder:
    return ConversationEncoder(tokenizer, 3, ConversationConfig(**settings), compat)


def dialogue(*turns: tuple[str, str | None], system: str | None = None) -> Dialogue:
    return Dialogue(tuple(Turn(*turn) for turn in turns), system)


def supervised(encoded: Encoded) -> list[list[int]]:
    """Return the supervised ids, one list per unbroken stretch."""
    runs = groupby(encoded.labels.tolist(), key=lambda label: label != IGNORE)
    return [list(run) for is_supervised, run in runs if is_supervised]


def text_of(encoded: Encoded, tokenizer: TextTokenizer) -> str:
    """Return a row as text, each image as `{image}`."""
    text, ids = "", []
    for token, image in zip(encoded.input_ids.tolist(), encoded.image_mask.tolist(), strict=True):
        if not image:
            ids.append(token)
        elif ids or not text.endswith("{image}"):
            text, ids = text + tokenizer.decode(ids, keep_special=True) + "{image}", []
    return text + tokenizer.decode(ids, keep_special=True)
