"""Resamplers: from many patch features to the few query features that `llama_proj` turns into image embeds.

Input: `patch_features` (I, P, Dv). Output: `query_features` (I, Q, Dq).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from minigpt4.assets import resolve
from minigpt4.config.parts import (
    MergeConfig,
    PatchesConfig,
    PixelShuffleConfig,
    PoolConfig,
    PrefixConfig,
    QFormerConfig,
)
from minigpt4.devices import dtype_named
from minigpt4.errors import ConfigError
from minigpt4.models.blip2_weights import read_part
from minigpt4.models.vision import VisionEncoder, identity_settings
from minigpt4.tensor_names import is_text_branch
from minigpt4.weights import RANDOM, load_strict

WHITENING_FLOOR = 1e-3
"""Added to every variance before whitening, as a share of the largest one."""


class Resampler(nn.Module):
    """The interface of every resampler.

    Attributes:
        num_query_tokens: Q.
        feature_dim: Dq.
        settings: the settings that decide what it computes; see `minigpt4.models.vision.identity_settings`.
        source: where its weights come from, as in the config.
        calibrated: names of buffers that `calibrate` sets from training images; checkpoints save them.
    """

    num_query_tokens: int
    feature_dim: int
    settings: dict[str, Any]
    source: str = ""
    calibrated: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Any, vision_encoder: VisionEncoder) -> Self:
        """Build the resampler for the features of an image encoder, and load its weights if it has any."""
        return cls(config, vision_encoder)

    def calibrate(self, patch_features: Tensor) -> None:
        """Set the buffers named in `calibrated` from the patch features (I, P, Dv) of training images."""


class QFormer(Resampler):
    """Trained queries that attend to the patches (BLIP-2, section 3.1)."""

    Config = QFormerConfig

    def __init__(self, config: QFormerConfig, patch_dim: int) -> None:
        super().__init__()
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                encoder_hidden_size=patch_dim,
                cross_attention_frequency=2,
            )
        )
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        nn.init.normal_(self.query_tokens, std=self.qformer.config.initializer_range)
        self.settings = identity_settings(config)
        self.num_query_tokens = config.num_query_tokens
        self.feature_dim = config.hidden_size

    @classmethod
    def from_config(cls, config: QFormerConfig, vision_encoder: VisionEncoder) -> Self:
        """Build the Q-Former for the encoder's patches and load its weights."""
        dtype = dtype_named(config.dtype)
        if config.weights == RANDOM:
            return cls(config, vision_encoder.feature_dim).to(dtype)
        with torch.device("meta"):
            resampler = cls(config, vision_encoder.feature_dim)
        resampler._load(config.weights, dtype)
        return resampler

    def _load(self, weights: str, dtype: torch.dtype) -> None:
        """Load query tokens and Q-Former from BLIP-2's file or from a Hugging Face folder of BLIP-2.

        Raises:
            WeightsError: a tensor is missing or of another shape.
        """
        path = resolve(weights)
        tensors = read_part(path, "resampler.")
        load_strict(self, tensors, source=str(path), ignore=is_text_branch, empty_as=dtype)
        self.source = weights

    def forward(self, patch_features: Tensor) -> Tensor:
        """Return `query_features` (I, Q, Dq), outside autocast in the precision of the weights."""
        patches = patch_features.to(self.query_tokens.dtype)
        queries = self.query_tokens.expand(len(patches), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state


class Merge(Resampler):
    """Drop the class token and join neighbouring patches along their width: 256 patches of 1408 to 64 of 5632."""

    Config = MergeConfig

    def __init__(self, config: MergeConfig, vision_encoder: VisionEncoder) -> None:
        super().__init__()
        patches = vision_encoder.num_patches - vision_encoder.num_prefix_tokens
        if patches % config.neighbours:
            raise ConfigError(f"model.resampler.neighbours: {patches} patches are not divisible by {config.neighbours}")
        self.settings = identity_settings(config)
        self.prefix = vision_encoder.num_prefix_tokens
        self.num_query_tokens = patches // config.neighbours
        self.feature_dim = vision_encoder.feature_dim * config.neighbours

    def forward(self, patch_features: Tensor) -> Tensor:
        """Return `query_features` (I, Q, Dq) with Q = P / neighbours and Dq = Dv * neighbours."""
        patches = patch_features[:, self.prefix :]
        return patches.reshape(len(patches), self.num_query_tokens, self.feature_dim)


class Patches(Resampler):
    """Every feature of the encoder becomes a token; a class token that the encoder keeps is the first one."""

    Config = PatchesConfig

    def __init__(self, config: PatchesConfig, vision_encoder: VisionEncoder) -> None:
        super().__init__()
        self.settings = identity_settings(config)
        self.num_query_tokens = vision_encoder.num_patches
        self.feature_dim = vision_encoder.feature_dim

    def forward(self, patch_features: Tensor) -> Tensor:
        """Return `query_features` (I, P, Dv), the features as they are."""
        return patch_features


class PixelShuffle(Resampler):
    """Drop the class token and join squares of neighbouring patches along their width, row by row in each square.

    Source: `pixel_shuffle` of Idefics3 (Laurençon et al. 2024, section 3.2), whose order this is.
    """

    Config = PixelShuffleConfig

    def __init__(self, config: PixelShuffleConfig, vision_encoder: VisionEncoder) -> None:
        super().__init__()
        rows, columns = vision_encoder.grid
        factor = config.factor
        if rows % factor or columns % factor:
            raise ConfigError(
                f"model.resampler.factor: {rows} x {columns} patches are not divisible by {factor} in both directions"
            )
        self.settings = identity_settings(config)
        self.prefix = vision_encoder.num_prefix_tokens
        self.patch_grid = (rows, columns)
        self.factor = factor
        self.num_query_tokens = rows * columns // factor**2
        self.feature_dim = vision_encoder.feature_dim * factor**2

    def forward(self, patch_features: Tensor) -> Tensor:
        """Return `query_features` (I, P / factor², Dv * factor²), squares row by row."""
        (rows, columns), side = self.patch_grid, self.factor
        squares = patch_features[:, self.prefix :].unflatten(1, (rows // side, side, columns // side, side))
        return squares.transpose(2, 3).reshape(len(patch_features), self.num_query_tokens, self.feature_dim)


class Pool(Resampler):
    """Grid pooling: each cell's mean, layer-normalised, so that its scale does not depend on the encoder."""

    Config = PoolConfig

    def __init__(self, config: PoolConfig, vision_encoder: VisionEncoder) -> None:
        super().__init__()
        if config.grid > min(vision_encoder.grid):
            raise ConfigError(f"model.resampler.grid: {config.grid} is finer than the encoder's {vision_encoder.grid}")
        width = vision_encoder.feature_dim
        self.settings = identity_settings(config)
        self.prefix = vision_encoder.num_prefix_tokens
        self.patch_grid = vision_encoder.grid
        self.cells = config.grid
        self.position_features = config.position_features
        self.scale = config.scale
        self.num_query_tokens = config.grid**2
        self.feature_dim = width + (self.num_query_tokens if config.position_features else 0)

    def forward(self, patch_features: Tensor) -> Tensor:
        """Return `query_features` (I, grid * grid, Dv [+ Q]), float32, cells row by row."""
        images, _, width = patch_features.shape
        maps = patch_features[:, self.prefix :].transpose(1, 2).reshape(images, width, *self.patch_grid).float()
        cells = F.layer_norm(F.adaptive_avg_pool2d(maps, self.cells).flatten(2).transpose(1, 2), (width,))
        if not self.position_features:
            return self.scale * cells
        # As long as a feature vector; otherwise the cell's bias would be trained more slowly than its features.
        places = math.sqrt(width) * torch.eye(self.num_query_tokens, device=cells.device, dtype=cells.dtype)
        return self.scale * torch.cat([cells, places.expand(images, -1, -1)], dim=-1)


class Prefix(Resampler):
    """What stands out in an image, as one vector, repeated for each query token in different columns.

    So one linear layer makes Q different tokens from one global feature, each with its own bias: the visual prefix of
    Frozen (Tsimpoukelli et al. 2021, section 3.1). Suited to small encoders and simple images. The principal
    directions are computed once from training images, without their texts. After this fixed linear map, features that
    vary little (colour, compared with shape) are trained as fast as the others. Dq is Q * (components + 1).
    """

    Config = PrefixConfig
    calibrated = ("mean", "directions")
    mean: Tensor
    directions: Tensor

    def __init__(self, config: PrefixConfig, vision_encoder: VisionEncoder) -> None:
        super().__init__()
        width = vision_encoder.feature_dim
        if config.components > width:
            raise ConfigError(
                f"model.resampler.components: {config.components} is more than the width of the features, {width}"
            )
        self.settings = identity_settings(config)
        self.prefix = vision_encoder.num_prefix_tokens
        self.components = config.components
        self.scale = config.scale
        self.num_query_tokens = config.num_query_tokens
        self.feature_dim = config.num_query_tokens * (config.components + 1)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("directions", torch.eye(width, config.components))

    def forward(self, patch_features: Tensor) -> Tensor:
        """Return `query_features` (I, Q, Q * (components + 1)), float32; token n is zero outside its own columns."""
        is_meta = patch_features.is_meta  # has no autocast
        # Whitening enlarges rounding errors.
        with nullcontext() if is_meta else torch.autocast(patch_features.device.type, enabled=False):
            found = (self._salient(patch_features) - self.mean) @ self.directions
        # As long as the features; otherwise a token's bias would be trained more slowly than they are.
        constant = found.new_full((len(found), 1), math.sqrt(self.components))
        slots = torch.eye(self.num_query_tokens, device=found.device, dtype=found.dtype)
        spread = slots[None, :, :, None] * torch.cat([found, constant], dim=1)[:, None, None, :]
        return self.scale * spread.flatten(2)

    @torch.no_grad()
    def calibrate(self, patch_features: Tensor) -> None:
        """Set mean and whitening from training images; directions that hardly vary are damped, not enlarged."""
        found = self._salient(patch_features).cpu()  # some accelerators cannot compute eigenvalues
        mean = found.mean(0)
        centred = found - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))  # in ascending order
        kept = variances.flip(0)[: self.components].clamp(min=0)
        self.mean.copy_(mean)
        self.directions.copy_(
            directions.flip(1)[:, : self.components] * (kept + WHITENING_FLOOR * variances.max()).rsqrt()
        )

    def _salient(self, patch_features: Tensor) -> Tensor:
        """Return the layer-normalised weighted mean (I, Dv) of the patches' differences from their image's mean.

        The weight of a patch is the squared length of its difference: all of an object counts, however small it is,
        and a plain background does not.
        """
        patches = patch_features[:, self.prefix :].float()
        away = patches - patches.mean(1, keepdim=True)
        weights = away.square().sum(-1, keepdim=True)
        salient = (away * weights).sum(1) / weights.sum(1).clamp(min=torch.finfo(weights.dtype).tiny)
        return F.layer_norm(salient, salient.shape[-1:])
