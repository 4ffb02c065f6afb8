"""Requests that are malformed, oversized or hostile: each gets a clear error, and the service continues."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib

import pytest
from PIL import Image

from tests.server.conftest import data_uri, noise, post, wait_until

USER = {"role": "user", "content": "What is this?"}


def body(**values) -> bytes:
    return json.dumps({"model": "tiny", "messages": [USER], "max_tokens": 2, **values}).encode()


def image(url: object) -> bytes:
    return image_url({"url": url})


def image_url(value: object) -> bytes:
    return body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": value}]}])


def nested(levels: int) -> object:
    value: object = []
    for _ in range(levels - 1):
        value = [value]
    return value


def bomb() -> str:
    """Return a PNG of about a hundred bytes that claims to have a hundred thousand pixels on each side."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def cut() -> str:
    buffer = io.BytesIO()
    noise(1, 100).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()[:2000]).decode()}"


def messages_of(*roles: str) -> bytes:
    return body(messages=[{"role": role, "content": "x"} for role in roles])


TABLE: dict[str, tuple[bytes, int, str]] = {
    "no JSON": (b"{", 400, "not valid JSON"),
    "nothing": (b"", 400, "not valid JSON"),
    "a list": (b"[]", 400, "must be a JSON object"),
    "not UTF-8": (b'{"model": "\xff"}', 400, "not UTF-8 text"),
    "nested deeply": (b'{"a":' * 50_000, 400, "nested too deeply"),
    "lists nested deeply": (b'{"a":' + b"[" * 50_000, 400, "nested too deeply"),
    "nested too deeply to be shown": (body(temperature=nested(900)), 400, "nested too deeply"),
    "nested 65 levels": (body(metadata=nested(64)), 400, "nested too deeply"),
    "many values": (b'{"a": [' + b"[]," * 100_000 + b"[]]}", 400, "too many values"),
    "a key twice": (b'{"seed": 1, "seed": 2}', 400, "the key 'seed' occurs twice"),
    "half a character as key": (b'{"\\udc00": 1}', 400, "half a character"),
    "half a character in metadata": (body(metadata={"a": "\ud800"}), 400, "half a character"),
    "NaN": (body(temperature=float("nan")), 400, "NaN is not a JSON number"),
    "a number of many digits": (b'{"seed": ' + b"9" * 100_000 + b"}", 400, "a number of 100000 digits"),
    "no messages": (body(messages=[]), 400, "messages must be a list"),
    "messages of text": (body(messages="hello"), 400, "messages must be a list"),
    "a message of text": (body(messages=["hello"]), 400, "messages.0"),
    "an unknown role": (messages_of("wizard"), 400, "role must be one of"),
    "the assistant first": (messages_of("assistant", "user"), 400, "the first message must be the user's"),
    "the assistant last": (messages_of("user", "assistant"), 400, "the last message must be the user's"),
    "system text in the middle": (messages_of("user", "system", "user"), 400, "a system message must come first"),
    "an empty message": (body(messages=[{"role": "user", "content": ""}]), 400, "messages.0.content: the message is"),
    "a message of null": (body(messages=[{"role": "user", "content": None}]), 400, "the message is empty"),
    "a message without parts": (body(messages=[{"role": "user", "content": []}]), 400, "the message is empty"),
    "a call of a tool": (
        body(messages=[USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, USER]),
        400,
        "messages.1.tool_calls: a message with tool_calls is not supported",
    ),
    "a part of sound": (body(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]), 400, "a part must be"),
    "half a character": (body(messages=[{"role": "user", "content": "\ud800"}]), 400, "half a character"),
    "a mark without image": (body(messages=[{"role": "user", "content": "<ImageHere>?"}]), 400, "the message has 0"),
    "an unknown parameter": (body(temprature=1), 400, "unknown parameter 'temprature'. Did you mean 'temperature'?"),
    "an unsupported one": (body(tools=[{"type": "function"}]), 400, "tools is not supported; leave it out, or pass []"),
    "two answers": (body(n=2), 400, "n is not supported; leave it out, or pass 1"),
    "temperature as text": (body(temperature="hot"), 400, "temperature must be a number, found 'hot'"),
    "temperature as truth": (body(temperature=True), 400, "temperature must be a number, found true"),
    "top_p of nothing": (body(top_p=0), 400, "top_p: top_p must be above 0, found 0"),
    "fewer than no tokens": (body(max_tokens=-2), 400, "max_tokens must be at least -1, found -2"),
    "top_k below -1": (body(top_k=-2), 400, "top_k must be at least -1, found -2"),
    "a penalty next to zero": (body(repetition_penalty=1e-320), 400, "repetition_penalty must be at least 0.01"),
    "a large penalty": (body(repetition_penalty=101), 400, "repetition_penalty must be at most 100"),
    "a negative temperature": (body(temperature=-0.1), 400, "temperature must be at least 0"),
    "a hot temperature": (body(temperature=2.1), 400, "temperature must be at most 2"),
    "a presence penalty": (body(presence_penalty=0.5), 400, "presence_penalty is not supported"),
    "a bias": (body(logit_bias={"1": 5}), 400, "logit_bias is not supported"),
    "JSON as answer": (body(response_format={"type": "json_object"}), 400, "response_format is not supported"),
    "a tool by name": (body(tool_choice={"type": "function"}), 400, "tool_choice is not supported"),
    "log probabilities": (body(logprobs=True), 400, "logprobs is not supported"),
    "an unknown stream option": (body(stream=True, stream_options={"usage": True}), 400, "unknown stream option"),
    "a seed too large": (body(seed=2**64), 400, "seed must be at most 9.22337e+18, found 18446744073709551616"),
    "a seed with a fraction": (body(seed=1.5), 400, "seed must be a whole number, found 1.5"),
    "a temperature beyond floats": (b'{"temperature": 1' + b"0" * 390 + b"}", 400, "temperature must be"),
    "stream as text": (body(stream="yes"), 400, "stream must be true or false, found 'yes'"),
    "stream options as a list": (body(stream_options=[1]), 400, "stream_options must be a mapping"),
    "five stops": (body(stop=["a"] * 5), 400, "stop must be text"),
    "a stop of null": (body(stop=[None]), 400, "stop must be text"),
    "usage without stream": (body(stream_options={"include_usage": True}), 400, "only for stream: true"),
    "more than the context": (body(messages=[{"role": "user", "content": "why " * 600}]), 400, "model reads 512"),
    "a long text": (body(messages=[{"role": "user", "content": "a" * 20_001}]), 400, "at most 20,000 are allowed"),
    "a large body": (b" " * 600_000 + body(), 413, "larger than 0.5 MB"),
    "another model": (body(model="gpt-9"), 404, "unknown model 'gpt-9'; this service has 'tiny'"),
    "four images": (
        body(messages=[{"role": "user", "content": [json.loads(image("data:,"))["messages"][0]["content"][0]] * 4}]),
        400,
        "4 images; at most 3 are allowed",
    ),
    "a file": (image("file:///etc/passwd"), 400, "only data: addresses"),
    "the metadata service": (image("http://169.254.169.254/latest/meta-data"), 400, "only data: addresses"),
    "an address that is a number": (image(7), 400, "must be text"),
    "a number as image": (image_url(7), 400, 'messages.0.content.0.image_url: must be {"url": ...}'),
    "a text as image": (image("data:text/html;base64,aGk="), 400, "must begin like data:image/png;base64,"),
    "no base64": (image("data:image/png;base64,@@@"), 400, "not base64"),
    "words as image": (image("data:image/png;base64,aGVsbG8="), 400, "this is not an image"),
    "a damaged image": (image(cut()), 400, "damaged"),
    "an image of many pixels": (image(data_uri(Image.new("L", (300, 300)))), 400, "more than the allowed 40,000"),
    "a decompression bomb": (image(bomb()), 400, "pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_wrong_request_is_rejected_and_the_next_one_is_answered(name, served):
    content, status, message = TABLE[name]
    found, reply, _ = post(served[1], content)
    error = reply["error"]
    assert (found, set(error)) == (status, {"message", "type", "param", "code"})
    assert message in f"{error['param']}: {error['message']}"
    assert "Traceback" not in str(reply)
    assert post(served[1], body())[0] == 200


def test_rejected_requests_free_their_places(served):
    wait_until(lambda: served[0]._work.in_progress == 0)
