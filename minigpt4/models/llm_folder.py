"""The weight files of a folder saved by transformers, looked at before transformers loads them.

Input: a folder. Output: its files, each opened as far as its header; an error names the file that is damaged.
"""

from __future__ import annotations

import json
from pathlib import Path

from minigpt4.errors import WeightsError
from minigpt4.weights import read_pickle, read_tensors

_NAMES = ("model.safetensors", "pytorch_model.bin")
"""What transformers looks for, in its order; each may have an index and shards in its place."""


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers would load.

    Raises:
        WeightsError: there are none, a shard is missing or damaged, or a pickle has foreign code in it.
    """
    files = next((found for name in _NAMES if (found := _named(folder, name))), [])
    if not files:
        raise WeightsError(f"{folder}: has a config.json, but no .safetensors or .bin file of weights")
    lacking = [file.name for file in files if not file.is_file()]
    if lacking:
        raise WeightsError(
            f"{folder}: {len(lacking)} of {len(files)} shards are missing, the first: {lacking[0]}; copy them here"
        )
    for file in files:
        if file.suffix == ".safetensors":
            read_tensors(file, lambda name: False)
        else:
            read_pickle(file)
    return files


def _named(folder: Path, name: str) -> list[Path]:
    """Return the file of this name, or the shards that its index names."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    try:
        shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / shard for shard in sorted(set(shards.values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: truncated or not an index of weights: {error!r}") from error
