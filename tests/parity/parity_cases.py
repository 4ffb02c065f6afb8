"""The published training cases as dialogues of ours."""

from __future__ import annotations

from typing import Any

import torch

from minigpt4.batch import Sample
from minigpt4.config.sections import ConversationConfig
from minigpt4.conversation.dialogue import Dialogue, Turn, normalise_marks
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.registry import TEMPLATES


def encoder_for(case: dict[str, Any], tokenizer: TextTokenizer, tokens_per_image: int) -> ConversationEncoder:
    """Return the encoder of a case: the built-in template that writes its prompt and end mark."""
    prompt = case.get("prompt_template") or case.get("prompt") or ""
    templates = map(TEMPLATES.get, TEMPLATES.names())
    name = next(t.name for t in templates if t.end == case["end_sym"] and prompt.startswith(t.question[0]))
    settings = ConversationConfig(template=name, max_answer_tokens=case["max_txt_len"])
    return ConversationEncoder(tokenizer, tokens_per_image, settings, compat="published")


def dialogues(meta: dict[str, Any], case: dict[str, Any], encoder: ConversationEncoder) -> list[Dialogue]:
    """Return one dialogue per sample of a case."""
    if case["kind"] == "caption":
        return [Dialogue((Turn("", answer),)) for answer in meta["answers"]]
    if case["kind"] == "instruction":
        before, after = encoder.training_template.question
        question = normalise_marks(case["prompt"].removeprefix(before).removesuffix(after))
        return [Dialogue((Turn(question, answer),)) for answer in meta["answers"]]
    mark = case["connect_sym"]
    return [
        Dialogue(tuple(Turn(normalise_marks(q), a) for q, a in zip(qs.split(mark), answers.split(mark), strict=True)))
        for qs, answers in zip(case["conv_q"], case["conv_a"], strict=True)
    ]


def samples_of(meta: dict[str, Any], name: str, encoder: ConversationEncoder, images: torch.Tensor) -> list[Sample]:
    """Return the encoded samples of a case, in order."""
    return [
        Sample(
            id=f"{name}:{n}",
            pixel_values=images[n : n + 1],
            **vars(encoder.encode_dialogue(dialogue, num_images=1, sample_id=f"{name}:{n}")),
        )
        for n, dialogue in enumerate(dialogues(meta, meta["cases"][name], encoder))
    ]
