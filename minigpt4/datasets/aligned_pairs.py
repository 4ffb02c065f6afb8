"""The aligned set of stage 2: `filter_cap.json` and a folder of images.

Input: the folder as its authors publish it (cc_sbu_align). Output: examples of one instruction and one
detailed description.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from minigpt4.conversation.prompts import read_prompts
from minigpt4.datasets.source import Example, IndexedSource, SourceConfig, examples_of, file_digest, require_folder
from minigpt4.errors import DataError
from minigpt4.registry import path_field

ANNOTATIONS = "filter_cap.json"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class AlignedPairs(IndexedSource):
    """Images with one long caption each, and an instruction drawn per sample (Original: per batch)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(SourceConfig):
        """Where the set is, and what is asked."""

        path: str = path_field()
        """The folder that holds `filter_cap.json` and `image/`."""
        prompts: str = "alignment"
        """Name of a shipped file in `prompts/`, or a path: one instruction a line. Empty: the caption
        alone."""

    def __init__(self, config: Config, name: str) -> None:
        super().__init__(config, name)
        folder = require_folder(config.path, name)
        self.prompts = read_prompts(config.prompts) if config.prompts else [""]
        self._file = folder / ANNOTATIONS
        self._annotations = self._read_annotations()
        self._folder = require_folder(str(folder / "image"), name)
        listed = {f.name for f in self._folder.iterdir() if f.suffix.lower() in SUFFIXES}
        self._images = {name.rpartition(".")[0]: name for name in sorted(listed)}
        ids = [self._image_id(index) for index in range(len(self))]
        missing = [f"{image_id}.jpg" for image_id in ids if image_id not in self._images]
        if len(missing) == len(ids):
            raise DataError(
                f"{name}: none of the {len(ids)} images of {self._file} is in {self._folder} "
                f"({examples_of(missing)}); put them there",
                cause="missing",
            )

    def digest(self) -> str:
        """See `Source.digest`: the annotations."""
        return file_digest(self._file)

    def __len__(self) -> int:
        """Return the number of annotations."""
        return len(self._annotations)

    def example(self, index: int, draw: random.Random) -> Example:
        """See `IndexedSource.example`."""
        place = f"{ANNOTATIONS} item {index + 1}"
        annotation = self._annotations[index]
        image_id = self._image_id(index)
        if not image_id:
            raise DataError(f"{self.name}: {place}: must be an object with `image_id` and `caption`", cause="row")
        caption = annotation.get("caption")
        if not isinstance(caption, str):
            raise DataError(f"{self.name}: {place} (image {image_id}): has no caption", cause="caption")
        if image_id not in self._images:
            raise DataError(
                f"{self.name}: {place}: there is no image {image_id}.jpg (nor {', '.join(SUFFIXES[1:])}) "
                f"in {self._folder}",
                cause="missing image",
            )
        prompt = draw.choice(self.prompts)
        dialogue = self.captioned(caption, f"{self.name}: {place}", prompt)
        return Example(f"{ANNOTATIONS}:{image_id}", (self._folder / self._images[image_id],), dialogue)

    def _image_id(self, index: int) -> str:
        annotation = self._annotations[index]
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        return str(image_id) if isinstance(image_id, str | int) else ""

    def _read_annotations(self) -> list[Any]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8-sig"))
        except FileNotFoundError as error:
            raise DataError(
                f"{self.name}: there is no {self._file}; set the path of this data set", cause="missing"
            ) from error
        except json.JSONDecodeError as error:
            raise DataError(f"{self._file}:{error.lineno}: not valid JSON: {error.msg}", cause="row") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self._file}: cannot be read: {error}", cause="row") from error
        annotations = content.get("annotations") if isinstance(content, dict) else None
        if not isinstance(annotations, list) or not annotations:
            raise DataError(
                f'{self._file}: must hold {{"annotations": [{{"image_id": ..., "caption": ...}}, ...]}} '
                "with at least one annotation",
                cause="row",
            )
        return annotations
