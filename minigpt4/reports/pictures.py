"""Images inside a page: thumbnails as data, contact sheets, and perceptual hashes for finding near copies.

Input: decoded pictures. Output: HTML for `Page.add`, and 64-bit hashes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minigpt4.reports.page import escape

SIDE = 192
"""Longest side of a thumbnail, in pixels."""
HASH_SIDE = 8
BANDS = 4
MAX_DISTANCE = BANDS - 1
"""Bits in which the hashes of near copies differ at most: of four bands of 16 bits, one is then equal."""


def thumbnail(picture: Image.Image, text: str = "", side: int = SIDE) -> str:
    """Return an `<img>` with a small copy of an RGB picture in it; `text` is its alternative text."""
    small = picture.copy()
    small.thumbnail((side, side))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=80)
    data = base64.b64encode(content.getvalue()).decode()
    return (
        f'<img loading="lazy" decoding="async" width="{small.width}" height="{small.height}" alt="{escape(text)}" '
        f'src="data:image/jpeg;base64,{data}">'
    )


def contact_sheet(images: Iterable[tuple[str, str]]) -> str:
    """Return a grid of images, given as `<img>` elements, with their captions as text."""
    cells = [f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>" for image, caption in images]
    return f'<div class="sheet">{"".join(cells)}</div>'


def perceptual_hash(picture: Image.Image) -> int:
    """Return a 64-bit hash that similar pictures share.

    The signs of the lowest 8 x 8 frequencies of the grey picture at 32 x 32 pixels, relative to their median: what the
    package imagehash calls `phash`, with the same bits.
    """
    side = 4 * HASH_SIDE
    grey = np.asarray(picture.convert("L").resize((side, side), Image.Resampling.LANCZOS), dtype=np.float64)
    low = (_COSINES @ grey @ _COSINES.T)[:HASH_SIDE, :HASH_SIDE]
    bits = (low > np.median(low)).flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_copies(hashes: Sequence[int]) -> list[list[int]]:
    """Return groups of positions whose hashes differ in at most `MAX_DISTANCE` bits, directly or through others.

    Args:
        hashes: 64-bit hashes, as `perceptual_hash` returns them.

    Returns:
        Groups of at least two positions, each sorted, by their first position.
    """
    values, inverse = np.unique(np.asarray(hashes, dtype=np.uint64), return_inverse=True)
    parent = list(range(len(values)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    bits = 64 // BANDS
    for band in range(BANDS):
        part = (values >> np.uint64(band * bits)) & np.uint64(2**bits - 1)
        order = np.argsort(part, kind="stable")
        edges = np.flatnonzero(np.diff(part[order])) + 1
        for bucket in np.split(order, edges):
            for place, node in enumerate(bucket[:-1].tolist()):
                rest = bucket[place + 1 :]
                close = rest[np.bitwise_count(values[rest] ^ values[node]) <= MAX_DISTANCE]
                for other in close.tolist():
                    parent[root(other)] = root(node)
    groups: dict[int, list[int]] = {}
    for position, value in enumerate(inverse.tolist()):
        groups.setdefault(root(value), []).append(position)
    return sorted(group for group in groups.values() if len(group) > 1)


def _cosines(side: int) -> NDArray[np.float64]:
    """Return the matrix of the discrete cosine transform (type II): row k is cos(pi k (2 n + 1) / 2 side), twice."""
    k, n = np.arange(side)[:, None], np.arange(side)[None, :]
    return 2 * np.cos(np.pi * k * (2 * n + 1) / (2 * side))


_COSINES = _cosines(4 * HASH_SIDE)
