"""Images from http addresses: only public ones, also behind names and redirects, within limits of size and time."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from minigpt4.config.sections import ServerConfig
from minigpt4.errors import RequestError
from minigpt4.processors.image import ImageProcessor, ImageSpec
from minigpt4.server.images import ImageReader, RemoteImages, is_public
from minigpt4.server.messages import ImageReference
from tests.server.conftest import data_uri, noise

pytestmark = pytest.mark.slow

LIMITS = ServerConfig(image_urls=True, image_url_seconds=0.7, image_url_megabytes=0.01)
PRIVATE = [
    *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1"),
    *("::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "255.255.255.255"),
]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.strip("/").partition("?")[0]
        if name.startswith("to-"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2] or "/to-")
            self.end_headers()
        elif name == "slow-head":
            self._drip(b"HTTP/1.0 200 OK\r\n" + b"X: y\r\n" * 100)
        elif name == "slow-body":
            self.send_response(200)
            self.end_headers()
            self._drip(b"x" * 100)
        else:
            self.send_response(404 if name == "gone" else 200)
            self.end_headers()
            self.wfile.write(b"x" * (20_000 if name == "large" else 5))

    def _drip(self, content: bytes) -> None:
        for n in range(len(content)):
            try:
                self.wfile.write(content[n : n + 1])
            except OSError:
                return
            time.sleep(0.05)

    def log_message(self, *_arguments: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def here() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(url: str, allows: Callable[[object], bool] = lambda address: True) -> bytes:
    return RemoteImages(LIMITS, allows).fetch(url)


def test_an_image_is_fetched(here):
    assert fetch(f"{here}/image.png") == b"xxxxx"
    assert fetch(f"{here}/to-?/image.png") == b"xxxxx"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone", "status 404"),
        ("large", "larger than 0.01 MB"),
        ("slow-body", "cannot be fetched"),
        ("slow-head", "cannot be fetched"),
        ("to-", "more than 3 redirects"),
        ("to-?file:///etc/passwd", "must begin with data:"),
    ],
)
def test_content_that_cannot_be_fetched(here, path, message):
    started = time.monotonic()
    with pytest.raises(RequestError, match=message):
        fetch(f"{here}/{path}")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address):
    assert not is_public(ipaddress.ip_address(address))
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(RequestError, match=r"not public|cannot be fetched"):
        RemoteImages(LIMITS).fetch(f"http://{host}/x.png")


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public(ipaddress.ip_address(address))


def test_names_and_redirects_are_checked_too(here):
    port = here.rpartition(":")[2]
    with pytest.raises(RequestError, match="not public"):
        RemoteImages(LIMITS).fetch(f"http://localhost:{port}/image.png")
    first = ipaddress.ip_address("127.0.0.1")
    with pytest.raises(RequestError, match="not public"):
        fetch(f"{here}/to-?http://127.0.0.2:{port}/image.png", lambda address: address == first)


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "http://user:word@example.org/x", "http://", "http://[::1", "gopher:x", ""]
)
def test_addresses_of_other_kinds(url):
    with pytest.raises(RequestError) as caught:
        fetch(url)
    assert caught.value.code == "invalid_image_url"


def test_an_image_is_read_with_its_place_in_messages():
    spec = ImageSpec(16, 24, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    reader = ImageReader(LIMITS, ImageProcessor(ImageProcessor.Config(max_pixels=1000), spec))
    assert torch.equal(reader(ImageReference(data_uri(noise(1)), "messages.0")), reader._process(noise(1)))
    with pytest.raises(RequestError, match="not public") as caught:
        reader(ImageReference("http://127.0.0.1/x.png", "messages.3.content.1.image_url"))
    assert caught.value.param == "messages.3.content.1.image_url"
    with pytest.raises(RequestError, match="more than the allowed 1,000"):
        reader(ImageReference(data_uri(noise(1, 40)), "messages.0"))
    reader.close()
