"""The images of a request: from the address that a client sent to the tensor that the vision encoder takes.

Input: `data:` addresses, or http(s) addresses if the service allows them. Output: pixel values. Fetching must not give
clients a way into the network of the service: the host name is looked up once, every address behind it must be public,
the connection goes to the address that was checked, and each redirect is checked in the same way.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from minigpt4.config.sections import ServerConfig
from minigpt4.errors import ImageError, RequestError
from minigpt4.processors.image import ImageProcessor, open_image
from minigpt4.server.messages import ImageReference

if TYPE_CHECKING:
    from torch import Tensor

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
MAX_REDIRECTS = 3
MAX_FETCHES = 8
"""Images fetched from other machines at once."""
_DATA = re.compile(r"data:image/[a-z0-9.+-]+(;[a-z0-9=-]+)*;base64,", re.IGNORECASE)
_URL_SAFE = str.maketrans("-_", "+/")
_MAX_HEADER = 200
_CHUNK = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for IPv4 ones (RFC 6052)."""


class ImageReader:
    """Reads images within the limits of the service, a few at once over all requests."""

    def __init__(self, limits: ServerConfig, process: ImageProcessor) -> None:
        """Read no image with more pixels than `limits.max_pixels`, or than the processor allows."""
        self._process = process
        self._max_pixels = min(limits.max_pixels, process.config.max_pixels)
        # Threads of their own, not a semaphore: each thread that decodes keeps some of the memory it used.
        self._decoders = ThreadPoolExecutor(limits.images_at_once, thread_name_prefix="image")
        self._fetching = threading.Semaphore(MAX_FETCHES)
        self._remote = RemoteImages(limits) if limits.image_urls else None

    def __call__(self, image: ImageReference) -> Tensor:
        """Return the pixel values (3, H, W); the picture itself is not kept.

        Raises:
            RequestError: it cannot be fetched, is not an image, or is too large.
        """
        try:
            url = image.url.strip()
            if url[:5].lower() == "data:":
                return self._decode(lambda: decode_data(url))
            with self._fetching:
                content = self._fetch(url)
                return self._decode(lambda: content)
        except ImageError as error:
            raise RequestError(str(error), param=image.param, code="invalid_image") from error
        except RequestError as error:
            error.param = image.param
            raise

    def close(self) -> None:
        """End the threads; images that wait for one are not read."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def _decode(self, content: Callable[[], bytes]) -> Tensor:
        def decode() -> Tensor:
            return self._process(open_image(content(), "image", self._max_pixels))

        return self._decoders.submit(decode).result()

    def _fetch(self, url: str) -> bytes:
        if self._remote is None:
            raise _refused(
                "only data: addresses (data:image/png;base64,...) are accepted; this service fetches no images"
            )
        return self._remote.fetch(url)


def decode_data(url: str) -> bytes:
    """Return the content of a `data:` address; white space, the url-safe alphabet and no padding are accepted.

    Raises:
        RequestError: it is not an image in base64.
    """
    header = _DATA.match(url[:_MAX_HEADER])
    if header is None:
        raise _refused("a data: address must begin like data:image/png;base64,")
    try:
        encoded = "".join(unquote(url[header.end() :]).split()).rstrip("=").translate(_URL_SAFE)
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError as error:
        raise _refused(f"the data: address is not base64: {error}") from error


def is_public(address: Address) -> bool:
    """Return whether an address belongs to the public internet, in whatever form it is written."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


class RemoteImages:
    """Fetches images from http(s) addresses, within limits of size and time."""

    def __init__(self, limits: ServerConfig, allows: Callable[[Address], bool] = is_public) -> None:
        """Fetch within `limits`, and only from addresses for which `allows` returns true."""
        self._seconds = limits.image_url_seconds
        self._max_bytes = int(limits.image_url_megabytes * 1e6)
        self._allows = allows

    def fetch(self, url: str) -> bytes:
        """Return the content at `url`.

        Raises:
            RequestError: the address is not allowed, the content is too large, or it takes too long.
        """
        deadline = time.monotonic() + self._seconds
        try:
            for _ in range(MAX_REDIRECTS + 1):
                found = self._get(_split(url), deadline)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _refused(f"the image cannot be fetched: {error}") from error
        raise _refused(f"the image is behind more than {MAX_REDIRECTS} redirects")

    def _get(self, place: SplitResult, deadline: float) -> bytes | str:
        """Return the content, or the address that it redirects to."""
        connection = self._connect(place, deadline)
        # A byte now and then would satisfy any timeout of a single read.
        alarm = threading.Timer(_left(deadline), connection.sock.shutdown, [socket.SHUT_RDWR])
        alarm.start()
        try:
            path = (place.path or "/") + (f"?{place.query}" if place.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "minigpt4"})
            response = connection.getresponse()
            if response.status in _REDIRECTS:
                return response.getheader("Location") or ""
            if response.status != http.client.OK:
                raise _refused(f"the image cannot be fetched: status {response.status}")
            content = bytearray()
            while chunk := response.read1(_CHUNK):
                content += chunk
                if len(content) > self._max_bytes:
                    raise _refused(f"the image is larger than {self._max_bytes / 1e6:g} MB")
            _left(deadline)  # a content that the alarm cut off is incomplete
            return bytes(content)
        finally:
            alarm.cancel()
            connection.close()

    def _connect(self, place: SplitResult, deadline: float) -> http.client.HTTPConnection:
        """Return a connection to the address that was checked, and to no other."""
        host = place.hostname or ""
        secure = place.scheme == "https"
        port = place.port or (443 if secure else 80)
        found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        addresses = [ipaddress.ip_address(str(each).partition("%")[0]) for each in found]
        if not addresses or not all(self._allows(address) for address in addresses):
            raise _refused("the image is at an address that is not public")
        connection = http.client.HTTPConnection(host, port)
        connection.sock = socket.create_connection((str(addresses[0]), port), timeout=_left(deadline))
        if secure:
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        connection.sock.settimeout(_left(deadline))
        return connection


def _split(url: str) -> SplitResult:
    place = urlsplit(url)
    if place.scheme not in ("http", "https") or not place.hostname or place.username is not None:
        raise _refused("an image address must begin with data:, http:// or https://, and must not hold a user name")
    return place


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("it took too long")
    return seconds


def _refused(message: str) -> RequestError:
    return RequestError(message, code="invalid_image_url")
