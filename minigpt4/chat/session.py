"""A conversation about images: `Chat(model).session(images=[...]).ask("What is this?")`."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.chat import storage
from minigpt4.chat.answer import Answer, FinishReason
from minigpt4.chat.decoding.cache import PrefixCache
from minigpt4.chat.engine import Engine
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.config.sections import ChatConfig
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn, images_first
from minigpt4.conversation.encoder import Encoded
from minigpt4.errors import ContextLengthError, ConversationError
from minigpt4.processors.image import ImageSource

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Picture:
    """One image of a conversation, and its query features (Q, Dq), computed once."""

    source: ImageSource
    features: Tensor


Images = ImageSource | Picture | Sequence[ImageSource | Picture]
"""One image or several: paths, bytes, PIL images, or `Picture`s whose features are known."""


class Chat:
    """Makes sessions with one loaded model."""

    def __init__(self, loaded: LoadedModel, settings: ChatConfig | None = None) -> None:
        """Use `settings`, or the `chat` section of the config the model was loaded from."""
        self.engine = Engine(loaded)
        self.settings = settings or loaded.config.chat

    def session(self, images: Images = (), system: str | None = None) -> Session:
        """Start a conversation about `images` (paths, bytes or PIL images; one, several or none).

        Raises:
            ImageError: an image cannot be read.
        """
        return Session(self.engine, self.settings, images, system)

    def open(self, folder: str | Path) -> Session:
        """Reopen a conversation that `Session.save` wrote.

        Raises:
            ConversationError: the folder has no conversation, or it is damaged.
            ImageError: one of its images cannot be read.
        """
        dialogue, images, opening = storage.read(Path(folder), self.engine.loaded.conversation.tokenizer)
        session = Session(self.engine, self.settings, images, dialogue.system)
        session.dialogue, session.opening = dialogue, opening
        return session


@dataclass(frozen=True)
class TurnReport:
    """The counts of one turn.

    Attributes:
        prompt_tokens: of the whole prompt, image positions included.
        prefilled_tokens: tokens of the prompt that were read; the others were in the cache.
        answer_tokens: tokens of the answer, the end-of-sequence token included.
        forgotten_turns: the oldest turns, left out because the language model's context is full.
        finish_reason: why the answer ended, None until it is complete.
    """

    prompt_tokens: int
    prefilled_tokens: int
    answer_tokens: int
    forgotten_turns: int
    finish_reason: FinishReason | None = None


class Session:
    """One conversation: the features of its images, its turns, and its key-value cache.

    Attributes:
        dialogue: the turns so far, and the system text.
        pictures: all images, in order; those that no question mentions go in front of the next question.
        opening: how many of them were given at the start.
        last: the counts of the last turn; set with its first token, final when its answer is complete.
    """

    def __init__(self, engine: Engine, settings: ChatConfig, images: Images = (), system: str | None = None) -> None:
        self.engine = engine
        self.settings = settings
        self.dialogue = Dialogue((), system)
        self.pictures = self._pictures(images)
        self.last: TurnReport | None = None
        self.opening = len(self.pictures)
        self._prefix = PrefixCache()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns so far, with those that the model does not see any more."""
        return self.dialogue.turns

    @property
    def features(self) -> Tensor | None:
        """Query features (images, Q, Dq) of all images, None without any."""
        return _stacked(self.pictures)

    def ask(self, question: str, images: Images = (), **settings: object) -> str:
        """Return the answer to `question`; see `stream`."""
        return "".join(self.stream(question, images, **settings))

    def stream(self, question: str, images: Images = (), **settings: object) -> Generator[str, None, None]:
        """Yield the answer to `question` as it grows.

        The turn is kept when the answer is complete. A stream that is closed earlier keeps the text it has yielded as
        the answer; without any text, or after an error, the conversation stays as it was.

        Args:
            question: may have `<ImageHere>` at the place of an image.
            images: more images, in front of this question unless it has places for them.
            settings: decoding settings of this turn only, by name.

        Raises:
            ImageError: an image cannot be read.
            ConversationError: the numbers of marks and images differ, or the prompt is empty.
            TypeError: a setting is unknown.
            ContextLengthError: this turn with all images is longer than the language model's context.
            DecodingError: the logits of the language model are not finite.
        """
        chosen = replace(self.settings, **settings)  # type: ignore[arg-type]
        pictures = [*self.pictures, *self._pictures(images)]
        waiting = len(pictures) - self.dialogue.num_image_marks
        asked = Turn(question if IMAGE_MARK in question else images_first(question, waiting))
        prompt, forgotten = self._fit(asked, len(pictures), chosen.max_new_tokens)
        answer = self.engine.new_answer(chosen)
        try:
            yield from self._decode(prompt, pictures, answer, forgotten)
        finally:
            answer.cancel()
            if answer.error is None and (answer.text or answer.finish_reason != "cancelled"):
                kept = replace(asked, answer=answer.text, answer_ids=tuple(answer.kept_ids()))
                self.dialogue = replace(self.dialogue, turns=(*self.turns, kept))
                self.pictures = pictures

    def regenerate(self, **settings: object) -> str:
        """Remove the last answer and return another one to the same question."""
        return self.ask(self.undo(), **settings)  # type: ignore[arg-type]

    def edit(self, question: str, **settings: object) -> str:
        """Replace the last question by `question`, about the same images, and return the answer."""
        self.undo()
        return self.ask(question, **settings)  # type: ignore[arg-type]

    def undo(self) -> str:
        """Remove the last turn and return its question; its images belong to the next question.

        Raises:
            ConversationError: there is no turn.
        """
        if not self.turns:
            raise ConversationError("there is no turn to undo; ask a question first", cause="no question")
        last = self.turns[-1]
        self.dialogue = replace(self.dialogue, turns=self.turns[:-1])
        return last.question

    def keep(self, turns: int) -> None:
        """Keep only the first `turns` turns and their images, and the images given at the start."""
        self.dialogue = replace(self.dialogue, turns=self.turns[:turns])
        self.pictures = self.pictures[: max(self.opening, self.dialogue.num_image_marks)]

    def reset(self) -> None:
        """Start again with the images given at the start."""
        self.keep(0)

    def branch(self) -> Session:
        """Return an independent copy of the conversation; nothing is read or encoded again."""
        other = Session(self.engine, self.settings, (), self.dialogue.system)
        other.dialogue, other.pictures, other.opening = self.dialogue, list(self.pictures), self.opening
        other._prefix = self._prefix.copy()
        return other

    def save(self, folder: str | Path) -> None:
        """Write the conversation as `session.json` and its images as PNG files; `Chat.open` reads them.

        Raises:
            ImageError: an image file was removed.
        """
        images = [picture.source for picture in self.pictures]
        storage.write(Path(folder), self.dialogue, images, self.opening, self.engine.loaded.conversation.tokenizer)

    def _decode(self, prompt: Encoded, pictures: Sequence[Picture], answer: Answer, forgotten: int) -> Iterator[str]:
        """Read the new part of the prompt and yield the answer; afterwards the cache and its entries agree."""
        entries = _entries(prompt, pictures)
        uses_cache = answer.settings.num_beams == 1
        start = self._prefix.reuse(entries) if uses_cache else 0
        embeds = self.engine.embed_encoded(prompt, _stacked(pictures), start)
        report = TurnReport(len(entries), len(embeds), 0, forgotten)
        try:
            for text in self.engine.stream(answer, embeds, self._prefix.cache):
                self.last = replace(report, answer_tokens=len(answer.ids))
                yield text
        except GeneratorExit:
            raise
        except BaseException:  # a forward pass may have failed between two layers
            self._prefix.clear()
            raise
        finally:
            if uses_cache:
                self._prefix.record([*entries, *answer.ids])
            answer.cancel()
            self.last = replace(report, answer_tokens=len(answer.ids), finish_reason=answer.finish_reason)

    def _fit(self, asked: Turn, num_images: int, max_new_tokens: int) -> tuple[Encoded, int]:
        """Return the prompt and how many of the oldest turns it leaves out to fit; images and system text stay."""
        room = self.engine.context_length - max_new_tokens
        whole = replace(self.dialogue, turns=(*self.turns, asked))

        def encode(forgotten: int) -> Encoded:
            return self.engine.loaded.conversation.encode_prompt(_without(whole, forgotten), num_images=num_images)

        def fits(prompt: Encoded) -> bool:
            return len(prompt.input_ids) <= room

        # The last count is nearly right, so that a turn of a long conversation costs no more than one of a short one.
        if self.last is not None:
            forgotten = min(self.last.forgotten_turns, len(self.turns))
        else:
            forgotten = bisect_left(range(len(self.turns)), True, key=lambda count: fits(encode(count)))
        prompt = encode(forgotten)
        while not fits(prompt) and forgotten < len(self.turns):
            forgotten += 1
            prompt = encode(forgotten)
        while forgotten and fits(longer := encode(forgotten - 1)):
            prompt, forgotten = longer, forgotten - 1
        if not fits(prompt):
            raise ContextLengthError(
                f"the prompt has {len(prompt.input_ids)} tokens without any earlier turn and the answer may have "
                f"{max_new_tokens}, but the language model reads {self.engine.context_length}: ask a shorter question, "
                "with fewer images, or lower chat.max_new_tokens"
            )
        if forgotten > (self.last.forgotten_turns if self.last else 0):
            _log.warning(
                "the conversation is longer than the language model's context of %d tokens: it does not see the oldest "
                "%d of %d turns any more; all images stay",
                self.engine.context_length,
                forgotten,
                len(self.turns),
            )
        return prompt, forgotten

    def _pictures(self, images: Images) -> list[Picture]:
        if isinstance(images, ImageSource | Picture):  # a path is itself a sequence of letters
            images = [images]
        features = self.engine.query_features([image for image in images if not isinstance(image, Picture)])
        known = iter(() if features is None else features)
        return [image if isinstance(image, Picture) else Picture(image, next(known)) for image in images]


def _stacked(pictures: Sequence[Picture]) -> Tensor | None:
    return torch.stack([picture.features for picture in pictures]) if pictures else None


def _entries(prompt: Encoded, pictures: Sequence[Picture]) -> list[Hashable]:
    """Return one entry per position of a prompt: a token id, or an image and a position in it."""
    positions = iter([(picture, n) for picture in pictures for n in range(len(picture.features))])
    rows = zip(prompt.input_ids.tolist(), prompt.image_mask.tolist(), strict=True)
    return [next(positions) if is_image else token for token, is_image in rows]


def _without(dialogue: Dialogue, count: int) -> Dialogue:
    """Return the dialogue without its first turns, whose images move to the first question that is left."""
    if not count:
        return dialogue
    marks = replace(dialogue, turns=dialogue.turns[:count]).num_image_marks
    first, *others = dialogue.turns[count:]
    return replace(dialogue, turns=(replace(first, question=images_first(first.question, marks)), *others))
