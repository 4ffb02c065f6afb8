"""What the service sends: the objects of OpenAI's interface.

Input: texts and counts. Output: plain values for JSON.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from minigpt4.chat.scheduler import Stream
from minigpt4.errors import RequestError

DONE = "data: [DONE]\n\n"
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def event(value: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def error_of(error: RequestError) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kind = "server_error" if error.status >= 500 else _TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def usage_of(stream: Stream) -> dict[str, int]:
    """Return the token counts of an answer."""
    prompt, completion = stream.prompt_tokens, stream.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Completion:
    """The objects about one answer, with the values that they share."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, text: str, stream: Stream) -> dict[str, Any]:
        """Return the complete answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": stream.finish_reason}
        return self._object("chat.completion", [choice]) | {"usage": usage_of(stream)}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """Return a piece of the answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice])

    def usage_chunk(self, stream: Stream) -> dict[str, Any]:
        """Return the chunk after the last one, with the token counts."""
        return self._object("chat.completion.chunk", []) | {"usage": usage_of(stream)}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}
