"""Safetensors in shards, written as the tensors come: never more than one shard beside the model itself.

Input: (name, tensor) pairs. Output: `model.safetensors`, or `model-00001-of-0000N.safetensors` and their index, as
transformers reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

INDEX = "model.safetensors.index.json"
_METADATA = {"format": "pt"}


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int) -> dict[str, tuple[int, ...]]:
    """Write the tensors in order, a new file before one would hold more than `max_bytes`.

    Args:
        tensors: consumed one by one; a tensor larger than `max_bytes` gets a file of its own.
        folder: exists.
        max_bytes: size of a shard.

    Returns:
        The shape of every tensor written, by name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    shards: list[tuple[Path, list[str]]] = []
    total = pending_bytes = 0
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        path = folder / f"shard-{len(shards) + 1}.partial"
        save_file({name: tensor.contiguous() for name, tensor in pending.items()}, path, metadata=_METADATA)
        shards.append((path, list(pending)))
        pending.clear()

    for name, tensor in tqdm(tensors, desc="writing", unit="tensor", disable=None):
        if pending and pending_bytes + tensor.nbytes > max_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor
        shapes[name] = tuple(tensor.shape)
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    _name_shards(shards, folder, total)
    return shapes


def _name_shards(shards: list[tuple[Path, list[str]]], folder: Path, total: int) -> None:
    """Give the files their final names, which hold their number, and write the index if there are several."""
    if len(shards) == 1:
        shards[0][0].replace(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.replace(folder / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
