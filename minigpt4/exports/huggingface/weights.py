"""The weights of an exported folder: our tensors under transformers' names, written in shards one after another.

Input: a model of EVA-ViT-g, Q-Former and a causal LM. Output: `model.safetensors`, or
`model-00001-of-0000N.safetensors` and their index. Besides the model, at most one shard is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.tensor_names import to_blip2

INDEX = "model.safetensors.index.json"
_METADATA = {"format": "pt"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def blip2_tensors(model: MiniGPT4, added_rows: Sequence[int] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under its name in `Blip2ForConditionalGeneration`; LoRA adapters are merged.

    Only the biases of attention, layers with adapters and, with `added_rows`, embedding and head are copied; each copy
    is freed when the caller drops it.

    Args:
        model: EVA-ViT-g, Q-Former and a causal LM.
        added_rows: rows of the embedding and of the head that are repeated after the last one.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if name.startswith("language_model.") or name.endswith(".attn.v_bias"):
            continue
        if name.endswith(".attn.q_bias"):  # Blip2 has one bias for queries, keys and values; EVA has none for keys
            tensor = torch.cat([tensor, torch.zeros_like(tensor), state[name.replace("q_bias", "v_bias")]])
        yield to_blip2(name), tensor
    yield from _language_model(model, added_rows)


def _language_model(model: MiniGPT4, added_rows: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    tied = model.language_model.is_tied
    for name, tensor in model.language_model.merged_tensors():
        if tied and name == _HEAD:
            continue
        if added_rows and name in (_EMBEDDING, _HEAD):
            tensor = torch.cat([tensor, tensor[list(added_rows)]])
        yield f"language_model.{name}", tensor


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int) -> dict[str, tuple[int, ...]]:
    """Write tensors in order to files of at most `max_bytes`.

    Args:
        tensors: consumed one by one; a tensor larger than `max_bytes` gets a file of its own.
        folder: must exist.
        max_bytes: size of a shard.

    Returns:
        The shape of every tensor, by name.
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
    """Give the files their final names, which contain their number, and write the index if there are several."""
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
