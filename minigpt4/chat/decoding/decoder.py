"""The decode loop: rows join, get a token per step, and leave when they are complete; and beam search.

Input: embeds of prompts. Output: tokens, added to the answer of each row. Sessions (one row and a cache that is kept),
batches and the scheduler of the server run the same loop, because rows come and go between tokens. Logits processors
and the beam search are transformers'.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt4.chat.answer import Answer
from minigpt4.chat.decoding.cache import RowCache, check_cacheable
from minigpt4.config.sections import ChatConfig
from minigpt4.errors import DecodingError
from minigpt4.models.language_model import LanguageModel

NOT_FINITE = "the language model's logits are not finite; load it in bfloat16 or float32"


class Sampler:
    """Chooses the tokens of one row, greedily or with the row's own seed, independent of the other rows."""

    def __init__(self, settings: ChatConfig, device: torch.device) -> None:
        self.is_sampling = settings.temperature > 0
        self.processors = LogitsProcessorList()
        if settings.repetition_penalty != 1.0:
            self.processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if self.is_sampling:
            self.processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                self.processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self.processors.append(TopPLogitsWarper(settings.top_p))
            self.generator = torch.Generator(device).manual_seed(settings.seed)

    def __call__(self, ids: Sequence[int], logits: Tensor) -> int:
        """Return the next token of a row.

        Args:
            ids: the row's answer so far.
            logits: (V,) float32.

        Raises:
            DecodingError: the settings make the probabilities infinite or NaN.
        """
        history = torch.tensor([ids], dtype=torch.long, device=logits.device)
        scores = self.processors(history, logits.unsqueeze(0))[0]  # type: ignore[arg-type]
        if self.is_sampling:
            probabilities = scores.softmax(-1)
            if not probabilities.isfinite().all():  # checked here, because on a GPU it would end the whole process
                raise DecodingError("the probabilities of the next token are not finite; use less extreme settings")
            return int(torch.multinomial(probabilities, 1, generator=self.generator))
        return int(scores.argmax())


class Decoder:
    """Decodes any number of answers together.

    Attributes:
        answers: the rows that are not complete.
    """

    def __init__(self, language_model: LanguageModel, lock: threading.Lock | None = None) -> None:
        """Use `lock` around every forward pass if other threads use the same model."""
        check_cacheable(language_model.model)
        self.model = language_model.model
        self.lock = lock or threading.Lock()
        self.answers: list[Answer] = []
        self._samplers: list[Sampler] = []
        self._padding: list[int] = []
        self._cache = RowCache()
        # transformers renamed the argument in 5.2x; the old name still works, through a slower wrapper.
        known = inspect.signature(self.model.forward).parameters
        self._cache_argument = "cache" if "cache" in known else "past_key_values"

    @torch.inference_mode()
    def join(self, answers: Sequence[Answer], prompts: Sequence[Tensor], cache: RowCache | None = None) -> None:
        """Read prompts, give each answer its first token, and add the answers that are not complete.

        Args:
            answers: one per prompt, without tokens.
            prompts: embeds, each (T_i, Dl), of what is not in the cache.
            cache: of one row: the start of the only prompt. It grows while the row is decoded, until another row joins.
        """
        fresh = cache if cache is not None else RowCache()
        embeds, padding = pad_left(prompts)
        logits = self._forward(fresh, padding, inputs_embeds=embeds)
        samplers = [Sampler(answer.settings, logits.device) for answer in answers]
        _add_tokens(answers, samplers, logits)
        self._leave()
        if not self.answers:
            self._cache = fresh
            self._padding = padding
        else:
            shorter = self._cache.length - fresh.length
            self._padding = [p + max(0, -shorter) for p in self._padding] + [p + max(0, shorter) for p in padding]
            self._cache.join(fresh)
        self.answers += answers
        self._samplers += samplers

    @torch.inference_mode()
    def step(self) -> None:
        """Remove the complete rows, and give every other row its next token."""
        self._leave()
        if not self.answers:
            return
        last = torch.tensor([[answer.ids[-1]] for answer in self.answers], device=self.model.device)
        logits = self._forward(self._cache, self._padding, input_ids=last)
        _add_tokens(self.answers, self._samplers, logits)

    @property
    def is_idle(self) -> bool:
        """Whether all rows are complete."""
        return all(answer.finish_reason for answer in self.answers)

    def _leave(self) -> None:
        """Remove the complete rows, and the columns that only they used."""
        left = [n for n, answer in enumerate(self.answers) if answer.finish_reason is None]
        if len(left) == len(self.answers):
            return
        self.answers = [self.answers[n] for n in left]
        self._samplers = [self._samplers[n] for n in left]
        padding = [self._padding[n] for n in left]
        first = min(padding, default=0)
        self._padding = [p - first for p in padding]
        if left:
            self._cache.keep(left, first)

    def _forward(self, cache: RowCache, padding: Sequence[int], **inputs: Tensor) -> Tensor:
        """Feed tokens (B, T) or embeds (B, T, Dl) after the cached ones, and return the last logits (B, V)."""
        (given,) = inputs.values()
        start, end = cache.length, cache.length + given.shape[1]
        columns = torch.arange(end, device=given.device)
        offsets = torch.tensor(padding, device=given.device).unsqueeze(1)
        arguments: dict[str, Any] = {
            **inputs,
            self._cache_argument: cache,
            "use_cache": True,
            "logits_to_keep": 1,
            "attention_mask": (columns >= offsets).long() if any(padding) else None,
            "position_ids": (columns[start:] - offsets).clamp(min=0),
        }
        with self.lock:
            logits: Tensor = self.model(**arguments).logits
            return logits[:, -1].float()


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Join prompts of different lengths.

    Args:
        rows: embeds, each (T_i, Dl).

    Returns:
        Embeds (B, T, Dl) padded on the left with zeros, and the number of padding positions of each row.
    """
    length = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
    for n, row in enumerate(rows):
        embeds[n, length - len(row) :] = row
    return embeds, [length - len(row) for row in rows]


def _add_tokens(answers: Sequence[Answer], samplers: Sequence[Sampler], logits: Tensor) -> None:
    """Add a token to each answer from its row of the logits (B, V); a row that cannot be continued fails alone."""
    best, finite = logits.argmax(-1).tolist(), logits.isfinite().all(-1).tolist()
    for answer, sampler, token, is_finite, row in zip(answers, samplers, best, finite, logits, strict=True):
        try:
            if not is_finite:
                raise DecodingError(NOT_FINITE)
            answer.add(sampler(answer.ids, row) if sampler.processors else token)
        except Exception as error:  # the other rows continue; the error is raised to whoever reads this answer
            answer.fail(error)


@torch.inference_mode()
def beam_search(
    language_model: LanguageModel,
    embeds: Tensor,
    settings: ChatConfig,
    end_ids: Collection[int],
    is_complete: Callable[[list[int]], bool],
) -> list[int]:
    """Return the ids of the best answer among `settings.num_beams` beams.

    Args:
        language_model: the model.
        embeds: (T, Dl), the whole prompt.
        settings: number of beams, longest answer, penalties.
        end_ids: tokens that end an answer.
        is_complete: whether the text of these ids ends an answer.

    Raises:
        DecodingError: the logits are not finite.
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
    # The defaults of the model folder (sampling, penalties) would fill in everything that is not set here.
    defaults, model.generation_config = model.generation_config, GenerationConfig()
    try:
        (ids,) = model.generate(
            inputs_embeds=embeds.unsqueeze(0),
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long, device=embeds.device),
            generation_config=chosen,
            logits_processor=LogitsProcessorList([_Finite()]),
            stopping_criteria=StoppingCriteriaList([_Complete(is_complete)]),
        ).tolist()
    finally:
        model.generation_config = defaults
    return list(ids)


class _Finite(LogitsProcessor):
    """Ends a search whose scores are not finite."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.isfinite().all():
            raise DecodingError(NOT_FINITE)
        return scores


class _Complete(StoppingCriteria):
    """Ends each beam by its own text."""

    def __init__(self, is_complete: Callable[[list[int]], bool]) -> None:
        self.is_complete = is_complete

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.tensor([self.is_complete(row) for row in input_ids.tolist()], device=input_ids.device)
