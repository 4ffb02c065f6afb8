"""Text processors: they clean captions and answers before a template renders them.

Input: raw text of a data set. Output: text. Each data set has its own processor: captions from the web need cleaning
that would damage written answers.
"""

from __future__ import annotations

import re

from minigpt4.config.parts import BlipCaptionConfig, TextProcessorConfig

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


class TextProcessor:
    """Strips both ends and cuts a text that is too long."""

    Config = TextProcessorConfig

    def __init__(self, max_words: int = 0) -> None:
        self.max_words = max_words
        self.num_cut = 0  # texts cut so far: a data set counts those of each sample

    @classmethod
    def from_config(cls, config: TextProcessorConfig) -> TextProcessor:
        """Build the processor."""
        return cls(config.max_words)

    def __call__(self, text: str) -> str:
        """Return the processed text; it may be empty."""
        return self._cut(text.strip())

    def _cut(self, text: str) -> str:
        words = text.split(" ")
        if not 0 < self.max_words < len(words):
            return text
        self.num_cut += 1
        return " ".join(words[: self.max_words])


class BlipCaption(TextProcessor):
    """BLIP's caption cleaning, as in the published stage 1 (`blip_processors.py`).

    Lower case; `.!"()*#:;~` become spaces; several spaces become one.
    """

    Config = BlipCaptionConfig

    def __call__(self, text: str) -> str:
        """Return the cleaned caption; it may be empty."""
        text = _PUNCTUATION.sub(" ", text.lower())
        return self._cut(_SPACES.sub(" ", text).rstrip("\n").strip(" "))
