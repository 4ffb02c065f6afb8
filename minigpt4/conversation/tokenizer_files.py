"""The tokenizer files in the folder of a language model; found without transformers."""

from __future__ import annotations

from pathlib import Path

FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
"""The names of tokenizer files in a model folder."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has tokenizer files."""
    return any(file.is_file() for pattern in FILES for file in folder.glob(pattern))
