"""No request gets a 500, and no request changes the answer of another client."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from minigpt4.config.sections import ChatConfig, ServerConfig
from minigpt4.errors import RequestError
from minigpt4.server.request import read_request
from tests.server.conftest import data_uri, noise, post
from tests.server.test_accepted import OFF, TEXT

pytestmark = pytest.mark.slow

NUMBERS = st.one_of(
    st.integers(-3, 5),
    st.integers(),
    st.floats(allow_nan=False),
    st.sampled_from([1e-320, -1e-320, 1e308, 2**31, 2**63, 2**64, -(2**63), 10**399, 0.01, 100, 1e-3, 2]),
)
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["", "<ImageHere>", "\ud800", "###", "\0", "a" * 300]))
ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
URLS = st.one_of(TEXTS.map("data:image/png;base64,{}".format), st.just(data_uri(noise(1))), st.just("http://[::1"), ANY)
IMAGES = URLS | st.fixed_dictionaries({"url": URLS}, optional={"detail": ANY})
PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": IMAGES}),
    ANY,
)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "developer"]) | ANY,
        "content": TEXTS | st.lists(PARTS, max_size=3) | ANY,
    },
    optional={"name": ANY, "tool_calls": ANY, "refusal": ANY},
)
LISTS = st.lists(MESSAGES, max_size=3)
NAMES = st.sampled_from(sorted({*OFF, "max_tokens"}))
REQUESTS = st.builds(
    lambda values, messages: {"messages": messages, **values},
    st.dictionaries(NAMES, NUMBERS | ANY, max_size=3) | st.dictionaries(NAMES | TEXTS, ANY, max_size=3),
    st.just([TEXT]) | LISTS | LISTS.map(lambda messages: [*messages, TEXT]) | ANY,
)


@given(REQUESTS | ANY)
@settings(max_examples=400, deadline=None)
def test_a_request_is_read_or_refused(values):
    refused: RequestError | None = None
    try:
        asked = read_request(json.dumps(values).encode(), ChatConfig(), ServerConfig(max_new_tokens=480))
    except RequestError as error:
        refused = error
    if refused is not None:
        assert refused.status == 400
        assert f"{refused}{refused.param}".encode()  # the reply can be written
        return
    assert 1 <= asked.settings.max_new_tokens <= 480
    assert asked.dialogue.turns[-1].answer is None


@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\ud8019eE-.ntf', max_size=60).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_a_body_of_any_bytes_is_refused(body):
    with pytest.raises(RequestError):
        read_request(body, ChatConfig(), ServerConfig())


def test_any_request_gets_a_status_below_500_and_no_other_answer_changes(served, record_property):
    """Another client asks the same question all the time."""
    record_property("figure: generated requests to a service: answered or refused, no other answer changed", 300)
    question = json.dumps({"messages": [TEXT], "max_tokens": 30}).encode()
    expected = post(served[1], question)[1]["choices"]
    found, over = [], threading.Event()

    def other_client() -> None:
        while not over.is_set():
            found.append(post(served[1], question)[1].get("choices"))

    @given(REQUESTS)
    @settings(max_examples=300, deadline=None)
    def any_request(values: dict[str, Any]) -> None:
        content = json.dumps({**values, "stream": False, "max_completion_tokens": 8}).encode()
        status, reply, _ = post(served[1], content)
        assert status == 200 or (400 <= status < 500 and reply["error"]["message"]), reply

    thread = threading.Thread(target=other_client)
    thread.start()
    try:
        any_request()
    finally:
        over.set()
        thread.join()
    assert len(found) > 5
    assert all(choices == expected for choices in found)


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"repetition_penalty": 1e-320, "temperature": 1}, 400),
        ({"temperature": 1e-320}, 200),
        ({"top_p": 1e-320, "temperature": 2}, 200),
    ],
)
def test_one_client_cannot_end_the_answers_of_six_others(served, values, status):
    question = {"messages": [TEXT], "max_tokens": 40}
    expected = post(served[1], json.dumps(question).encode())[1]["choices"]
    with ThreadPoolExecutor(6) as clients:
        others = [clients.submit(post, served[1], json.dumps(question).encode()) for _ in range(6)]
        found, _, _ = post(served[1], json.dumps({**question, **values}).encode())
        replies = [other.result()[1]["choices"] for other in others]
    assert found == status
    assert replies == [expected] * 6
