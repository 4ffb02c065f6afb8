"""Checkpoints without a model, and a process that writes one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minigpt4.checkpoints.manifest import FORMAT, Manifest, PartIdentity
from minigpt4.checkpoints.store import STATE_KEYS, CheckpointStore

TENSORS = {"llama_proj.weight": torch.arange(1_000_000.0).view(1000, 1000), "llama_proj.bias": torch.zeros(1000)}


def manifest(step: int) -> Manifest:
    parts = {name: PartIdentity("X", "", 1, "0") for name in ("vision_encoder", "resampler", "language_model")}
    trained = {name: list(tensor.shape) for name, tensor in TENSORS.items()}
    return Manifest(FORMAT, "0", step, 100, "plain", trained, parts)


def state(step: int) -> dict[str, Any]:
    return {**dict.fromkeys(STATE_KEYS), "progress": {"step": step}}


def save(folder: Path, step: int, keep_last: int = 3) -> Path:
    store = CheckpointStore(folder, keep_last)
    return store.save(step, TENSORS, manifest(step), "compat: ours\n", state(step))


def save_forever(folder: Path, first: int) -> None:
    for step in range(first, first + 10_000):
        save(folder, step)
