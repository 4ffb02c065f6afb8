"""Templates: the fixed text around questions, answers and images, one object for training and chat.

A template's name is saved in every checkpoint. `published_chat` and `published_training` give the variants that the
published code used in one place and not in the other; only `compat: published` asks for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from minigpt4.conversation.dialogue import IMAGE_MARK
from minigpt4.errors import ConversationError, UnknownNameError
from minigpt4.registry import did_you_mean

_TAGGED = f"<Img>{IMAGE_MARK}</Img>"


@dataclass(frozen=True)
class Template:
    """The fixed text of a conversation format.

    Attributes:
        name: how configs and checkpoints call it.
        question: text before and after a question; the model answers after it.
        end: the end mark behind every answer; it is trained, and an answer in chat stops at it.
        next_question: text before and after every later question, None if the same as `question`.
        opening: text in front of everything when no system text is given.
        system: text before and after a system text; None if the format knows none.
        image: what stands for one image, `IMAGE_MARK` included.
        starts_with_bos: whether the tokenizer's BOS, if it has one, comes first.
        answers_apart: whether an answer is tokenised apart from the question before it, as training does.
    """

    name: str
    question: tuple[str, str]
    end: str
    next_question: tuple[str, str] | None = None
    opening: str = ""
    system: tuple[str, str] | None = None
    image: str = IMAGE_MARK
    starts_with_bos: bool = True
    answers_apart: bool = True

    def around_question(self, index: int) -> tuple[str, str]:
        """Return the text before and after the question of turn `index`, counted from 0."""
        return self.question if index == 0 or self.next_question is None else self.next_question

    def before_all(self, system: str | None) -> str:
        """Return what stands in front of the first question.

        Raises:
            ConversationError: a system text is given and the format has no place for one.
        """
        if not system:
            return self.opening
        if self.system is None:
            raise ConversationError(f"template {self.name!r} has no place for a system text")
        return self.system[0] + system + self.system[1]


PLAIN = Template(name="plain", question=("", ""), end="\n")

# The published training prompt has a blank in front of ###Assistant; the end mark of an answer opens the next turn.
VICUNA_V0 = Template(
    name="vicuna_v0",
    question=("###Human: ", " ###Assistant: "),
    next_question=("Human: ", " ###Assistant: "),
    end="###",
    system=("", ""),
    image=_TAGGED,
)

LLAMA2 = Template(
    name="llama2",
    question=("[INST] ", " [/INST] "),
    next_question=("<s>[INST] ", " [/INST] "),
    end="</s>",
    image=_TAGGED,
)

CHATML = Template(
    name="chatml",
    question=("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    next_question=("\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    end="<|im_end|>",
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    starts_with_bos=False,
)

TEMPLATES = {t.name: t for t in (PLAIN, VICUNA_V0, LLAMA2, CHATML)}

OWN = "tokenizer"
"""Name that stands for the chat template which the language model's tokenizer brings along."""

PUBLISHED_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)


def get_template(name: str) -> Template:
    """Return a built-in template by name.

    Raises:
        UnknownNameError: no such template; the message has the nearest name.
    """
    if name not in TEMPLATES:
        known = [*TEMPLATES, OWN]
        raise UnknownNameError(f"unknown template {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}")
    return TEMPLATES[name]


def published_training(template: Template) -> Template:
    """Return the template as the published conversation data was rendered: each later turn starts anew with BOS."""
    before, after = template.question
    return replace(template, next_question=(before if before.startswith("<s>") else f"<s>{before}", after))


def published_chat(template: Template) -> Template:
    """Return the template as the published chat wrote its prompts, which differ from its training prompts.

    Original: `conversation.py` of the published code glues its separators to the text and tokenises everything between
    two images in one go.
    """
    if template.name == "vicuna_v0":
        variant = replace(template, question=("Human: ", "###Assistant: "), next_question=None, end="###")
        return replace(variant, opening=f"{PUBLISHED_SYSTEM}###", system=("", "###"), answers_apart=False)
    if template.name == "llama2":
        variant = replace(template, question=("<s>[INST] ", " [/INST] "), next_question=None, end="")
        return replace(variant, opening=PUBLISHED_SYSTEM, system=("", ""), answers_apart=False)
    return template
