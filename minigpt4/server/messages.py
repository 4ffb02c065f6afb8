"""From a client's `messages` to a dialogue and its images.

Input: the parsed JSON of a request, from anybody. Output: a `Dialogue` whose last turn is open, and the images its
questions mention, in order. The images of a message stand in front of its text, as in training, unless the text says
where with `<ImageHere>`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn
from minigpt4.errors import RequestError
from minigpt4.server.section import ServerSection

_SYSTEM = ("system", "developer")
_ROLES = (*_SYSTEM, "user", "assistant")


@dataclass(frozen=True)
class ImageReference:
    """An image that a message mentions: its address, and where in the request that stands."""

    url: str
    param: str


@dataclass(frozen=True)
class _Message:
    role: str
    text: str
    images: tuple[ImageReference, ...]
    param: str


def read_messages(messages: Any, limits: ServerSection) -> tuple[Dialogue, tuple[ImageReference, ...]]:
    """Return the dialogue that `messages` tell, and its images.

    System texts stand at the start. Messages of one side that follow one another are one question, or one answer.

    Raises:
        RequestError: the messages tell no dialogue, or exceed a limit; `param` says where.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list with at least one message", param="messages")
    read = [_read_message(message, f"messages.{n}") for n, message in enumerate(messages)]
    _check_limits(read, limits)
    opening = next((n for n, message in enumerate(read) if message.role not in _SYSTEM), len(read))
    system = "\n".join(message.text for message in read[:opening]) or None
    turns: list[Turn] = []
    for before, message in zip([None, *read[opening:]], read[opening:], strict=False):
        _add(turns, message, before.role if before else None)
    if not turns or turns[-1].answer is not None:
        raise RequestError("the last message must be the user's: it is what is answered", param="messages")
    return Dialogue(tuple(turns), system), tuple(image for message in read for image in message.images)


def _add(turns: list[Turn], message: _Message, before: str | None) -> None:
    """Add a message behind one of the role `before` (None: it is the first)."""
    if message.role in _SYSTEM:
        raise RequestError("a system text stands only at the start", param=message.param)
    if message.role == "user":
        question = _question(message)
        if before == "user":
            turns[-1] = Turn(f"{turns[-1].question}\n{question}")
        else:
            turns.append(Turn(question))
    elif before is None:
        raise RequestError("the first message must be the user's", param=message.param)
    else:
        last = turns[-1]
        turns[-1] = Turn(last.question, message.text if last.answer is None else f"{last.answer}\n{message.text}")


def _question(message: _Message) -> str:
    """Return a user's text with a mark for each of its images."""
    marks, images = message.text.count(IMAGE_MARK), len(message.images)
    if marks and marks != images:
        raise RequestError(
            f"the text places {marks} image(s) with {IMAGE_MARK}, but the message has {images}", param=message.param
        )
    if marks or not images:
        return message.text
    return IMAGE_MARK * images + (f" {message.text}" if message.text else "")


def _read_message(message: Any, param: str) -> _Message:
    if not isinstance(message, dict):
        raise RequestError("a message must be an object with role and content", param=param)
    role = message.get("role")
    if role not in _ROLES:
        raise RequestError(f"role must be one of {', '.join(_ROLES)}", param=f"{param}.role")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RequestError("content must be a text or a list of parts", param=f"{param}.content")
    texts: list[str] = []
    images: list[ImageReference] = []
    for n, part in enumerate(content):
        _read_part(part, f"{param}.content.{n}", texts, images)
    if images and role != "user":
        raise RequestError("only the user's messages hold images", param=f"{param}.content")
    if not images and not "".join(texts).strip():
        raise RequestError("the message is empty", param=f"{param}.content")
    return _Message(role, "\n".join(texts), tuple(images), param)


def _read_part(part: Any, param: str, texts: list[str], images: list[ImageReference]) -> None:
    """Put one part of a message into `texts` or `images`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        texts.append(_text(part.get("text"), f"{param}.text"))
    elif kind == "image_url":
        source = part.get("image_url")
        place = f"{param}.image_url"
        url = _text(source.get("url") if isinstance(source, dict) else None, f"{place}.url")
        images.append(ImageReference(url, place))
    else:
        raise RequestError("a part must be of type text or image_url", param=f"{param}.type")


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise RequestError("must be a text", param=param)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair, which is no character
        raise RequestError(f"the text is not Unicode: {error.reason}", param=param) from error
    return value


def _check_limits(messages: list[_Message], limits: ServerSection) -> None:
    characters = sum(len(message.text) for message in messages)
    if characters > limits.max_text_characters:
        raise RequestError(
            f"the messages have {characters:,} characters of text; at most {limits.max_text_characters:,} are read",
            param="messages",
            code="context_length_exceeded",
        )
    images = sum(len(message.images) for message in messages)
    if images > limits.max_images:
        raise RequestError(f"the messages have {images} images; at most {limits.max_images} are read", param="messages")
