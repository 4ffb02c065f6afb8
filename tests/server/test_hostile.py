"""Requests that are malformed, oversized or hostile: each gets a clear error, and the service goes on."""

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
    return body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


def bomb() -> str:
    """Return a PNG of some hundred bytes that claims a hundred thousand pixels on each side."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def cut() -> str:
    buffer = io.BytesIO()
    noise(1, 100).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()[:2000]).decode()}"


def said(*roles: str) -> bytes:
    return body(messages=[{"role": role, "content": "x"} for role in roles])


TABLE: dict[str, tuple[bytes, int, str]] = {
    "no JSON": (b"{", 400, "the body is not JSON"),
    "nothing": (b"", 400, "the body is not JSON"),
    "a list": (b"[]", 400, "must be a JSON object"),
    "not UTF-8": (b'{"model": "\xff"}', 400, "the body is not UTF-8"),
    "nested deeply": (b'{"a":' * 100_000, 400, "nested too deeply"),
    "NaN": (body(temperature=float("nan")), 400, "NaN is no JSON number"),
    "a number of many digits": (b'{"seed": ' + b"9" * 100_000 + b"}", 400, "the body is not JSON"),
    "no messages": (body(messages=[]), 400, "messages must be a list"),
    "messages of text": (body(messages="hello"), 400, "messages must be a list"),
    "a message of text": (body(messages=["hello"]), 400, "messages.0"),
    "an unknown role": (said("wizard"), 400, "role must be one of"),
    "the assistant first": (said("assistant", "user"), 400, "the first message must be the user's"),
    "the assistant last": (said("user", "assistant"), 400, "the last message must be the user's"),
    "system text in the middle": (said("user", "system", "user"), 400, "a system text stands only at the start"),
    "an empty message": (body(messages=[{"role": "user", "content": ""}]), 400, "the message is empty"),
    "a part of sound": (body(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]), 400, "a part must be"),
    "half a character": (body(messages=[{"role": "user", "content": "\ud800"}]), 400, "not Unicode"),
    "a mark without image": (body(messages=[{"role": "user", "content": "<ImageHere>?"}]), 400, "the message has 0"),
    "an unknown parameter": (body(temprature=1), 400, "unknown parameter 'temprature'. Did you mean 'temperature'?"),
    "an unsupported one": (body(tools=[{"type": "function"}]), 400, "tools is not supported here"),
    "two answers": (body(n=2), 400, "n is not supported here; leave it out, or pass 1"),
    "temperature as text": (body(temperature="hot"), 400, "temperature must be a number from 0 to 2"),
    "temperature as truth": (body(temperature=True), 400, "temperature must be a number"),
    "top_p of nothing": (body(top_p=0), 400, "top_p must be in (0, 1]"),
    "no tokens": (body(max_tokens=0), 400, "max_tokens must be a whole number from 1 to 480"),
    "many tokens": (body(max_tokens=10**9), 400, "max_tokens must be a whole number from 1 to 480"),
    "a seed too large": (body(seed=2**64), 400, "seed must be a whole number"),
    "five stops": (body(stop=["a"] * 5), 400, "stop must be a text"),
    "an empty stop": (body(stop=""), 400, "stop must be a text"),
    "usage without stream": (body(stream_options={"include_usage": True}), 400, "only for stream: true"),
    "more than the context": (body(messages=[{"role": "user", "content": "why " * 600}]), 400, "model reads 512"),
    "a long text": (body(messages=[{"role": "user", "content": "a" * 20_001}]), 400, "at most 20,000 are read"),
    "a large body": (b" " * 600_000 + body(), 413, "larger than 0.5 MB"),
    "another model": (body(model="gpt-9"), 404, "there is no model 'gpt-9' here"),
    "four images": (
        body(messages=[{"role": "user", "content": [json.loads(image("data:,"))["messages"][0]["content"][0]] * 4}]),
        400,
        "4 images; at most 3",
    ),
    "a file": (image("file:///etc/passwd"), 400, "only data: addresses"),
    "the metadata service": (image("http://169.254.169.254/latest/meta-data"), 400, "only data: addresses"),
    "an address that is a number": (image(7), 400, "must be a text"),
    "a text as image": (image("data:text/html;base64,aGk="), 400, "must begin like data:image/png;base64,"),
    "no base64": (image("data:image/png;base64,@@@"), 400, "not base64"),
    "words as image": (image("data:image/png;base64,aGVsbG8="), 400, "this is not an image"),
    "a damaged image": (image(cut()), 400, "damaged"),
    "an image of many pixels": (image(data_uri(Image.new("L", (300, 300)))), 400, "more than the allowed 40,000"),
    "a decompression bomb": (image(bomb()), 400, "pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_wrong_request_is_refused_and_the_next_one_is_answered(name, served):
    content, status, message = TABLE[name]
    found, reply, _ = post(served[1], content)
    error = reply["error"]
    assert (found, set(error)) == (status, {"message", "type", "param", "code"})
    assert message in f"{error['param']}: {error['message']}"
    assert "Traceback" not in str(reply)
    assert post(served[1], body())[0] == 200


def test_no_refused_request_keeps_its_place(served):
    wait_until(lambda: served[0]._work.under_way == 0)
