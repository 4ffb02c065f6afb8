"""Beam search, by transformers' `generate`: one prompt at a time, read anew."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from minigpt4.chat.decoding.choice import check_usable
from minigpt4.chat.section import ChatSection
from minigpt4.models.language_model import LanguageModel


@torch.inference_mode()
def search(
    language_model: LanguageModel,
    embeds: Tensor,
    settings: ChatSection,
    end_ids: Collection[int],
    is_complete: Callable[[list[int]], bool],
) -> list[int]:
    """Return the ids of the best answer among `settings.num_beams` beams.

    Args:
        language_model: the model.
        embeds: (T, Dl), the whole prompt.
        settings: beams, longest answer, penalties.
        end_ids: tokens that end an answer.
        is_complete: whether the text of these ids ends an answer.

    Raises:
        DecodingError: the language model gives no usable logits.
    """
    ends = sorted(end_ids)
    chosen = GenerationConfig(
        num_beams=settings.num_beams,
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
        length_penalty=settings.length_penalty,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    model: Any = language_model.model
    # What a model folder recommends (sampling, penalties) would fill in whatever is not set here.
    recommended, model.generation_config = model.generation_config, GenerationConfig()
    try:
        (ids,) = model.generate(
            inputs_embeds=embeds.unsqueeze(0),
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long, device=embeds.device),
            generation_config=chosen,
            logits_processor=LogitsProcessorList([_Usable()]),
            stopping_criteria=StoppingCriteriaList([_Complete(is_complete)]),
        ).tolist()
    finally:
        model.generation_config = recommended
    return list(ids)


class _Usable(LogitsProcessor):
    """Ends a search whose scores mean nothing."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_usable(scores)
        return scores


class _Complete(StoppingCriteria):
    """Ends each beam on its own."""

    def __init__(self, is_complete: Callable[[list[int]], bool]) -> None:
        self.is_complete = is_complete

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.tensor([self.is_complete(row) for row in input_ids.tolist()], device=input_ids.device)
