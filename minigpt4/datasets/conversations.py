"""Your own data: a JSON or JSONL file of conversations or captions about images.

Input: rows in LLaVA's layout `{"image": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}`
or the plain one `{"image": ..., "caption": ...}`; a file may have both. `image` (or `images`) is a path, a list of
paths, or absent. Output: examples. The error of a row that cannot be used names its line and the problem.

No key is left unread in silence: a row whose image seems to stand under another key is an error, other keys are logged
once, and a file in which no row has an image is refused unless `images: optional` says so.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt4.config.parts import ConversationsConfig
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn, normalise_marks, place_images, read_prompts
from minigpt4.datasets.rows import Row, place_of, stream_rows
from minigpt4.datasets.source import Example, IndexedSource, Item, is_file, parse_json, require
from minigpt4.errors import DataError

HUMAN = ("human", "user")
MODEL = ("gpt", "assistant")
IMAGE_KEYS = ("image", "images")
READ_KEYS = (*IMAGE_KEYS, "caption", "conversations", "id")
SHOWN_KEYS = 10
"""Unread keys of a file that are logged one by one."""
_IMAGE_WORD = re.compile(
    r"(?i)image|img|picture|photo|pixel|(^|_)pics?($|_)|^(file_?name|file_?path|jpe?g|png|webp)s?$"
)
_IMAGE_NAME = re.compile(r"(?i)\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|jp2|ppm)([?#].*)?$|^data:image/")
_log = logging.getLogger(__name__)


class Conversations(IndexedSource):
    """Rows of one file; they are kept as bytes and parsed when read, so that a worker's copy is cheap.

    Without `hold_rows`, none is kept: `rows` reads the file of any size, and `item` turns a row into an example.

    Attributes:
        images: the folder that image paths are relative to.
        unread: a line for each key of the rows that is not read.
    """

    Config = ConversationsConfig

    def __init__(self, config: ConversationsConfig, name: str, hold_rows: bool = True) -> None:
        super().__init__(config, name)
        self.config = config
        self.annotations: Path = require(config.path, "file", name)
        self.images = require(config.image_dir or self.annotations.parent, "folder", name, "image_dir")
        self.prompts = read_prompts(config.prompts)
        self.unread: list[str] = []
        self._rows: list[tuple[int, bytes]] = []
        self._num_images = 0
        if not hold_rows:
            return
        survey = RowSurvey()
        for row in self.rows():
            if isinstance(row.value, DataError):
                raise row.value
            self._rows.append((row.number, row.text.encode() if isinstance(row.text, str) else row.text))
            survey.add(row.value)
        survey.check(self)
        self._num_images = survey.num_images
        self.unread = survey.unread_keys(self.annotations)
        for line in self.unread:
            _log.warning("%s", line)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def expected_images(self) -> int:
        """See `Source.expected_images`: as many as the rows name."""
        return self._num_images

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the file, read from its beginning; see `stream_rows`."""
        return stream_rows(self.annotations)

    def place(self, index: int) -> str:
        """See `IndexedSource.place`."""
        return place_of(self.annotations, self._rows[index][0])

    def example(self, index: int, rng: random.Random) -> Example:
        """See `IndexedSource.example`."""
        number, text = self._rows[index]
        return self._example(number, parse_json(text, self.annotations, number), rng)

    def item(self, row: Row, rng: random.Random) -> Item:
        """Return the example of a row, or what is wrong with it; random choices use `rng`."""
        place = place_of(self.annotations, row.number)
        return self.guarded(lambda: self._example(row.number, row.value, rng), place)

    def _example(self, number: int, row: Any, rng: random.Random) -> Example:
        place = place_of(self.annotations, number)
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, dict):
            raise DataError(f"{place}: a row must be an object, found {shown(row)}", cause="row")
        images = image_files(row, place, self.images)
        if "conversations" in row:
            dialogue = self._conversation(row["conversations"], place)
        elif "caption" in row:
            if not isinstance(row["caption"], str):
                raise DataError(f"{place}: caption must be text, found {shown(row['caption'])}", cause="caption")
            prompt = rng.choice(self.prompts)
            prompt = prompt if len(images) == 1 else prompt.replace(IMAGE_MARK, "").strip()
            dialogue = self.captioned(row["caption"], place, prompt)
        else:
            keys = ", ".join(map(_name, sorted(row))) or "no keys"
            raise DataError(f"{place}: expected `conversations` or `caption`, found {keys}", cause="row")
        place_images(dialogue, len(images), place)  # raises if the numbers of marks and images differ
        return Example(place_of(self.annotations.name, number), tuple(images), dialogue)

    def _conversation(self, messages: Any, place: str) -> Dialogue:
        """Return the dialogue of LLaVA's alternating messages."""
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{place}: conversations must be a list of messages, not empty", cause="conversation")
        system: str | None = None
        question: str | None = None
        turns: list[Turn] = []
        for number, message in enumerate(messages, start=1):
            try:
                speaker, text = _speaker_and_text(message)
                if speaker == "system" and number == 1:
                    system = text
                elif speaker in HUMAN:
                    if question is not None:
                        raise ValueError("two questions in a row; the first has no answer")
                    question = normalise_marks(text)
                elif speaker in MODEL:
                    if question is None:
                        raise ValueError("an answer without a question before it")
                    answer = self.process_text(text)
                    if not answer:
                        raise ValueError("the answer is empty")
                    turns.append(Turn(question, answer))
                    question = None
                else:
                    known = ", ".join((*HUMAN, *MODEL))
                    raise ValueError(f"unknown speaker {speaker!r}; known: {known}, and system in the first message")
            except ValueError as error:
                raise DataError(f"{place}, message {number}: {error}", cause="conversation") from error
        if question is not None or not turns:
            raise DataError(f"{place}: the last question has no answer", cause="conversation")
        return Dialogue(tuple(turns), system)


def image_files(row: dict[str, Any], place: str, folder: Path) -> list[Path]:
    """Return the image files of a row, from its `image` or `images`; paths are relative to `folder`.

    Raises:
        DataError: a file is missing, or no image is named although another key seems to hold one.
    """
    present = [key for key in IMAGE_KEYS if row.get(key) not in (None, [])]
    if len(present) > 1:
        raise DataError(f"{place}: found `image` and `images`; a row needs one of them", cause="row")
    given = row[present[0]] if present else None
    if given is None and (key := _image_like_key(row)) is not None:
        raise DataError(
            f"{place}: the row has no `image`, but the unknown key {_name(key)} looks like one "
            f"({shown(row[key])}); rename the key to `image`",
            cause="unknown key",
        )
    names = [] if given is None else given if isinstance(given, list) else [given]
    files = []
    for name in names:
        if not isinstance(name, str) or not name:
            raise DataError(f"{place}: image must be a path or a list of paths, found {shown(given)}", cause="row")
        file = folder / name
        if not is_file(file):
            where = repr(str(file)) if len(str(file)) <= 300 else f"{str(file)[:100]!r}... (a name of {len(name)})"
            raise DataError(f"{place}: image {where} not found; see image_dir", cause="missing image")
        files.append(file)
    return files


class RowSurvey:
    """Counts over all rows of a file: what is wrong with the file as a whole, and keys that are not read."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.num_with_image = 0
        self.num_images = 0
        self.unread: Counter[str] = Counter()

    def add(self, row: Any) -> None:
        """Count one row."""
        self.num_rows += 1
        if isinstance(row, dict):
            self.num_with_image += any(row.get(key) for key in IMAGE_KEYS)
            given = row.get("image") or row.get("images") or []
            self.num_images += len(given) if isinstance(given, list) else 1
            self.unread.update(_unread_keys(row))

    def check(self, source: Conversations) -> None:
        """Raise a `DataError` if the file of `source` has no row, or no image although images are required."""
        file = source.annotations
        if not self.num_rows:
            raise DataError(f"{file}: the file has no row", cause="row")
        if source.config.images == "required" and not self.num_with_image:
            keys = ", ".join(ascii(key) for key, _ in self.unread.most_common(SHOWN_KEYS))
            raise DataError(
                f"{file}: none of the {self.num_rows} rows has an image"
                + (f"; found the unknown keys {keys}: an image stands under `image`" if keys else "")
                + f". For a data set without images, set images: optional of {source.name}",
                cause="missing image",
            )

    def unread_keys(self, file: Path) -> list[str]:
        """Return a line for each of the most frequent keys that are not read, and one for all others."""
        lines = [
            f"{file}: the key {key!a} is not read ({count} of {self.num_rows} rows)"
            for key, count in self.unread.most_common(SHOWN_KEYS)
        ]
        more = len(self.unread) - SHOWN_KEYS
        return [*lines, f"{file}: {more} more keys are not read"] if more > 0 else lines


def _speaker_and_text(message: Any) -> tuple[str, str]:
    speaker, text = (message.get("from"), message.get("value")) if isinstance(message, dict) else (None, None)
    if not isinstance(speaker, str) or not isinstance(text, str):
        raise ValueError(f'must be {{"from": "human" or "gpt", "value": text}}, found {shown(message)}')
    return speaker, text


def _unread_keys(row: dict[str, Any]) -> list[str]:
    """Return the keys of a row that are not read, although they hold something."""
    unread = [key for key, value in row.items() if key not in READ_KEYS and value not in (None, "", [], {})]
    return [*unread, "caption"] if "conversations" in row and "caption" in row else unread


def _image_like_key(row: dict[str, Any]) -> str | None:
    """Return the key of a row without `image` that seems to hold one, by its name or its value."""
    for key, value in row.items():
        if key in ("caption", "conversations") or value in (None, "", [], {}):
            continue
        values = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
        is_named = key not in READ_KEYS and _IMAGE_WORD.search(key)
        if is_named or any(isinstance(one, str) and _IMAGE_NAME.search(one[-200:]) for one in values):
            return key
    return None


def _name(key: str) -> str:
    """Return a key for a message, with everything escaped that a terminal would not print."""
    return (key if key.isprintable() else ascii(key)[1:-1])[:60]


def shown(value: Any) -> str:
    """Return a value as JSON, cut to a length that fits a message."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if text.isprintable() else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
