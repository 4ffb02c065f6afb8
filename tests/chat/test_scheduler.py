"""Many requests, one loop: every answer is independent of the others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from minigpt4.chat.engine import Engine, Prompt
from minigpt4.chat.scheduler import Scheduler
from minigpt4.config.sections import ChatConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.errors import ContextLengthError, ConversationError, DecodingError
from tests.chat.conftest import image

GREEDY = ChatConfig(max_new_tokens=12)
LONG = ChatConfig(max_new_tokens=400)


def prompt(engine: Engine, question: str, *colours: str) -> Prompt:
    return Prompt(Dialogue((Turn(question),)), engine.query_features([image(c) for c in colours]))


@pytest.fixture
def engine(loaded) -> Engine:
    return Engine(loaded)


@pytest.fixture
def scheduler(engine) -> Iterator[Scheduler]:
    with closing(Scheduler(engine, max_rows=3)) as running:
        yield running


def test_answers_of_many_threads_are_those_of_one_by_one(engine, scheduler):
    asked = [prompt(engine, "Why? " * (n % 5 + 1), *["red", "blue"][: n % 3]) for n in range(12)]
    settings = [
        ChatConfig(max_new_tokens=4 + n % 7, temperature=2.0 * (n % 2), seed=n, top_k=40 * (n % 3)) for n in range(12)
    ]
    alone = [engine.decode([p], s)[0] for p, s in zip(asked, settings, strict=True)]
    found: dict[int, list[str]] = {}
    streams = {}

    def client(n: int) -> None:
        streams[n] = scheduler.submit(asked[n], settings[n])
        found[n] = list(streams[n])

    threads = [threading.Thread(target=client, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for n, answer in enumerate(alone):
        assert "".join(found[n]) == answer.text
        assert streams[n].finish_reason == answer.finish_reason
        assert streams[n].completion_tokens == len(answer.ids)
        assert streams[n].prompt_tokens == len(engine.embeds(asked[n], 1))


def test_a_cancelled_stream_frees_its_row_for_those_who_wait(engine, scheduler):
    long = [scheduler.submit(prompt(engine, f"Go on {n}"), LONG) for n in range(3)]
    waiting = scheduler.submit(prompt(engine, "Short?"), GREEDY)
    impatient = scheduler.submit(prompt(engine, "Never"), GREEDY)
    first = next(iter(long[0]))
    impatient.cancel()
    assert list(impatient) == []
    assert impatient.finish_reason == "cancelled"
    assert waiting.finish_reason is None
    assert long[1].finish_reason is None
    for stream in long:
        stream.cancel()
    assert "".join(waiting) == engine.answer([prompt(engine, "Short?")], GREEDY)[0]
    for stream in long:
        rest = "".join(stream)
        assert stream.finish_reason == "cancelled"
        assert stream.completion_tokens < LONG.max_new_tokens
    assert first or rest


def test_leaving_the_loop_early_cancels(engine, scheduler):
    stream = scheduler.submit(prompt(engine, "Go on"), LONG)
    for _ in stream:
        break
    assert "".join(scheduler.submit(prompt(engine, "Next"), GREEDY)) is not None
    assert stream.finish_reason == "cancelled"


def test_what_cannot_be_asked_is_an_error_at_once(engine, scheduler):
    with pytest.raises(ContextLengthError, match="reads 512"):
        scheduler.submit(prompt(engine, "Why? " * 300), GREEDY)
    with pytest.raises(ConversationError, match=r"mention 1 image\(s\), but the sample has 0"):
        scheduler.submit(Prompt(Dialogue((Turn("What is <ImageHere>?"),))), GREEDY)


def test_an_answer_is_cut_to_the_room_that_the_prompt_leaves(engine, scheduler):
    stream = scheduler.submit(prompt(engine, "Why? " * 90), ChatConfig(max_new_tokens=600))
    assert len(list(stream)) > 0
    assert stream.prompt_tokens + stream.completion_tokens == 512
    assert stream.finish_reason == "length"


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1e-320, "temperature": 1.0}, {"temperature": 1e-320}])
def test_settings_that_fail_at_a_token_end_their_own_row_only(engine, scheduler, settings):
    long = ChatConfig(max_new_tokens=60)
    expected = engine.answer([prompt(engine, "Why?")], long)[0]
    others = [scheduler.submit(prompt(engine, "Why?"), long) for _ in range(2)]
    iterators = [iter(other) for other in others]
    pieces = [next(iterator) for iterator in iterators]
    with pytest.raises(DecodingError, match="probabilities of the next token are not finite"):
        list(scheduler.submit(prompt(engine, "Who?"), ChatConfig(max_new_tokens=60, **settings)))
    assert [first + "".join(rest) for first, rest in zip(pieces, iterators, strict=True)] == [expected, expected]


def test_a_request_that_fails_fails_alone(engine, scheduler):
    good = prompt(engine, "Why?")
    wanted = engine.answer([good], GREEDY)[0]
    picture = prompt(engine, "Why?", "red")
    bad = Prompt(picture.dialogue, torch.full_like(picture.query_features, float("nan")))
    streams = [scheduler.submit(p, GREEDY) for p in (good, bad, good)]
    assert ["".join(streams[n]) for n in (0, 2)] == [wanted, wanted]
    with pytest.raises(DecodingError, match="not finite"):
        list(streams[1])
    assert streams[1].finish_reason == "error"


def test_a_model_that_breaks_fails_who_is_in_and_serves_who_comes(engine, scheduler, loaded):
    head = loaded.model.language_model.model.lm_head
    stream = scheduler.submit(prompt(engine, "Go on"), LONG)
    next(iter(stream))
    weight = head.weight
    stream = scheduler.submit(prompt(engine, "Go on"), LONG)
    head.weight = torch.nn.Parameter(weight[:, :5])  # a shape that no pass survives
    with pytest.raises(RuntimeError):
        list(stream)
    head.weight = weight
    assert (
        "".join(scheduler.submit(prompt(engine, "Next"), GREEDY)) == engine.answer([prompt(engine, "Next")], GREEDY)[0]
    )


def test_a_stop_text_ends_and_never_shows(engine, scheduler):
    whole = engine.answer([prompt(engine, "Why?")], GREEDY)[0]
    mark = whole[len(whole) // 2 :][:3]
    stream = scheduler.submit(prompt(engine, "Why?"), GREEDY, stop=[mark])
    assert "".join(stream) == whole[: whole.index(mark)].strip()
    assert stream.finish_reason == "stop"


def test_a_closed_scheduler_ends_what_it_has_and_takes_no_more(engine):
    scheduler = Scheduler(engine, max_rows=1)
    streams = [scheduler.submit(prompt(engine, "Go on"), LONG) for _ in range(2)]
    scheduler.close()
    for stream in streams:
        with pytest.raises(DecodingError, match="closed"):
            list(stream)
    with pytest.raises(DecodingError, match="closed"):
        scheduler.submit(prompt(engine, "Why?"), GREEDY)
    with pytest.raises(ValueError, match="max_rows"):
        Scheduler(engine, max_rows=0)
