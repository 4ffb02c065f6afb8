"""Prompts in, text out: the step between dialogues and the decode loop.

Input: prompts (a dialogue whose last turn is open, and query features of its images). Output: answers, as a whole for a
batch of prompts, or bit by bit for one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4.chat.answer import Answer
from minigpt4.chat.decoding.beams import search
from minigpt4.chat.decoding.cache import RowCache
from minigpt4.chat.decoding.loop import Decoder
from minigpt4.chat.section import ChatSection
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.dialogue import Dialogue
from minigpt4.conversation.encoder import Encoded
from minigpt4.errors import ContextLengthError
from minigpt4.models.splice import splice
from minigpt4.processors.image import ImageSource


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
        """Take a model; threads that share it must share its engine, too."""
        self.loaded = loaded
        self.lock = threading.Lock()
        self._image_lock = threading.Lock()
        ends = getattr(loaded.model.language_model.model.generation_config, "eos_token_id", None)
        self._end_ids = set(ends if isinstance(ends, list) else [ends])

    @torch.inference_mode()
    def query_features(self, images: Sequence[ImageSource]) -> Tensor | None:
        """Return (images, Q, Dq), or None for no images; from any thread.

        Raises:
            ImageError: an image cannot be read.
        """
        if not images:
            return None
        return self.encode(
            [self.loaded.image_processor(image, name=f"image {n}") for n, image in enumerate(images, start=1)]
        )

    @torch.inference_mode()
    def encode(self, pixel_values: Sequence[Tensor]) -> Tensor:
        """Return (images, Q, Dq) for what the image processor made of them, each (3, H, W); from any thread."""
        with self._image_lock:
            return self.loaded.model.query_features(torch.stack(list(pixel_values)).to(self.loaded.model.device))

    @torch.inference_mode()
    def embeds(self, prompt: Prompt, max_new_tokens: int) -> Tensor:
        """Return the embeds (T, Dl) of a prompt; from any thread.

        Raises:
            ContextLengthError: prompt and answer do not fit the language model's context together.
            ConversationError: the prompt cannot be rendered.
        """
        features = prompt.query_features
        encoded = self.loaded.encoder.encode_prompt(
            prompt.dialogue, num_images=0 if features is None else len(features)
        )
        length = len(encoded.input_ids)
        if length + max_new_tokens > self.context_length:
            raise ContextLengthError(
                f"the prompt has {length} tokens and the answer may have {max_new_tokens}, but the language model "
                f"reads {self.context_length}: ask in a new session, or lower chat.max_new_tokens"
            )
        return self.embed(encoded, features)

    @property
    def context_length(self) -> int:
        """The longest prompt and answer together, in tokens."""
        return self.loaded.model.language_model.context_length

    @torch.inference_mode()
    def embed(self, encoded: Encoded, query_features: Tensor | None, start: int = 0) -> Tensor:
        """Return the embeds (T - start, Dl) of an encoded prompt of T tokens from position `start` on."""
        model = self.loaded.model
        seen = int(encoded.image_mask[:start].sum())
        image_embeds = None
        if encoded.image_mask[start:].any() and query_features is not None:
            whole, part = divmod(seen, model.num_query_tokens)
            # A position at a time, because the start may lie within an image.
            image_embeds = model.project(query_features[whole:]).flatten(0, 1)[part:].unsqueeze(1)
        tokens = model.language_model.embed(encoded.input_ids[start:].to(model.device).unsqueeze(0))
        return splice(tokens, image_embeds, encoded.image_mask[start:].to(model.device).unsqueeze(0))[0]

    def new_answer(self, settings: ChatSection, stop: Sequence[str] = ()) -> Answer:
        """Return an answer without tokens yet, that ends where this model's answers end, or at a text of `stop`."""
        ends = {*self._end_ids, self.loaded.encoder.tokenizer.eos_id} - {None}
        return Answer(self.loaded.encoder, settings, ends, stop)

    def answer(self, prompts: Sequence[Prompt], settings: ChatSection, stop: Sequence[str] = ()) -> list[str]:
        """Return the text of the answer to each prompt, decoded together."""
        return [answer.text for answer in self.decode(prompts, settings, stop)]

    def decode(self, prompts: Sequence[Prompt], settings: ChatSection, stop: Sequence[str] = ()) -> list[Answer]:
        """Return the answer to each prompt, decoded together.

        Raises:
            ContextLengthError, ConversationError: a prompt cannot be answered.
            DecodingError: the language model gives no usable logits.
        """
        answers = [self.new_answer(settings, stop) for _ in prompts]
        embeds = [self.embeds(prompt, settings.max_new_tokens) for prompt in prompts]
        if settings.num_beams > 1:
            for answer, row in zip(answers, embeds, strict=True):
                self._search(answer, row)
        elif prompts:
            decoder = Decoder(self.loaded.model.language_model, self.lock)
            decoder.join(answers, embeds)
            while not decoder.is_idle:
                decoder.step()
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return answers

    def stream(self, prompt: Prompt, settings: ChatSection, stop: Sequence[str] = ()) -> Iterator[str]:
        """Yield the answer to one prompt as it grows; end mark and stop text never show."""
        answer = self.new_answer(settings, stop)
        yield from self.grow(answer, self.embeds(prompt, settings.max_new_tokens))

    def grow(self, answer: Answer, embeds: Tensor, cache: RowCache | None = None) -> Iterator[str]:
        """Decode one answer to a prompt's embeds (T, Dl) behind what `cache` holds, and yield its text as it grows.

        A beam search knows its answer only at its end; it reads the whole prompt, and no cache.

        Raises:
            DecodingError: the language model gives no usable logits.
        """
        if answer.settings.num_beams > 1:
            self._search(answer, embeds)
            yield answer.text
            return
        decoder = Decoder(self.loaded.model.language_model, self.lock)
        decoder.join([answer], [embeds], cache)
        sent = ""
        while True:
            if len(answer.text) > len(sent):
                yield answer.text[len(sent) :]
                sent = answer.text
            if decoder.is_idle:
                break
            decoder.step()
        if answer.error is not None:
            raise answer.error

    def _search(self, answer: Answer, embeds: Tensor) -> None:
        """Fill an answer by beam search."""
        with self.lock:
            found = search(
                self.loaded.model.language_model, embeds, answer.settings, answer.end_ids, answer.is_complete
            )
        for token in found:
            if answer.finish_reason is None:
                answer.add(token)
