"""Which formats accept a model: each has a function that says why it does not.

Input: a loaded model. Output: a reason, or an error that names only formats that accept the model, and what to change
for one that would.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.errors import ExportError
from minigpt4.exports.needs import NEEDS, Need
from minigpt4.exports.stock_processor import PROCESSORS, prompts_differ
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.models.resampler import Merge, QFormer
from minigpt4.models.vision import EvaViTG
from minigpt4.processors.image import ImageProcessor

_UNIVERSAL = "prompt-embeds"
"""The format that accepts every model; it is made anew for each prompt."""


def has_linear_with_bias(model: MiniGPT4) -> bool:
    """Whether `llama_proj` is one linear layer with a bias, as every format from before there was a choice has it."""
    return isinstance(model.llama_proj, nn.Linear) and model.llama_proj.bias is not None


def projector(model: MiniGPT4) -> str:
    """Return what `llama_proj` is, in words."""
    if not isinstance(model.llama_proj, nn.Linear):
        return f"the projector {type(model.llama_proj).__name__}"
    return "one linear layer" + (" without bias" if model.llama_proj.bias is None else "")


def published_misfit(model: MiniGPT4) -> str:
    """Return why the published code cannot use a model; empty if it can."""
    more = sorted({name for name in model.trained_names() if not name.startswith("llama_proj.")})
    if more:
        shown = ", ".join(more[:3]) + (", ..." if len(more) > 3 else "")
        return f"the published code loads llama_proj only, but this model also has trained {shown}"
    if not has_linear_with_bias(model):
        return f"the published code's llama_proj is one linear layer with a bias; this model has {projector(model)}"
    encoder, resampler = type(model.vision_encoder), type(model.resampler)
    if encoder is not EvaViTG or resampler not in (QFormer, Merge):
        return (
            "the published code supports EVA-ViT-g with a Q-Former, or with four patches joined; this model has "
            f"{encoder.__name__} and {resampler.__name__}"
        )
    return ""


def huggingface_misfit(loaded: LoadedModel) -> str:
    """Return what a model has that the architecture of Blip2 does not have; empty if it fits."""
    model = loaded.model
    if type(model.vision_encoder) is not EvaViTG:
        return f"Blip2's image encoder is EVA-ViT-g; this model has {type(model.vision_encoder).__name__}"
    if type(model.resampler) is not QFormer:
        return f"Blip2's resampler is a Q-Former; this model has {type(model.resampler).__name__}"
    if not has_linear_with_bias(model):
        return f"Blip2's projection is one linear layer with a bias; this model has {projector(model)}"
    family = model.language_model.model.config.model_type
    if family != "llama":
        return f"this format supports LLaMA language models; this model has {family!r}"
    if type(loaded.image_processor) is not ImageProcessor:
        return f"Blip2 has no image processor like the plugin {type(loaded.image_processor).__name__}"
    encoder = loaded.conversation
    if encoder.chat_template.is_one_text and not encoder.tokenizer.parts_are_texts:
        return (
            "example.py cannot build prompts of conversation.template tokenizer with this tokenizer, which puts blanks "
            "in front of texts"
        )
    return ""


def unmet(loaded: LoadedModel, to: str) -> list[Need]:
    """Return what a model lacks for a format of `NEEDS`; if nothing else, whether its prompts can be built."""
    found = [need for need in NEEDS[to](loaded) if not need.is_met]
    if not found and to in PROCESSORS and (difference := prompts_differ(loaded, to)):
        return [Need(False, f"the processor of this format builds other prompts: {difference}")]
    return found


def _first_unmet(to: str) -> Callable[[LoadedModel], str]:
    return lambda loaded: next((need.reason for need in unmet(loaded, to)), "")


MISFIT: dict[str, Callable[[LoadedModel], str]] = {
    "published": lambda loaded: published_misfit(loaded.model),
    "huggingface": huggingface_misfit,
    **{to: _first_unmet(to) for to in NEEDS},
    _UNIVERSAL: lambda loaded: "",
}
"""By the name of the format: why it does not accept a model; empty if it does."""


def check_fits(loaded: LoadedModel, to: str) -> None:
    """Raise ExportError unless the format `to` accepts the model.

    The message names the formats that do. If only `prompt-embeds` does, it also says how to train a pair that fits
    another one.
    """
    reason = MISFIT[to](loaded)
    if reason:
        fitting = [name for name in reversed(MISFIT) if not MISFIT[name](loaded)]
        advice = _nearest_change(loaded, to) if fitting == [_UNIVERSAL] else ""
        raise ExportError(f"{reason}{advice}: use --to {' or '.join(fitting)}, or keep the checkpoint")


def _nearest_change(loaded: LoadedModel, to: str) -> str:
    """Return the fewest changes of YAML after which a pair fits a format, `to` if possible; empty if none would do."""
    candidates = []
    for name in sorted(NEEDS, key=lambda name: name != to):
        lacking = unmet(loaded, name)
        if lacking and all(need.change for need in lacking):
            candidates.append((len(lacking), name, [need.change for need in lacking]))
    if not candidates:
        return ""
    _, name, changes = min(candidates, key=lambda candidate: candidate[0])
    return f" (trained with {' and '.join(changes)}, it would fit --to {name})"
