"""The published names of tensors, and ours; and the released files: `llama_proj` beside an optimiser and a config.

With `models/resampler.py`, which reads BLIP-2's Q-Former file, the only place that knows `visual_encoder`, `Qformer`
and `llama_model`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4.checkpoints.manifest import FORMAT, Manifest, PartIdentity
from minigpt4.conversation.templates import TEMPLATES, Template
from minigpt4.errors import CheckpointError, ExportError
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.models.resampler import Merge, QFormer, qformer_name
from minigpt4.models.vision import EvaViTG
from minigpt4.weights import read_pickle, tensors_of

_PREFIXES = {
    "visual_encoder.": "vision_encoder.vit.",
    "ln_vision.": "vision_encoder.ln_vision.",
    "llama_model.": "language_model.model.",
}
_PROJECTION = ("llama_proj.weight", "llama_proj.bias")
_BUFFERS = re.compile(r"embeddings\.position_ids$|rotary_emb\.inv_freq$")


def our_name(published: str) -> str:
    """Return our name of a tensor given its published one."""
    if published == "query_tokens" or published.startswith("Qformer."):
        return f"resampler.{qformer_name(published)}"
    for theirs, ours in _PREFIXES.items():
        if published.startswith(theirs):
            return ours + published.removeprefix(theirs)
    return published


def is_buffer(published: str) -> bool:
    """Whether a tensor is a buffer that every model computes itself."""
    return _BUFFERS.search(published) is not None


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return published tensors under our names, without the buffers that every model computes itself."""
    return {our_name(name): tensor for name, tensor in tensors.items() if not is_buffer(name)}


@dataclass(frozen=True)
class Release:
    """One of the released models.

    Attributes:
        config: the file in `eval_configs/` that describes it.
        language_model: what it was trained with.
        resampler: class name of ours.
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
        tensors: `llama_proj`, under our names.
        manifest: what the file tells of itself; what it does not is empty.
        release: which of the released models it is of, None for another size.
        ignored: names of the buffers in it that every model computes itself.
    """

    tensors: dict[str, Tensor]
    manifest: Manifest
    release: Release | None
    ignored: list[str]


def is_released(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a file in the layout of the released ones."""
    weight, bias = (tensors.get(name) for name in _PROJECTION)
    return weight is not None and bias is not None and weight.ndim == 2 and bias.shape == weight.shape[:1]


def read_released(path: Path) -> Released:
    """Read `llama_proj` of a released MiniGPT-4 file, of either stage.

    Raises:
        WeightsError: the file cannot be read, or has foreign code in it.
        CheckpointError: it is of another layout, or more than `llama_proj` was trained.
    """
    content = read_pickle(path)
    found = tensors_of(content, path)
    if not is_released(found):
        own = ", ".join([name for name in found if not is_buffer(name)][:3]) or "no tensors"
        raise CheckpointError(
            f"{path}: is no MiniGPT-4 checkpoint, it has no {_PROJECTION[0]} with its bias, but {own}; "
            f"python -m minigpt4 inspect {path} tells what it is"
        )
    ignored = [name for name in found if is_buffer(name)]
    unexpected = sorted(found.keys() - {*_PROJECTION, *ignored})
    if unexpected:
        raise CheckpointError(
            f"{path}: has {len(unexpected)} trained tensors besides llama_proj ({', '.join(unexpected[:3])}, ...), as "
            "MiniGPT-v2 and models with a trained Q-Former have; only llama_proj could be taken, and that is not the "
            "model that was trained"
        )
    tensors = {name: found[name] for name in _PROJECTION}
    width, query_width = (int(n) for n in tensors["llama_proj.weight"].shape)
    release = RELEASES.get((width, query_width))
    return Released(tensors, _manifest(content, tensors, release), release, ignored)


def _manifest(content: Any, tensors: Mapping[str, Tensor], release: Release | None) -> Manifest:
    """Return what a released file tells of itself, in the form our checkpoints have."""
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
    """Return stage and template of a released file, 0 and empty where its config does not tell.

    Only stage 2 has prompts.
    """
    config = content.get("config") if isinstance(content, Mapping) else None
    model = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(model, Mapping) or "arch" not in model:
        return 0, ""
    prompt = str(model.get("prompt_template") or "")
    if not model.get("prompt_path"):
        return 1, "plain"
    return 2, next((t.name for t in TEMPLATES.values() if t.question == tuple(prompt.split("{}"))), "")


def save_published(model: MiniGPT4, template: Template, path: Path) -> None:
    """Write a `.pth` for `ckpt:` of the published code's configs: `llama_proj` alone, float32, under `model`.

    Source: `runner_base.py`, which writes model, optimizer, config, scaler and epoch; a model's `from_config` reads
    `model` only, so the optimizer and the scaler are left out, and `config` tells the prompt alone.

    Args:
        model: where only `llama_proj` was trained.
        template: it was trained with.
        path: must not exist.

    Raises:
        ExportError: the published code cannot use this model, or `path` exists or cannot be written.
    """
    _check_published(model)
    if path.exists():
        raise ExportError(f"{path}: exists already; name a new file")
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in model.trained_state().items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": tensors, "config": {"model": _prompt_config(template)}, "epoch": 0}, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError to torch
        raise ExportError(f"{path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _check_published(model: MiniGPT4) -> None:
    more = sorted({name for name in model.learnt_names() if not name.startswith("llama_proj.")})
    if more:
        raise ExportError(
            f"the published code loads llama_proj alone, but this model has also learnt {', '.join(more[:3])}"
            f"{', ...' if len(more) > 3 else ''}: use --to huggingface, or keep the checkpoint as it is"
        )
    encoder, resampler = type(model.vision_encoder), type(model.resampler)
    if encoder is not EvaViTG or resampler not in (QFormer, Merge):
        raise ExportError(
            "the published code knows EVA-ViT-g with a Q-Former, or with four patches joined; this model has "
            f"{encoder.__name__} and {resampler.__name__}: keep the checkpoint, or use --to prompt-embeds"
        )


def _prompt_config(template: Template) -> dict[str, str]:
    """Return the keys of the published config that say how the model was asked; captions were not."""
    if template.question == ("", ""):
        return {"arch": "minigpt4", "end_sym": template.end}
    prompt = "{}".join(template.question)
    return {
        "arch": "minigpt4",
        "prompt_path": "prompts/alignment.txt",
        "prompt_template": prompt,
        "end_sym": template.end,
    }
