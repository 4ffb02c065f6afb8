"""Captions for a folder of images, in batches, into a JSON lines file.

Input: a loaded model and a folder. Output: one line per image, in the order of their names: `image`, `prompt`, and
`caption` or `error`. A job that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import tqdm
from PIL import Image
from torch import Tensor

from minigpt4.chat.engine import Engine, Prompt
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.errors import DataError, ImageError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionCount:
    """How a job ended: images captioned and images that cannot be read, those of earlier runs included."""

    captions: int
    bad_images: int


class CaptionRunner:
    """Asks the same question about every image of a folder."""

    def __init__(self, images: Path, out: Path, batch_size: int, prompt: str) -> None:
        """Caption the image files below `images` into the file `out`, `batch_size` at a time.

        Raises:
            DataError: there is no such folder, no image in it, or `out` is of another job.
        """
        if batch_size < 1:
            raise DataError(f"--batch-size must be at least 1, found {batch_size}")
        self.folder = images
        self.out = out
        self.batch_size = batch_size
        self.prompt = prompt
        self.names = _image_names(images, out)
        self.done = read_done(out, prompt)

    def run(self, loaded: LoadedModel) -> CaptionCount:
        """Write what is lacking, and return what the file holds.

        Raises:
            MiniGPT4Error: the prompt cannot be asked.
        """
        engine = Engine(loaded)
        waiting = [name for name in self.names if name not in self.done]
        if self.done:
            _log.info("%s: has %d of %d images, going on", self.out, len(self.names) - len(waiting), len(self.names))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with (
            self.out.open("ab", buffering=0) as file,
            tqdm(total=len(self.names), initial=len(self.names) - len(waiting), desc="captions", unit="image") as bar,
        ):
            for start in range(0, len(waiting), self.batch_size):
                rows = self._batch(engine, waiting[start : start + self.batch_size])
                # One write for all lines: whoever reads the file meets none half written.
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
                os.fsync(file.fileno())
                self.done |= {row["image"]: "error" in row for row in rows}
                bar.update(len(rows))
        bad = sum(self.done.values())
        return CaptionCount(len(self.done) - bad, bad)

    def _batch(self, engine: Engine, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the lines of some images; one that cannot be read has its error in place of a caption."""
        pixels: dict[str, Tensor] = {}
        errors: dict[str, str] = {}
        for name in names:
            try:
                pixels[name] = engine.loaded.image_processor(self.folder / name)
            except ImageError as error:
                errors[name] = str(error)
        captions: dict[str, str] = {}
        if pixels:
            features = engine.encode(list(pixels.values()))
            prompts = [Prompt(Dialogue((Turn(self.prompt),)), one.unsqueeze(0)) for one in features]
            answers = engine.answer(prompts, engine.loaded.config.chat)
            captions = dict(zip(pixels, answers, strict=True))
        return [
            {"image": name, "prompt": self.prompt}
            | ({"error": errors[name]} if name in errors else {"caption": captions[name]})
            for name in names
        ]


def read_done(out: Path, prompt: str) -> dict[str, bool]:
    """Return the images that a file holds, and whether each is a bad one; a line cut off by a kill is removed.

    Raises:
        DataError: the file is not of this job.
    """
    if not out.exists():
        return {}
    try:
        content = out.read_bytes()
    except OSError as error:
        raise DataError(f"{out}: cannot be read ({error}); give another --out") from error
    whole = content[: content.rfind(b"\n") + 1]
    done: dict[str, bool] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            name, asked = row["image"], row["prompt"]
            done[name] = "error" in row
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{out}:{number}: is no line of captions; give another --out") from error
        if asked != prompt:
            raise DataError(f"{out}:{number}: was asked {asked!r}, not {prompt!r}; give another --out")
    if len(whole) < len(content):
        os.truncate(out, len(whole))
    return done


def _image_names(folder: Path, out: Path) -> list[str]:
    """Return the image files below a folder by their names in it, sorted."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; --images takes a folder")
    Image.init()
    known = Image.registered_extensions()
    files = [path for path in folder.rglob("*") if path.is_file() and path.resolve() != out.resolve()]
    # A link to nothing is no file, and yet an image that cannot be read: it is reported with the others.
    files += [path for path in folder.rglob("*") if path.is_symlink() and not path.exists()]
    names = sorted(path.relative_to(folder).as_posix() for path in files if path.suffix.lower() in known)
    if not names:
        raise DataError(f"{folder}: has no image file ({', '.join(sorted(known)[:5])}, ...) among {len(files)} files")
    if len(names) < len(files):
        _log.info("%s: %d files are left out, their names are not those of images", folder, len(files) - len(names))
    return names
