"""The memory of a service, measured on a process of its own; and how it behaves while it is flooded."""

from __future__ import annotations

import json
import random
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from tests.server.conftest import about, data_uri, memory, noise, post, process
from tests.server.test_hostile import TABLE
from tests.server.test_limits import BODY, send

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


def question(*addresses: str) -> bytes:
    parts = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    return json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 2}).encode()


@pytest.mark.long
def test_large_images_in_many_requests_do_not_add_up(tiny_file):
    """One of these images has 64 MB as RGB; each of 24 requests once held 200 to 700 MB of them."""
    wide = data_uri(Image.new("RGB", (4000, 4000), "red"))
    deep = data_uri(Image.fromarray(np.full((4000, 4000), 40_000, np.uint16)))
    with process(tiny_file) as (service, address, _):
        assert post(address, question(data_uri(noise(1))))[0] == 200
        before = memory(service, "VmRSS")
        with ThreadPoolExecutor(24) as clients:
            bodies = [question(wide, wide), question(deep)] * 12
            assert [reply[0] for reply in clients.map(lambda body: post(address, body), bodies)] == [200] * 24
        assert memory(service, "VmHWM") - before < 450


def test_400_half_sent_headers_with_few_files(tiny_file, record_property):
    """Once: no answer to anybody, and 163 MB of log."""
    record_property("figure: half-sent headers to a service: other clients are answered in time", 400)
    few = ["bash", "-c", 'ulimit -n 256; exec "$@"', "few"]
    with process(tiny_file, "server.header_seconds=3", prefix=few) as (_, address, lines), ExitStack() as stack:
        place = urlsplit(address)
        for _ in range(400):
            client = stack.enter_context(socket.create_connection((place.hostname, place.port), timeout=5))
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        started = time.monotonic()
        with urlopen(f"{address.removesuffix('/v1')}/health", timeout=5) as answer:
            assert answer.status == 200
        assert post(address, BODY)[0] == 200
        assert time.monotonic() - started < 3
        time.sleep(4)
        log = "".join(lines)
        assert "made room for another one (server.max_connections) (100 times" in log
        assert len(log) < 5000


def test_100_connections_without_a_body_keep_nobody_out(tiny_file, record_property):
    record_property("figure: connections without a body: other clients are answered", 100)
    with process(tiny_file) as (_, address, _), ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(send(address, b"", "Content-Length: 100\r\n"))
        assert [post(address, BODY)[0] for _ in range(5)] == [200] * 5


@pytest.mark.long
def test_memory_after_1000_requests_is_that_after_100(tiny_file, record_property):
    """Requests of every kind, from 8 clients at once, in an order of chance."""
    record_property("figure: hostile and honest requests mixed: memory within 10 % of that after 100", 1000)
    chance = random.Random(0)
    hostile = [body for body, _, _ in TABLE.values()]
    honest = [
        BODY,
        question(data_uri(noise(2, 300)), data_uri(noise(3, 500))),
        json.dumps({"messages": [about(noise(4, 1200), "What is this?")], "max_tokens": 20}).encode(),
        json.dumps({"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 100, "stream": False}).encode(),
        question(data_uri(Image.new("RGB", (4000, 4000), "red"))),
    ]

    def one(address: str, number: int) -> int:
        if number % 10 == 0:  # a client that leaves while its answer is made
            send(address, BODY, f"Content-Length: {len(BODY)}\r\n").close()
            return 200
        return post(address, chance.choice(hostile if number % 2 else honest))[0]

    with process(tiny_file, "server.max_body_megabytes=5") as (service, address, _):
        after = []
        for numbers in (range(100), range(100, 1000)):
            with ThreadPoolExecutor(8) as clients:
                statuses = list(clients.map(lambda number: one(address, number), numbers))
            assert max(statuses) < 500
            after.append(memory(service, "VmRSS"))
        assert after[1] < 1.1 * after[0], after
