"""Beam search: the likeliest answer as a whole, ended by its text as well as by its tokens."""

from __future__ import annotations

import pytest
import torch

from minigpt4.chat.engine import Engine, Prompt
from minigpt4.config.sections import ChatConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.errors import DecodingError
from tests.chat.conftest import image, load, stream

PROMPT = Dialogue((Turn("What is this?"),))


@pytest.fixture
def engine(loaded) -> Engine:
    return Engine(loaded)


@torch.inference_mode()
def score(engine: Engine, prompt: Prompt, ids: list[int]) -> float:
    """Return the log probability of an answer, token by token without a cache."""
    llm = engine.loaded.model.language_model
    embeds = engine.embeds(prompt, 1)
    whole = torch.cat([embeds, llm.embed(torch.tensor(ids[:-1], dtype=torch.long))])
    logits = llm.model(inputs_embeds=whole.unsqueeze(0), use_cache=False).logits[0, len(embeds) - 1 :]
    return float(logits.log_softmax(-1)[range(len(ids)), ids].sum())


@torch.inference_mode()
def test_as_many_beams_as_tokens_find_the_best_of_all_answers(engine):
    """Against brute force: of all 490,000 answers of two tokens, none is likelier."""
    prompt = Prompt(PROMPT, engine.query_features([image("red")]))
    (answer,) = engine.decode([prompt], ChatConfig(max_new_tokens=2, num_beams=700))
    llm, every = engine.loaded.model.language_model, torch.arange(700)
    embeds = engine.embeds(prompt, 2).expand(700, -1, -1)
    whole = torch.cat([embeds, llm.embed(every.unsqueeze(1))], dim=1)
    first, second = llm.model(inputs_embeds=whole, use_cache=False, logits_to_keep=2).logits.log_softmax(-1).unbind(1)
    scores = first[0].unsqueeze(1) + second
    assert answer.ids == list(divmod(int(scores.argmax()), 700))


def test_a_search_is_no_worse_than_greedy_and_each_prompt_is_its_own(engine):
    prompts = [Prompt(PROMPT), Prompt(PROMPT, engine.query_features([image("red")]))]
    greedy = engine.decode(prompts, ChatConfig(max_new_tokens=8))
    found = engine.decode(prompts, ChatConfig(max_new_tokens=8, num_beams=4))
    for prompt, one, other in zip(prompts, greedy, found, strict=True):
        assert score(engine, prompt, other.ids) >= score(engine, prompt, one.ids) - 1e-4
        assert engine.decode([prompt], ChatConfig(max_new_tokens=8, num_beams=4))[0].ids == other.ids
    assert [list(stream(engine, p, ChatConfig(max_new_tokens=8, num_beams=4))) for p in prompts] == [
        [answer.text] for answer in found
    ]


def test_beams_end_at_a_stop_text(engine):
    settings = ChatConfig(max_new_tokens=8, num_beams=3)
    (whole,) = engine.decode([Prompt(PROMPT)], settings)
    mark = whole.text[len(whole.text) // 2 :][:2]
    (answer,) = engine.decode([Prompt(PROMPT)], settings, stop=[mark])
    assert answer.finish_reason in ("stop", "length")
    assert mark not in answer.text
    assert not answer.is_complete(answer.ids[:-1])  # it went no further than the mark


def test_beams_of_a_broken_model(loaded):
    with torch.no_grad():
        loaded.model.language_model.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DecodingError, match="not finite"):
        Engine(loaded).decode([Prompt(PROMPT)], ChatConfig(num_beams=2))


def test_a_folders_own_sampling_defaults_change_nothing(tiny_values, write_config):
    engine = Engine(load(tiny_values, write_config))
    settings = ChatConfig(max_new_tokens=6, num_beams=3)
    (wanted,) = engine.decode([Prompt(PROMPT)], settings)
    defaults = engine.loaded.model.language_model.model.generation_config
    defaults.do_sample, defaults.temperature, defaults.repetition_penalty = True, 3.0, 9.0
    defaults.max_length, defaults.no_repeat_ngram_size = 3, 1
    (found,) = engine.decode([Prompt(PROMPT)], settings)
    assert found.ids == wanted.ids
