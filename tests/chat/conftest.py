"""Loaded models for chat: a random one, and one that gives a chosen answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from minigpt4.chat.engine import Engine, Prompt
from minigpt4.checkpoints.assemble import LoadedModel, assemble
from minigpt4.config import load_config
from minigpt4.config.sections import ChatConfig


@pytest.fixture
def loaded(tiny_values, write_config) -> LoadedModel:
    """A random model, whose answers are noise."""
    return load(tiny_values, write_config)


@pytest.fixture
def load_with(tiny_values, write_config) -> Callable[..., LoadedModel]:
    """Return a function that loads the random model with another conversation section."""
    return lambda **conversation: load(tiny_values | {"conversation": conversation}, write_config)


def load(values: dict[str, Any], write_config: Callable[..., Any]) -> LoadedModel:
    loaded = assemble(load_config(write_config(values)))
    loaded.model.eval()
    return loaded


def image(colour: str) -> Image.Image:
    return Image.new("RGB", (30, 20), colour)


def stream(engine: Engine, prompt: Prompt, settings: ChatConfig) -> Iterator[str]:
    return engine.stream(engine.new_answer(settings), engine.embeds(prompt, settings.max_new_tokens))


def ids_of(loaded, *pieces: str | int) -> list[int]:
    convert = loaded.conversation.tokenizer.tokenizer.convert_tokens_to_ids
    ids = [piece if isinstance(piece, int) else convert(piece) for piece in pieces]
    assert 0 not in ids  # every piece is in the vocabulary
    return ids


def teach(loaded: LoadedModel, ids: list[int]) -> None:
    """Rewrite the language model's weights so that it answers every prompt with `ids`.

    Each layer adds nothing, each token's embedding is an axis of its own, and the head maps it to the next token.
    """
    prompt_end = loaded.conversation.tokenizer.tokenize([(loaded.conversation.chat_template.question[1], True)])[-1]
    chain = [prompt_end, *ids]
    llm = loaded.model.language_model.model
    assert len(set(chain)) == len(chain) <= llm.config.hidden_size
    with torch.no_grad():
        for layer in llm.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        llm.model.embed_tokens.weight.zero_()
        llm.lm_head.weight.zero_()
        for place, token in enumerate(chain):
            llm.model.embed_tokens.weight[token, place] = 1.0
            if place:
                llm.lm_head.weight[token, place - 1] = 1.0
