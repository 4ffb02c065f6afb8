"""Pairs of an image and a caption, from a folder or from the rows of a table.

Input: a folder of images with captions in `txt` or `json` files of the same name, or a table. Output: one item per row
or image, in a fixed order: a pair, or what is wrong with it. Rows are read as training reads them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.conversation.encoder import require_text
from minigpt4.datasets.aligned_pairs import ANNOTATIONS
from minigpt4.datasets.conversations import image_files
from minigpt4.datasets.rows import Row
from minigpt4.datasets.shard_index import sha256_of
from minigpt4.datasets.source import is_file, sample_error
from minigpt4.datasets.web_pairs import IMAGE_KEYS, MAX_TEXT
from minigpt4.errors import DataError
from minigpt4.preparation.tables import ENDINGS, Table, shown
from minigpt4.strict_json import JSONError, parse_json

MAX_CAPTION = MAX_TEXT // 8
"""Longest caption, in characters; in JSON, it fits into the bytes that training reads."""
ADDRESS = ("url", "URL", "image_url")
"""Columns of tables whose images have still to be downloaded."""


class Pair(NamedTuple):
    """An image, as a path or the content of its file, its caption, and where both come from."""

    image: Path | bytes
    caption: str
    place: str


@dataclass(frozen=True)
class Keys:
    """Where a row has its image and its caption.

    Attributes:
        image: the key of the image; empty: `image` or `images`, as in training.
        caption: the key of the caption.
    """

    image: str = ""
    caption: str = "caption"


class TablePairs:
    """The pairs of a table."""

    def __init__(self, file: Path, keys: Keys, image_dir: Path | None = None) -> None:
        """Read `file`; image paths are relative to `image_dir`, by default the folder of the file."""
        self.table = Table(file)
        self.keys = keys
        self.images = image_dir or file.parent
        if not self.images.is_dir():
            raise DataError(f"{self.images}: folder not found; set --image-dir", cause="missing")

    @property
    def progress(self) -> tuple[int, int, str]:
        """How far the source was read, its size, and the unit of both."""
        return self.table.position, self.table.total, self.table.unit

    def identity(self) -> dict[str, str]:
        """Return the name and the checksum of the source."""
        return {"source": self.table.file.name, "sha256": sha256_of(self.table.file)}

    def items(self) -> Iterator[Pair | DataError]:
        """Yield a pair or an error for every row.

        Raises:
            DataError: the file cannot be read any further; a line of a JSONL file is not JSON.
        """
        for row in self.table.rows():
            if isinstance(row.value, DataError) and self.table.suffix not in (".csv", ".tsv"):
                raise row.value  # as in training, which does not start with such a file
            place = self.table.place(row.number)
            try:
                yield self._pair(row, place)
            except Exception as error:
                yield sample_error(error, place)

    def _pair(self, row: Row, place: str) -> Pair:
        value = row.value
        if isinstance(value, DataError):
            raise value
        if not isinstance(value, dict):
            raise DataError(f"{place}: a row must be an object, found {shown(value)}", cause="row")
        if "conversations" in value:
            raise DataError(
                f"{place}: the row has `conversations`, and shards hold captions; train on the file itself, with "
                "type: conversations",
                cause="conversation",
            )
        key = self.keys.caption
        if key not in value:
            raise DataError(
                f"{place}: the row has no `{key}`; found {', '.join(map(str, value)) or 'no keys'}: name the key with "
                "--caption-key",
                cause="caption",
            )
        return Pair(self._image(value, place), checked_caption(value[key], place), self._short(row.number))

    def _image(self, value: dict[str, Any], place: str) -> Path | bytes:
        if self.keys.image:
            value = {"image": value.get(self.keys.image)}
        given = value.get("image")
        content = given.get("bytes") if isinstance(given, dict) else given
        if isinstance(content, bytes):  # a Parquet file with the images in it
            return content
        if isinstance(given, dict) and isinstance(given.get("path"), str):
            value = {"image": given["path"]}
        has_image = any(value.get(key) not in (None, [], "") for key in ("image", "images"))
        address = next((key for key in ADDRESS if value.get(key)), None)
        if not has_image and address:
            raise DataError(
                f"{place}: the row has no image, only the address {shown(value[address])}; download the images with "
                "img2dataset, see dataset/README_1_STAGE.md",
                cause="missing image",
            )
        files = image_files(value, place, self.images)
        if len(files) != 1:
            raise DataError(f"{place}: {len(files)} images; a pair has one", cause="image count")
        return files[0]

    def _short(self, number: int) -> str:
        return Path(self.table.place(number)).name


class FolderPairs:
    """The pairs of a folder, in the order of their names."""

    def __init__(self, folder: Path, keys: Keys) -> None:
        """Read `folder` with its subfolders."""
        if is_file(folder / ANNOTATIONS):
            raise DataError(
                f"{folder}: has {ANNOTATIONS}; train on the folder itself, with type: aligned_pairs", cause="row"
            )
        self.folder = folder
        self.keys = keys
        self._read = 0
        self._total = 0

    @property
    def progress(self) -> tuple[int, int, str]:
        """How far the source was read, its size, and the unit of both."""
        return self._read, self._total, "image"

    def identity(self) -> dict[str, str]:
        """Return the name of the folder, and a checksum of the names and sizes of its files."""
        digest = hashlib.sha256()
        self._total = 0
        for file in walk(self.folder):
            self._total += file.suffix.lower()[1:] in IMAGE_KEYS
            digest.update(
                f"{file.relative_to(self.folder).as_posix()}\0{file.stat().st_size}\n".encode(errors="replace")
            )
        return {"source": self.folder.absolute().name, "sha256": digest.hexdigest()}

    def items(self) -> Iterator[Pair | DataError]:
        """Yield a pair or an error for every image.

        Raises:
            DataError: the folder has no image.
        """
        self._read = 0
        for file in walk(self.folder):
            if file.suffix.lower()[1:] not in IMAGE_KEYS:
                continue
            self._read += 1
            try:
                place = file.relative_to(self.folder).as_posix()
                yield Pair(file, self._caption(file), place)
            except Exception as error:
                yield sample_error(error, str(file))
        if not self._read:
            table = next((file.name for file in walk(self.folder) if file.suffix.lower() in ENDINGS), None)
            hint = f"; pack the table {table!r} instead" if table else ""
            raise DataError(f"{self.folder}: the folder has no image ({', '.join(IMAGE_KEYS)}){hint}", cause="missing")

    def _caption(self, image: Path) -> str:
        text, fields = image.with_suffix(".txt"), image.with_suffix(".json")
        try:
            if is_file(fields):
                content = parse_json(_read_text(fields), check_text=False, allow_nan=True)
                caption = content.get(self.keys.caption) if isinstance(content, dict) else None
                if caption or not is_file(text):
                    return checked_caption(caption, f"{fields}")
            if is_file(text):
                return checked_caption(_read_text(text).decode("utf-8-sig"), f"{text}")
        except (JSONError, UnicodeDecodeError) as error:
            raise DataError(f"{image}: the caption cannot be read: {error}", cause="caption") from error
        table = next((name for name in ("metadata.jsonl", "metadata.csv") if is_file(self.folder / name)), "")
        hint = f"; pack {table} with --image-key file_name" if table else ""
        raise DataError(f"{image}: found neither {text.name} nor {fields.name} with its caption{hint}", cause="caption")


def pairs_of(source: Path, keys: Keys, image_dir: Path | None = None) -> TablePairs | FolderPairs:
    """Return the reader of a source: a folder or a table.

    Raises:
        DataError: the source is missing, or it is not one of these.
    """
    return FolderPairs(source, keys) if source.is_dir() else TablePairs(source, keys, image_dir)


def checked_caption(caption: Any, place: str) -> str:
    """Return a caption as it is.

    Raises:
        DataError: it is not text, empty, too long or not Unicode.
    """
    if not isinstance(caption, str):
        raise DataError(f"{place}: the caption must be text, found {shown(caption)}", cause="caption")
    if not caption.strip():
        raise DataError(f"{place}: the caption is empty; write one or leave the row out", cause="caption")
    if len(caption) > MAX_CAPTION:
        raise DataError(
            f"{place}: a caption of {len(caption):,} characters; is this a caption?", cause="text too large"
        )
    require_text(Dialogue((Turn("", caption),)), place)
    return caption


def walk(folder: Path) -> Iterator[Path]:
    """Yield the regular files below a folder, in the order of their names; hidden ones are left out."""
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(path, name)
            if not name.startswith(".") and is_file(file):
                yield file


def _read_text(file: Path) -> bytes:
    if file.stat().st_size > MAX_TEXT:
        raise DataError(
            f"{file}: {file.stat().st_size:,} bytes of text; more than {MAX_TEXT:,}", cause="text too large"
        )
    return file.read_bytes()
