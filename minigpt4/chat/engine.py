"""From prompts to text: the step between dialogues and the decode loop.

Input: prompts (a dialogue whose last turn has no answer, and the query features of its images). Output: answers to a
batch of prompts, or the growing text of one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4.chat.answer import Answer
from minigpt4.chat.decoding.cache import RowCache
from minigpt4.chat.decoding.decoder import Decoder, beam_search
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.config.sections import ChatConfig
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
        """Use a loaded model; threads that share the model must share its engine."""
        self.loaded = loaded
        self.lock = threading.Lock()
        self._image_lock = threading.Lock()

    @property
    def end_ids(self) -> list[int]:
        """The end-of-sequence ids of the tokenizer and of the language model's generation config, sorted."""
        generation = getattr(self.loaded.model.language_model.model, "generation_config", None)
        ends = getattr(generation, "eos_token_id", None)
        ids = {self.loaded.conversation.tokenizer.eos_id, *(ends if isinstance(ends, list) else [ends])}
        return sorted(i for i in ids if i is not None)

    @property
    def context_length(self) -> int:
        """Largest number of tokens of a prompt and its answer together."""
        return self.loaded.model.language_model.context_length

    @torch.inference_mode()
    def query_features(self, images: Sequence[ImageSource | Tensor]) -> Tensor | None:
        """Return (images, Q, Dq), or None for no images; from any thread.

        Args:
            images: paths, bytes or PIL images, or pixel values (3, H, W) from the image processor.

        Raises:
            ImageError: an image cannot be read.
        """
        if not images:
            return None
        process = self.loaded.image_processor
        pixels = [
            image if isinstance(image, Tensor) else process(image, name=f"image {n}")
            for n, image in enumerate(images, start=1)
        ]
        with self._image_lock:
            return self.loaded.model.query_features(torch.stack(pixels).to(self.loaded.model.device))

    @torch.inference_mode()
    def embeds(self, prompt: Prompt, max_new_tokens: int) -> Tensor:
        """Return the embeds (T, Dl) of a prompt; from any thread.

        Raises:
            ContextLengthError: prompt and answer together are longer than the language model's context.
            ConversationError: the prompt cannot be rendered.
        """
        features = prompt.query_features
        encoded = self.loaded.conversation.encode_prompt(
            prompt.dialogue, num_images=0 if features is None else len(features)
        )
        length = len(encoded.input_ids)
        if length + max_new_tokens > self.context_length:
            raise ContextLengthError(
                f"the prompt has {length} tokens and the answer may have {max_new_tokens}, but the language model "
                f"reads {self.context_length}: start a new session, or lower chat.max_new_tokens"
            )
        return self.embed_encoded(encoded, features)

    @torch.inference_mode()
    def embed_encoded(self, encoded: Encoded, query_features: Tensor | None, start: int = 0) -> Tensor:
        """Return the embeds (T - start, Dl) of an encoded prompt of T tokens from position `start` on."""
        model = self.loaded.model
        mask = encoded.image_mask[start:]
        image_embeds = None
        if mask.any() and query_features is not None:
            whole, part = divmod(int(encoded.image_mask[:start].sum()), model.num_query_tokens)
            # One position at a time, because `start` may be inside an image.
            image_embeds = model.project(query_features[whole:]).flatten(0, 1)[part:].unsqueeze(1)
        tokens = model.language_model.embed(encoded.input_ids[start:].to(model.device).unsqueeze(0))
        return splice(tokens, image_embeds, mask.to(model.device).unsqueeze(0))[0]

    def new_answer(self, settings: ChatConfig, stop: Sequence[str] = ()) -> Answer:
        """Return an empty answer; it ends with an end-of-sequence token, the end mark, or a text of `stop`."""
        return Answer(self.loaded.conversation, settings, self.end_ids, stop)

    def answer(self, prompts: Sequence[Prompt], settings: ChatConfig, stop: Sequence[str] = ()) -> list[str]:
        """Return the text of the answer to each prompt, decoded together."""
        return [answer.text for answer in self.decode(prompts, settings, stop)]

    def decode(self, prompts: Sequence[Prompt], settings: ChatConfig, stop: Sequence[str] = ()) -> list[Answer]:
        """Return the answer to each prompt, decoded together.

        Raises:
            ContextLengthError, ConversationError: a prompt cannot be answered.
            DecodingError: the logits of the language model are not finite.
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

    def stream(self, answer: Answer, embeds: Tensor, cache: RowCache | None = None) -> Iterator[str]:
        """Decode one answer to the embeds (T, Dl) that follow the content of `cache`, and yield its text as it grows.

        A beam search yields its answer at the end; its embeds are the whole prompt, and it uses no cache.

        Raises:
            DecodingError: the logits of the language model are not finite.
        """
        if answer.settings.num_beams > 1:
            self._search(answer, embeds)
            yield answer.take()
            return
        decoder = Decoder(self.loaded.model.language_model, self.lock)
        decoder.join([answer], [embeds], cache)
        while True:
            if new := answer.take():
                yield new
            if decoder.is_idle:
                break
            decoder.step()
        if answer.error is not None:
            raise answer.error

    def _search(self, answer: Answer, embeds: Tensor) -> None:
        """Generate an answer by beam search."""
        with self.lock:
            ids = beam_search(
                self.loaded.model.language_model, embeds, answer.settings, answer.end_ids, answer.is_complete
            )
        for token in ids:
            if answer.finish_reason is None:
                answer.add(token)
