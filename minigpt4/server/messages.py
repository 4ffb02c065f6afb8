"""From a client's `messages` to a dialogue and its images.

Input: the parsed JSON of a request. Output: a `Dialogue` whose last turn has no answer yet, and the images that its
questions mention, in order. The images of a message come before its text, as in training, unless the text places them
with `<ImageHere>`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from minigpt4.config.sections import ServerConfig
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn
from minigpt4.errors import RequestError

_SYSTEM = ("system", "developer")
_ROLES = (*_SYSTEM, "user", "assistant")
_UNSUPPORTED = ("tool_calls", "function_call", "audio", "refusal")
"""What an assistant's message can have in place of text."""


@dataclass(frozen=True)
class ImageReference:
    """An image that a message mentions: its address, and its place in the request."""

    url: str
    param: str


@dataclass(frozen=True)
class _Message:
    role: str
    text: str
    images: tuple[ImageReference, ...]
    param: str


def read_messages(messages: Any, limits: ServerConfig) -> tuple[Dialogue, tuple[ImageReference, ...]]:
    """Return the dialogue in `messages`, and its images.

    System messages come first. Consecutive messages of the same role are one question, or one answer. A system message
    or an answer may be empty, null or an empty list: no system text, and an answer of no words.

    Raises:
        RequestError: the messages are not a dialogue, or exceed a limit; `param` says where.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list with at least one message", param="messages")
    read = [_read_message(message, f"messages.{n}") for n, message in enumerate(messages)]
    _check_limits(read, limits)
    system = [message.text for message in takewhile(lambda message: message.role in _SYSTEM, read)]
    turns: list[Turn] = []
    for message in read[len(system) :]:
        _add(turns, message)
    if not turns or turns[-1].answer is not None:
        raise RequestError("the last message must be the user's: it is the one to answer", param="messages")
    system_text = "\n".join(text for text in system if text.strip())
    return Dialogue(tuple(turns), system_text or None), tuple(each for message in read for each in message.images)


def _add(turns: list[Turn], message: _Message) -> None:
    """Add a message that is not the system's to the turns before it."""
    last = turns[-1] if turns else None
    if message.role in _SYSTEM and not message.text.strip():
        return
    if message.role in _SYSTEM:
        raise RequestError("a system message must come first", param=message.param)
    if message.role == "user" and (last is None or last.answer is not None):
        turns.append(Turn(_question(message)))
    elif last is None:
        raise RequestError("the first message must be the user's", param=message.param)
    elif message.role == "user":
        turns[-1] = Turn(f"{last.question}\n{_question(message)}")
    else:
        # An empty answer is an answer, so that the next question is a turn of its own; it adds nothing to another one.
        answers = [text for text in (last.answer, message.text) if text]
        turns[-1] = Turn(last.question, "\n".join(answers))


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
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise RequestError(f"role must be one of {', '.join(_ROLES)}", param=f"{param}.role")
    for key in _UNSUPPORTED:
        if message.get(key):
            raise RequestError(f"a message with {key} is not supported", param=f"{param}.{key}")
    if content is None:
        content = []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RequestError("content must be text or a list of parts", param=f"{param}.content")
    parts = [_read_part(part, f"{param}.content.{n}") for n, part in enumerate(content)]
    images = tuple(part for part in parts if isinstance(part, ImageReference))
    text = "\n".join(part for part in parts if isinstance(part, str))
    if images and role != "user":
        raise RequestError("only the user's messages can hold images", param=f"{param}.content")
    if role == "user" and not images and not text.strip():
        raise RequestError("the message is empty", param=f"{param}.content")
    return _Message(role, text, images, param)


def _read_part(part: Any, param: str) -> str | ImageReference:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _text(part.get("text"), f"{param}.text")
    if kind == "image_url":
        source, place = part.get("image_url"), f"{param}.image_url"
        if isinstance(source, dict):
            return ImageReference(_text(source.get("url"), f"{place}.url"), place)
        if not isinstance(source, str):
            raise RequestError('must be {"url": ...}, or the address itself', param=place)
        return ImageReference(_text(source, place), place)
    raise RequestError("a part must be of type text or image_url", param=f"{param}.type")


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise RequestError("must be text", param=param)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair, which is not a character
        raise RequestError(f"the text is not Unicode: {error.reason}", param=param) from error
    return value


def _check_limits(messages: list[_Message], limits: ServerConfig) -> None:
    characters = sum(len(message.text) for message in messages)
    if characters > limits.max_text_characters:
        raise RequestError(
            f"the messages have {characters:,} characters of text; at most {limits.max_text_characters:,} are allowed",
            param="messages",
            code="context_length_exceeded",
        )
    images = sum(len(message.images) for message in messages)
    if images > limits.max_images:
        raise RequestError(f"there are {images} images; at most {limits.max_images} are allowed", param="messages")
