"""The images of a request: from what a client sent to pictures.

Input: `data:` addresses, or http(s) addresses where the service allows them. Output: RGB pictures.
"""

from __future__ import annotations

import base64
import binascii
import re

from PIL import Image

from minigpt4.errors import ImageError, RequestError
from minigpt4.processors.image import open_image
from minigpt4.server.messages import ImageReference
from minigpt4.server.remote import RemoteImages
from minigpt4.server.section import ServerSection

_DATA = re.compile(r"data:image/[a-z0-9.+-]+(;[a-z0-9=-]+)*;base64,", re.IGNORECASE)
_MAX_HEADER = 200


class ImageReader:
    """Reads images within the limits of the service."""

    def __init__(self, limits: ServerSection, max_pixels: int) -> None:
        """Read no image of more pixels than the limits or `max_pixels` of the model's own processor allow."""
        self._max_pixels = min(limits.max_pixels, max_pixels)
        self._remote = RemoteImages(limits) if limits.image_urls else None

    def __call__(self, image: ImageReference) -> Image.Image:
        """Return the picture.

        Raises:
            RequestError: it cannot be had, or is no image, or is too large.
        """
        try:
            return open_image(self._content(image.url), "image", self._max_pixels)
        except ImageError as error:
            raise RequestError(str(error), param=image.param, code="invalid_image") from error
        except RequestError as error:
            error.param = image.param
            raise

    def _content(self, url: str) -> bytes:
        if url[:5].lower() == "data:":
            return decode_data(url)
        if self._remote is None:
            raise RequestError(
                "only data: addresses (data:image/png;base64,...) are read; this service fetches no image from others",
                code="invalid_image_url",
            )
        return self._remote.fetch(url)


def decode_data(url: str) -> bytes:
    """Return what a `data:` address holds.

    Raises:
        RequestError: it holds no image in base64.
    """
    header = _DATA.match(url[:_MAX_HEADER])
    if header is None:
        raise RequestError("a data: address must begin like data:image/png;base64,", code="invalid_image_url")
    try:
        return base64.b64decode(url[header.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"the data: address is not base64: {error}", code="invalid_image_url") from error
