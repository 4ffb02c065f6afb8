"""Small sources of pairs in every format, and folders compared byte by byte."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from minigpt4.datasets.source import Example
from tests.datasets.parts import image_bytes, web_pairs

FORMATS = ["json", "jsonl", "csv", "tsv", "parquet"]


def write_images(folder: Path, count: int) -> list[dict[str, Any]]:
    """Write images of a few kinds, and return a row for each."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        name = f"images/{number:04d}.{('jpg', 'png', 'webp')[number % 3]}"
        (folder / name).write_bytes(image_bytes(number, ("JPEG", "PNG", "WEBP")[number % 3]))
        rows.append({"image": name, "caption": f'caption {number}, "quoted" — é'})
    return rows


def write_table(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format that the ending of `file` names."""
    suffix = file.suffix[1:]
    if suffix == "json":
        file.write_text(json.dumps(rows, indent=1))
    elif suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]), delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    return file


def content(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def captions(folder: Path) -> list[str]:
    """Return the captions that training reads from the shards of a folder, in order; every sample must be whole."""
    items = list(web_pairs([str(folder / "*.tar")]).in_order())
    assert all(isinstance(item, Example) for item in items), items
    return [str(item.dialogue.turns[0].answer) for item in items if isinstance(item, Example)]
