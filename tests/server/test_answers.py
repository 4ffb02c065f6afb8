"""OpenAI's client gets the model's own answers: whole, streamed, in a conversation, and many at the same time."""

from __future__ import annotations

import base64
import io
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from minigpt4 import load_model
from minigpt4.chat.engine import Engine, Prompt
from minigpt4.config.paths import shipped
from minigpt4.config.sections import ChatConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from tests.server.conftest import about, client_of, noise, running

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"role": "user", "content": "What is this?"}


@pytest.fixture(scope="module")
def engine(load) -> Engine:
    return Engine(load())


def own_answer(engine, *turns, images=(), system=None, tokens=12, stop=()) -> str:
    prompt = Prompt(Dialogue(tuple(Turn(*turn) for turn in turns), system), engine.query_features(images))
    return engine.answer([prompt], ChatConfig(max_new_tokens=tokens), stop)[0]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "minigpt4"
    with pytest.raises(openai.NotFoundError, match="unknown model 'other'; this service has 'tiny'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[TEXT])


def test_an_image_and_a_question(client, engine):
    reply = client.chat.completions.create(model="tiny", messages=[about(noise(1), "What is it?")])
    expected = own_answer(engine, ("<ImageHere> What is it?",), images=[noise(1)])
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
    assert expected != own_answer(engine, ("<ImageHere> What is it?",), images=[noise(2)])


def test_a_stream_is_the_same_answer_in_pieces(client, engine):
    asked = {"model": "tiny", "messages": [about(noise(1), "What is it?")], "stream": True}
    chunks = list(client.chat.completions.create(**asked, stream_options={"include_usage": True}))
    first, *others, last, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    pieces = [chunk.choices[0].delta.content for chunk in others]
    assert len(pieces) > 2
    assert "".join(pieces) == own_answer(engine, ("<ImageHere> What is it?",), images=[noise(1)])
    assert last.choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage.completion_tokens) == ([], 12)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.choices for chunk in client.chat.completions.create(**asked))  # no usage unless asked for


def test_a_conversation_with_system_text_and_images_in_two_turns(client, engine):
    messages = [
        {"role": "system", "content": "Be brief."},
        about(noise(1), "What is it?"),
        {"role": "assistant", "content": "A bird."},
        about(noise(2), "And <ImageHere>, what is that?"),
    ]
    reply = client.chat.completions.create(model="tiny", messages=messages)
    turns = [("<ImageHere> What is it?", "A bird."), ("And <ImageHere>, what is that?",)]
    assert reply.choices[0].message.content == own_answer(
        engine, *turns, images=[noise(1), noise(2)], system="Be brief."
    )


def test_messages_of_one_side_in_a_row_are_one(client, engine):
    parts = [TEXT, {"role": "user", "content": [{"type": "text", "text": "Say."}]}]
    reply = client.chat.completions.create(model="tiny", messages=parts)
    assert reply.choices[0].message.content == own_answer(engine, ("What is this?\nSay.",))


def test_stop_text_ends_the_answer_and_does_not_show(client, engine):
    whole = own_answer(engine, ("What is this?",), tokens=40)
    stop = whole[6:9]
    asked = {"model": "tiny", "messages": [TEXT], "max_completion_tokens": 40}
    for given in (stop, ["not in it", stop]):
        reply = client.chat.completions.create(**asked, stop=given)
        assert reply.choices[0].message.content == whole[: whole.index(stop)].rstrip()
        assert reply.choices[0].finish_reason == "stop"
    pieces = client.chat.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole[: whole.index(stop)].rstrip()


def test_a_seed_repeats_a_sample_and_no_seed_does_not(client):
    def sample(**settings):
        asked = {"model": "tiny", "messages": [TEXT], "temperature": 2, "max_tokens": 20, **settings}
        return client.chat.completions.create(**asked).choices[0].message.content

    assert sample(seed=1) == sample(seed=1) != sample(seed=-2)
    assert sample() != sample()
    assert sample(seed=3, top_p=1e-6) == sample(seed=4, top_p=1e-6) == sample(temperature=0)


@pytest.mark.slow
def test_thirty_two_clients_get_their_own_answers(served, engine):
    questions = [f"Tell me about number {n}" + ", please" * (n % 5) for n in range(32)]
    images = [noise(n) if n % 3 else None for n in range(32)]
    expected = [
        own_answer(engine, (f"<ImageHere> {text}" if image else text,), images=[image] if image else [], tokens=8 + n)
        for n, (text, image) in enumerate(zip(questions, images, strict=True))
    ]
    assert len(set(expected)) > 24

    def ask(n: int) -> str:
        message = about(images[n], questions[n]) if images[n] else {"role": "user", "content": questions[n]}
        asked: dict[str, Any] = {"model": "tiny", "messages": [message], "max_tokens": 8 + n}
        client = client_of(served[1])
        if n % 2:
            return client.chat.completions.create(**asked).choices[0].message.content
        chunks = client.chat.completions.create(**asked, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(32) as people:
        assert list(people.map(ask, range(32))) == expected


@pytest.mark.mini
def test_the_mini_model_sees_what_each_client_shows_and_the_documented_example_works(capsys, monkeypatch):
    shapes = {"red_triangle": "red", "blue_circle": "blue", "green_rectangle": "green", "yellow_circle": "yellow"}

    with running(load_model("mini", device="cpu"), name="mini") as (_, address):

        def ask(shape: str) -> str:
            image = Image.open(shipped("eval_configs", "mini", "examples", f"{shape}.png"))
            asked: dict[str, Any] = {"model": "mini", "messages": [about(image, "What colour is the shape?")]}
            return client_of(address).chat.completions.create(**asked).choices[0].message.content

        with ThreadPoolExecutor(4) as people:
            assert list(people.map(ask, shapes)) == list(shapes.values())
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "chat.md").read_text(encoding="utf-8"), re.DOTALL)
        (example,) = [block for block in blocks if "from openai" in block]
        monkeypatch.chdir(ROOT)
        exec(example.replace("http://127.0.0.1:8000/v1", address), {})
    assert capsys.readouterr().out == "red"


def test_a_data_address_of_any_image_type(client, engine):
    buffer = io.BytesIO()
    noise(1).save(buffer, "WEBP", lossless=True)
    url = f"data:image/webp;charset=utf-8;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    part = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    reply = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part]}])
    assert reply.choices[0].message.content == own_answer(engine, ("<ImageHere>",), images=[noise(1)])
