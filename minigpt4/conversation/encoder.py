"""From a dialogue to token ids, labels and image positions, for training and chat.

Input: a `Dialogue` and the number of its images. Output: `Encoded`. Text is tokenised in segments: the text between two
images is one segment, an answer is a segment of its own. Labels come from these segments, never from searching ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from minigpt4.batch import IGNORE
from minigpt4.config.sections import OWN_TEMPLATE, ConversationConfig
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn, images_first, place_images
from minigpt4.conversation.own_template import own_template
from minigpt4.conversation.templates import ASSISTANT, USER, Template, published_chat, published_training
from minigpt4.conversation.tokenizer import Place, TextPiece, TextTokenizer
from minigpt4.errors import ConfigError, ConversationError
from minigpt4.registry import TEMPLATES
from minigpt4.strict_json import find_surrogate

ANSWER_CUT = "answer cut to max_answer_tokens"
END_MARK_IN_ANSWER = "end mark in answer"
MAX_CHARACTERS = 1_000_000
"""Most characters of text in one sample; tokenizing more takes seconds, and memory."""


@dataclass
class Encoded:
    """One encoded dialogue; every tensor is (T,). See `minigpt4.batch.Sample` for their meaning."""

    input_ids: Tensor
    labels: Tensor
    image_mask: Tensor
    position_ids: Tensor
    branch_ids: Tensor
    altered: dict[str, int] = field(default_factory=dict)


@dataclass
class _Segment:
    """The ids of one segment; `supervised` is true for answers, `cut` for one that lost its tail."""

    ids: list[int]
    supervised: bool = False
    image: bool = False
    cut: bool = False


class ConversationEncoder:
    """Renders dialogues with one template and tokenises them."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        tokens_per_image: int,
        settings: ConversationConfig,
        compat: Literal["ours", "published"] | str = "ours",
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens_per_image = tokens_per_image
        self.settings = settings
        self.keeps_end_mark = compat != "published"
        template = own_template(tokenizer) if settings.template == OWN_TEMPLATE else TEMPLATES.get(settings.template)
        self.training_template = published_training(template) if compat == "published" else template
        self.chat_template = published_chat(template) if compat == "published" else template
        self.end_ids = tokenizer.tokenize_after_word((template.end, True))
        if self.keeps_end_mark and settings.max_answer_tokens <= len(self.end_ids):
            raise ConfigError(
                f"conversation.max_answer_tokens: {settings.max_answer_tokens} is too small: the end mark "
                f"{template.end!r} takes {len(self.end_ids)} token(s), and the answer needs at least one"
            )

    def encode_dialogue(self, dialogue: Dialogue, *, num_images: int, sample_id: str) -> Encoded:
        """Encode a dialogue for training.

        Raises:
            ConversationError: the numbers of marks and images differ, a turn has no answer, no token is supervised, or
                the row is longer than `max_tokens`.
        """
        unanswered = next((n for n, turn in enumerate(dialogue.turns) if not (turn.answer or "").strip()), None)
        if not dialogue.turns or unanswered is not None:
            raise ConversationError(f"{sample_id}: turn {unanswered or 0} has no answer", cause="no answer")
        require_text(dialogue, sample_id)
        if self.settings.isolate_turns and len(dialogue.turns) > 1:
            trunk, branches = self._isolated(dialogue, num_images, sample_id)
        else:
            placed = place_images(dialogue, num_images, sample_id)
            trunk, branches = list(self._segments(self.training_template, placed)), []
        encoded = _join(trunk, branches)
        if not (encoded.labels[1:] != IGNORE).any():
            raise ConversationError(f"{sample_id}: no token of the answers is supervised", cause="no answer")
        if len(encoded.input_ids) > self.settings.max_tokens:
            raise ConversationError(
                f"{sample_id}: {len(encoded.input_ids)} tokens, more than conversation.max_tokens "
                f"{self.settings.max_tokens}",
                cause="too long",
            )
        end = self.training_template.end
        num_with_end = sum(end in (turn.answer or "") for turn in dialogue.turns) if end else 0
        if num_with_end:
            encoded.altered[END_MARK_IN_ANSWER] = num_with_end
        return encoded

    def encode_prompt(self, dialogue: Dialogue, *, num_images: int, sample_id: str = "prompt") -> Encoded:
        """Encode a dialogue whose last turn the model is to answer.

        With `compat: ours` the ids equal those of `encode_dialogue` up to the answer. Earlier answers are not cut, and
        keep the ids that the model generated. With `isolate_turns` the prompt has the last turn only.

        Raises:
            ConversationError: the numbers of marks and images differ, or the prompt is empty.
        """
        if not dialogue.turns:
            raise ConversationError(f"{sample_id}: there is no turn to answer", cause="no question")
        require_text(dialogue, sample_id)
        placed = place_images(dialogue, num_images, sample_id)
        if self.settings.isolate_turns and len(dialogue.turns) > 1:
            last = dialogue.turns[-1]
            has_all = last.question.count(IMAGE_MARK) == num_images
            placed = replace(dialogue, turns=(last if has_all else _with_all_images(last, num_images),))
        encoded = _join(list(self._segments(self.chat_template, placed, whole_answers=True)), [])
        if not len(encoded.input_ids):
            raise ConversationError(f"{sample_id}: the prompt is empty; ask a question or give an image", cause="empty")
        return encoded

    def _segments(self, template: Template, dialogue: Dialogue, whole_answers: bool = False) -> Iterator[_Segment]:
        """Yield the segments of a dialogue; answers are cut to `max_answer_tokens` unless `whole_answers`.

        The segments of a template that `is_one_text` have the ids of the whole text, except where a token of the whole
        text would reach over the border of an answer: the line break before an answer and one at its start, say.
        """
        pieces: list[TextPiece] = [(template.before_all(dialogue.system or self.settings.system or None), True)]
        place: Place | None = "start" if template.is_one_text else None

        def segment(ids: list[int], **kind: bool) -> _Segment:
            nonlocal place
            place = place and (self.tokenizer.place_after(ids[-1]) if ids else place)
            return _Segment(ids, **kind)

        if template.starts_with_bos and self.tokenizer.bos_id is not None:
            yield _Segment([self.tokenizer.bos_id])
        for index, turn in enumerate(dialogue.turns):
            before, after = template.around_question(index)
            pieces.append((before, True))
            *texts, rest = template.content(USER, turn.question).split(IMAGE_MARK)
            opening, closing = template.image.split(IMAGE_MARK)
            for text in texts:
                pieces += [(text, False), (opening, True)]
                yield segment(self.tokenizer.tokenize(pieces, place))
                yield _Segment([self.tokenizer.filler_id] * self.tokens_per_image, image=True)
                place = place and "after a mark"
                pieces = [(closing, True)]
            pieces += [(rest, False), (after, True)]
            if turn.answer is None:
                break
            if template.answers_apart:
                yield segment(self.tokenizer.tokenize(pieces, place))
                ids, is_cut = self._answer_ids(template, turn, place, whole_answers)
                yield segment(ids, supervised=True, cut=is_cut)
                pieces = []
            else:
                pieces += [(turn.answer, False), (template.end, True)]
        yield segment(self.tokenizer.tokenize(pieces, place))

    def _isolated(
        self, dialogue: Dialogue, num_images: int, sample_id: str
    ) -> tuple[list[_Segment], list[list[_Segment]]]:
        """Return the segments that all turns share, and those of each turn, rendered as if it were the first."""
        if any(IMAGE_MARK in turn.question for turn in dialogue.turns[1:]):
            raise ConversationError(
                f"{sample_id}: a later question mentions an image; with isolate_turns, all images belong to the first",
                cause="image count",
            )
        place_images(dialogue, num_images, sample_id)  # raises if the numbers of marks and images differ
        trunk: list[_Segment] = []
        branches: list[list[_Segment]] = []
        for turn in dialogue.turns:
            alone = replace(dialogue, turns=(_with_all_images(turn, num_images),))
            segments = list(self._segments(self.training_template, alone))
            cut = max((n for n, segment in enumerate(segments) if segment.image), default=-1) + 1
            trunk = segments[:cut]
            branches.append(segments[cut:])
        return trunk, branches

    def _answer_ids(self, template: Template, turn: Turn, place: Place | None, whole: bool) -> tuple[list[int], bool]:
        """Return an answer's ids with its end mark, cut to `max_answer_tokens` unless `whole`, and whether it was.

        The white space before an answer is part of it: a model generates it, so `answer_ids` already have it.
        """
        if turn.answer_ids is not None:
            ids = [*turn.answer_ids, *self.end_ids]
        else:
            answer = template.before_answer + template.content(ASSISTANT, turn.answer or "")
            ids = self.tokenizer.tokenize([(answer, False), (template.end, True)], place)
        limit = self.settings.max_answer_tokens
        if whole or len(ids) <= limit:
            return ids, False
        # Original: the end mark is cut off as well, and the model never learns to stop long answers.
        return (ids[: limit - len(self.end_ids)] + self.end_ids if self.keeps_end_mark else ids[:limit]), True


def _join(trunk: list[_Segment], branches: list[list[_Segment]]) -> Encoded:
    """Join segments to a row; the positions of every branch continue from the end of the trunk."""
    groups = [trunk, *branches]
    first, *others = sizes = [sum(len(segment.ids) for segment in group) for group in groups]
    segments = [segment for group in groups for segment in group]
    num_cut = sum(segment.cut for segment in segments)
    return Encoded(
        torch.tensor([i for s in segments for i in s.ids], dtype=torch.long),
        torch.tensor([i if s.supervised else IGNORE for s in segments for i in s.ids], dtype=torch.long),
        torch.tensor([s.image for s in segments for _ in s.ids], dtype=torch.bool),
        torch.cat([torch.arange(first), *(torch.arange(first, first + size) for size in others)]),
        torch.arange(len(groups)).repeat_interleave(torch.tensor(sizes)),
        {ANSWER_CUT: num_cut} if num_cut else {},
    )


def require_text(dialogue: Dialogue, sample_id: str) -> None:
    """Raise a `ConversationError` unless a tokenizer can read all of a dialogue's text."""
    parts = [dialogue.system or "", *(part for t in dialogue.turns for part in (t.question, t.answer or ""))]
    size = sum(map(len, parts))
    if size > MAX_CHARACTERS:
        raise ConversationError(
            f"{sample_id}: {size:,} characters of text, more than {MAX_CHARACTERS:,}; is this a caption?",
            cause="text too large",
        )
    half = find_surrogate(parts)
    if half is not None:
        place = next(n for n, c in enumerate(half) if "\ud800" <= c <= "\udfff")
        raise ConversationError(
            f"{sample_id}: the text {half[max(0, place - 20) : place + 1]!a} holds half a character (a lone "
            "surrogate, from bytes that are not UTF-8 or a text cut in the middle of an emoji); correct the text",
            cause="text",
        )


def _with_all_images(turn: Turn, num_images: int) -> Turn:
    """Return a turn with all images in front of its question."""
    return replace(turn, question=images_first(turn.question.replace(IMAGE_MARK, "").strip(), num_images))
