"""The aligned set of stage 2: `filter_cap.json` and a folder of images.

Input: the folder as its authors publish it (cc_sbu_align). Output: examples of one instruction and one detailed
description.
"""

from __future__ import annotations

import random
from typing import Any

from minigpt4.config.parts import AlignedPairsConfig
from minigpt4.conversation.dialogue import read_prompts
from minigpt4.datasets.source import Example, IndexedSource, read_json, require, shortened
from minigpt4.errors import DataError

ANNOTATIONS = "filter_cap.json"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class AlignedPairs(IndexedSource):
    """Images with one long caption each, and an instruction drawn per sample (Original: per batch)."""

    Config = AlignedPairsConfig

    def __init__(self, config: AlignedPairsConfig, name: str) -> None:
        super().__init__(config, name)
        folder = require(config.path, "folder", name)
        self.prompts = read_prompts(config.prompts)
        self.annotations = require(folder / ANNOTATIONS, "file", name)
        content = read_json(self.annotations)
        rows = content.get("annotations") if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows:
            raise DataError(
                f'{self.annotations}: must be {{"annotations": [{{"image_id": ..., "caption": ...}}, ...]}} '
                "with at least one annotation",
                cause="row",
            )
        self._rows = rows
        self._folder = require(folder / "image", "folder", name)
        listed = {f.name for f in self._folder.iterdir() if f.suffix.lower() in SUFFIXES}
        self._images = {name.rpartition(".")[0]: name for name in sorted(listed)}
        missing = [f"{image_id}.jpg" for image_id in map(_image_id, self._rows) if image_id not in self._images]
        if len(missing) == len(self._rows):
            raise DataError(
                f"{name}: none of the {len(missing)} images of {self.annotations} was found in {self._folder} "
                f"({shortened(missing)}); put them there",
                cause="missing",
            )

    def __len__(self) -> int:
        """Return the number of annotations."""
        return len(self._rows)

    def example(self, index: int, rng: random.Random) -> Example:
        """See `IndexedSource.example`."""
        place = f"{self.name}: {ANNOTATIONS} item {index + 1}"
        row = self._rows[index]
        image_id = _image_id(row)
        if not image_id:
            raise DataError(f"{place}: expected an object with `image_id` and `caption`", cause="row")
        caption = row.get("caption")
        if not isinstance(caption, str):
            raise DataError(f"{place} (image {image_id}): the caption is missing", cause="caption")
        if image_id not in self._images:
            raise DataError(
                f"{place}: image {image_id}.jpg (or {', '.join(SUFFIXES[1:])}) not found in {self._folder}",
                cause="missing image",
            )
        dialogue = self.captioned(caption, place, rng.choice(self.prompts))
        return Example(f"{ANNOTATIONS}:{image_id}", (self._folder / self._images[image_id],), dialogue)


def _image_id(row: Any) -> str:
    """Return the image id of an annotation, empty if it has none."""
    image_id = row.get("image_id") if isinstance(row, dict) else None
    return str(image_id) if isinstance(image_id, str | int) else ""
