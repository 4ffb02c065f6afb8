"""Which token comes next: greedy, or sampled by transformers' logits processors with a row's own seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt4.chat.section import ChatSection
from minigpt4.errors import DecodingError


class TokenChoice:
    """Picks the tokens of one row; what other rows are decoded beside it changes nothing."""

    def __init__(self, settings: ChatSection, device: torch.device) -> None:
        self.samples = settings.temperature > 0
        self.processors = LogitsProcessorList()
        if settings.repetition_penalty != 1.0:
            self.processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if self.samples:
            self.processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                self.processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self.processors.append(TopPLogitsWarper(settings.top_p))
            self.generator = torch.Generator(device).manual_seed(settings.seed)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is always the one."""
        return not self.samples and not self.processors

    def __call__(self, ids: Sequence[int], logits: Tensor) -> int:
        """Return the next token of a row.

        Args:
            ids: the row's answer so far.
            logits: (V,) float32.
        """
        history = torch.tensor([ids], dtype=torch.long, device=logits.device)
        scores = self.processors(history, logits.unsqueeze(0))[0]  # type: ignore[arg-type]
        if self.samples:
            return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
        return int(scores.argmax())


def check_usable(logits: Tensor) -> None:
    """Refuse logits from which nothing can be chosen.

    Raises:
        DecodingError: they are not finite.
    """
    if not logits.isfinite().all():
        raise DecodingError("the language model's logits are not finite; load it in bfloat16 or float32")
