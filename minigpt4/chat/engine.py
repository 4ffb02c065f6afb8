"""Prompts in, text out: the step between dialogues and the decode loop.

Input: prompts (a dialogue whose last turn is open, and query features of its images). Output: answers, as a whole for a
batch of prompts, or bit by bit for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4.chat.decoding import decode, pad_left
from minigpt4.chat.section import ChatSection
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.dialogue import Dialogue
from minigpt4.errors import ContextLengthError
from minigpt4.models.splice import splice
from minigpt4.processors.image import ImageSource

_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Prompt:
    """What the model is to answer.

    Attributes:
        dialogue: its last turn has no answer.
        query_features: (images, Q, Dq), or None without images.
    """

    dialogue: Dialogue
    query_features: Tensor | None = None


class Engine:
    """Answers prompts with a loaded model."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    @torch.inference_mode()
    def query_features(self, images: Sequence[ImageSource]) -> Tensor | None:
        """Return (images, Q, Dq), or None for no images.

        Raises:
            ImageError: an image cannot be read.
        """
        if not images:
            return None
        pixels = torch.stack(
            [self.loaded.image_processor(image, name=f"image {n}") for n, image in enumerate(images, start=1)]
        )
        return self.loaded.model.query_features(pixels.to(self.loaded.model.device))

    @torch.inference_mode()
    def embeds(self, prompt: Prompt, max_new_tokens: int) -> Tensor:
        """Return the embeds (T, Dl) of a prompt.

        Raises:
            ContextLengthError: prompt and answer do not fit the language model's context together.
        """
        model = self.loaded.model
        features = prompt.query_features
        encoded = self.loaded.encoder.encode_prompt(
            prompt.dialogue, num_images=0 if features is None else len(features)
        )
        length, context = len(encoded.input_ids), model.language_model.context_length
        if length + max_new_tokens > context:
            raise ContextLengthError(
                f"the prompt has {length} tokens and the answer may have {max_new_tokens}, but the language model "
                f"reads {context}: ask in a new session, or lower chat.max_new_tokens"
            )
        image_embeds = None if features is None else model.project(features)
        tokens = model.language_model.embed(encoded.input_ids.to(model.device).unsqueeze(0))
        return splice(tokens, image_embeds, encoded.image_mask.to(model.device).unsqueeze(0))[0]

    def answer(self, prompts: Sequence[Prompt], settings: ChatSection) -> list[str]:
        """Return the answer to each prompt, decoded together."""
        if not prompts:
            return []
        ids: list[list[int]] = [[] for _ in prompts]
        for step in self._decode(prompts, settings):
            for row, token in enumerate(step):
                if token is not None:
                    ids[row].append(token)
        return [self._text(row)[0].strip() for row in ids]

    def stream(self, prompt: Prompt, settings: ChatSection) -> Iterator[str]:
        """Yield the answer to one prompt as it grows; the end mark never shows."""
        ids: list[int] = []
        sent = ""
        for (token,) in self._decode([prompt], settings):
            ids.append(token)  # type: ignore[arg-type]
            text, ended = self._text(ids)
            text = text.lstrip()
            safe = text.rstrip() if ended else self._without_start_of_end_mark(text)
            if len(safe) > len(sent) and not safe.endswith(_UNFINISHED):
                yield safe[len(sent) :]
                sent = safe
        rest = self._text(ids)[0].strip()
        if len(rest) > len(sent):
            yield rest[len(sent) :]

    def _decode(self, prompts: Sequence[Prompt], settings: ChatSection) -> Iterator[list[int | None]]:
        embeds, mask = pad_left([self.embeds(prompt, settings.max_new_tokens) for prompt in prompts])
        return decode(self.loaded.model.language_model, embeds, mask, settings, lambda _, ids: self._text(ids)[1])

    def _text(self, ids: list[int]) -> tuple[str, bool]:
        """Return the text of `ids` up to the end of the answer, and whether that end is there.

        An answer ends at an end-of-sequence id, or where the template's end mark shows in the text, however it was
        tokenised.
        """
        tokenizer = self.loaded.encoder.tokenizer
        ended = bool(ids) and ids[-1] == tokenizer.eos_id
        text, marked = self.loaded.encoder.cut_answer(tokenizer.decode(ids[:-1] if ended else ids, keep_special=True))
        return text, ended or marked

    def _without_start_of_end_mark(self, text: str) -> str:
        """Return `text` without a tail that may become the end mark, or that is white space so far."""
        end = self.loaded.encoder.training_template.end
        for size in range(len(end) - 1, 0, -1):
            if text.endswith(end[:size]):
                text = text[:-size]
                break
        return text.rstrip()
