"""Every format by name: `python -m minigpt4 export MODEL --to FORMAT`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.checkpoints.published import save_published
from minigpt4.errors import ExportError
from minigpt4.exports.huggingface.folder import export_huggingface
from minigpt4.exports.prompt_embeds import export_prompt_embeds


def write(loaded: LoadedModel, to: str, out: Path, *, images: Sequence[str | Path] = (), question: str = "") -> None:
    """Write `loaded` in the format `to`.

    Args:
        loaded: the model and what belongs to it.
        to: published, huggingface or prompt-embeds.
        out: a file (published) or a folder; must not exist.
        images: for prompt-embeds, what is asked about.
        question: for prompt-embeds, what is asked.

    Raises:
        ExportError: no such format, or the model does not fit it.
    """
    if to != "prompt-embeds" and (images or question):
        raise ExportError(f"--image and --question belong to --to prompt-embeds, not to {to}")
    if to == "published":
        save_published(loaded.model, loaded.encoder.training_template, out)
    elif to == "huggingface":
        export_huggingface(loaded, out)
    elif to == "prompt-embeds":
        export_prompt_embeds(loaded, out, images, question)
    else:
        raise ExportError(f"unknown format {to!r}; known: published, huggingface, prompt-embeds")
