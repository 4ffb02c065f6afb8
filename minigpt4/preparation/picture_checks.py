"""What the images of a data set are like: sizes, modes, and which are blank, dark, blurred or copies.

Input: images, opened as training opens them. Output: counts, and findings. The thresholds are guesses that are right
for photographs: a finding is a reason to look at the image, not an error.
"""

from __future__ import annotations

import hashlib
import io
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt4.errors import DataError, ImageError
from minigpt4.preparation.findings import Findings
from minigpt4.processors.image import open_image
from minigpt4.reports.pictures import near_copies, perceptual_hash

BLANK = 2.0
"""Standard deviation of the grey values (0..255) below which an image shows nothing."""
DARK = 40.0
"""The 99th percentile of the grey values (0..255) below which an image is dark."""
BLURRED = 12.0
"""Variance of the Laplacian of the grey picture at `SIDE` pixels below which it is blurred."""
SIDE = 256
TINY = 32
"""Side in pixels below which an image has little to show."""
THIN = 5.0
"""Ratio of the sides above which an image is stretched beyond recognition."""


class PictureChecks:
    """Opens images, each file once, and counts what they are like."""

    def __init__(self, findings: Findings, max_images: int | None, max_pixels: int) -> None:
        """Count into `findings`; open at most `max_images` (None: all) of at most `max_pixels` pixels."""
        self.findings = findings
        self.max_images = max_images
        self.max_pixels = max_pixels
        self.opened = 0
        self.not_opened = 0
        self.used_again = 0
        self.widths: Counter[int] = Counter()
        self.heights: Counter[int] = Counter()
        self.modes: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self._seen: dict[int, DataError | None] = {}
        self._contents = array("q")
        self._hashes = array("Q")
        self._names: list[str] = []

    def check(self, image: bytes | Path, place: str) -> Image.Image | None:
        """Open an image and count it; return its RGB picture, or None if it was not opened.

        Raises:
            ImageError: training could not open it, either.
        """
        if isinstance(image, Path):
            key = hash(str(image))
            if key in self._seen:
                self.used_again += 1
                broken = self._seen[key]
                if broken is not None:
                    raise broken
                return None
        if self.max_images is not None and self.opened >= self.max_images:
            self.not_opened += 1
            return None
        try:
            picture = self._open(image, str(image) if isinstance(image, Path) else place)
        except DataError as error:
            if isinstance(image, Path):
                self._seen[key] = error
            raise
        if isinstance(image, Path):
            self._seen[key] = None
        return picture

    def _open(self, image: bytes | Path, name: str) -> Image.Image:
        self.opened += 1
        content = _content(image)
        picture = open_image(content, name, self.max_pixels)
        with Image.open(io.BytesIO(content)) as header:
            width, height = header.size
            self.modes[header.mode] += 1
            self.formats[header.format or "?"] += 1
        self.widths[width] += 1
        self.heights[height] += 1
        if min(width, height) < TINY:
            self.findings.warning("tiny image", f"{name}: {width} x {height} pixels")
        if max(width, height) > THIN * min(width, height):
            self.findings.warning("thin image", f"{name}: {width} x {height} pixels")
        self._look(picture, name)
        self._contents.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True))
        self._hashes.append(perceptual_hash(picture))
        self._names.append(name)
        return picture

    def finish(self) -> None:
        """Find copies among the images that were opened."""
        exact: dict[int, list[int]] = {}
        for position, content in enumerate(self._contents):
            exact.setdefault(content, []).append(position)
        for group in exact.values():
            if len(group) > 1:
                self.findings.warning("copied image", f"equal files: {self._named(group)}", len(group) - 1)
        firsts = [group[0] for group in exact.values()]
        for near in near_copies([self._hashes[first] for first in firsts]):
            group = [firsts[position] for position in near]
            self.findings.warning("near copy", f"look the same: {self._named(group)}", len(group) - 1)

    def _named(self, group: list[int]) -> str:
        names = [self._names[position] for position in group]
        return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")

    def _look(self, picture: Image.Image, name: str) -> None:
        small = picture.convert("L")
        small.thumbnail((SIDE, SIDE))
        grey = np.asarray(small, dtype=np.float64)
        if grey.std() < BLANK:
            self.findings.warning("blank image", f"{name}: one colour, grey value {grey.mean():.0f} of 255")
        elif np.percentile(grey, 99) < DARK:
            self.findings.warning("dark image", f"{name}: 99 of 100 pixels are below grey value {DARK:.0f} of 255")
        elif min(grey.shape) > 2:
            around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
            edges = float((around - 4 * grey[1:-1, 1:-1]).var())
            if edges < BLURRED:
                self.findings.warning("blurred image", f"{name}: hardly any edges ({edges:.1f}, below {BLURRED:.0f})")


def _content(image: bytes | Path) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise ImageError(f"{image}: cannot be read: {error}") from error
    except ValueError as error:  # a name with a NUL
        raise DataError(f"{image}: not the name of a file: {error}", cause="missing image") from error
