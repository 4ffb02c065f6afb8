"""Pages, plots and hashes: correct, escaped, in one file; in Chromium nothing is cut off and nothing is fetched."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minigpt4.errors import DataError
from minigpt4.reports.page import Page, details, paragraph, table, tiles
from minigpt4.reports.pictures import MAX_DISTANCE, contact_sheet, near_copies, perceptual_hash, thumbnail
from minigpt4.reports.plots import bars, histogram

HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J\u202e"


def picture(seed: int, size: tuple[int, int] = (200, 150)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def page() -> Page:
    made = Page(HOSTILE, HOSTILE)
    made.add(paragraph(HOSTILE), tiles([(HOSTILE, HOSTILE, "bad"), ("rows", 12345, "")]), heading=HOSTILE)
    made.add(details(HOSTILE, table([HOSTILE, "n"], [[HOSTILE * 9, 1234], ["x", 0.5]]), colour="warn", is_open=True))
    made.add(histogram(HOSTILE, {3: 4, 900: 1}, marks=[(160, HOSTILE)]), bars(HOSTILE, [(HOSTILE, 3)]))
    made.add(contact_sheet([(thumbnail(picture(n), HOSTILE), HOSTILE) for n in range(30)]))
    return made


def test_text_of_others_stays_text() -> None:
    html = page().to_html()
    assert "<script" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "&lt;script&gt;" in html
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    assert all('loading="lazy"' in image for image in re.findall(r"<img[^>]*>", html))


@given(counts=st.dictionaries(st.integers(-50, 10**7), st.integers(1, 10**6), min_size=1, max_size=40))
def test_a_histogram_shows_every_value(counts: dict[int, int]) -> None:
    figure = ElementTree.fromstring(histogram("lengths", counts, marks=[(100, "limit")]))
    titles = [title.text or "" for title in figure.iter("title")]
    assert sum(int(title.rpartition(": ")[2].replace(",", "")) for title in titles) == sum(counts.values())
    for bar in figure.iter("rect"):
        assert float(bar.get("x", "")) >= 0
        assert float(bar.get("x", "")) + float(bar.get("width", "")) <= 480.5


def test_bars_keep_their_order() -> None:
    figure = ElementTree.fromstring(bars("kinds", Counter({"a": 1, "b": 5000}).most_common()))
    assert [title.text for title in figure.iter("title")] == ["b: 5,000", "a: 1"]


def test_near_copies_are_found_and_others_are_not() -> None:
    pictures = [picture(n) for n in range(40)]
    pictures += [pictures[3].resize((90, 60)), pictures[3].point(lambda v: v * 0.9), pictures[7].copy()]
    hashes = [perceptual_hash(one) for one in pictures]
    assert near_copies(hashes) == [[3, 40, 41], [7, 42]]
    assert perceptual_hash(Image.new("RGB", (1, 1))) >= 0


@given(st.lists(st.integers(0, 2**64 - 1), max_size=12), st.data())
def test_near_copies_are_those_within_the_distance(values: list[int], data: st.DataObject) -> None:
    if values:
        for bits in data.draw(st.lists(st.sets(st.integers(0, 63), max_size=MAX_DISTANCE + 1), max_size=6)):
            values = [*values, data.draw(st.sampled_from(values)) ^ sum(1 << bit for bit in bits)]
    linked = {(i, j) for i, a in enumerate(values) for j, b in enumerate(values) if (a ^ b).bit_count() <= MAX_DISTANCE}
    groups = near_copies(values)
    for i, j in linked:
        assert i == j or any(i in group and j in group for group in groups)
    assert all(any((i, j) in linked for j in group if j != i) for group in groups for i in group)


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        Page("x").write(tmp_path / "file" / "page.html")


@pytest.mark.slow
def test_a_page_in_chromium(browser: Any, tmp_path: Path) -> None:
    page().write(tmp_path / "page.html")
    colours = {}
    for scheme in ("light", "dark"):
        for width in (390, 1280):
            tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            requests: list[str] = []
            tab.on("request", lambda request, seen=requests: seen.append(request.url))
            tab.goto((tmp_path / "page.html").as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
            colours[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            tab.close()
    assert colours["light"] != colours["dark"]
