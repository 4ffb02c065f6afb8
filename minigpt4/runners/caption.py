"""Captions for a folder of images, in batches, written to a JSON lines file.

Input: a loaded model and a folder. Output: one line per image, in the order of their names: `image`, `prompt`, and
`caption` or `error`, and `made_by`: the model, the decoding settings and the folder. An interrupted job continues where
it stopped; a file that anything else made is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import tqdm
from PIL import Image

from minigpt4.chat.engine import Engine, Prompt
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.errors import DataError
from minigpt4.strict_json import parse_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionCount:
    """The captions and the unreadable images in the file of a job, those of earlier runs included."""

    captions: int
    bad_images: int


class CaptionRunner:
    """Asks the same question about every image of a folder; the verb `caption`."""

    def __init__(self, images: Path, out: Path, batch_size: int, prompt: str) -> None:
        """Caption the image files below `images`, `batch_size` at a time, into the file `out`.

        Raises:
            DataError: the folder is missing or has no image, or `out` belongs to another job.
        """
        if batch_size < 1:
            raise DataError(f"--batch-size must be at least 1, found {batch_size}")
        self.folder = images
        self.out = out
        self.batch_size = batch_size
        self.prompt = prompt
        self.names = _image_names(images, out)
        self.rows = read_rows(out, prompt, self.names)
        self.identity: dict[str, str] = {}

    def run(self, loaded: LoadedModel) -> CaptionCount:
        """Caption the images that have no caption in the file yet, and return the counts of the whole file.

        Images that could not be read in an earlier run are tried again.

        Raises:
            DataError: another model, other decoding settings or another folder made the file, or another job writes it.
            MiniGPT4Error: the prompt cannot be answered.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("ab", buffering=0) as file:
            _lock(file, self.out)
            self.identity = identity_of(loaded, self.folder)
            self.rows = read_rows(self.out, self.prompt, self.names)
            self._check_identity()
            whole = [row for row in self.rows.values() if "error" not in row]
            if len(whole) < len(self.rows):
                file = self._rewritten(file, whole)
            self.rows = {row["image"]: row for row in whole}
            waiting = [name for name in self.names if name not in self.rows]
            num_done = len(self.names) - len(waiting)
            if num_done:
                _log.info("%s: has %d of %d images, continuing", self.out, num_done, len(self.names))
            engine = Engine(loaded)
            with tqdm(total=len(self.names), initial=num_done, desc="captions", unit="image") as bar:
                for start in range(0, len(waiting), self.batch_size):
                    rows = self._batch(engine, waiting[start : start + self.batch_size])
                    # One write for all lines, so that a reader of the file sees complete lines only.
                    file.write(b"".join(map(_line, rows)))
                    os.fsync(file.fileno())
                    self.rows |= {row["image"]: row for row in rows}
                    bar.update(len(rows))
            ordered = sorted(self.rows.values(), key=lambda row: row["image"])
            if ordered != list(self.rows.values()):
                file = self._rewritten(file, ordered)
            file.close()
        bad = sum("error" in row for row in self.rows.values())
        return CaptionCount(len(self.rows) - bad, bad)

    def _check_identity(self) -> None:
        for number, row in enumerate(self.rows.values(), start=1):
            made_by = row.get("made_by")
            if not isinstance(made_by, dict):
                raise DataError(
                    f"{self.out}:{number}: the line does not say which model made it (an earlier version wrote it); "
                    "choose another --out"
                )
            for key, value in self.identity.items():
                if made_by.get(key) != value:
                    raise DataError(
                        f"{self.out}:{number}: made with another {key} ({made_by.get(key)!r}, not {value!r}); "
                        "choose another --out"
                    )

    def _rewritten(self, file: io.FileIO, rows: Sequence[dict[str, Any]]) -> io.FileIO:
        """Replace the file's content in one step, and return it open for appending and locked."""
        new = self.out.with_name(self.out.name + ".new")
        new.write_bytes(b"".join(map(_line, rows)))
        replaced = new.open("ab", buffering=0)
        _lock(replaced, self.out)
        os.fsync(replaced.fileno())
        new.replace(self.out)
        file.close()
        return replaced

    def _batch(self, engine: Engine, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the lines of some images; the line of an unreadable image has an error instead of a caption."""
        rows: dict[str, dict[str, Any]] = {name: {"image": name, "prompt": self.prompt} for name in names}
        pixels = {}
        for name in names:
            try:
                pixels[name] = engine.loaded.image_processor(self.folder / name)
            except MemoryError:
                raise
            except Exception as error:  # one image never stops the others
                rows[name]["error"] = str(error) or type(error).__name__
        features = engine.query_features(list(pixels.values()))
        if features is not None:
            prompts = [Prompt(Dialogue((Turn(self.prompt),)), one.unsqueeze(0)) for one in features]
            for name, caption in zip(pixels, engine.answer(prompts, engine.loaded.config.chat), strict=True):
                rows[name]["caption"] = caption
        return [{**row, "made_by": self.identity} for row in rows.values()]


def identity_of(loaded: LoadedModel, folder: Path) -> dict[str, str]:
    """Return what decides a caption besides image and prompt: short hashes of model and decoding, and the folder."""
    config = loaded.config
    parts = repr((replace(config.model, init_from=""), config.processors, config.conversation, config.compat))
    model = hashlib.sha256(parts.encode())
    trained = loaded.model.inherited or {n for n in loaded.model.state_dict() if n.startswith("llama_proj.")}
    for name, tensor in sorted(loaded.model.state_dict().items()):
        if name in trained:
            model.update(name.encode())
            model.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    decoding = hashlib.sha256(repr(config.chat).encode())
    return {"model": model.hexdigest()[:16], "decoding": decoding.hexdigest()[:16], "folder": str(folder.resolve())}


def read_rows(out: Path, prompt: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the lines of a file by image; an incomplete last line is removed if this job began it.

    Raises:
        DataError: the file belongs to another job.
    """
    if not out.exists():
        return {}
    try:
        content = out.read_bytes()
    except OSError as error:
        raise DataError(f"{out}: cannot be read ({error}); choose another --out") from error
    whole = content[: content.rfind(b"\n") + 1]
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            row = parse_json(line, check_text=False)
            name, asked = row["image"], row["prompt"]
            if not isinstance(name, str) or not isinstance(asked, str) or not ("caption" in row or "error" in row):
                raise TypeError("other fields")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{out}:{number}: not a line of captions; choose another --out") from error
        if asked != prompt:
            raise DataError(f"{out}:{number}: the prompt is {asked!r}, not {prompt!r}; choose another --out")
        rows[name] = row
    tail = content[len(whole) :]
    if tail:
        beginnings = (_line({"image": name, "prompt": prompt})[:-2] for name in names)
        if not any(tail[: len(begin)] == begin[: len(tail)] for begin in beginnings):
            raise DataError(f"{out}:{len(rows) + 1}: not a line of captions; choose another --out")
        os.truncate(out, len(whole))
    return rows


def _line(row: dict[str, Any]) -> bytes:
    """Return a row as a line of JSON; a file name that is not text is escaped (Python reads it back as it was)."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode()


def _lock(file: io.FileIO, out: Path) -> None:
    """Keep other jobs from writing the file; the lock ends with the process. Not every system has locks."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"{out}: another job is writing this file; wait for it, or choose another --out") from error
    except OSError:
        _log.warning("%s: this file system has no locks; do not start two jobs with one --out", out)


def _image_names(folder: Path, out: Path) -> list[str]:
    """Return the paths of the image files below a folder, relative to it and sorted."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; --images takes a folder")
    Image.init()
    known = Image.registered_extensions()
    files = [path for path in folder.rglob("*") if path.is_file() and path.resolve() != out.resolve()]
    # A broken link is reported as an image that cannot be read.
    files += [path for path in folder.rglob("*") if path.is_symlink() and not path.exists()]
    names = sorted(path.relative_to(folder).as_posix() for path in files if path.suffix.lower() in known)
    if not names:
        raise DataError(f"{folder}: no image file ({', '.join(sorted(known)[:5])}, ...) among {len(files)} files")
    if len(names) < len(files):
        _log.info(
            "%s: %d files are left out, because their names are not those of images", folder, len(files) - len(names)
        )
    return names
