"""From the body of a chat request to what the service has to do: `ChatRequest`.

Input: bytes from any client. Output: a checked request. A parameter that would change the answer and that this service
does not support is an error; it is never ignored.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from minigpt4.config.schema import describe_problems
from minigpt4.config.sections import ChatConfig, ServerConfig
from minigpt4.conversation.dialogue import Dialogue
from minigpt4.errors import RequestError
from minigpt4.registry import did_you_mean
from minigpt4.server.messages import ImageReference, read_messages
from minigpt4.strict_json import JSONError, parse_json

MAX_STOPS = 4
"""As many stop texts as OpenAI's interface allows."""
MAX_STOP_CHARACTERS = 256
MAX_DEPTH = 64
"""Lists and objects inside each other in a request; messages have six."""
MAX_ELEMENTS = 50_000
"""Values in a request, in addition to the characters of its texts."""
GREEDY_BELOW = 1e-3
"""A temperature below this is greedy; the logits divided by it could be too large for float32."""


@pydantic_dataclass(config=ConfigDict(strict=True, allow_inf_nan=False))
class _Parameters:
    """What the service reads of a request; `ChatConfig` has the other bounds of the decoding settings."""

    model: str | None = None
    messages: Any = None
    stream: bool = False
    stream_options: dict[str, bool | None] = field(default_factory=dict)
    stop: Any = ()
    seed: Annotated[int, Ge(-(2**63)), Le(2**63 - 1)] | None = None
    temperature: Annotated[float, Ge(0), Le(2)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Ge(-1), Le(2**31)] | None = None
    repetition_penalty: Annotated[float, Ge(0.01), Le(100)] | None = None
    max_tokens: Annotated[int, Ge(-1)] | None = None
    max_completion_tokens: Annotated[int, Ge(-1)] | None = None


_READ = tuple(spec.name for spec in fields(_Parameters))
_SAMPLING = ("seed", "temperature", "top_p", "top_k", "repetition_penalty")
_STREAM_OPTIONS = ("include_usage", "include_obfuscation")
_WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"),
    *("prompt_cache_retention", "verbosity"),
)
"""Parameters that do not concern the answer."""
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
    "best_of": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""Parameters of OpenAI's interface that are accepted only with values that change nothing."""


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        model: the name of the model, None if the request has none.
        dialogue: its last turn has no answer yet.
        images: the images that the questions mention, in order.
        settings: how to decode.
        stop: texts that end the answer.
        stream: whether the answer is sent as it grows.
        include_usage: whether a stream ends with the token counts.
    """

    model: str | None
    dialogue: Dialogue
    images: tuple[ImageReference, ...]
    settings: ChatConfig
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def read_request(body: bytes, defaults: ChatConfig, limits: ServerConfig) -> ChatRequest:
    """Return the request in `body`.

    Args:
        body: JSON.
        defaults: decoding settings for what the request does not set.
        limits: limits of the service.

    Raises:
        RequestError: the request is wrong or not supported; the message says why, and `param` where.
    """
    given = _read_json(body, limits)
    _refuse_unknown(given)
    try:
        values = _Parameters(**{name: value for name, value in given.items() if name in _READ})
        settings = _settings(values, defaults, limits)
    except ValidationError as error:
        place, problem = next(describe_problems(error))
        param = ".".join(map(str, place))
        raise RequestError(f"{param}{problem}", param=param) from error
    if unknown := next((name for name in values.stream_options if name not in _STREAM_OPTIONS), None):
        raise RequestError(f"unknown stream option {unknown[:60]!r}", param="stream_options")
    include_usage = bool(values.stream_options.get("include_usage"))
    if include_usage and not values.stream:
        raise RequestError("include_usage in stream_options is only for stream: true", param="stream_options")
    dialogue, images = read_messages(values.messages, limits)
    return ChatRequest(
        model=values.model,
        dialogue=dialogue,
        images=images,
        settings=settings,
        stop=_stop(values.stop),
        stream=values.stream,
        include_usage=include_usage,
    )


def _read_json(body: bytes, limits: ServerConfig) -> dict[str, Any]:
    """Return the values of a JSON object, without those that are null."""
    # Counted before parsing, because the parser holds Python's lock until its end.
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_ELEMENTS + limits.max_text_characters:
        raise RequestError("the body has too many values")
    try:
        values = parse_json(body)
    except JSONError as error:
        raise RequestError(f"the body is not usable JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    _check_depth(values)
    return {key: value for key, value in values.items() if value is not None}


def _check_depth(values: Any) -> None:
    level = [values]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise RequestError(f"the body is not usable JSON: nested too deeply, more than {MAX_DEPTH} levels")


def _refuse_unknown(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key in _ONLY:
            if not any(value == only and isinstance(value, bool) == isinstance(only, bool) for only in _ONLY[key]):
                accepted = " or ".join(json.dumps(only) for only in _ONLY[key])
                raise RequestError(f"{key} is not supported; leave it out, or pass {accepted}", param=key)
        elif key not in (*_READ, *_WITHOUT_EFFECT):
            shown = key if len(key) <= 60 else f"{key[:57]}..."
            hint = did_you_mean(shown, (*_READ, *_ONLY))
            raise RequestError(f"unknown parameter {shown!r}.{hint}", param=shown, code="unknown_parameter")


def _settings(values: _Parameters, defaults: ChatConfig, limits: ServerConfig) -> ChatConfig:
    """Return the decoding settings of a request; sampling without a seed is different each time."""
    chosen = {name: getattr(values, name) for name in _SAMPLING if getattr(values, name) is not None}
    if chosen.get("top_k") == -1:
        chosen["top_k"] = 0
    if chosen.get("temperature", GREEDY_BELOW) < GREEDY_BELOW:
        chosen["temperature"] = 0.0
    asked = values.max_tokens if values.max_completion_tokens is None else values.max_completion_tokens
    longest = asked if asked and asked > 0 else defaults.max_new_tokens
    longest = min(longest, limits.max_new_tokens)
    return replace(defaults, max_new_tokens=longest, **({"seed": secrets.randbits(63)} | chosen))


def _stop(given: Any) -> tuple[str, ...]:
    """Return the stop texts; an empty one stops nothing."""
    texts = [given] if isinstance(given, str) else given
    fits = isinstance(texts, (list, tuple)) and len(texts) <= MAX_STOPS
    if not fits or not all(isinstance(text, str) and len(text) <= MAX_STOP_CHARACTERS for text in texts):
        raise RequestError(
            f"stop must be text, or a list of at most {MAX_STOPS} texts, of at most {MAX_STOP_CHARACTERS} characters "
            "each",
            param="stop",
        )
    return tuple(text for text in texts if text)
