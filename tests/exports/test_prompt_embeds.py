"""The request for a server, and the answer of the unchanged language model to it."""

from __future__ import annotations

import base64
import io
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt4 import Chat
from minigpt4.errors import ContextLengthError
from minigpt4.exports.prompt_embeds import export_prompt_embeds, stops
from tests.exports.parts import noisy


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_unchanged_language_model_gives_the_answer_of_our_chat(tiny_values, pairs, tiny_llm, tmp_path, images):
    tiny_values["chat"]["max_new_tokens"] = 8
    loaded = noisy(tiny_values)
    # The folder is served, so our model must have the same weights.
    loaded.model.language_model.model.load_state_dict(AutoModelForCausalLM.from_pretrained(tiny_llm).state_dict())
    pictures = [str(pairs / "image" / f"{n}.jpg") for n in range(images)]
    export_prompt_embeds(loaded, tmp_path / "out", pictures, "What is this?")

    request = json.loads((tmp_path / "out" / "request.json").read_text())
    embeds = torch.load(io.BytesIO(base64.b64decode(request["prompt_embeds"])), weights_only=True)
    assert torch.equal(embeds, torch.load(tmp_path / "out" / "prompt_embeds.pt", weights_only=True))
    assert embeds.ndim == 2
    assert embeds.shape[1] == 32
    assert len(base64.b64decode(request["prompt_embeds"])) < 4096 + embeds.nbytes  # the tensor, not a larger storage

    plain = AutoModelForCausalLM.from_pretrained(request["model"])
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    ids = plain.generate(
        inputs_embeds=embeds.unsqueeze(0),
        max_new_tokens=request["max_tokens"],
        do_sample=request["temperature"] > 0,
        eos_token_id=request["stop_token_ids"],
        stop_strings=request["stop"],
        tokenizer=tokenizer,
    )[0]
    text = tokenizer.decode([i for i in ids.tolist() if i not in request["stop_token_ids"]])
    answer = Chat(loaded).session(images=pictures).ask("What is this?")
    assert str(text).partition(request["stop"][0])[0].strip() == answer
    assert len(ids) > 1


def test_the_request_stops_where_our_chat_does(tiny_values):
    assert stops(noisy(tiny_values)) == {"stop": ["###"], "stop_token_ids": [2]}
    tiny_values["conversation"]["template"] = (
        "llama2"  # its end mark is a special token, which is not part of a server's text
    )
    assert stops(noisy(tiny_values)) == {"stop": [], "stop_token_ids": [2]}
    tiny_values["conversation"]["template"] = "plain"
    assert stops(noisy(tiny_values)) == {"stop": ["\n"], "stop_token_ids": [2]}


def test_a_prompt_that_leaves_no_room_for_the_answer_is_an_error(tiny_values, tmp_path):
    tiny_values["chat"]["max_new_tokens"] = 600
    with pytest.raises(ContextLengthError, match=r"may have 600, but the language model reads 512: .*lower chat"):
        export_prompt_embeds(noisy(tiny_values), tmp_path / "out", [], "Why?")
