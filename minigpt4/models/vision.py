"""Image encoders, all on timm: EVA-ViT-g as MiniGPT-4 uses it, and any other backbone by name.

Input: `pixel_values` (I, 3, H, W), normalised as the encoder's `image_spec` says. Output: `patch_features` (I, P, Dv).
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt4.assets import resolve
from minigpt4.config.parts import EvaViTGConfig, TimmConfig
from minigpt4.config.schema import plain
from minigpt4.devices import dtype_named
from minigpt4.errors import ConfigError, UnknownNameError, WeightsError
from minigpt4.models.blip2_weights import read_part, read_vit
from minigpt4.models.encoder_files import read_encoder, read_tables
from minigpt4.models.imports import absent
from minigpt4.processors.image import ImageSpec
from minigpt4.weights import RANDOM, in_order, load_strict

with absent("wandb"):  # timm's training scripts report to it; importing it takes half a second
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.layers.pos_embed import resample_abs_pos_embed
    from timm.models.eva import Eva

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_log = logging.getLogger(__name__)


_NOT_IDENTITY = ("path", "weights", "ln_vision_weights", "weights_match", "dtype")
"""Settings that say where weights come from and how they are stored."""


def identity_settings(config: Any) -> dict[str, Any]:
    """Return the settings that decide what a part computes, besides its weights; a checkpoint's manifest records them.

    Args:
        config: the settings of an image encoder or a resampler.
    """
    return {key: value for key, value in plain(config).items() if key not in _NOT_IDENTITY}


class VisionEncoder(nn.Module):
    """The interface of every image encoder.

    Attributes:
        feature_dim: Dv.
        num_prefix_tokens: tokens before the patches, such as a class token.
        grid: rows and columns of the patches behind them.
        image_spec: size and normalisation of `pixel_values`.
        settings: the settings that decide what it computes; see `identity_settings`.
        source: where its weights come from, as in the config.
    """

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


class EvaViTG(VisionEncoder):
    """EVA-ViT-g: all tokens of the last block, class token included, without a final norm, then `ln_vision`.

    Source: BLIP-2's `eva_vit.py`. The blocks have an epsilon of 1e-6, `ln_vision` has 1e-5 and is computed in float32
    or higher.
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
        dtype = dtype_named(config.dtype)
        if config.weights == RANDOM:
            encoder = cls(config)
            encoder.vit.to(dtype)
            return encoder
        with torch.device("meta"):  # no need to draw a billion random numbers first
            encoder = cls(config)
        encoder._load(config.weights, config.ln_vision_weights, dtype)
        return encoder

    def _load(self, weights: str, ln_vision_weights: str, dtype: torch.dtype) -> None:
        """Load the encoder's weights and, if named, `ln_vision.*`; each from a published file or a BLIP-2 folder.

        Raises:
            WeightsError: a tensor is missing, unknown or of another shape.
        """
        path = resolve(weights)
        unused = (f"blocks.{len(self.vit.blocks)}.", "norm.", "fc_norm.", "head.", "mask_token")
        tensors = read_vit(path)
        blocks: Any = self.vit.blocks
        for block in blocks:  # a constant that is in no file
            block.attn.k_bias = torch.zeros(self.feature_dim, dtype=dtype)
        load_strict(self.vit, tensors, source=str(path), ignore=lambda name: name.startswith(unused), empty_as=dtype)
        self.ln_vision = nn.LayerNorm(self.feature_dim, eps=self.ln_vision.eps)
        if ln_vision_weights:
            norm_path = resolve(ln_vision_weights)
            norm = read_part(norm_path, "vision_encoder.ln_vision.")
            if not norm:
                raise WeightsError(
                    f"{norm_path}: has no ln_vision, the norm between image encoder and Q-Former; set "
                    "model.vision_encoder.ln_vision_weights to the file that has it"
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


class TimmEncoder(VisionEncoder):
    """A timm backbone, ViT or CNN; returns patches only, without class tokens."""

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
                self.eval()
                features = self._maps(torch.zeros(1, 3, side, side))
        except (AssertionError, AttributeError, IndexError, RuntimeError) as error:
            raise ConfigError(
                f"model.vision_encoder: {config.name} returns no feature maps for image_size {side} and "
                f"feature_levels {self.levels}: {error}"
            ) from error
        self.feature_dim = sum(level.shape[1] for level in features)
        rows, columns = min((level.shape[2:] for level in features), key=lambda hw: hw[0] * hw[1])
        self.grid = (rows, columns)

    @classmethod
    def from_config(cls, config: TimmConfig) -> TimmEncoder:
        """Build the backbone and load its weights, if it has any."""
        encoder = cls(config)
        if config.weights != RANDOM:
            encoder._load(resolve(config.weights), config)
            encoder.source = config.weights
        encoder.to(dtype_named(config.dtype))
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):  # its variances would be rounded, and it takes any precision
                module.float()
        return encoder

    def _load(self, path: Path, config: TimmConfig) -> None:
        """Load the weights of a file, as timm or another tool saved it; classification heads are ignored.

        Raises:
            WeightsError: a tensor is missing, unknown or of another shape.
        """
        whole = timm.create_model(config.name, pretrained=False)
        expected = self.backbone.state_dict()
        if config.weights_match == "order":
            tables = read_tables(path)
            place = str(path)
            tensors = self._own_norm(in_order(whole, max(tables.values(), key=len), place))
        else:
            tensors, place = read_encoder(path, expected.keys(), self._own_norm)
        self._fit_position_embedding(tensors, path)
        head = whole.state_dict().keys() - expected.keys()
        report = load_strict(self.backbone, tensors, source=place, ignore=lambda name: name in head)
        if report.ignored:
            _log.info("%s: classification head ignored: %s", path, ", ".join(report.ignored))

    def _own_norm(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the last norm of backbones with average pooling, where it is after the pooling; here it is before."""
        if "norm.weight" in tensors or "norm.weight" not in self.backbone.state_dict():
            return tensors
        return {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in tensors.items()}

    def _fit_position_embedding(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Resample a learned position embedding (1, P, Dv) to this image size; what cannot be resampled stays."""
        found, own = tensors.get("pos_embed"), self.backbone.state_dict().get("pos_embed")
        grid = getattr(getattr(self.backbone, "patch_embed", None), "grid_size", None)
        if grid is None or found is None or own is None or found.shape == own.shape or {found.ndim, own.ndim} != {3}:
            return
        rows, columns = grid
        prefix = own.shape[1] - rows * columns
        side = math.isqrt(max(found.shape[1] - prefix, 0))
        if side * side + prefix != found.shape[1] or found.shape[2] != own.shape[2]:
            return
        tensors["pos_embed"] = resample_abs_pos_embed(found, [rows, columns], num_prefix_tokens=prefix)
        _log.info("%s: pos_embed resampled from %d x %d to %d x %d patches", path, side, side, rows, columns)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return `patch_features` (I, P, Dv), patches row by row."""
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
    """Raise UnknownNameError for an unknown backbone and ConfigError for a wrong normalisation."""
    name, _, tag = config.name.partition(".")
    tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{name}.*")]
    if not timm.is_model(name) or (tag and tag not in tags):
        known = [f"{name}.{t}" for t in tags] if timm.is_model(name) else timm.list_models()
        near = difflib.get_close_matches(config.name, known, n=5, cutoff=0.5)
        raise UnknownNameError(f"timm has no model {config.name!r}. Similar: {', '.join(near) or 'none'}")
    for field_, values in (("mean", config.mean), ("std", config.std)):
        if len(values) not in (0, 3):
            raise ConfigError(f"model.vision_encoder.{field_}: {len(values)} values; give one for each of R, G and B")


def _takes_image_size(name: str) -> bool:
    """Whether the backbone is built for one image size, as transformers are and most CNNs are not."""
    cfg = timm.get_pretrained_cfg(name)
    return cfg is not None and cfg.fixed_input_size
