"""A batch of questions through a model: answers by batched chat, or the losses of choices.

Input: questions with their images. Output: one mapping per question: `answer`; or `losses`, `tokens` and `positions` of
its choices; or `error` where its image cannot be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt4.batch import Sample
from minigpt4.chat.engine import Engine, Prompt
from minigpt4.config.sections import ChatConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.datasets.collate import collate
from minigpt4.errors import ImageError
from minigpt4.evaluation.question import Question


def ask(engine: Engine, questions: Sequence[Question], decoding: ChatConfig) -> list[dict[str, Any]]:
    """Return what the model says to each question; an image of several questions is encoded once.

    Args:
        engine: of the model.
        questions: a batch, in which all are answered freely, or all have choices.
        decoding: how answers are decoded.
    """
    features, errors = _features(engine, questions)
    found: list[dict[str, Any]] = [{"error": errors[key]} if (key := _key(q)) in errors else {} for q in questions]
    asked = [number for number, result in enumerate(found) if not result]
    if asked and questions[0].choices:
        for number in asked:
            question = questions[number]
            found[number] = choice_losses(engine, question, features.get(_key(question)))
    elif asked:
        prompts = [Prompt(Dialogue((Turn(questions[n].text),)), features.get(_key(questions[n]))) for n in asked]
        for number, answer in zip(asked, engine.answer(prompts, decoding), strict=True):
            found[number] = {"answer": answer}
    return found


def _key(question: Question) -> str:
    return question.shown or question.image


def _features(engine: Engine, questions: Sequence[Question]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the query features (1, Q, Dq) of each image, and the errors of those that cannot be read."""
    sources = {_key(q): q.source for q in questions if q.source is not None}
    pixels, errors = {}, {}
    for name, source in sources.items():
        try:
            pixels[name] = engine.loaded.image_processor(source, name=name)
        except ImageError as error:
            errors[name] = str(error)
    features = engine.query_features(list(pixels.values()))
    if features is None:
        return {}, errors
    return {name: features[n : n + 1] for n, name in enumerate(pixels)}, errors


@torch.inference_mode()
def choice_losses(engine: Engine, question: Question, features: Tensor | None) -> dict[str, list[Any]]:
    """Return the loss of each choice as the answer to a question, all of them in one pass.

    Args:
        engine: of the model.
        question: its choices are scored.
        features: (1, Q, Dq) of its image, or None.

    Returns:
        `losses`: summed over the tokens of the choice and its end mark, in nats; `tokens`: their number; `positions`:
        the length of the row.
    """
    loaded, samples = engine.loaded, []
    for choice in question.choices:
        dialogue = Dialogue((Turn(question.text, choice),))
        number = 0 if features is None else len(features)
        encoded = loaded.conversation.encode_dialogue(dialogue, num_images=number, sample_id=question.id)
        samples.append(
            Sample(
                id=question.id,
                input_ids=encoded.input_ids,
                labels=encoded.labels,
                image_mask=encoded.image_mask,
                position_ids=encoded.position_ids,
                branch_ids=encoded.branch_ids,
                query_features=None if features is None else features.cpu(),
            )
        )
    batch = collate(samples, loaded.conversation.tokenizer.filler_id).to(loaded.model.device)
    losses, counts = loaded.model.losses_per_sample(batch)
    return {
        "losses": [round(value, 6) for value in losses.double().tolist()],
        "tokens": counts.tolist(),
        "positions": [len(sample.input_ids) for sample in samples],
    }
