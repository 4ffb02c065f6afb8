"""Text processors: what is done to a caption or an answer before a template sees it.

Input: raw text of a data set. Output: text. Each data set names its own processor, since captions scraped
from the web want cleaning that written answers would suffer from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


class TextProcessor:
    """Strips both ends; leaves the text itself as it was written."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """How much is kept."""

        max_words: int = 0
        """Longest text in words, the rest is cut; 0 keeps everything."""

        def __post_init__(self) -> None:
            if self.max_words < 0:
                raise ValueError(f"max_words must be 0 or more, found {self.max_words}")

    def __init__(self, max_words: int = 0) -> None:
        self.max_words = max_words

    @classmethod
    def from_config(cls, config: Config) -> TextProcessor:
        """Build the processor."""
        return cls(config.max_words)

    def __call__(self, text: str) -> str:
        """Return the processed text; it may be empty."""
        return self._cut(text.strip())

    def _cut(self, text: str) -> str:
        words = text.split(" ")
        return " ".join(words[: self.max_words]) if 0 < self.max_words < len(words) else text


class BlipCaption(TextProcessor):
    """BLIP's caption cleaning, as the published stage 1 uses it (`blip_processors.py`).

    Lower case; `.!"()*#:;~` become blanks; runs of blanks become one.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TextProcessor.Config):
        """How much is kept."""

        max_words: int = 50
        """Longest caption in words, the rest is cut; 0 keeps everything."""

    def __call__(self, text: str) -> str:
        """Return the cleaned caption; it may be empty."""
        text = _PUNCTUATION.sub(" ", text.lower())
        return self._cut(_SPACES.sub(" ", text).rstrip("\n").strip(" "))
