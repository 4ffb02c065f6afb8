"""What the formats of today's runtimes need from a pair, and which change of YAML would meet it.

Input: a loaded model. Output: for each format a list of `Need`; a model fits if all are met. A change of YAML means
training again: the projector learns from what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.models.projector import Linear, Mlp
from minigpt4.models.resampler import Patches, PixelShuffle
from minigpt4.models.transformers_encoder import TransformersEncoder
from minigpt4.processors.image import ImageProcessor

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2", "gemma3_text")
"""Language models whose inner model and head are all there is, as LLaVA and Idefics3 of transformers wire them."""

LLAMA_CPP_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast")
"""What llama.cpp computes as one of its two: `quick_gelu`, and the tanh form of `gelu`, exact to about 5e-4."""


@dataclass(frozen=True)
class Need:
    """Something that a format needs.

    Attributes:
        is_met: whether the model has it.
        reason: why the model does not fit, otherwise.
        change: the change of YAML that would meet it; empty if none would.
    """

    is_met: bool
    reason: str
    change: str = ""


def llava_needs(loaded: LoadedModel) -> list[Need]:
    """Return what `LlavaForConditionalGeneration` needs."""
    return [*_tower_needs(loaded, (CLIP, SIGLIP), "LLaVA"), *_patches_needs(loaded, "LLaVA"), *_prompt_needs(loaded)]


def idefics3_needs(loaded: LoadedModel) -> list[Need]:
    """Return what `Idefics3ForConditionalGeneration` needs."""
    model = loaded.model
    settings = model.vision_encoder.settings
    projector, rows = model.llama_proj, model.vision_encoder.grid[0]
    return [
        *_tower_needs(loaded, (SIGLIP,), "Idefics3"),
        Need(
            settings.get("layer") == -1 and settings.get("post_norm") is True,
            "Idefics3 uses the tower's last block behind its final norm",
            "model.vision_encoder: {layer: -1, post_norm: true}",
        ),
        Need(
            type(model.resampler) is PixelShuffle,
            f"Idefics3 joins squares of patches; this model has {type(model.resampler).__name__}",
            "model.resampler: {type: pixel_shuffle}",
        ),
        Need(
            type(projector) is Linear and projector.bias is None,
            "Idefics3's projector is one linear layer without bias",
            "model.projector: {type: linear, bias: false}",
        ),
        Need(
            idefics3_keeps_positions(rows),
            f"Idefics3 of transformers rounds the positions of {rows} x {rows} patches, and gives some patches those "
            "of their neighbours",
            "model.vision_encoder.path: a SigLIP with another number of patches",
        ),
        *_prompt_needs(loaded),
    ]


def mmproj_needs(loaded: LoadedModel) -> list[Need]:
    """Return what llama.cpp's projector `mlp` needs; its language model is a file of its own.

    Its projector `idefics3` is not used: llama.cpp puts marks around the image that a language model without vision has
    no tokens for, and shows every image as tiles as well, so that no prompt would be one of training.
    """
    model, tokenizer = loaded.model, loaded.conversation.tokenizer
    trained = sorted({name.split(".")[0] for name in model.trained_names()} & {"language_model"})
    settings = model.vision_encoder.settings
    own = getattr(getattr(model.vision_encoder, "tower", None), "config", None)
    activation = getattr(own, "hidden_act", "gelu")
    return [
        *_tower_needs(loaded, (CLIP, SIGLIP), "llama.cpp's projector mlp"),
        Need(
            getattr(own, "model_type", "") != CLIP,
            "llama.cpp puts the class token of a CLIP behind the patches and then leaves out the first patch (its "
            "issue 25814; build b11739 does), so it would answer differently",
            "model.vision_encoder.path: A_SIGLIP_FOLDER",
        ),
        Need(
            activation in LLAMA_CPP_ACTIVATIONS,
            f"llama.cpp's vision towers have {', '.join(LLAMA_CPP_ACTIVATIONS)}; this one has {activation}",
        ),
        *_patches_needs(loaded, "llama.cpp's projector mlp"),
        Need(
            settings.get("class_token") != "keep" or model.vision_encoder.num_prefix_tokens == 0,
            "llama.cpp leaves out the class token",
            "model.vision_encoder.class_token: drop",
        ),
        Need(
            not trained,
            "an mmproj file goes with the unchanged language model, and this model's was trained",
            "model.trainable: [llama_proj]",
        ),
        Need(
            tokenizer.parts_are_texts,
            "llama.cpp puts a blank behind every special token for this kind of tokenizer (SentencePiece), so it would "
            "build other prompts",
        ),
        *_all_turns_needs(loaded),
    ]


def idefics3_keeps_positions(rows: int) -> bool:
    """Whether Idefics3 of transformers gives each of `rows` rows its own position.

    Source: `Idefics3VisionEmbeddings.forward`, which sorts fractions into buckets in float32.
    """
    import torch

    boundaries = torch.arange(1 / rows, 1.0, 1 / rows)
    fractions = torch.clamp(torch.arange(rows, dtype=torch.float32) * (1.0 / torch.tensor(rows)), max=1.0 - 1e-6)
    return bool((torch.bucketize(fractions, boundaries, right=True) == torch.arange(rows)).all())


NEEDS: dict[str, Callable[[LoadedModel], list[Need]]] = {
    "llava": llava_needs,
    "idefics3": idefics3_needs,
    "mmproj": mmproj_needs,
}
"""By the name of the format."""


def _tower_needs(loaded: LoadedModel, families: tuple[str, ...], format_name: str) -> list[Need]:
    encoder: Any = loaded.model.vision_encoder
    names = " or ".join({CLIP: "CLIP", SIGLIP: "SigLIP"}[family] for family in families)
    is_tower = isinstance(encoder, TransformersEncoder)
    own = encoder.tower.config if is_tower else None
    found = own.model_type if own else type(encoder).__name__
    spec = encoder.image_spec
    return [
        Need(
            own is not None and own.model_type in families,
            f"{format_name} has a vision tower of {names}; this model has {found}",
            f"model.vision_encoder: {{type: transformers, path: A_{families[-1].split('_')[0].upper()}_FOLDER}}",
        ),
        Need(
            own is None or (spec.height, spec.width) == (getattr(own, "image_size", 0),) * 2,
            f"{format_name} takes the tower's own image size; this model has {spec.height} x {spec.width} pixels",
            "model.vision_encoder.image_size: 0",
        ),
    ]


def _patches_needs(loaded: LoadedModel, format_name: str) -> list[Need]:
    model = loaded.model
    resampler, projector = type(model.resampler), type(model.llama_proj)
    return [
        Need(
            not model.vision_encoder.settings.get("post_norm"),
            f"{format_name} does not apply the tower's final norm",
            "model.vision_encoder.post_norm: false",
        ),
        Need(
            resampler is Patches,
            f"{format_name} makes every patch a token; this model has {resampler.__name__}",
            "model.resampler: {type: patches}",
        ),
        Need(
            projector in (Linear, Mlp),
            f"{format_name}'s projector is linear or an mlp; this model has {projector.__name__}",
            "model.projector: {type: linear}",
        ),
    ]


def _prompt_needs(loaded: LoadedModel) -> list[Need]:
    """Return what the language model and the prompts of a folder for transformers need."""
    family = loaded.model.language_model.model.config.model_type
    return [
        Need(family in FAMILIES, f"this format supports {', '.join(FAMILIES)} language models; this one is {family}"),
        *_all_turns_needs(loaded),
    ]


def _all_turns_needs(loaded: LoadedModel) -> list[Need]:
    """Return what the prompts and the images of other runtimes need."""
    processor: Any = loaded.image_processor
    return [
        Need(
            not loaded.conversation.settings.isolate_turns,
            "other runtimes build prompts of all turns; this model was trained to see one",
            "conversation.isolate_turns: false",
        ),
        Need(
            type(processor) is ImageProcessor
            and processor.config.resize == "stretch"
            and not processor.config.max_side,
            "this format's images are stretched to the tower's size, and nothing else",
            "processors.image: {resize: stretch, max_side: 0}",
        ),
    ]
