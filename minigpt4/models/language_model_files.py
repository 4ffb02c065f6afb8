"""The weight files in the folder of a language model, as transformers finds them; found without transformers."""

from __future__ import annotations

from pathlib import Path

from minigpt4.errors import WeightsError
from minigpt4.tensor_headers import content_of_pickle, headers_of_safetensors

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""The files that transformers looks for, in its order; an index and shards may take the place of each."""


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers loads from a folder, each opened as far as its header.

    Raises:
        WeightsError: there are none, a shard is missing or damaged, or a pickle contains foreign code.
    """
    files = next((found for name in _WEIGHT_FILES if (found := _files_of(folder, name))), [])
    if not files:
        raise WeightsError(f"{folder}: has a config.json, but no .safetensors or .bin file of weights")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise WeightsError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing, the first: {missing[0]}; copy them here"
        )
    for file in files:
        is_safe = file.suffix == ".safetensors"
        if (headers_of_safetensors(file) if is_safe else content_of_pickle(file)) is not None:
            continue
        from minigpt4.weights import read_pickle, read_tensors  # which say what is wrong

        if is_safe:
            read_tensors(file, lambda name: False)
        else:
            read_pickle(file)
    return files


def _files_of(folder: Path, name: str) -> list[Path]:
    """Return the file of this name, or the shards of its index."""
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        return [folder / name]
    if not index.is_file():
        return []
    from minigpt4.weights import read_index

    return [folder / shard for shard in sorted(set(read_index(index).values()))]
