"""Keys, limits on requests, and what happens to the work for a client that disconnects."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import openai
import pytest

from minigpt4.chat.scheduler import Stream
from tests.server.conftest import JSON, client_of, post, running, wait_until

pytestmark = pytest.mark.slow

TEXT = {"role": "user", "content": "What is this?"}
LONG: dict[str, Any] = {"model": "tiny", "messages": [TEXT], "max_tokens": 480}
BODY = json.dumps({**LONG, "max_tokens": 2}).encode()


def send(address: str, content: bytes, headers: str = "") -> socket.socket:
    """Send a request by hand, so that the client can disconnect at any point."""
    place = urlsplit(address)
    client = socket.create_connection((place.hostname, place.port), timeout=20)
    head = f"POST {place.path}/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}\r\n"
    client.sendall(head.encode() + content)
    return client


def send_json(address: str, **values: object) -> socket.socket:
    content = json.dumps({**LONG, **values}).encode()
    return send(address, content, f"Content-Length: {len(content)}\r\n")


def rows(service) -> list[Stream]:
    return service._work._scheduler._active


def test_a_client_that_stops_reading_a_stream_frees_its_row(served):
    service, address = served
    stream = client_of(address).chat.completions.create(**LONG, stream=True)
    next(stream)
    wait_until(lambda: bool(rows(service)))
    row = rows(service)[0]
    stream.close()
    wait_until(lambda: row.finish_reason is not None)
    assert row.finish_reason == "cancelled"
    assert row.completion_tokens < 480
    wait_until(lambda: service._work.in_progress == 0)


def test_a_client_that_does_not_wait_for_its_answer_frees_its_row(served):
    service, address = served
    client = send_json(address)
    wait_until(lambda: bool(rows(service)))
    row = rows(service)[0]
    client.close()
    wait_until(lambda: row.finish_reason is not None)
    assert row.finish_reason == "cancelled"
    wait_until(lambda: service._work.in_progress == 0)


def test_waiting_requests_and_one_too_many(load):
    with running(load(max_rows=1, max_waiting=1, max_new_tokens=480)) as (service, address):
        first = client_of(address).chat.completions.create(**LONG, stream=True)
        next(first)
        wait_until(lambda: bool(rows(service)))
        waiting = send_json(address)
        wait_until(lambda: service._work.in_progress == 2)
        with pytest.raises(openai.RateLimitError, match="2 requests are in progress") as caught:
            client_of(address).chat.completions.create(**LONG)
        assert caught.value.response.headers["retry-after"] == "1"
        waiting.close()  # frees a waiting place
        wait_until(lambda: service._work.in_progress == 1)
        first.close()
        wait_until(lambda: service._work.in_progress == 0)
        assert post(address, BODY)[0] == 200


def test_a_body_without_a_length_is_counted_as_it_arrives(served):
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    client = send(served[1], chunk * 10 + b"0\r\n\r\n", "Transfer-Encoding: chunked\r\n")
    assert b" 413 " in client.recv(4096)
    endless = send(served[1], chunk * 40, "Transfer-Encoding: chunked\r\n")
    assert b" 413 " in endless.recv(4096)
    assert post(served[1], BODY)[0] == 200


def test_a_body_that_never_arrives_is_refused_and_takes_no_place(served):
    service, address = served
    client = send(address, b"{", "Content-Length: 100\r\n")
    wait_until(lambda: service._uploads.size == 1)
    assert service._work.in_progress == 0
    assert b" 408 " in client.recv(4096)
    wait_until(lambda: service._uploads.size == 0)
    gone = send(address, b"{", "Content-Length: 100\r\n")
    wait_until(lambda: service._uploads.size == 1)
    gone.close()
    wait_until(lambda: service._uploads.size == 0)


@pytest.mark.parametrize("length", ["-1", "x", "999999999999"])
def test_a_wrong_length(served, length):
    client = send(served[1], b"{}", f"Content-Length: {length}\r\n")
    assert client.recv(4096).split()[1] in (b"400", b"413")
    assert post(served[1], BODY)[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_form_of_another_page_is_rejected(served, kind):
    status, reply, _ = post(served[1], BODY, {"Content-Type": kind})
    assert status == 415
    assert "application/json" in reply["error"]["message"]


def test_other_paths_and_methods_answer_in_json(served):
    root = served[1].removesuffix("/v1")
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings: Not Found"):
        client_of(served[1]).embeddings.create(model="tiny", input="x")
    with pytest.raises(HTTPError, match="405") as caught:
        urlopen(f"{served[1]}/chat/completions")
    assert json.load(caught.value)["error"]["type"] == "invalid_request_error"
    with urlopen(f"{root}/health") as answer:
        assert json.load(answer)["status"] == "ok"


def test_a_key(load):
    with running(load(), key="secret-key") as (_, address):
        assert [model.id for model in client_of(address, "secret-key").models.list()] == ["tiny"]
        for wrong in ("secret", "secret-key2", "é"):
            status, reply, headers = post(address, BODY, {**JSON, "Authorization": f"Bearer {wrong}"})
            assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        assert post(address, b"{", {**JSON, "Authorization": "Basic secret-key"})[0] == 401
        with pytest.raises(openai.AuthenticationError, match="missing or wrong key"):
            client_of(address, "no").models.list()
        with urlopen(f"{address.removesuffix('/v1')}/health") as answer:
            assert answer.status == 200


def test_a_failing_model_is_an_error_for_the_client_without_details(load):
    loaded = load()
    loaded.model.language_model.model.lm_head.weight.data.fill_(float("nan"))
    with running(loaded) as (service, address):
        status, reply, _ = post(address, BODY)
        assert (status, reply["error"]["type"]) == (500, "server_error")
        assert "its log says why" in reply["error"]["message"]
        with pytest.raises(openai.APIError, match="its log says why"):
            list(client_of(address).chat.completions.create(**LONG, stream=True))
        wait_until(lambda: service._work.in_progress == 0)
