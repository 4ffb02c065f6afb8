"""From the body of a chat request to what is to be done: `ChatRequest`.

Input: bytes from anybody. Output: a checked request. A parameter that would change the answer and that this service
does not know is refused, never left out in silence.
"""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass, replace
from typing import Any

from minigpt4.chat.section import ChatSection
from minigpt4.conversation.dialogue import Dialogue
from minigpt4.errors import RequestError
from minigpt4.registry import did_you_mean
from minigpt4.server.messages import ImageReference, read_messages
from minigpt4.server.section import ServerSection

MAX_STOPS = 4
"""As many stop texts as OpenAI's interface allows."""
MAX_STOP_CHARACTERS = 256
_SEEDS = (-(2**63), 2**63 - 1)
_READ = (
    *("model", "messages", "stream", "stream_options", "stop", "seed", "temperature", "top_p", "top_k"),
    *("repetition_penalty", "max_tokens", "max_completion_tokens"),
)
_WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"),
)
"""Parameters that say nothing about the answer."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Parameters of OpenAI's interface that are taken only with the values that ask for nothing."""


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        model: the name that was asked for, None if none was.
        dialogue: its last turn is open.
        images: what the questions mention, in order.
        settings: how to decode.
        stop: texts that end the answer.
        stream: whether the answer is sent as it grows.
        include_usage: whether a stream ends with the token counts.
    """

    model: str | None
    dialogue: Dialogue
    images: tuple[ImageReference, ...]
    settings: ChatSection
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def read_request(body: bytes, defaults: ChatSection, limits: ServerSection) -> ChatRequest:
    """Return the request in `body`.

    Args:
        body: JSON in UTF-8.
        defaults: decoding settings for what the request leaves open.
        limits: of the service.

    Raises:
        RequestError: it cannot be done as it is asked; the message says what is wrong, and `param` where.
    """
    values = _read_json(body)
    _refuse_unknown(values)
    dialogue, images = read_messages(values.get("messages"), limits)
    stream = _flag(values, "stream")
    options = values.get("stream_options") or {}
    if not isinstance(options, dict) or (options and not stream):
        raise RequestError("stream_options must be an object, and is only for stream: true", param="stream_options")
    return ChatRequest(
        model=_model(values),
        dialogue=dialogue,
        images=images,
        settings=_settings(values, defaults, limits),
        stop=_stop(values),
        stream=stream,
        include_usage=_flag(options, "include_usage", within="stream_options."),
    )


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise RequestError("the body is not usable JSON: nested too deeply") from error
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    return {key: value for key, value in values.items() if value is not None}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _refuse_unknown(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key in _ONLY:
            if not any(value == only and isinstance(value, bool) == isinstance(only, bool) for only in _ONLY[key]):
                known = " or ".join(json.dumps(only) for only in _ONLY[key])
                raise RequestError(f"{key} is not supported here; leave it out, or pass {known}", param=key)
        elif key not in _READ and key not in _WITHOUT_EFFECT:
            shown = key if len(key) <= 60 else f"{key[:57]}..."
            hint = did_you_mean(shown, (*_READ, *_ONLY))
            raise RequestError(f"unknown parameter {shown!r}.{hint}", param=shown, code="unknown_parameter")


def _model(values: dict[str, Any]) -> str | None:
    model = values.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError("model must be a text", param="model")
    return model


def _settings(values: dict[str, Any], defaults: ChatSection, limits: ServerSection) -> ChatSection:
    """Return the decoding settings; sampling without a seed takes a new one each time."""
    given: dict[str, Any] = {
        "temperature": _number(values, "temperature", 0, 2),
        "top_p": _number(values, "top_p", 0, 1),
        "top_k": _integer(values, "top_k", 0, 2**31),
        "repetition_penalty": _number(values, "repetition_penalty", 0, 100),
        "seed": _integer(values, "seed", *_SEEDS),
    }
    for name in ("max_completion_tokens", "max_tokens"):
        if name in values:
            given["max_new_tokens"] = _integer(values, name, 1, limits.max_new_tokens)
            break
    else:
        given["max_new_tokens"] = min(defaults.max_new_tokens, limits.max_new_tokens)
    if given["seed"] is None:
        given["seed"] = secrets.randbits(63)
    try:
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise RequestError(str(error)) from error


def _stop(values: dict[str, Any]) -> tuple[str, ...]:
    stop = values.get("stop", [])
    texts = [stop] if isinstance(stop, str) else stop
    fits = isinstance(texts, list) and len(texts) <= MAX_STOPS
    if not fits or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARACTERS for text in texts):
        raise RequestError(
            f"stop must be a text, or a list of at most {MAX_STOPS}, each of 1 to {MAX_STOP_CHARACTERS} characters",
            param="stop",
        )
    return tuple(texts)


def _flag(values: dict[str, Any], name: str, within: str = "") -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{within}{name} must be true or false", param=within + name)
    return bool(value)


def _number(values: dict[str, Any], name: str, low: float, high: float) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low} to {high}", param=name)
    return float(value)


def _integer(values: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}", param=name)
    return value
