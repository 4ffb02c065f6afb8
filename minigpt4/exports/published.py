"""A `.pth` file for the published code: `llama_proj` alone, as `ckpt:` of its configs names it."""

from __future__ import annotations

from pathlib import Path

import torch

from minigpt4.conversation.templates import Template
from minigpt4.errors import ExportError
from minigpt4.exports.fitting import published_misfit
from minigpt4.exports.writing import write_complete
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.tensor_names import to_published


def export_published(model: MiniGPT4, template: Template, out: Path) -> None:
    """Write the file: `llama_proj` under `model`, in float32, and the prompt under `config`.

    Source: `runner_base.py`, which writes model, optimizer, config, scaler and epoch; a model's `from_config` reads
    `model` only, so the optimizer and the scaler are left out.

    Args:
        model: a model of which only `llama_proj` was trained.
        template: the conversation template that it was trained with.
        out: must not exist.

    Raises:
        ExportError: the published code cannot use this model, or `out` exists or cannot be written.
    """
    if reason := published_misfit(model):
        raise ExportError(reason)
    tensors = {to_published(name): t.float().cpu().contiguous() for name, t in model.trained_state().items()}
    with write_complete(out) as partial:
        torch.save({"model": tensors, "config": {"model": _prompt_config(template)}, "epoch": 0}, partial)


def _prompt_config(template: Template) -> dict[str, str]:
    """Return the keys of the published config that describe the prompt; captions have none."""
    config = {"arch": "minigpt4", "end_sym": template.end}
    if template.question != ("", ""):
        config |= {"prompt_path": "prompts/alignment.txt", "prompt_template": "{}".join(template.question)}
    return config
