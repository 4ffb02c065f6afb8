"""The decode loop: from embeds to token ids, for one row or many.

Input: left-padded `inputs_embeds` of the prompts. Output: one token id per row and step. Caches and logits processors
are transformers'; the loop is ours, because streams and rows that end at different steps need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt4.chat.section import ChatSection
from minigpt4.errors import DecodingError
from minigpt4.models.language_model import LanguageModel


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join prompts of different lengths.

    Args:
        rows: embeds, each (T_i, Dl).

    Returns:
        Embeds (B, T, Dl) padded on the left with zeros, and the mask (B, T), true at real positions.
    """
    length = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device=rows[0].device)
    for n, row in enumerate(rows):
        embeds[n, length - len(row) :] = row
        mask[n, length - len(row) :] = True
    return embeds, mask


@torch.inference_mode()
def decode(
    language_model: LanguageModel,
    embeds: Tensor,
    mask: Tensor,
    settings: ChatSection,
    is_done: Callable[[int, list[int]], bool],
) -> Iterator[list[int | None]]:
    """Yield the next token of every row until all rows are done.

    Args:
        language_model: the model.
        embeds: (B, T, Dl) prompts, padded on the left.
        mask: (B, T) bool, false at padding.
        settings: how to choose tokens, and how many at most.
        is_done: called with a row's number and its ids so far, after each token; true ends that row.

    Yields:
        One id per row, None for rows already done.
    """
    model = language_model.model
    cache = DynamicCache(config=model.config)
    choose = _chooser(settings, embeds.device)
    ids: list[list[int]] = [[] for _ in range(len(embeds))]
    done = [False] * len(embeds)
    mask = mask.long()
    inputs: dict[str, Tensor] = {"inputs_embeds": embeds}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(settings.max_new_tokens):
        logits = model(
            **inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = choose(ids, logits.float())
        step: list[int | None] = []
        for row, token in enumerate(tokens.tolist()):
            step.append(None if done[row] else token)
            ids[row].append(token)
            done[row] = done[row] or is_done(row, ids[row])
        yield step
        if all(done):
            return
        inputs = {"input_ids": tokens.unsqueeze(1)}
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1


def _chooser(settings: ChatSection, device: torch.device) -> Callable[[list[list[int]], Tensor], Tensor]:
    """Return the function that picks a token per row from logits (B, V)."""
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature > 0:
        processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            processors.append(TopPLogitsWarper(settings.top_p))
    generator = torch.Generator(device).manual_seed(settings.seed)

    def choose(ids: list[list[int]], logits: Tensor) -> Tensor:
        if not torch.isfinite(logits).all():
            raise DecodingError("the language model's logits are not finite; load it in bfloat16 or float32")
        history = torch.tensor(ids, dtype=torch.long, device=device)
        scores = processors(history, logits)  # type: ignore[arg-type]
        if settings.temperature == 0:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)

    return choose
