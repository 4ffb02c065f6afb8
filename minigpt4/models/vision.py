"""Image encoders, all on timm: EVA-ViT-g as MiniGPT-4 uses it, and any other backbone by name.

Input: `pixel_values` (I, 3, H, W), normalised as the encoder's own `image_spec` says. Output: `patch_features`
(I, P, Dv). An encoder publishes `feature_dim` (Dv), `num_prefix_tokens` (class tokens in front of the patches) and
`grid` (rows, columns of the patches behind them).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from timm.models.eva import Eva
from torch import Tensor, nn

from minigpt4.assets import resolve
from minigpt4.errors import ConfigError, UnknownNameError, WeightsError
from minigpt4.models.blip2_folder import is_blip2_folder, read_encoder, read_ln_vision
from minigpt4.models.identity import identity_settings
from minigpt4.processors.image import ImageSpec
from minigpt4.registry import path_field
from minigpt4.weights import RANDOM, in_order, load_strict, read_tensors

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionEncoder(nn.Module):
    """What every image encoder offers."""

    feature_dim: int
    num_prefix_tokens: int
    grid: tuple[int, int]
    image_spec: ImageSpec
    settings: dict[str, Any]
    source: str = RANDOM

    @property
    def num_patches(self) -> int:
        """P, prefix tokens included."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]


@dataclass(frozen=True, kw_only=True)
class EvaViTGConfig:
    """EVA-CLIP ViT-g/14 as MiniGPT-4 uses it; the sizes are those of the published file."""

    weights: str = path_field()
    """`eva_vit_g.pth`, a Hugging Face folder of BLIP-2, or `random`."""
    ln_vision_weights: str = path_field("")
    """What holds `ln_vision` (the Q-Former's file, or a Hugging Face folder of BLIP-2). Empty: identity, as in the
    published LLaMA-2 variant."""
    image_size: int = 224
    """Height and width of the input in pixels."""
    patch_size: int = 14
    """Height and width of a patch in pixels."""
    embed_dim: int = 1408
    """Dv."""
    depth: int = 39
    """Blocks; the published file has one more, which MiniGPT-4 leaves out."""
    num_heads: int = 16
    """Attention heads per block."""
    mlp_ratio: float = 4.3637
    """Width of the MLP in units of `embed_dim`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the frozen weights are held."""


class EvaViTG(VisionEncoder):
    """EVA-ViT-g: all tokens of the last of its blocks, class token kept, no final norm, then `ln_vision`.

    Source: BLIP-2's `eva_vit.py`; blocks' eps 1e-6, `ln_vision`'s 1e-5 and computed in float32 at least.
    """

    Config = EvaViTGConfig
    num_prefix_tokens = 1

    def __init__(self, config: EvaViTGConfig) -> None:
        super().__init__()
        self.vit = Eva(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=True,
            qkv_fused=True,
            num_classes=0,
            global_pool="",
            use_fc_norm=False,
            use_post_transformer_norm=False,
        )
        self.settings = identity_settings(config)
        self.ln_vision = nn.LayerNorm(config.embed_dim, eps=1e-5)
        self.feature_dim = config.embed_dim
        side = config.image_size // config.patch_size
        self.grid = (side, side)
        self.image_spec = ImageSpec(config.image_size, config.image_size, CLIP_MEAN, CLIP_STD, "bicubic")

    @classmethod
    def from_config(cls, config: EvaViTGConfig) -> EvaViTG:
        """Build the encoder and load its weights."""
        dtype: torch.dtype = getattr(torch, config.dtype)
        if config.weights == RANDOM:
            encoder = cls(config)
            encoder.vit.to(dtype)
            return encoder
        with torch.device("meta"):  # a billion random numbers would only be thrown away
            encoder = cls(config)
        encoder._load(config.weights, config.ln_vision_weights, dtype)
        return encoder

    def _load(self, weights: str, ln_vision_weights: str, dtype: torch.dtype) -> None:
        """Load the encoder's weights and, if named, `ln_vision.*`; each from a published file or a BLIP-2 folder.

        Raises:
            WeightsError: a tensor is missing, misshapen or not known to be superfluous.
        """
        path = resolve(weights)
        left_out = (f"blocks.{len(self.vit.blocks)}.", "norm.", "fc_norm.", "head.", "mask_token")
        tensors = read_encoder(path) if is_blip2_folder(path) else read_tensors(path)
        blocks: Any = self.vit.blocks
        for block in blocks:  # a constant, which no file holds
            block.attn.k_bias = torch.zeros(self.feature_dim, dtype=dtype)
        load_strict(self.vit, tensors, source=str(path), ignore=lambda name: name.startswith(left_out), empty_as=dtype)
        self.ln_vision = nn.LayerNorm(self.feature_dim, eps=self.ln_vision.eps)
        if ln_vision_weights:
            norm_path = resolve(ln_vision_weights)
            norm = read_ln_vision(norm_path)
            if not norm:
                raise WeightsError(
                    f"{norm_path}: has no ln_vision, the norm between image encoder and Q-Former; "
                    "model.vision_encoder.ln_vision_weights takes the file that has it"
                )
            load_strict(self.ln_vision, norm, source=f"{norm_path} (ln_vision)")
        self.source = weights

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return `patch_features` (I, 1 + P, Dv), in the precision of the weights."""
        tokens = self.vit.forward_features(pixel_values.to(next(self.vit.parameters()).dtype))
        norm = self.ln_vision
        precision = torch.promote_types(tokens.dtype, torch.float32)
        weight, bias = norm.weight.to(precision), norm.bias.to(precision)
        normed = F.layer_norm(tokens.to(precision), norm.normalized_shape, weight, bias, norm.eps)
        return normed.to(tokens.dtype)


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """Any backbone of timm."""

    name: str
    """timm's name of the architecture, such as `vit_base_patch16_siglip_224` or `convnext_tiny`."""
    weights: str = path_field()
    """A weight file, `asset:NAME`, or `random`; nothing is downloaded."""
    weights_match: Literal["names", "order"] = "names"
    """How tensors of the file find their places: by name, or by their order in the file."""
    image_size: int = 0
    """Height and width of the input in pixels; 0 takes the backbone's own."""
    feature_levels: list[int] = field(default_factory=list)
    """Feature maps to join, by timm's index; empty takes the last one. Each is layer-normalised over channels and
    averaged down to the coarsest grid."""
    mean: list[float] = field(default_factory=list)
    """Mean of the three channels for values in 0..1; empty takes the backbone's own."""
    std: list[float] = field(default_factory=list)
    """Standard deviation of the three channels; empty takes the backbone's own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the frozen weights are held."""


class TimmEncoder(VisionEncoder):
    """A timm backbone, ViT or CNN; patches only, class tokens dropped."""

    Config = TimmConfig
    num_prefix_tokens = 0

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        _check(config)
        size: dict[str, Any] = {}
        if config.image_size and _takes_image_size(config.name):
            size["img_size"] = config.image_size
        self.backbone: Any = timm.create_model(config.name, pretrained=False, num_classes=0, global_pool="", **size)
        own = resolve_model_data_config(self.backbone)
        side = config.image_size or own["input_size"][1]
        self.settings = identity_settings(config)
        self.levels = list(config.feature_levels)
        self.image_spec = ImageSpec(
            side, side, tuple(config.mean or own["mean"]), tuple(config.std or own["std"]), "bicubic"
        )
        try:
            with torch.no_grad():
                features = self.eval()._maps(torch.zeros(1, 3, side, side))
        except (AssertionError, AttributeError, IndexError, RuntimeError) as error:
            raise ConfigError(
                f"model.vision_encoder: {config.name} gives no feature maps for image_size {side} and feature_levels "
                f"{self.levels}: {error}"
            ) from error
        self.feature_dim = sum(level.shape[1] for level in features)
        rows, columns = min((level.shape[2:] for level in features), key=lambda hw: hw[0] * hw[1])
        self.grid = (rows, columns)

    @classmethod
    def from_config(cls, config: TimmConfig) -> TimmEncoder:
        """Build the backbone and load its weights, if it has any."""
        encoder = cls(config)
        if config.weights != RANDOM:
            path = str(resolve(config.weights))
            tensors = read_tensors(path)
            whole = timm.create_model(config.name, pretrained=False)
            if config.weights_match == "order":
                tensors = in_order(whole, tensors, path)
            head = whole.state_dict().keys() - encoder.backbone.state_dict().keys()
            if "norm.weight" not in tensors and "norm.weight" in encoder.backbone.state_dict():
                # Backbones made for average pooling have their last norm behind the pooling; here it is per patch.
                tensors = {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in tensors.items()}
            load_strict(encoder.backbone, tensors, source=path, ignore=lambda name: name in head)
            encoder.source = config.weights
        encoder.to(getattr(torch, config.dtype))
        return encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return `patch_features` (I, P, Dv); patches run row by row."""
        maps = self._maps(pixel_values.to(next(self.backbone.parameters()).dtype))
        if self.levels:
            maps = [F.layer_norm(m.movedim(1, -1), m.shape[1:2]).movedim(-1, 1) for m in maps]
        joined = torch.cat([F.adaptive_avg_pool2d(m, self.grid) for m in maps], dim=1)
        return joined.flatten(2).transpose(1, 2)

    def _maps(self, pixel_values: Tensor) -> list[Tensor]:
        """Return the chosen feature maps, each (I, C, h, w)."""
        return self.backbone.forward_intermediates(
            pixel_values,
            indices=self.levels or 1,
            norm=not self.levels,
            intermediates_only=True,
            output_fmt="NCHW",
        )


def _check(config: TimmConfig) -> None:
    """Raise UnknownNameError or ConfigError for a backbone or a normalisation that cannot be."""
    name, _, tag = config.name.partition(".")
    tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{name}.*")]
    if not timm.is_model(name) or (tag and tag not in tags):
        known = [f"{name}.{t}" for t in tags] if timm.is_model(name) else timm.list_models()
        near = difflib.get_close_matches(config.name, known, n=5, cutoff=0.5)
        raise UnknownNameError(f"timm has no model {config.name!r}. Alike: {', '.join(near) or 'none'}")
    for field_, values in (("mean", config.mean), ("std", config.std)):
        if len(values) not in (0, 3):
            raise ConfigError(f"model.vision_encoder.{field_}: {len(values)} values; give one for each of R, G and B")


def _takes_image_size(name: str) -> bool:
    """Whether the backbone is built for one image size (transformers are, most CNNs are not)."""
    cfg = timm.get_pretrained_cfg(name)
    return cfg is not None and cfg.fixed_input_size
