"""Fetching images from http(s) addresses without becoming a way into the network behind the service.

Input: an address from anybody. Output: at most so many bytes, in at most so many seconds. The name is looked up once,
every address behind it must be public, and the connection goes to that very address; each redirect is checked alike.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import SplitResult, urljoin, urlsplit

from minigpt4.errors import RequestError
from minigpt4.server.section import ServerSection

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
MAX_REDIRECTS = 3
_CHUNK = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for IPv4 ones (RFC 6052)."""


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, whatever form it is written in."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


class RemoteImages:
    """Fetches what is behind an address, within limits."""

    def __init__(self, limits: ServerSection, allows: Callable[[Address], bool] = is_public) -> None:
        """Fetch within `limits`, and only from addresses that `allows` admits."""
        self._seconds = limits.image_url_seconds
        self._max_bytes = int(limits.image_url_megabytes * 1e6)
        self._allows = allows

    def fetch(self, url: str) -> bytes:
        """Return the content behind `url`.

        Raises:
            RequestError: it is not allowed, cannot be had in time, or is too large.
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
        alarm = threading.Timer(_left(deadline), connection.sock.shutdown, [socket.SHUT_RDWR])  # a byte now and then
        alarm.start()  # would satisfy any timeout of a single read
        try:
            path = (place.path or "/") + (f"?{place.query}" if place.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "minigpt4"})
            response = connection.getresponse()
            if response.status in _REDIRECTS:
                return response.getheader("Location") or ""
            if response.status != http.client.OK:
                raise _refused(f"the image cannot be fetched: status {response.status}")
            content = self._read(response)
            _left(deadline)
            return content
        finally:
            alarm.cancel()
            connection.close()

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        content = bytearray()
        while chunk := response.read1(_CHUNK):
            content += chunk
            if len(content) > self._max_bytes:
                raise _refused(f"the image is larger than {self._max_bytes / 1e6:g} MB")
        return bytes(content)

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
        raise _refused("an image address must begin with data:, http:// or https://, and hold no user name")
    return place


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("it took too long")
    return seconds


def _refused(message: str) -> RequestError:
    return RequestError(message, code="invalid_image_url")
