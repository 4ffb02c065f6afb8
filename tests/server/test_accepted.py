"""Requests as clients really send them: each gets the answer that its plain form gets."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import about, data_uri, noise, post

pytestmark = pytest.mark.slow

CASES = Path(__file__).resolve().parents[1] / "data" / "cases"
TEXT = {"role": "user", "content": "What is this?"}


def ask(served, **values: Any) -> dict[str, Any]:
    """Return the reply to a request that must be answered."""
    content = json.dumps({"model": "tiny", "messages": [TEXT], "max_tokens": 6, **values}).encode()
    status, reply, _ = post(served[1], content)
    assert status == 200, reply
    return reply


def text_of(reply: dict[str, Any]) -> str:
    return reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize("case", ["16", "17", "18"])
def test_requests_of_real_clients(served, case):
    (file,) = CASES.glob(f"{case}_*/request.json")
    reply = ask(served, **(json.loads(file.read_text(encoding="utf-8")) | {"model": "tiny"}))
    assert reply["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("content", ["", None, []])
def test_an_empty_answer_in_the_history(served, content):
    def history(answer: Any) -> list[Any]:
        return [TEXT, {"role": "assistant", "content": answer}, {"role": "user", "content": "And that?"}]

    reply, plain = ask(served, messages=history(content)), ask(served, messages=history(""))
    assert (text_of(reply), reply["usage"]) == (text_of(plain), plain["usage"])
    one_turn = [{"role": "user", "content": "What is this?\nAnd that?"}]
    tokens = reply["usage"]["prompt_tokens"]
    assert tokens > ask(served, messages=one_turn)["usage"]["prompt_tokens"]  # the empty answer is a turn
    twice = [TEXT, {"role": "assistant", "content": content}, *history("A bird.")[1:]]
    assert text_of(ask(served, messages=twice)) == text_of(ask(served, messages=history("A bird.")))


def test_an_answer_without_the_key_content(served):
    ask(served, messages=[TEXT, {"role": "assistant", "tool_calls": [], "refusal": None}, TEXT])


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("content", ["", " \n", None, [], [{"type": "text", "text": ""}]])
def test_an_empty_system_text_is_none(served, role, content):
    empty = {"role": role, "content": content}
    plain = ask(served)
    assert ask(served, messages=[empty, TEXT])["usage"] == plain["usage"]
    assert text_of(ask(served, messages=[empty, TEXT])) == text_of(plain)
    brief = {"role": "system", "content": "Be brief."}
    assert text_of(ask(served, messages=[empty, brief, TEXT])) == text_of(ask(served, messages=[brief, TEXT]))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [0, -1, None])
def test_no_limit_of_its_own_is_the_default(served, name, value):
    reply = ask(served, **{"max_tokens": None, name: value})
    assert reply["usage"]["completion_tokens"] == 12
    assert reply["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("words", [1, 130])
@pytest.mark.parametrize("value", [481, 4096, 2**31, 10**30])
def test_a_limit_above_the_room_is_cut_to_it(served, value, words):
    question = {"role": "user", "content": "why " * words}
    reply = ask(served, messages=[question], max_tokens=value)
    prompt, answer = reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]
    assert answer == min(480, 512 - prompt)
    assert reply["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "spell",
    [
        lambda png: {"url": f"data:image/png;base64,{base64.encodebytes(png).decode()}"},
        lambda png: {"url": f"data:image/png;base64,{base64.encodebytes(png).decode()}".replace("\n", "\r\n")},
        lambda png: {"url": f" data:image/png;base64, {base64.b64encode(png).decode()} "},
        lambda png: {"url": f"data:image/png;base64,{base64.urlsafe_b64encode(png).decode()}"},
        lambda png: {"url": f"data:image/png;base64,{base64.b64encode(png).decode().rstrip('=')}"},
        lambda png: {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}".replace("+", "%2B")},
        lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
        lambda png: f"data:image/png;base64,{base64.urlsafe_b64encode(png).decode().rstrip('=')}\n",
    ],
)
@pytest.mark.parametrize("size", [26, 27, 28])
def test_spellings_of_an_image(served, spell, size):
    buffer = io.BytesIO()
    noise(size, size).save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue())
    assert b"+" in encoded
    assert b"/" in encoded
    part = {"type": "image_url", "image_url": spell(buffer.getvalue())}
    message = {"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}
    plain = ask(served, messages=[about(noise(size, size), "What is it?")])
    assert text_of(ask(served, messages=[message])) == text_of(plain)


def test_an_image_alone_is_a_question(served):
    part = {"type": "image_url", "image_url": data_uri(noise(1))}
    for extra in ([], [{"type": "text", "text": ""}]):
        ask(served, messages=[{"role": "user", "content": [*extra, part]}])


OFF: dict[str, list[Any]] = {
    "top_k": [-1, 0, None], "top_p": [1, 1.0, None], "stop": ["", [], [""], None],
    "temperature": [0, 0.0, None, 1e-320], "repetition_penalty": [1, 1.0, None],
    "response_format": [{"type": "text"}, None], "tools": [[], None], "tool_choice": ["none", "auto", None],
    "functions": [[]], "function_call": ["none", "auto"], "parallel_tool_calls": [True, False],
    "n": [1, None], "best_of": [1], "logprobs": [False, None], "top_logprobs": [0, None],
    "presence_penalty": [0, 0.0], "frequency_penalty": [0, 0.0], "logit_bias": [{}, None],
    "user": ["me", ""], "metadata": [{}, {"a": "b"}], "store": [False, True], "seed": [None, 7],
    "stream": [False, None], "stream_options": [None, {}, {"include_usage": False}, {"include_usage": None}],
    "modalities": [["text"]], "service_tier": ["auto"], "model": [None], "verbosity": ["medium"],
    "min_p": [0, 0.0], "min_tokens": [0], "length_penalty": [1.0], "ignore_eos": [False], "use_beam_search": [False],
    "stop_token_ids": [[]], "skip_special_tokens": [True], "max_completion_tokens": [None, 6],
}  # fmt: skip


@pytest.mark.parametrize("name", OFF)
def test_values_that_change_nothing(served, name):
    plain = text_of(ask(served))
    for value in OFF[name]:
        assert text_of(ask(served, **{name: value})) == plain, value


def test_top_k_of_minus_one_samples_from_all(served):
    sample = {"temperature": 2, "seed": 3, "max_tokens": 20}
    assert text_of(ask(served, **sample, top_k=-1)) == text_of(ask(served, **sample))
    assert text_of(ask(served, **sample, top_k=1)) == text_of(ask(served, max_tokens=20))


@pytest.mark.parametrize("penalty", [0.01, 100])
@pytest.mark.parametrize("temperature", [1e-3, 2])
def test_the_bounds_of_the_parameters_give_answers(served, penalty, temperature):
    reply = ask(served, repetition_penalty=penalty, temperature=temperature, top_p=1e-320, max_tokens=40)
    assert reply["usage"]["completion_tokens"] > 0
