"""Plots as inline SVG: histograms and bars that follow the colours of the page.

Input: counts. Output: a `<figure>` for `Page.add`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from minigpt4.reports.page import escape

WIDTH, HEIGHT = 480, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 12, 24
BINS = 32


def histogram(
    title: str, counts: Mapping[int, int], *, unit: str = "", marks: Sequence[tuple[float, str]] = (), bins: int = BINS
) -> str:
    """Return a histogram.

    Args:
        title: what is counted.
        counts: how often each value occurs.
        unit: of the values, shown in the tooltips.
        marks: values with a dashed line and its label, such as a limit.
        bins: most bars.

    Raises:
        ValueError: there is no count.
    """
    if not counts:
        raise ValueError("a histogram needs at least one value")
    top = max([*counts, *(math.ceil(value) for value, _ in marks)])
    low = min(0, *counts)
    step = _nice((top - low + 1) / bins)
    low = math.floor(low / step) * step
    number = max(1, math.ceil((top - low + 1) / step))
    heights = [0] * number
    for value, count in counts.items():
        heights[int((value - low) // step)] += count
    spans = [f"{low + n * step:,} to {low + (n + 1) * step - 1:,} {unit}".strip() for n in range(number)]
    spans = spans if step > 1 else [f"{low + n:,} {unit}".strip() for n in range(number)]
    parts = _bars(heights, spans)
    width = (WIDTH - _LEFT - _RIGHT) / (number * step)
    for n in range(0, number + 1, max(1, math.ceil(number / 6))):
        parts.append(_text(_LEFT + n * step * width, HEIGHT - 8, f"{low + n * step:,}"))
    for mark, label in marks:
        x = _LEFT + (mark - low) * width
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(_text(x - 4 if anchor == "end" else x + 4, _TOP + 9, label, anchor))
    return _figure(title, parts)


def bars(title: str, counts: Iterable[tuple[str, int]]) -> str:
    """Return one horizontal bar per label, in the given order."""
    rows = list(counts)
    top = max((count for _, count in rows), default=0) or 1
    line = 22
    left, height = 150, line * max(1, len(rows)) + 6
    parts = []
    for n, (label, count) in enumerate(rows):
        y = n * line + 4
        length = (WIDTH - left - 70) * count / top
        shown = label if len(label) <= 22 else f"{label[:21]}…"
        parts.append(_text(left - 8, y + 12, shown, "end"))
        parts.append(
            f'<rect class="bar" x="{left}" y="{y}" width="{max(length, 1):.1f}" height="{line - 7}" rx="2">'
            f"<title>{escape(label)}: {count:,}</title></rect>"
        )
        parts.append(_text(left + length + 6, y + 12, f"{count:,}", "start"))
    return _figure(title, parts, height)


def _bars(heights: Sequence[int], spans: Sequence[str]) -> list[str]:
    top = max(heights) or 1
    width, room = (WIDTH - _LEFT - _RIGHT) / len(heights), HEIGHT - _TOP - _BOTTOM
    floor = HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>']
    for share in (0.5, 1):
        y = floor - room * share
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, _short(top * share), "end"))
    for n, count in enumerate(heights):
        if count:
            height = max(room * count / top, 1)
            parts.append(
                f'<rect class="bar" x="{_LEFT + n * width + 0.5:.1f}" y="{floor - height:.1f}" '
                f'width="{max(width - 1, 1):.1f}" height="{height:.1f}"><title>{spans[n]}: {count:,}</title></rect>'
            )
    return parts


def _figure(title: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(number: float) -> str:
    for limit, letter in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:g}"


def _nice(step: float) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50 ..."""
    power = 10 ** max(0, math.floor(math.log10(max(step, 1))))
    return next(int(factor * power) for factor in (1, 2, 5, 10) if factor * power >= step)
