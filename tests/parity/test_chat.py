"""The published chat: mixed context embeds, logits and greedy ids of each prompt."""

from __future__ import annotations

import re

import pytest
import torch

from minigpt4.chat.answer import Answer
from minigpt4.chat.decoding.decoder import Decoder, beam_search
from minigpt4.config.sections import ChatConfig, ConversationConfig
from minigpt4.conversation.dialogue import Dialogue, Turn, normalise_marks
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.models.splice import splice
from tests.parity.conftest import META, TOLERANCE, reference

TEMPLATE_OF = {"vicuna0": "vicuna_v0", "llama2": "llama2"}
CASES = [(format_, turn) for format_, turns in META.get("chat", {}).items() for turn in turns]


def dialogue_of(prompt: str, encoder: ConversationEncoder) -> Dialogue:
    """Read a rendered prompt back into turns."""
    template = encoder.chat_template
    before, after = template.question
    assert prompt.startswith(template.opening)
    pattern = f"{re.escape(before)}(.*?){re.escape(after)}(.*?)(?={re.escape(before)}|$)"
    turns = re.findall(pattern, prompt.removeprefix(template.opening), flags=re.DOTALL)
    return Dialogue(
        (
            *(Turn(normalise_marks(q), a.removesuffix(template.end) if template.end else a) for q, a in turns[:-1]),
            Turn(normalise_marks(turns[-1][0])),
        )
    )


@pytest.mark.parametrize(("format_", "turn"), CASES)
def test_chat_equals_the_published_one(format_, turn, models, tokenizer):
    numbers = reference("chat_qformer")
    model = models["qformer"]
    encoder = ConversationEncoder(
        tokenizer, model.num_query_tokens, ConversationConfig(template=TEMPLATE_OF[format_]), compat="published"
    )
    prompt = encoder.encode_prompt(dialogue_of(META["chat"][format_][turn], encoder), num_images=1)
    with torch.no_grad():
        images = model.encode_images(numbers["input.image"][:1])
        tokens = model.language_model.embed(prompt.input_ids.unsqueeze(0))
        context = splice(tokens, images, prompt.image_mask.unsqueeze(0))
    key = f"chat.{format_}.{turn}"
    torch.testing.assert_close(context, numbers[f"{key}.context"], **TOLERANCE)

    with torch.no_grad():
        logits = model.language_model(context, None)[0, -1]
    torch.testing.assert_close(logits, numbers[f"{key}.last_logits"], **TOLERANCE)

    # The first published id is an artefact of the old generate: compare from the second on.
    greedy, beam = (numbers[f"{key}.{kind}"][0, 1:].tolist() for kind in ("greedy", "beam3"))
    decoder, answer = Decoder(model.language_model), Answer(encoder, ChatConfig(max_new_tokens=len(greedy)), ())
    decoder.join([answer], [context[0]])
    while not decoder.is_idle:
        decoder.step()
    assert answer.ids == greedy

    settings = ChatConfig(max_new_tokens=len(beam), num_beams=3)
    assert beam_search(model.language_model, context[0], settings, {tokenizer.eos_id}, lambda ids: False) == beam
