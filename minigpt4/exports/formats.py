"""Every format by name: `python -m minigpt4 export MODEL --to FORMAT`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.errors import ExportError
from minigpt4.exports.fitting import MISFIT, check_fits
from minigpt4.exports.huggingface.folder import export_huggingface
from minigpt4.exports.huggingface.pair import export_pair
from minigpt4.exports.linear_projector import Layout
from minigpt4.exports.mmproj import Numbers, export_mmproj
from minigpt4.exports.prompt_embeds import export_prompt_embeds
from minigpt4.exports.published import export_published


def write(
    loaded: LoadedModel,
    to: str,
    out: Path,
    *,
    images: Sequence[str | Path] = (),
    question: str = "",
    layout: Layout | None = None,
    numbers: Numbers | None = None,
) -> None:
    """Write `loaded` in the format `to`.

    Args:
        loaded: the model and what belongs to it.
        to: a name in `MISFIT`.
        out: a file (published) or a folder; must not exist.
        images: for prompt-embeds, the images that the question is about.
        question: for prompt-embeds.
        layout: for llava, how its two layers hold a linear projector; None is `exact`.
        numbers: for mmproj, how matrices are stored; None is `f16`.

    Raises:
        ExportError: unknown format, or the model does not fit it.
    """
    if to not in MISFIT:
        raise ExportError(f"unknown format {to!r}; known: {', '.join(MISFIT)}")
    if to != "prompt-embeds" and (images or question):
        raise ExportError(f"--image and --question are options of --to prompt-embeds, not of {to}")
    if to != "llava" and layout is not None:
        raise ExportError(f"--projector is an option of --to llava, not of {to}")
    if to != "mmproj" and numbers is not None:
        raise ExportError(f"--numbers is an option of --to mmproj, not of {to}")
    if to == "published":
        check_fits(loaded, to)
        export_published(loaded.model, loaded.conversation.training_template, out)
    elif to == "huggingface":
        export_huggingface(loaded, out)
    elif to == "llava":
        export_pair(loaded, "llava", out, layout or "exact")
    elif to == "idefics3":
        export_pair(loaded, "idefics3", out)
    elif to == "mmproj":
        export_mmproj(loaded, out, numbers or "f16")
    else:
        export_prompt_embeds(loaded, out, images, question)
