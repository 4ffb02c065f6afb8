"""The released MiniGPT-4 files: `llama_proj`, the optimiser's state and a config in one pickle.

Input: a `.pth` file of either stage. Output: `Released`, with `llama_proj` and a manifest like that of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.checkpoints.manifest import FORMAT, Manifest, PartIdentity
from minigpt4.errors import CheckpointError
from minigpt4.registry import TEMPLATES
from minigpt4.tensor_headers import Header, content_of_pickle, headers_of
from minigpt4.tensor_names import is_buffer

if TYPE_CHECKING:  # a file is inspected without torch
    from torch import Tensor

_PROJECTION = ("llama_proj.weight", "llama_proj.bias")


@dataclass(frozen=True)
class Release:
    """One of the released models.

    Attributes:
        config: the file in `eval_configs/` that describes it.
        language_model: the language model that it was trained with.
        resampler: name of our class.
    """

    config: str
    language_model: str
    resampler: str


RELEASES = {
    (4096, 768): Release("minigpt4_7b", "Vicuna-7B v0", "QFormer"),
    (5120, 768): Release("minigpt4_13b", "Vicuna-13B v0", "QFormer"),
    (4096, 5632): Release("minigpt4_llama2", "LLaMA-2-7B-chat", "Merge"),
}
"""By the shape of `llama_proj.weight`: the width of the language model, and of the query features."""


@dataclass(frozen=True)
class Released:
    """A file in the layout of the released ones.

    Attributes:
        tensors: weight and bias of `llama_proj`.
        manifest: what the file says about itself; other fields are empty or 0.
        release: the released model that it belongs to, None for other sizes.
        ignored: names of its buffers that every model computes itself.
    """

    tensors: dict[str, Tensor]
    manifest: Manifest
    release: Release | None
    ignored: list[str]


def is_released(tensors: Mapping[str, Tensor | Header]) -> bool:
    """Whether these are the tensors of a file in the layout of the released ones."""
    weight, bias = (tensors.get(name) for name in _PROJECTION)
    return weight is not None and bias is not None and weight.ndim == 2 and bias.shape == weight.shape[:1]


def read_released(path: Path) -> Released:
    """Read `llama_proj` of a released MiniGPT-4 file, of either stage.

    Raises:
        WeightsError: the file cannot be read, or contains foreign code.
        CheckpointError: it has another layout, or more than `llama_proj` was trained.
    """
    from minigpt4.weights import read_pickle, tensors_of

    content = read_pickle(path)
    return _released(path, content, tensors_of(content, path))


def inspect_released(path: Path) -> Released:
    """Return the same as `read_released`, with headers in place of the tensors where torch is not needed to read it."""
    content = content_of_pickle(path)
    found = headers_of(content)
    return _released(path, content, found) if found else read_released(path)


def _released(path: Path, content: object, found: Mapping[str, Any]) -> Released:
    if not is_released(found):
        own = ", ".join([name for name in found if not is_buffer(name)][:3]) or "no tensors"
        raise CheckpointError(
            f"{path}: is not a MiniGPT-4 checkpoint: expected {' and '.join(_PROJECTION)}, found {own}; "
            f"python -m minigpt4 inspect {path} says what it is"
        )
    ignored = [name for name in found if is_buffer(name)]
    unexpected = sorted(found.keys() - {*_PROJECTION, *ignored})
    if unexpected:
        raise CheckpointError(
            f"{path}: has {len(unexpected)} trained tensors besides llama_proj ({', '.join(unexpected[:3])}, ...), as "
            "MiniGPT-v2 and models with a trained Q-Former have; such files cannot be loaded, because llama_proj alone "
            "is not the model that was trained"
        )
    tensors = {name: found[name] for name in _PROJECTION}
    width, query_width = (int(n) for n in tensors["llama_proj.weight"].shape)
    release = RELEASES.get((width, query_width))
    return Released(tensors, _manifest(content, tensors, release), release, ignored)


def _manifest(content: Any, tensors: Mapping[str, Tensor | Header], release: Release | None) -> Manifest:
    """Return what a released file says about itself, as the manifest of a checkpoint."""
    width, query_width = (int(n) for n in tensors["llama_proj.weight"].shape)
    parts = {
        "vision_encoder": PartIdentity("EvaViTG", "EVA-ViT-g", 1408 if release else 0, ""),
        "resampler": PartIdentity(release.resampler if release else "", "", query_width, ""),
        "language_model": PartIdentity("", release.language_model if release else "", width, ""),
    }
    trained = {name: list(tensor.shape) for name, tensor in tensors.items()}
    stage, template = _stage(content)
    epoch = content.get("epoch") if isinstance(content, Mapping) else None
    notes = ["published layout" + (f", {epoch + 1} epoch(s)" if isinstance(epoch, int) else "")]
    return Manifest(FORMAT, "published", 0, 0, template, trained, parts, notes=notes, stage=stage)


def _stage(content: Any) -> tuple[int, str]:
    """Return stage and template of a released file, 0 and empty if its config does not name them.

    Only stage 2 has prompts.
    """
    config = content.get("config") if isinstance(content, Mapping) else None
    model = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(model, Mapping) or "arch" not in model:
        return 0, ""
    prompt = str(model.get("prompt_template") or "")
    if not model.get("prompt_path"):
        return 1, "plain"
    return 2, next(
        (name for name in TEMPLATES.names() if TEMPLATES.get(name).question == tuple(prompt.split("{}"))), ""
    )
