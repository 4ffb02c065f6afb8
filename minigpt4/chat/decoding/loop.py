"""The decode loop: rows join, take a token each per step, and leave when they are done.

Input: embeds of prompts. Output: tokens, handed to each row's answer. Sessions (one row and a cache that stays),
batches and the scheduler of the server all run this loop. Caches and logits processors are transformers'; the loop is
ours, because of rows that come and go between tokens.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt4.chat.answer import Answer
from minigpt4.chat.decoding.cache import RowCache, check_cacheable
from minigpt4.chat.decoding.choice import TokenChoice, check_usable
from minigpt4.errors import DecodingError
from minigpt4.models.language_model import LanguageModel


class Decoder:
    """Decodes any number of answers together.

    Attributes:
        answers: the rows that are not done.
    """

    def __init__(self, language_model: LanguageModel, lock: threading.Lock | None = None) -> None:
        """Use `lock` around every pass, where other threads use the same model."""
        check_cacheable(language_model.model)
        self.model = language_model.model
        self.lock = lock or threading.Lock()
        self.answers: list[Answer] = []
        self._choices: list[TokenChoice] = []
        self._padding: list[int] = []
        self._cache = RowCache()
        # transformers renamed the argument in 5.2x; the old name still works, through a slower wrapper.
        known = inspect.signature(self.model.forward).parameters
        self._cache_argument = "cache" if "cache" in known else "past_key_values"

    @torch.inference_mode()
    def join(self, answers: Sequence[Answer], prompts: Sequence[Tensor], cache: RowCache | None = None) -> None:
        """Read prompts, give each answer its first token, and let those that are not done yet take part.

        Args:
            answers: one per prompt, without tokens.
            prompts: embeds, each (T_i, Dl), of what the cache does not hold.
            cache: of one row, with the start of the only prompt in it. It is written on as the row is decoded, until
                another row joins.
        """
        fresh = cache if cache is not None else RowCache()
        embeds, padding = pad_left(prompts)
        logits = self._pass(fresh, padding, inputs_embeds=embeds)
        choices = [TokenChoice(answer.settings, logits.device) for answer in answers]
        _choose(answers, choices, logits)
        self._leave()
        if not self.answers:
            self._cache = fresh
            self._padding = padding
        else:
            shorter = self._cache.length - fresh.length
            self._padding = [p + max(0, -shorter) for p in self._padding] + [p + max(0, shorter) for p in padding]
            self._cache.join(fresh)
        self.answers += answers
        self._choices += choices

    @torch.inference_mode()
    def step(self) -> None:
        """Give every row its next token; rows that are done leave before."""
        self._leave()
        if not self.answers:
            return
        last = torch.tensor([[answer.ids[-1]] for answer in self.answers], device=self.model.device)
        logits = self._pass(self._cache, self._padding, input_ids=last)
        _choose(self.answers, self._choices, logits)

    @property
    def is_idle(self) -> bool:
        """Whether no row wants another token."""
        return all(answer.finish_reason for answer in self.answers)

    def _leave(self) -> None:
        """Drop the rows that are done, and the columns that only they had."""
        left = [n for n, answer in enumerate(self.answers) if answer.finish_reason is None]
        if len(left) == len(self.answers):
            return
        self.answers = [self.answers[n] for n in left]
        self._choices = [self._choices[n] for n in left]
        padding = [self._padding[n] for n in left]
        first = min(padding, default=0)
        self._padding = [p - first for p in padding]
        if left:
            self._cache.keep(left, first)

    def _pass(self, cache: RowCache, padding: Sequence[int], **inputs: Tensor) -> Tensor:
        """Feed tokens (B, T) or embeds (B, T, Dl) behind what is cached, and return the last logits (B, V)."""
        (given,) = inputs.values()
        start, end = cache.length, cache.length + given.shape[1]
        columns = torch.arange(end, device=given.device)
        lacking = torch.tensor(padding, device=given.device).unsqueeze(1)
        mask = columns >= lacking if any(padding) else None
        positions = (columns[start:] - lacking).clamp(min=0)
        with self.lock:
            arguments: dict[str, Any] = {self._cache_argument: cache, "use_cache": True, "logits_to_keep": 1}
            return (
                self.model(
                    **inputs,
                    **arguments,
                    attention_mask=None if mask is None else mask.long(),
                    position_ids=positions,
                )
                .logits[:, -1]
                .float()
            )


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Join prompts of different lengths.

    Args:
        rows: embeds, each (T_i, Dl).

    Returns:
        Embeds (B, T, Dl) padded on the left with zeros, and how many positions of each row are padding.
    """
    length = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
    for n, row in enumerate(rows):
        embeds[n, length - len(row) :] = row
    return embeds, [length - len(row) for row in rows]


def _choose(answers: Sequence[Answer], choices: Sequence[TokenChoice], logits: Tensor) -> None:
    """Give each answer a token from its row of the logits (B, V); a row without usable ones fails alone."""
    likeliest = logits.argmax(-1).tolist()
    for answer, choose, token, row in zip(answers, choices, likeliest, logits, strict=True):
        try:
            check_usable(row)
        except DecodingError as error:
            answer.fail(error)
        else:
            answer.add(token if choose.is_plain else choose(answer.ids, row))
