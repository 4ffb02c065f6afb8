"""Templates: the fixed text around questions, answers and images, for training and chat.

A template's name is saved in every checkpoint. `published_chat` and `published_training` are the variants that the
published code used in chat and in training; only `compat: published` uses them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue
from minigpt4.errors import ConversationError

ROLES = SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
"""The roles of system texts, questions and answers, as chat templates call them."""
_TAGGED = f"<Img>{IMAGE_MARK}</Img>"


@dataclass(frozen=True)
class Template:
    """The fixed text of a conversation format.

    Attributes:
        name: its name in configs and checkpoints.
        question: text before and after a question; the model answers after it.
        end: the end mark after every answer; it is trained, and an answer in chat stops at it.
        next_question: text before and after every later question, None if the same as `question`.
        opening: text in front of everything when no system text is given.
        system: text before and after a system text; None if the format has no system text.
        image: the text of one image, with `IMAGE_MARK`.
        starts_with_bos: whether the tokenizer's BOS, if it has one, comes first.
        answers_apart: whether an answer is tokenised separately from the question before it, as in training.
        before_answer: white space in front of an answer that is part of it: trained, and generated in chat.
        stripped: the roles, of `ROLES`, whose text loses its outer white space.
        is_one_text: whether segments are tokenised as parts of one text, as chat templates are; else each as a text of
            its own, in front of which SentencePiece tokenizers put a blank, as in the published code.
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
    before_answer: str = ""
    stripped: frozenset[str] = frozenset()
    is_one_text: bool = False

    def around_question(self, index: int) -> tuple[str, str]:
        """Return the text before and after the question of turn `index`, counted from 0."""
        return self.question if index == 0 or self.next_question is None else self.next_question

    def before_all(self, system: str | None) -> str:
        """Return the text in front of the first question.

        Raises:
            ConversationError: a system text is given and the format has none.
        """
        if not system:
            return self.opening
        if self.system is None:
            raise ConversationError(f"template {self.name!r} does not support a system text")
        return self.system[0] + self.content(SYSTEM, system) + self.system[1]

    def content(self, role: str, text: str) -> str:
        """Return the text of a role as the format writes it."""
        return text.strip() if role in self.stripped else text

    def render(self, dialogue: Dialogue) -> str:
        """Return a dialogue as text, with `IMAGE_MARK` for each image; up to the question that has no answer."""
        text = self.before_all(dialogue.system)
        for index, turn in enumerate(dialogue.turns):
            before, after = self.around_question(index)
            text += before + self.content(USER, turn.question).replace(IMAGE_MARK, self.image) + after
            if turn.answer is not None:
                text += self.before_answer + self.content(ASSISTANT, turn.answer) + self.end
        return text


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

PUBLISHED_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)


def published_training(template: Template) -> Template:
    """Return the template as the published conversation data was rendered: each turn starts with BOS."""
    before, after = template.question
    return replace(template, next_question=(before if before.startswith("<s>") else f"<s>{before}", after))


def published_chat(template: Template) -> Template:
    """Return the template as the published chat wrote its prompts, which differ from its training prompts.

    Original: `conversation.py` of the published code joins its separators to the text and tokenises everything between
    two images at once.
    """
    if template.name == "vicuna_v0":
        variant = replace(template, question=("Human: ", "###Assistant: "), next_question=None, end="###")
        return replace(variant, opening=f"{PUBLISHED_SYSTEM}###", system=("", "###"), answers_apart=False)
    if template.name == "llama2":
        variant = replace(template, question=("<s>[INST] ", " [/INST] "), next_question=None, end="")
        return replace(variant, opening=PUBLISHED_SYSTEM, system=("", ""), answers_apart=False)
    return template
