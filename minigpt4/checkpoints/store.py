"""Checkpoint folders: written completely or not at all, the last few kept, the newest linked as `latest`.

`checkpoints/step_<n>/` contains `model.safetensors` (trained tensors only), `manifest.json`, `config.yaml` (resolved)
and `training_state.pt` (for resuming). A folder is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minigpt4.checkpoints.manifest import FILE as MANIFEST
from minigpt4.checkpoints.manifest import LATEST, WEIGHTS, Manifest
from minigpt4.errors import CheckpointError, MiniGPT4Error
from minigpt4.weights import read_tensors

CONFIG = "config.yaml"
STATE = "training_state.pt"
STATE_KEYS = {"optimizer", "scaler", "progress", "window", "positions", "random_states", "readers"}
"""What `training_state.pt` must hold."""
_log = logging.getLogger(__name__)
_STEP = re.compile(r"step_(\d+)")


@dataclass
class CheckpointStore:
    """The `checkpoints/` folder of a run.

    Attributes:
        folder: the folder.
        keep_last: number of checkpoints that are kept.
    """

    folder: Path
    keep_last: int = 3

    def save(
        self, step: int, tensors: dict[str, Tensor], manifest: Manifest, config_yaml: str, state: dict[str, Any]
    ) -> Path:
        """Write the checkpoint of a step; a process killed at any time leaves it complete or absent.

        Raises:
            CheckpointError: it cannot be written.
        """
        final = self.folder / f"step_{step}"
        partial = self.folder / f".step_{step}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, partial / WEIGHTS)
            torch.save(state, partial / STATE)
            (partial / CONFIG).write_text(config_yaml, encoding="utf-8")
            checked = replace(manifest, checksums={name: _checksum(partial / name) for name in (WEIGHTS, STATE)})
            (partial / MANIFEST).write_text(checked.to_json(), encoding="utf-8")
            for file in partial.iterdir():
                _to_disk(file)
            if final.exists():
                self._remove(final)
            partial.replace(final)
            self._point_latest(final.name)
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk is a RuntimeError to torch
            self._remove_partial()
            kept = self.latest()
            raise CheckpointError(
                f"{final}: cannot be written: {str(error).splitlines()[0]}; the last checkpoint is "
                f"{kept.name if kept else 'missing'}"
            ) from error
        self._remove_old()
        return final

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        steps = self._steps()
        return steps[-1] if steps else None

    def resumable(self) -> Path | None:
        """Return the newest checkpoint that a run can resume from, or None, and repair what a kill left behind.

        A damaged one that is newer is renamed to `step_<n>.damaged`, with a warning.

        Raises:
            CheckpointError, WeightsError: all checkpoints are damaged.
        """
        steps = self._steps()
        if not steps:
            return None
        errors: list[MiniGPT4Error] = []
        for path in reversed(steps):
            try:
                read_trained(path, Manifest.read(path))
                read_state(path)
            except MiniGPT4Error as error:
                errors.append(error)
                continue
            for damaged, found in zip(reversed(steps), errors, strict=False):
                aside = damaged.with_name(f"{damaged.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                damaged.replace(aside)
                _log.warning("%s; the folder is renamed to %s and the run continues from %s", found, aside, path.name)
            latest = self.folder / LATEST
            if not latest.is_symlink() or latest.resolve() != path.resolve():
                self._point_latest(path.name)
            self._remove_old()
            return path
        raise errors[0]

    def _steps(self) -> list[Path]:
        """Return every complete checkpoint, oldest first."""
        found = [(int(m.group(1)), p) for p in self.folder.glob("step_*") if (m := _STEP.fullmatch(p.name))]
        return [path for _, path in sorted(found) if (path / MANIFEST).is_file()]

    def _point_latest(self, name: str) -> None:
        link = self.folder / f".{LATEST}.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(name, target_is_directory=True)
        latest = self.folder / LATEST
        if latest.is_dir() and not latest.is_symlink():  # a run folder copied without its links
            shutil.rmtree(latest)
        link.replace(latest)

    def _remove(self, folder: Path) -> None:
        """Remove a checkpoint; killed at any instant, no half of it is left under its name."""
        aside = self.folder / f".{folder.name}.old.partial"
        shutil.rmtree(aside, ignore_errors=True)
        folder.replace(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _remove_old(self) -> None:
        """Remove all checkpoints but the last few, and what a kill left behind."""
        for old in self._steps()[: -self.keep_last]:
            self._remove(old)
        self._remove_partial()

    def _remove_partial(self) -> None:
        """Remove what was not written completely."""
        for partial in self.folder.glob(".step_*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            (self.folder / f".{LATEST}.partial").unlink()


def read_trained(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Read the trained tensors of a checkpoint folder.

    Raises:
        CheckpointError: names, shapes or the checksum differ from the manifest.
        WeightsError: the file is damaged.
    """
    tensors = read_tensors(folder / WEIGHTS)
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != manifest.trained:
        expected = manifest.trained
        differing = [
            *(f"{name} is missing" for name in expected if name not in found),
            *(f"{name} is unexpected" for name in found if name not in expected),
            *(
                f"{k} is {found[k]}, should be {expected[k]}"
                for k in expected
                if found.get(k, expected[k]) != expected[k]
            ),
        ]
        raise CheckpointError(f"{folder / WEIGHTS}: does not agree with {MANIFEST}: {', '.join(differing[:5])}")
    _check_file(folder / WEIGHTS, manifest)
    return tensors


def read_state(folder: Path) -> dict[str, Any]:
    """Read the training state, for resuming.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = folder / STATE
    if path.is_file():  # before it is unpickled, where a flipped bit may ask for any amount of memory
        _check_file(path, Manifest.read(folder))
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; this checkpoint can be used, but not resumed") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what torch raises depends on which byte is damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: damaged: {reason.split('. ')[0]}") from error
    missing = STATE_KEYS - (state.keys() if isinstance(state, dict) else set())
    if missing:
        raise CheckpointError(f"{path}: damaged: without {', '.join(sorted(missing))}")
    checked: dict[str, Any] = state
    return checked


def _check_file(path: Path, manifest: Manifest) -> None:
    """Raise CheckpointError if a file is not the one that was saved; one of an earlier version cannot be checked."""
    expected = manifest.checksums.get(path.name)
    if expected and expected != (found := _checksum(path)):
        raise CheckpointError(
            f"{path}: damaged, or changed after it was saved: its sha256 is {found[:12]}..., {MANIFEST} has "
            f"{expected[:12]}...; copy it again, or use another checkpoint"
        )


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Write a text file; killed at any instant or refused by the disk, the file is the new one or the old one."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
