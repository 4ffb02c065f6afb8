"""A conversation about images: `Chat(model).session(images=[...]).ask("What is this?")`."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.chat import storage
from minigpt4.chat.answer import Answer, FinishReason
from minigpt4.chat.engine import Engine
from minigpt4.chat.memory import Memory
from minigpt4.chat.section import ChatSection
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn
from minigpt4.conversation.encoder import Encoded
from minigpt4.errors import ContextLengthError, ConversationError
from minigpt4.processors.image import ImageSource

_log = logging.getLogger(__name__)
Images = ImageSource | Sequence[ImageSource]
"""One image or several: paths, bytes or PIL images."""


class Chat:
    """Makes sessions with one loaded model."""

    def __init__(self, loaded: LoadedModel, settings: ChatSection | None = None) -> None:
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
            ConversationError: there is none, or it is damaged.
            ImageError: one of its images cannot be read.
        """
        saved = storage.read(Path(folder), self.engine.loaded.encoder.tokenizer)
        session = Session(self.engine, self.settings, saved.images, saved.dialogue.system)
        session.dialogue = saved.dialogue
        session.opening = saved.opening
        return session


@dataclass(frozen=True, eq=False)
class Picture:
    """One image of a conversation, and its query features (Q, Dq), computed once."""

    source: ImageSource
    features: Tensor


@dataclass(frozen=True)
class TurnReport:
    """What one turn took.

    Attributes:
        prompt_tokens: the whole prompt, image positions included.
        prefilled_tokens: those of them that had to be read; the others were known from the turns before.
        answer_tokens: tokens of the answer, the end-of-sequence token included.
        forgotten_turns: the oldest turns that do not fit the language model's context any more and were left out.
        finish_reason: why the answer ended, None while it grows.
    """

    prompt_tokens: int
    prefilled_tokens: int
    answer_tokens: int
    forgotten_turns: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class _Prompt:
    """What is read for one turn."""

    encoded: Encoded
    pictures: Sequence[Picture]
    forgotten: int

    @property
    def entries(self) -> list[Hashable]:
        """Return one entry per position: a token's id, or an image and a place in it."""
        places = iter([(picture, place) for picture in self.pictures for place in range(len(picture.features))])
        rows = zip(self.encoded.input_ids.tolist(), self.encoded.image_mask.tolist(), strict=True)
        return [next(places) if is_image else token for token, is_image in rows]


class Session:
    """One conversation: its images' features, its turns, and what the language model has read of them.

    Attributes:
        dialogue: the turns so far, and the system text.
        pictures: all images, in order; those that no question mentions yet go in front of the next one.
        opening: how many of them were given at the start.
        last: what the last turn took; set when its first token is there, completed when its answer is.
    """

    def __init__(self, engine: Engine, settings: ChatSection, images: Images = (), system: str | None = None) -> None:
        self.engine = engine
        self.settings = settings
        self.dialogue = Dialogue((), system)
        self.pictures = self._pictures(images)
        self.last: TurnReport | None = None
        self.opening = len(self.pictures)
        self._memory = Memory()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns answered so far, those included that the model had to forget."""
        return self.dialogue.turns

    @property
    def features(self) -> Tensor | None:
        """Query features (images, Q, Dq) of all images, None without any."""
        return _stacked(self.pictures)

    def ask(self, question: str, images: Images = (), **settings: object) -> str:
        """Return the answer to `question`; see `stream`."""
        return "".join(self.stream(question, images, **settings))

    def stream(self, question: str, images: Images = (), **settings: object) -> Iterator[str]:
        """Yield the answer to `question` as it grows.

        The turn is kept when the answer is complete. A stream that is closed before keeps what it has shown as the
        answer; one that has shown nothing, or failed, leaves the conversation as it was.

        Args:
            question: what is asked; may hold `<ImageHere>` where an image stands.
            images: more images, in front of this question unless it says where.
            settings: decoding settings of this turn alone, by name.

        Raises:
            ImageError: an image cannot be read.
            ConversationError: marks and images differ in number, or there is nothing to ask about.
            TypeError: there is no setting of that name.
            ContextLengthError: this turn alone, with all images, is longer than the language model's context.
            DecodingError: the language model gives no usable logits.
        """
        chosen = replace(self.settings, **settings)  # type: ignore[arg-type]
        pictures = [*self.pictures, *self._pictures(images)]
        asked = Turn(self._with_images(question, len(pictures) - self.dialogue.num_image_marks))
        prompt = self._fit(asked, pictures, chosen.max_new_tokens)
        answer = self.engine.new_answer(chosen)
        try:
            yield from self._decode(prompt, answer)
        finally:
            answer.cancel()
            if answer.error is None and (answer.text or answer.finish_reason != "cancelled"):
                kept = replace(asked, answer=answer.text, answer_ids=tuple(answer.kept_ids()))
                self.dialogue = replace(self.dialogue, turns=(*self.turns, kept))
                self.pictures = pictures

    def regenerate(self, **settings: object) -> str:
        """Take the last answer back and return another one to the same question."""
        return self.ask(self.undo(), **settings)  # type: ignore[arg-type]

    def edit(self, question: str, **settings: object) -> str:
        """Ask `question` about the same images in place of the last one, and return the answer."""
        self.undo()
        return self.ask(question, **settings)  # type: ignore[arg-type]

    def undo(self) -> str:
        """Take the last turn back and return its question; its images wait for the next one.

        Raises:
            ConversationError: there is no turn.
        """
        if not self.turns:
            raise ConversationError("there is no turn to take back; ask something first", cause="no question")
        last = self.turns[-1]
        self.dialogue = replace(self.dialogue, turns=self.turns[:-1])
        return last.question

    def keep(self, turns: int) -> None:
        """Forget all but the first `turns` turns and their images; those given at the start stay."""
        self.dialogue = replace(self.dialogue, turns=self.turns[:turns])
        self.pictures = self.pictures[: max(self.opening, self.dialogue.num_image_marks)]

    def reset(self) -> None:
        """Start anew with the images given at the start."""
        self.keep(0)

    def branch(self) -> Session:
        """Return a conversation that goes its own way from here; nothing is read or encoded again."""
        other = Session(self.engine, self.settings, (), self.dialogue.system)
        other.dialogue, other.pictures, other.opening = self.dialogue, list(self.pictures), self.opening
        other._memory = self._memory.copy()
        return other

    def save(self, folder: str | Path) -> None:
        """Write the conversation as `session.json` and its images as PNG files; `Chat.open` reads them.

        Raises:
            ImageError: the file of an image is not there any more.
        """
        images = [picture.source for picture in self.pictures]
        saved = storage.Saved(self.dialogue, images, self.opening)
        storage.write(Path(folder), saved, self.engine.loaded.encoder.tokenizer)

    def _decode(self, prompt: _Prompt, answer: Answer) -> Iterator[str]:
        """Read what is new in the prompt, and yield the answer; the memory is right whenever this is left."""
        entries = prompt.entries
        known = self._memory.recall(entries) if answer.settings.num_beams == 1 else 0
        embeds = self.engine.embed(prompt.encoded, _stacked(prompt.pictures), known)
        report = TurnReport(len(entries), len(embeds), 0, prompt.forgotten)
        try:
            for text in self.engine.grow(answer, embeds, self._memory.cache):
                self.last = replace(report, answer_tokens=len(answer.ids))
                yield text
        except GeneratorExit:
            raise
        except BaseException:  # a pass may have broken off between two layers
            self._memory.forget()
            raise
        finally:
            if answer.settings.num_beams == 1:
                self._memory.note([*entries, *answer.ids])
            answer.cancel()
            self.last = replace(report, answer_tokens=len(answer.ids), finish_reason=answer.finish_reason)

    def _fit(self, asked: Turn, pictures: Sequence[Picture], max_new_tokens: int) -> _Prompt:
        """Return the prompt, without as many of the oldest turns as it takes to fit; images and system text stay."""
        room = self.engine.context_length - max_new_tokens
        for forgotten in range(len(self.turns) + 1):
            dialogue = _without(replace(self.dialogue, turns=(*self.turns, asked)), forgotten)
            encoded = self.engine.loaded.encoder.encode_prompt(dialogue, num_images=len(pictures))
            if len(encoded.input_ids) <= room:
                break
        else:
            raise ContextLengthError(
                f"the prompt has {len(encoded.input_ids)} tokens without any earlier turn and the answer may have "
                f"{max_new_tokens}, but the language model reads {self.engine.context_length}: ask something shorter, "
                "with fewer images, or lower chat.max_new_tokens"
            )
        if forgotten > (self.last.forgotten_turns if self.last else 0):
            _log.warning(
                "the conversation is longer than the %d tokens the language model reads: it does not see the oldest %d "
                "of %d turns any more; all images stay",
                self.engine.context_length,
                forgotten,
                len(self.turns),
            )
        return _Prompt(encoded, pictures, forgotten)

    def _pictures(self, images: Images) -> list[Picture]:
        if isinstance(images, ImageSource):  # a path is a sequence of letters: a natural slip with a baffling end
            images = [images]
        features = self.engine.query_features(images)
        return [] if features is None else [Picture(*pair) for pair in zip(images, features, strict=True)]

    def _with_images(self, question: str, waiting: int) -> str:
        """Put the images that no question mentions yet in front of this one, unless it places them itself."""
        if not waiting or IMAGE_MARK in question:
            return question
        words = f" {question}" if question else ""
        return IMAGE_MARK * waiting + words


def _stacked(pictures: Sequence[Picture]) -> Tensor | None:
    return torch.stack([picture.features for picture in pictures]) if pictures else None


def _without(dialogue: Dialogue, count: int) -> Dialogue:
    """Return the dialogue without its first turns, whose images move to the first question that is left."""
    marks = replace(dialogue, turns=dialogue.turns[:count]).num_image_marks
    if not count:
        return dialogue
    first, *others = dialogue.turns[count:]
    if marks:
        first = replace(first, question=f"{IMAGE_MARK * marks} {first.question}")
    return replace(dialogue, turns=(first, *others))
