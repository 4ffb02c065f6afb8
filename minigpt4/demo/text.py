"""Texts for the page that stay texts: nothing in them becomes a tag, a link or an image that the browser fetches.

Gradio removes scripts from what it shows, but not images, and it reads HTML also where Markdown is off.
"""

from __future__ import annotations

import re
import string

_BEGINS_HTML = re.compile(r"&(?=[#a-zA-Z])|<(?=[a-zA-Z/!?])")
_ESCAPED = {ord(mark): f"&#{ord(mark)};" for mark in string.punctuation if mark not in "*-"}
"""All marks but those of emphasis and lists: without the others there are no images, no links and no HTML."""


def as_html(text: str) -> str:
    """Return HTML that shows `text`; only what would begin a tag or an entity is changed, so that copies are exact."""
    return _BEGINS_HTML.sub(lambda found: "&amp;" if found[0] == "&" else "&lt;", text)


def as_markdown(text: str) -> str:
    """Return Markdown that shows `text`; it may have paragraphs, emphasis and lists; no other mark counts."""
    return "\n".join(line.strip().translate(_ESCAPED) for line in text.strip().splitlines())
