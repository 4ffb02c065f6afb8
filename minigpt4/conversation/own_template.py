"""The chat template that a language model's tokenizer brings along, as a `Template`.

A chat template is a program. Its fixed text is read from a few renderings, and the result is compared with what the
program writes for dialogues of one, two and three turns with several texts, as a whole and as prompts. A template whose
text depends on anything but the dialogue, or that cannot be described by a `Template`, is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import takewhile
from typing import Any

from minigpt4.config.sections import OWN_TEMPLATE
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn
from minigpt4.conversation.templates import ASSISTANT, SYSTEM, USER, Template
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.errors import ConversationError

TODAY = date(2024, 7, 26)
"""The date that replaces the current one: the date that Llama 3's template writes where it has no clock."""
ADVICE = "set conversation.template to a built-in one"
_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)")
_CHANCE = re.compile(r"\|\s*random\b")
_TEXTS = (
    "Is it 1 or 2?",
    f"{IMAGE_MARK} a",
    "One.\n\n\tTwo.",
    "<a href='b'> & \"c\" {{ d }} {% e %}",
    "É 🦜 ß",
)
_PADDED = " {} \n"
_THOUGHT = "<think>\nWhy?\n</think>\n\nBecause."
_log = logging.getLogger(__name__)


def own_template(tokenizer: TextTokenizer) -> Template:
    """Return the tokenizer's own chat template as a `Template`.

    Raises:
        ConversationError: there is none, or it cannot be rendered faithfully.
    """
    program = _Program.of(tokenizer)
    question, answer, later, reply = (f"Sentinel{n}x{n}" for n in range(1, 5))
    turns = [(USER, question), (ASSISTANT, answer), (USER, later), (ASSISTANT, reply)]
    opening, after, between, suffix, tail = program.between(turns, (question, answer, later, reply))
    prompt = program.between(turns[:1], (question,), open_answer=True)[1]
    before_answer = after.removeprefix(prompt)
    if not after.startswith(prompt) or before_answer.strip():
        raise ConversationError(
            f"the tokenizer's chat template writes {prompt!r} before an answer to generate and {after!r} before a "
            f"given answer, so training and chat would differ; {ADVICE}"
        )
    end = tokenizer.end_mark(tail)
    if not between.startswith(end):
        raise ConversationError(
            f"the tokenizer's chat template ends the last answer with {tail!r} and earlier ones with {between!r}; "
            f"{ADVICE}"
        )
    template = Template(
        name=OWN_TEMPLATE,
        question=("", prompt),
        next_question=(between[len(end) :], suffix.removesuffix(before_answer)),
        end=end,
        opening=opening,
        starts_with_bos=False,
        before_answer=before_answer,
        stripped=frozenset(role for role in (USER, ASSISTANT) if program.strips(role)),
        is_one_text=True,
    )
    closing = tail[len(end) :]  # the same for every dialogue, and not trained
    if difference := _first_difference(program, template, (*_TEXTS, *map(_PADDED.format, _TEXTS)), closing):
        raise ConversationError(f"the tokenizer's chat template cannot be followed: {difference}; {ADVICE}")
    if _first_difference(program, template, (_THOUGHT, *_TEXTS), closing):
        _log.warning("the tokenizer's chat template rewrites answers with </think>; they are kept as they are")
    return _with_system(program, template, closing)


def _with_system(program: _Program, template: Template, closing: str) -> Template:
    """Return the template with its place for a system text, if it has one in front of the first question.

    Outer white space of questions is not compared here: Llama 2 keeps it behind a system text, and only there.
    """
    system, question = "Sentinel1x1", "Sentinel2x2"
    try:
        front, middle, _ = program.between([(SYSTEM, system), (USER, question)], (system, question))
        stripped = template.stripped | ({SYSTEM} if program.strips(SYSTEM) else set())
        with_system = replace(template, system=(front, middle), stripped=stripped)
        texts = ("Be kind.\n\nBe <brief>.", _PADDED.format("Be kind."))
        different = any(_first_difference(program, with_system, _TEXTS, closing, system=text) for text in texts)
    except ConversationError:  # many formats have no system role
        return template
    return template if different else with_system


@dataclass(frozen=True)
class _Program:
    """A chat template as it is rendered here: always with the same date."""

    tokenizer: Any
    source: str

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> _Program:
        if not tokenizer.tokenizer.chat_template:
            raise ConversationError(f"the tokenizer has no chat template; {ADVICE}")
        try:
            given = tokenizer.tokenizer.get_chat_template()
        except ValueError as error:  # several templates, and none is the default
            raise ConversationError(f"the tokenizer's chat template cannot be chosen: {error}; {ADVICE}") from error
        source = _DATE_CALL.sub(lambda call: repr(TODAY.strftime(call[2])), given)
        if source != given:
            _log.info("the tokenizer's chat template writes the current date: %s is written instead", TODAY)
        for found, cause in (("strftime_now(" in source, "the current date"), (_CHANCE.search(source), "chance")):
            if found:
                raise ConversationError(
                    f"the tokenizer's chat template depends on {cause}, so training and chat would differ; {ADVICE}"
                )
        return cls(tokenizer.tokenizer, source)

    def text(self, messages: Sequence[tuple[str, str]], *, open_answer: bool = False) -> str:
        """Return the text that transformers renders."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": role, "content": content} for role, content in messages],
                    chat_template=self.source,
                    tokenize=False,
                    add_generation_prompt=open_answer,
                )
            )
        except Exception as error:  # a template is a program and may raise anything
            raise ConversationError(f"the tokenizer's chat template fails: {error}; {ADVICE}") from error

    def between(
        self, messages: Sequence[tuple[str, str]], sentinels: Sequence[str], *, open_answer: bool = False
    ) -> list[str]:
        """Return the text before, between and after the sentinels.

        Raises:
            ConversationError: a sentinel does not appear exactly once, in order.
        """
        text = self.text(messages, open_answer=open_answer)
        if any(text.count(s) != 1 for s in sentinels):
            raise ConversationError(f"the tokenizer's chat template changes, repeats or drops its input; {ADVICE}")
        return re.split("|".join(map(re.escape, sentinels)), text)

    def strips(self, role: str) -> bool:
        """Whether the outer white space of the content of a role is left out."""

        contents = {SYSTEM: "S", USER: "Q", ASSISTANT: "A"}
        plain = [(r, text) for r, text in contents.items() if r != SYSTEM or role == SYSTEM]
        padded = [(r, _PADDED.format(text) if r == role else text) for r, text in plain]
        return self.text(plain) == self.text(padded)


def _first_difference(
    program: _Program, template: Template, texts: Sequence[str], closing: str, system: str | None = None
) -> str:
    """Return where the template and the program first differ, in words; empty if nowhere."""
    for dialogue, closed in _dialogues(texts, system):
        messages = [(SYSTEM, system)] if system else []
        for turn in dialogue.turns:
            messages.append((USER, turn.question))
            messages += [] if turn.answer is None else [(ASSISTANT, turn.answer)]
        theirs = program.text(messages, open_answer=not closed)
        ours = template.render(dialogue) + (closing if closed else "")
        if theirs != ours:
            same = (a == b for a, b in zip(theirs, ours, strict=False))
            place = len(list(takewhile(bool, same)))
            shown = slice(max(0, place - 20), place + 30)
            what = "dialogue" if closed else "prompt"
            return (
                f"for a {what} of {len(dialogue.turns)} turn(s) it writes {theirs[shown]!r} where {ours[shown]!r} "
                "follows from the text around its first turns"
            )
    return ""


def _dialogues(texts: Sequence[str], system: str | None) -> Iterator[tuple[Dialogue, bool]]:
    """Yield whole dialogues and prompts of one to three turns, with every text in every place; true for whole ones."""
    for count in (1, 2, 3):
        for shift in range(len(texts)):
            around = [texts[(shift + n) % len(texts)] for n in range(2 * count)]
            turns = tuple(Turn(q, a) for q, a in zip(around[::2], around[1::2], strict=True))
            yield Dialogue(turns, system), True
            yield Dialogue((*turns[:-1], replace(turns[-1], answer=None)), system), False
