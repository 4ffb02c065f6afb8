"""Checkpoint folders: written whole or not at all, the last few kept, found again by `latest`.

`checkpoints/step_<n>/` holds `model.safetensors` (trained tensors only), `manifest.json`, `config.yaml` (resolved) and
`training_state.pt` (what resuming needs). Each is written under another name and renamed when complete.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minigpt4.checkpoints.manifest import FILE as MANIFEST
from minigpt4.checkpoints.manifest import Manifest
from minigpt4.errors import CheckpointError
from minigpt4.weights import read_tensors

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
STATE = "training_state.pt"
LATEST = "latest"
_STEP = re.compile(r"step_(\d+)")


@dataclass
class CheckpointStore:
    """The `checkpoints/` folder of a run.

    Attributes:
        folder: the folder.
        keep_last: how many checkpoints stay.
    """

    folder: Path
    keep_last: int = 3

    def save(
        self, step: int, tensors: dict[str, Tensor], manifest: Manifest, config_yaml: str, state: dict[str, Any]
    ) -> Path:
        """Write the checkpoint of a step; killed at any instant, it is there whole or not at all.

        Raises:
            CheckpointError: the disk refuses.
        """
        final = self.folder / f"step_{step}"
        partial = self.folder / f".step_{step}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, partial / WEIGHTS)
            (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            (partial / CONFIG).write_text(config_yaml, encoding="utf-8")
            torch.save(state, partial / STATE)
            for file in partial.iterdir():
                _to_disk(file)
            if final.exists():
                shutil.rmtree(final)
            partial.replace(final)
            self._point_latest(final.name)
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk is a RuntimeError to torch
            raise CheckpointError(f"{final}: cannot be written: {error}") from error
        self._drop_old()
        return final

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        steps = self._steps()
        return steps[-1] if steps else None

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

    def _drop_old(self) -> None:
        for old in self._steps()[: -self.keep_last]:
            shutil.rmtree(old, ignore_errors=True)
        for partial in self.folder.glob(".step_*.partial"):
            shutil.rmtree(partial, ignore_errors=True)


def read_trained(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Read the trained tensors of a checkpoint folder.

    Raises:
        CheckpointError: names or shapes are not those of the manifest.
        WeightsError: the file is damaged.
    """
    tensors = read_tensors(folder / WEIGHTS)
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != manifest.trained:
        wanted = manifest.trained
        differing = [
            *(f"{name} is missing" for name in wanted if name not in found),
            *(f"{name} is one too many" for name in found if name not in wanted),
            *(f"{k} is {found[k]}, not {wanted[k]}" for k in wanted if k in found and found[k] != wanted[k]),
        ]
        raise CheckpointError(f"{folder / WEIGHTS}: does not hold what the manifest says: {', '.join(differing[:5])}")
    return tensors


def read_state(folder: Path) -> dict[str, Any]:
    """Read what resuming needs.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = folder / STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; this checkpoint can be used, but not resumed from") from error
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: damaged: {str(error).splitlines()[0]}") from error
    return state


def _to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
