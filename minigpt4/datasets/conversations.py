"""Your own data: a JSON or JSONL file of conversations or captions about images.

Input: LLaVA's layout `{"image": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt",
...}]}` and the plain one `{"image": ..., "caption": ...}`, mixed as you like; `image` is a path, a list of
paths, or absent. Output: examples. A row that cannot be used names its line and what is wrong with it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.assets import resolve
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn, normalise_marks, place_images
from minigpt4.conversation.prompts import read_prompts
from minigpt4.datasets.source import Example, IndexedSource, SourceConfig, file_digest
from minigpt4.errors import DataError
from minigpt4.registry import path_field

LINES = (".jsonl", ".ndjson")
HUMAN = ("human", "user")
MODEL = ("gpt", "assistant")


class Conversations(IndexedSource):
    """Rows of one file; rows are kept as bytes and parsed when read, so a worker's copy is cheap."""

    @dataclass(frozen=True, kw_only=True)
    class Config(SourceConfig):
        """Where the rows and their images are."""

        path: str = path_field()
        """A `.json` file with a list of rows, or a `.jsonl` file with one row a line."""
        image_dir: str = path_field("")
        """The folder that image paths start from; empty: the folder of the file."""
        prompts: str = "alignment"
        """Instructions for plain captions: a shipped file in `prompts/`, or a path. Empty: the caption
        alone."""

    def __init__(self, config: Config, name: str) -> None:
        super().__init__(config, name)
        self._file = resolve(config.path)
        self._images = resolve(config.image_dir) if config.image_dir else self._file.parent
        if not self._file.is_file():
            raise DataError(f"{name}: there is no file {config.path!r}; set the path of this data set", cause="missing")
        if not self._images.is_dir():
            raise DataError(f"{name}: there is no image folder {str(self._images)!r}; set image_dir", cause="missing")
        self.prompts = read_prompts(config.prompts) if config.prompts else [""]
        is_lines = self._file.suffix.lower() in LINES
        self._rows = _rows_of_lines(self._file) if is_lines else _rows_of_list(self._file)
        if not self._rows:
            raise DataError(f"{self._file}: holds no row", cause="row")
        self._place = "{file}:{number}" if is_lines else "{file} item {number}"

    def digest(self) -> str:
        """See `Source.digest`: the annotations."""
        return file_digest(self._file)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def example(self, index: int, draw: random.Random) -> Example:
        """See `IndexedSource.example`."""
        number, text = self._rows[index]
        place = self._place.format(file=self._file, number=number)
        row = json.loads(text)
        if not isinstance(row, dict):
            raise DataError(f"{place}: a row must be an object, found {_shown(row)}", cause="row")
        images = self._image_files(row, place)
        if "conversations" in row:
            dialogue = self._conversation(row["conversations"], place)
        elif "caption" in row:
            if not isinstance(row["caption"], str):
                raise DataError(f"{place}: caption must be text, found {_shown(row['caption'])}", cause="caption")
            prompt = draw.choice(self.prompts)
            prompt = prompt if len(images) == 1 else prompt.replace(IMAGE_MARK, "").strip()
            dialogue = self.captioned(row["caption"], place, prompt)
        else:
            keys = ", ".join(sorted(row)) or "nothing"
            raise DataError(f"{place}: neither `conversations` nor `caption`; the row has {keys}", cause="row")
        place_images(dialogue, len(images), place)  # raises where marks and images differ
        return Example(self._place.format(file=self._file.name, number=number), tuple(images), dialogue)

    def _image_files(self, row: dict[str, Any], place: str) -> list[Path]:
        given = row.get("image")
        names = [] if given is None else given if isinstance(given, list) else [given]
        files = []
        for name in names:
            if not isinstance(name, str) or not name:
                raise DataError(f"{place}: image must be a path or a list of paths, found {_shown(given)}", cause="row")
            file = self._images / name
            if not file.is_file():
                raise DataError(f"{place}: there is no image {str(file)!r}; see image_dir", cause="missing image")
            files.append(file)
        return files

    def _conversation(self, messages: Any, place: str) -> Dialogue:
        """Return the dialogue of LLaVA's alternating messages."""
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{place}: conversations must be a list of messages, not empty", cause="conversation")
        system: str | None = None
        question: str | None = None
        turns: list[Turn] = []
        for number, message in enumerate(messages, start=1):
            here = f"{place}, message {number}"
            speaker, text = self._message(message, here)
            if speaker == "system" and number == 1:
                system = text
            elif speaker in HUMAN:
                if question is not None:
                    raise DataError(f"{here}: two questions in a row, the first has no answer", cause="conversation")
                question = normalise_marks(text)
            elif speaker in MODEL:
                if question is None:
                    raise DataError(f"{here}: an answer without a question before it", cause="conversation")
                turns.append(Turn(question, self._answer(text, here)))
                question = None
            else:
                known = ", ".join((*HUMAN, *MODEL))
                raise DataError(
                    f"{here}: unknown speaker {speaker!r}; known are {known}, and system at the start",
                    cause="conversation",
                )
        if question is not None or not turns:
            raise DataError(f"{place}: the last question has no answer", cause="conversation")
        return Dialogue(tuple(turns), system)

    def _message(self, message: Any, here: str) -> tuple[str, str]:
        speaker, text = (message.get("from"), message.get("value")) if isinstance(message, dict) else (None, None)
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise DataError(
                f'{here}: must be {{"from": "human" or "gpt", "value": text}}, found {_shown(message)}',
                cause="conversation",
            )
        return speaker, text

    def _answer(self, text: str, here: str) -> str:
        answer = self.process_text(text)
        if not answer:
            raise DataError(f"{here}: the answer is empty", cause="conversation")
        return answer


def _rows_of_lines(file: Path) -> list[tuple[int, bytes]]:
    """Return line number and text of every row of a JSONL file, each checked to be JSON."""
    rows = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                _parse(text, file, number)
                rows.append((number, text))
    return rows


def _rows_of_list(file: Path) -> list[tuple[int, bytes]]:
    """Return number and text of every item of a JSON list."""
    content = _parse(file.read_bytes().removeprefix(b"\xef\xbb\xbf"), file, 1)
    if not isinstance(content, list):
        raise DataError(
            f"{file}: must be a list of rows, found {_shown(content)}; a file with a row a line is a .jsonl",
            cause="row",
        )
    return [(number, json.dumps(item).encode()) for number, item in enumerate(content, start=1)]


def _parse(text: bytes, file: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a file with a row a line is a .jsonl" if error.msg == "Extra data" else ""
        line = first_line + error.lineno - 1
        raise DataError(f"{file}:{line}: not valid JSON: {error.msg}{hint}", cause="row") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{file}:{first_line}: not valid JSON: {error}", cause="row") from error


def _shown(value: Any) -> str:
    """Return a value as JSON, cut to a length that fits a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
