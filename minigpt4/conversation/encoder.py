"""From a dialogue to token ids, labels and image positions: the one encoder for training and chat.

Input: a `Dialogue` and the number of its images. Output: `Encoded`. Text is tokenised segment by segment: a segment is
what stands between two images, an answer is a segment of its own. Labels come from the spans written here, never from
searching ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from minigpt4.batch import IGNORE
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn, place_images
from minigpt4.conversation.templates import OWN, Template, get_template, published_chat, published_training
from minigpt4.conversation.tokenizer import Run, TextTokenizer
from minigpt4.errors import ConfigError, ConversationError


@dataclass(frozen=True, kw_only=True)
class ConversationSection:
    """How dialogues become tokens; saved with every checkpoint, and the same in chat."""

    template: str = "plain"
    """plain, vicuna_v0, llama2, chatml, or `tokenizer` for the language model's own chat template."""
    system: str = ""
    """System text in front of every dialogue that has none; empty: the template's own opening."""
    max_answer_tokens: int = 160
    """Longest answer, end mark included, in tokens; a longer one is cut and keeps its end mark."""
    max_tokens: int = 2048
    """Longest row in tokens, image positions included; a longer sample is skipped and counted."""
    isolate_turns: bool = False
    """Keep the turns of a dialogue from one another: each is then a first turn, and no answer can be read off another.
    In chat, too, a question is then answered without those before it, as the model learnt it; it sees all images."""

    def __post_init__(self) -> None:
        """Refuse a template that does not exist; the tokenizer's own is known only once it is loaded."""
        if self.template != OWN:
            get_template(self.template)


@dataclass
class Encoded:
    """One encoded dialogue; every tensor is (T,). See `minigpt4.batch.Sample` for their meaning."""

    input_ids: Tensor
    labels: Tensor
    image_mask: Tensor
    position_ids: Tensor
    branch_ids: Tensor


@dataclass
class _Span:
    """A stretch of tokens: their ids, whether they are learnt, whether they are an image."""

    ids: list[int]
    learnt: bool = False
    image: bool = False


class ConversationEncoder:
    """Renders dialogues by one template and tokenises them."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        tokens_per_image: int,
        settings: ConversationSection,
        compat: Literal["ours", "published"] | str = "ours",
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens_per_image = tokens_per_image
        self.settings = settings
        self.keeps_end_mark = compat != "published"
        template = tokenizer.own_template() if settings.template == OWN else get_template(settings.template)
        self.training_template = published_training(template) if compat == "published" else template
        self.chat_template = published_chat(template) if compat == "published" else template
        # The end mark as it is tokenised behind a word, not at the start of a segment.
        glued = tokenizer.encode([("a", False), (template.end, True)])
        self.end_ids = glued[len(tokenizer.encode([("a", False)])) :]
        if self.keeps_end_mark and settings.max_answer_tokens <= len(self.end_ids):
            raise ConfigError(
                f"conversation.max_answer_tokens: {settings.max_answer_tokens} leaves no room for an answer beside the "
                f"end mark {template.end!r}, which is {len(self.end_ids)} token(s)"
            )

    def encode(self, dialogue: Dialogue, *, num_images: int, sample_id: str) -> Encoded:
        """Encode a dialogue to learn from.

        Raises:
            ConversationError: marks and images differ in number, a turn has no answer, nothing is left to learn, or the
                row is longer than `max_tokens`.
        """
        unanswered = next((n for n, turn in enumerate(dialogue.turns) if not (turn.answer or "").strip()), None)
        if not dialogue.turns or unanswered is not None:
            raise ConversationError(f"{sample_id}: turn {unanswered or 0} has no answer to learn", cause="no answer")
        if self.settings.isolate_turns and len(dialogue.turns) > 1:
            trunk, branches = self._isolated(dialogue, num_images, sample_id)
        else:
            placed = place_images(dialogue, num_images, sample_id)
            trunk, branches = list(self._spans(self.training_template, placed)), []
        encoded = self._join(trunk, branches)
        if not (encoded.labels[1:] != IGNORE).any():
            raise ConversationError(f"{sample_id}: no token is left to learn", cause="no answer")
        if len(encoded.input_ids) > self.settings.max_tokens:
            raise ConversationError(
                f"{sample_id}: {len(encoded.input_ids)} tokens, more than conversation.max_tokens "
                f"{self.settings.max_tokens}",
                cause="too long",
            )
        return encoded

    def encode_prompt(self, dialogue: Dialogue, *, num_images: int, sample_id: str = "prompt") -> Encoded:
        """Encode a dialogue whose last turn the model is to answer.

        With `compat: ours` the ids equal those that `encode` gives the same dialogue, up to the answer; earlier answers
        are whole, however long, and stand as the ids they were given in; with `isolate_turns` there are none.

        Raises:
            ConversationError: marks and images differ in number, or there is nothing to encode.
        """
        if not dialogue.turns:
            raise ConversationError(f"{sample_id}: there is no turn to answer", cause="no question")
        placed = place_images(dialogue, num_images, sample_id)
        if self.settings.isolate_turns and len(dialogue.turns) > 1:
            last = dialogue.turns[-1]
            has_all = last.question.count(IMAGE_MARK) == num_images
            placed = replace(dialogue, turns=(last,)) if has_all else _alone(dialogue, last, num_images)
        encoded = self._join(list(self._spans(self.chat_template, placed, whole_answers=True)), [])
        if not len(encoded.input_ids):
            raise ConversationError(f"{sample_id}: the prompt is empty; ask a question or give an image", cause="empty")
        return encoded

    def cut_answer(self, text: str) -> tuple[str, bool]:
        """Return `text` up to the end mark, and whether the mark was there."""
        end = self.training_template.end
        head, found, _ = text.partition(end) if end else (text, "", "")
        return head, bool(found)

    def _spans(self, template: Template, dialogue: Dialogue, whole_answers: bool = False) -> Iterable[_Span]:
        """Yield the spans of a dialogue rendered by `template`, answers as they are or as training cuts them."""
        runs: list[Run] = [(template.before_all(dialogue.system or self.settings.system or None), True)]
        if template.starts_with_bos and self.tokenizer.bos_id is not None:
            yield _Span([self.tokenizer.bos_id])
        for index, turn in enumerate(dialogue.turns):
            before, after = template.around_question(index)
            runs.append((before, True))
            *imaged, rest = turn.question.split(IMAGE_MARK)
            opening, closing = template.image.split(IMAGE_MARK)
            for text in imaged:
                runs += [(text, False), (opening, True)]
                yield from self._text(runs)
                yield _Span([self.tokenizer.filler_id] * self.tokens_per_image, image=True)
                runs = [(closing, True)]
            runs += [(rest, False), (after, True)]
            if turn.answer is None:
                break
            if template.answers_apart:
                yield from self._text(runs)
                yield _Span(self._answer_ids(turn, template.end, whole_answers), learnt=True)
                runs = []
            else:
                runs += [(turn.answer, False), (template.end, True)]
        yield from self._text(runs)

    def _isolated(self, dialogue: Dialogue, num_images: int, sample_id: str) -> tuple[list[_Span], list[list[_Span]]]:
        """Return the spans all turns share, and each turn's own: every turn rendered as the first one."""
        if any(IMAGE_MARK in turn.question for turn in dialogue.turns[1:]):
            raise ConversationError(
                f"{sample_id}: a later question places an image; isolated turns share all images",
                cause="image count",
            )
        place_images(dialogue, num_images, sample_id)  # a wrong number of marks is an error here, too
        trunk: list[_Span] = []
        branches: list[list[_Span]] = []
        for turn in dialogue.turns:
            spans = list(self._spans(self.training_template, _alone(dialogue, turn, num_images)))
            cut = max((n for n, span in enumerate(spans) if span.image), default=-1) + 1
            trunk = spans[:cut]
            branches.append(spans[cut:])
        return trunk, branches

    def _text(self, runs: list[Run]) -> Iterable[_Span]:
        ids = self.tokenizer.encode(runs)
        if ids:
            yield _Span(ids)

    def _answer_ids(self, turn: Turn, end: str, whole: bool) -> list[int]:
        """Return an answer's ids with its end mark, cut to `max_answer_tokens` unless they are to be whole."""
        if turn.answer_ids is not None:
            ids = [*turn.answer_ids, *self.end_ids]
        else:
            ids = self.tokenizer.encode([(turn.answer or "", False), (end, True)])
        limit = self.settings.max_answer_tokens
        if whole or len(ids) <= limit:
            return ids
        # Original: the end mark is cut off with the rest, and the model never learns to stop long answers.
        return ids[: limit - len(self.end_ids)] + self.end_ids if self.keeps_end_mark else ids[:limit]

    def _join(self, trunk: list[_Span], branches: list[list[_Span]]) -> Encoded:
        """Lay spans out in a row; positions of every branch go on from the end of the trunk."""
        flat = [(span, 0) for span in trunk]
        flat += [(span, n) for n, branch in enumerate(branches, start=1) for span in branch]
        ids = [i for span, _ in flat for i in span.ids]
        labels = [i if span.learnt else IGNORE for span, _ in flat for i in span.ids]
        image = [span.image for span, _ in flat for _ in span.ids]
        branch_ids = torch.tensor([n for span, n in flat for _ in span.ids], dtype=torch.long)
        positions = torch.arange(len(ids))
        trunk_length = int((branch_ids == 0).sum())
        for n in range(1, len(branches) + 1):
            own = branch_ids == n
            positions[own] = torch.arange(trunk_length, trunk_length + int(own.sum()))
        return Encoded(
            torch.tensor(ids, dtype=torch.long),
            torch.tensor(labels, dtype=torch.long),
            torch.tensor(image, dtype=torch.bool),
            positions,
            branch_ids,
        )


def _alone(dialogue: Dialogue, turn: Turn, num_images: int) -> Dialogue:
    """Return the dialogue with one turn only, all images in front of its question."""
    words = replace(turn, question=turn.question.replace(IMAGE_MARK, "").strip())
    return place_images(replace(dialogue, turns=(words,)), num_images, "")
