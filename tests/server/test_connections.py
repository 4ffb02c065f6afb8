"""Clients that connect and then send or read nothing: the others are answered, and the log stays short."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from starlette.requests import Request

from minigpt4.config.sections import ServerConfig
from minigpt4.errors import RequestError
from minigpt4.server.connections import allowed_connections
from minigpt4.server.uploads import Uploads
from tests.server.conftest import post, running, wait_until
from tests.server.test_limits import BODY, LONG, send, send_json

pytestmark = pytest.mark.slow

HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def guarded(load):
    """The tiny model, with few connections and short deadlines."""
    seconds = {"header_seconds": 0.6, "body_seconds": 20.0, "send_seconds": 0.6, "shutdown_seconds": 2.0}
    with running(load(max_connections=20, max_rows=2, max_waiting=4, max_total_megabytes=1.0, **seconds)) as service:
        yield service


def connect(address: str) -> socket.socket:
    place = urlsplit(address)
    return socket.create_connection((place.hostname, place.port), timeout=20)


@contextmanager
def connections(address: str, count: int, content: bytes) -> Iterator[list[socket.socket]]:
    """Open connections that have sent `content`."""
    with ExitStack() as stack:
        opened = [stack.enter_context(connect(address)) for _ in range(count)]
        for each in opened:
            each.sendall(content)
        yield opened


def closed(client: socket.socket) -> bool:
    """Return whether the service has closed the connection without an answer."""
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def health(address: str) -> dict:
    with urlopen(f"{address.removesuffix('/v1')}/health", timeout=5) as answer:
        return json.load(answer)


@pytest.mark.parametrize("content", [HALF, b"", b"G"])
def test_a_header_that_never_ends_closes_its_connection(guarded, caplog, content):
    with connections(guarded[1], 3, content) as clients:
        time.sleep(0.3)
        assert not any(map(closed, clients))
        wait_until(lambda: all(map(closed, clients)), 3)
    assert "sent no complete request (server.header_seconds)" in caplog.text


def test_a_header_that_comes_byte_by_byte_is_not_waited_for(guarded):
    with connect(guarded[1]) as client:
        started = time.monotonic()
        while not closed(client) and time.monotonic() < started + 5:
            client.setblocking(True)
            with suppress(OSError):
                client.sendall(b"x")
            time.sleep(0.1)
        assert time.monotonic() - started < 3


def test_the_second_header_of_a_connection_has_a_deadline_too(guarded):
    with connect(guarded[1]) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in client.recv(4096)
        client.sendall(HALF)
        wait_until(lambda: closed(client), 3)


def test_more_connections_than_the_cap_replace_those_that_wait(guarded):
    """An answer that is being made is not ended by a flood of connections."""
    service, address = guarded
    expected = post(address, BODY)[1]["choices"]
    wait_until(lambda: service._work.in_progress == 0)
    asked = send_json(address, max_tokens=300)
    wait_until(lambda: service._work.in_progress == 1)
    with connections(address, 100, HALF):
        assert health(address)["status"] == "ok"
        assert post(address, BODY)[1]["choices"] == expected
    reply = b""
    while chunk := asked.recv(65536):
        reply += chunk
        if b'"finish_reason"' in reply:
            break
    assert b" 200 OK" in reply
    asked.close()


def test_when_all_connections_are_answered_the_next_one_is_refused(load):
    with running(load(max_connections=2, max_new_tokens=480, shutdown_seconds=1.0)) as (service, address):
        asked = [send_json(address, max_tokens=480, stream=True) for _ in range(2)]
        wait_until(lambda: service._work.in_progress == 2)
        with connect(address) as third:
            assert third.recv(4096).startswith(b"HTTP/1.1 503 ")
        for client in asked:
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
            client.close()
        wait_until(lambda: service._work.in_progress == 0)
        assert post(address, BODY)[0] == 200


def test_connections_without_a_body_take_no_place(guarded):
    service, address = guarded
    clients = [send(address, b"", "Content-Length: 100\r\n") for _ in range(15)]
    wait_until(lambda: len(service._uploads.receiving) == 15)
    assert health(address)["requests_under_way"] == 0
    assert [post(address, BODY)[0] for _ in range(3)] == [200] * 3
    assert len(service._uploads.receiving) == 15
    for client in clients:
        client.close()
    wait_until(lambda: not service._uploads.receiving)


def test_incomplete_bodies_make_room_for_others(guarded):
    """All bodies together may have 1 MB: five that stopped after 0.3 MB each do not keep a sixth out."""
    service, address = guarded
    clients = [send(address, b" " * 300_000, "Content-Length: 900000\r\n") for _ in range(5)]
    wait_until(lambda: len(service._uploads.receiving) == 3)
    assert service._uploads.size <= 1_000_000
    assert post(address, b" " * 900_000 + BODY)[0] == 200
    assert b" 408 " in clients[0].recv(4096)
    for client in clients:
        client.close()
    wait_until(lambda: service._uploads.size == 0)
    status, reply, headers = post(address, b" " * 1_100_000 + BODY)
    assert (status, headers["retry-after"]) == (429, "1")
    assert "the requests in progress have 1 MB" in reply["error"]["message"]
    assert service._uploads.size == 0


def test_a_body_that_was_given_up_counts_no_more():
    """Its next chunk is there before its timer runs: counted again, it would push out a third one."""
    uploads = Uploads(ServerConfig(max_total_megabytes=1.0))

    async def receive(name: str, chunks: list[int], order: list[str]) -> int | str:
        sizes = iter(chunks)

        async def message() -> dict:
            size = next(sizes, 0)
            while order[0] != name:
                await asyncio.sleep(0)
            order.pop(0)
            return {"type": "http.request", "body": b" " * size, "more_body": bool(size)}

        try:
            with uploads.upload() as upload:
                return len(await upload.receive(Request({"type": "http", "headers": []}, message)))
        except RequestError as error:
            return error.status

    async def all_bodies() -> list[int | str]:
        order = ["first", "second", "third", "third", "first", "third", "second", ""]
        bodies = {"first": [300_000, 500_000], "second": [400_000], "third": [200_000, 200_000]}
        return await asyncio.gather(*(receive(name, chunks, order) for name, chunks in bodies.items()))

    assert asyncio.run(all_bodies()) == [408, 400_000, 400_000]
    assert uploads.size == 0


def test_a_client_that_does_not_read_its_answer_is_disconnected(load, caplog):
    """The answer is longer than what the sockets hold."""
    limits = {"max_new_tokens": 480, "send_seconds": 0.5, "shutdown_seconds": 1.0}
    with running(load(**limits), name="x" * 30_000) as (service, address):  # each event has the name
        place = urlsplit(address)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((place.hostname, place.port))
        content = json.dumps({**LONG, "model": None, "stream": True}).encode()
        client.sendall(
            f"POST {place.path}/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        wait_until(lambda: "did not read its answer (server.send_seconds)" in caplog.text)
        wait_until(lambda: service._work.in_progress == 0)
        client.close()


def test_health_answers_while_a_large_body_is_parsed(load):
    with running(load(max_body_megabytes=20.0)) as (_, address):
        slowest = 0.0
        contents = [b'{"a": [' + b"[]," * 4_000_000 + b"[]]}", b'{"messages": ["' + b"a" * 12_000_000 + b'"]}']
        for content in contents:
            client = send(address, content, f"Content-Length: {len(content)}\r\n")
            client.setblocking(False)
            answered = False
            while not answered:
                started = time.monotonic()
                health(address)
                slowest = max(slowest, time.monotonic() - started)
                try:
                    answered = b" 400 " in client.recv(4096)
                except BlockingIOError:
                    continue
            client.close()
        assert slowest < 1


def test_the_cap_fits_the_files_that_the_process_may_open(caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert allowed_connections(ServerConfig(max_connections=100)) == 100
    beyond = ServerConfig(max_connections=hard + 1)
    try:
        with caplog.at_level(logging.WARNING, "minigpt4"):
            assert 0 < allowed_connections(beyond) < hard
        assert f"may open only {hard} files (ulimit -n)" in caplog.text
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
