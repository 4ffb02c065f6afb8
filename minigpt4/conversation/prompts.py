"""Prompt files: one instruction a line, text as data.

Input: the name of a shipped file in `prompts/`, or a path. Output: the lines, image marks in one spelling.
Data sets draw one of them per sample (Original: one per batch).
"""

from __future__ import annotations

from pathlib import Path

from minigpt4.config import shipped
from minigpt4.conversation.dialogue import normalise_marks
from minigpt4.errors import DataError


def read_prompts(name_or_path: str) -> list[str]:
    """Return the instructions of a prompt file, blank lines left out.

    Args:
        name_or_path: `alignment` for the shipped `prompts/alignment.txt`, or the path of a text file.

    Raises:
        DataError: there is no such file, it is not text, or it holds no instruction.
    """
    given = Path(name_or_path)
    file = given if given.is_file() else shipped("prompts", f"{name_or_path}.txt")
    if not file.is_file():
        names = ", ".join(sorted(f.stem for f in shipped("prompts").glob("*.txt"))) or "none"
        raise DataError(f"no prompt file {name_or_path!r}; give a path or a shipped name ({names})", cause="prompts")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}", cause="prompts") from error
    prompts = [normalise_marks(line.strip()) for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{file}: holds no prompt; write one instruction a line", cause="prompts")
    return prompts
