"""One HTML page of sections, tables and figures, in one file without scripts and without anything to fetch.

Input: text and HTML of the helpers here, of `plots` and of `pictures`. Output: the page, readable in light and dark, on
a wide screen and on a phone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape as _escape
from pathlib import Path

from minigpt4.errors import DataError
from minigpt4.printable import printable

_STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --front: #1d2125; --soft: #5b6570; --line: #d9dde1; --card: #ffffff;
  --accent: #0b7a75; --accent-soft: #cfe9e7; --bad: #b3261e; --warn: #8a5a00; --good: #1b6e3c; }
@media (prefers-color-scheme: dark) { :root { --back: #15181b; --front: #e6e9ec; --soft: #9aa5b1; --line: #343b42;
  --card: #1d2226; --accent: #4fc3bb; --accent-soft: #17403e; --bad: #ff8a80; --warn: #f0b94d; --good: #7fd6a0; } }
* { box-sizing: border-box; }
h1, h2, h3, p, summary, figcaption { overflow-wrap: anywhere; }
body { margin: 0; background: var(--back); color: var(--front); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 75rem; margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { max-width: 48rem; margin: .5rem 0; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span { color: var(--soft); font-size: .85rem; }
.bad b, .bad > summary { color: var(--bad); } .warn b, .warn > summary { color: var(--warn); }
.good b { color: var(--good); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { overflow-wrap: anywhere; }
th, td { text-align: left; vertical-align: top; padding: .4rem .7rem; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; min-width: 5rem; } tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { margin: .5rem 0; } summary { cursor: pointer; padding: .2rem 0; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; }
figcaption { font-size: .9rem; color: var(--soft); margin-bottom: .4rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .bar { fill: var(--accent); } svg .axis { stroke: var(--line); }
svg .mark { stroke: var(--bad); stroke-dasharray: 4 3; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; }
.sheet figure { padding: .5rem; } .sheet img { width: 100%; height: 8rem; object-fit: contain; display: block;
  background: var(--back); }
.sheet figcaption { margin: .4rem 0 0; font-size: .8rem; overflow-wrap: anywhere; max-height: 6.5em; overflow: auto; }
.sample { display: grid; grid-template-columns: minmax(6rem, 11rem) 1fr; gap: 1rem; margin: 1rem 0;
  align-items: start; }
.sample img { max-width: 100%; height: auto; border-radius: .35rem; }
.prompt { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; margin: 0;
  font: .88rem/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; }
.prompt mark { background: var(--accent-soft); color: inherit; border-bottom: 2px solid var(--accent); }
.prompt i { color: var(--soft); }
@media (max-width: 36rem) { .sample { grid-template-columns: 1fr; } .sample img { max-height: 11rem; } }
@media print { details { display: block; } .scroll { overflow: visible; } }
"""


def escape(text: object) -> str:
    """Return a text for HTML; control characters are shown as escapes."""
    return _escape(printable(str(text), keep="\n\t"))


class Page:
    """A page that is put together section by section."""

    def __init__(self, title: str, lead: str = "") -> None:
        """Begin a page.

        Args:
            title: shown at its top, as text.
            lead: one or two sentences below it, as text.
        """
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(lead)}</p>' if lead else ""]

    def add(self, *html: str, heading: str = "") -> None:
        """Add a section of HTML that the helpers of this package have made."""
        self._parts.append(f"<h2>{escape(heading)}</h2>" if heading else "")
        self._parts += html

    def to_html(self) -> str:
        """Return the whole page."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head><body><main>\n"
            + "\n".join(part for part in self._parts if part)
            + "\n</main></body></html>\n"
        )

    def write(self, file: Path) -> None:
        """Write the page in one step.

        Raises:
            DataError: the file cannot be written.
        """
        new = file.with_name(f".{file.name}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(self.to_html(), encoding="utf-8", errors="backslashreplace")
            new.replace(file)
        except OSError as error:
            raise DataError(f"{file}: cannot be written: {error}; choose another file") from error


def paragraph(text: str) -> str:
    """Return a paragraph of text."""
    return f"<p>{escape(text)}</p>"


def subheading(text: str) -> str:
    """Return a heading inside a section."""
    return f"<h3>{escape(text)}</h3>"


def tiles(figures: Iterable[tuple[str, object, str]]) -> str:
    """Return large figures: label, value, and a colour (`good`, `bad`, `warn` or nothing)."""
    cells = [
        f'<div class="tile {colour}"><b>{escape(f"{value:,}" if isinstance(value, int) else value)}</b>'
        f"<span>{escape(label)}</span></div>"
        for label, value, colour in figures
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; numbers stand on the right."""
    body = []
    numeric: set[int] = set()
    for row in rows:
        cells = []
        for column, value in enumerate(row):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            numeric |= {column} if is_number else set()
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
            cells.append(f"<td{' class=number' if is_number else ''}>{escape(shown)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th{' class=number' if n in numeric else ''}>{escape(h)}</th>" for n, h in enumerate(headers))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def details(summary: str, html: str, *, colour: str = "", is_open: bool = False) -> str:
    """Return a part that opens on demand; `colour` is `bad`, `warn` or nothing."""
    state = " open" if is_open else ""
    return f'<details class="{colour}"{state}><summary>{escape(summary)}</summary>{html}</details>'
