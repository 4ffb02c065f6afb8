"""Resamplers: from many patch features to the few query features that `llama_proj` turns into image embeds.

Input: `patch_features` (I, P, Dv). Output: `query_features` (I, Q, Dq). A resampler publishes `num_query_tokens` (Q)
and `feature_dim` (Dq).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from minigpt4.assets import resolve
from minigpt4.errors import ConfigError
from minigpt4.models.blip2_folder import is_blip2_folder, read_qformer
from minigpt4.models.identity import identity_settings
from minigpt4.models.vision import VisionEncoder
from minigpt4.registry import path_field
from minigpt4.weights import RANDOM, load_strict, read_tensors

_TEXT_BRANCH = re.compile(r"qformer\.(embeddings\.(word|position)_|encoder\.layer\.\d+\.(intermediate|output)\.)")


class Resampler(nn.Module):
    """What every resampler offers.

    Attributes:
        num_query_tokens: Q.
        feature_dim: Dq.
        settings: what its config says of what it computes.
        source: where its weights came from, as the config has it.
        calibrated: names of buffers that `calibrate` sets from training images; they are saved with what was trained.
    """

    num_query_tokens: int
    feature_dim: int
    settings: dict[str, Any]
    source: str = ""
    calibrated: tuple[str, ...] = ()

    def calibrate(self, patch_features: Tensor) -> None:
        """Set the buffers named in `calibrated` from the patch features (I, P, Dv) of training images."""


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """BLIP-2's Q-Former without its text branch; the sizes are those of the published file."""

    weights: str = path_field()
    """`blip2_pretrained_flant5xxl.pth`, a Hugging Face folder of BLIP-2, or `random`."""
    num_query_tokens: int = 32
    """Q."""
    hidden_size: int = 768
    """Dq."""
    num_hidden_layers: int = 12
    """Layers; every second one, from the first, attends to the patches."""
    num_attention_heads: int = 12
    """Attention heads per layer."""
    intermediate_size: int = 3072
    """Width of the feed-forward layers."""


class QFormer(Resampler):
    """Learnt queries that attend to the patches (BLIP-2, section 3.1), held in float32."""

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
    def from_config(cls, config: QFormerConfig, vision_encoder: VisionEncoder) -> QFormer:
        """Build the Q-Former for the encoder's patches and load its weights."""
        if config.weights == RANDOM:
            return cls(config, vision_encoder.feature_dim)
        with torch.device("meta"):
            resampler = cls(config, vision_encoder.feature_dim)
        resampler._load(config.weights)
        return resampler

    def _load(self, weights: str) -> None:
        """Load `Qformer.bert.*` and `query_tokens` of a BLIP-2 file or of a Hugging Face folder of BLIP-2.

        Raises:
            WeightsError: a tensor is missing or misshapen.
        """
        path = resolve(weights)
        if is_blip2_folder(path):
            tensors = read_qformer(path)
        else:
            published = read_tensors(path, lambda name: name == "query_tokens" or name.startswith("Qformer.bert."))
            tensors = {qformer_name(name): tensor for name, tensor in published.items()}
        load_strict(self, tensors, source=str(path), ignore=is_text_branch, empty_as=torch.float32)
        self.source = weights

    def forward(self, patch_features: Tensor) -> Tensor:
        """Return `query_features` (I, Q, Dq), float32 outside autocast."""
        patches = patch_features.to(self.query_tokens.dtype)
        queries = self.query_tokens.expand(len(patches), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state


def qformer_name(published: str) -> str:
    """Return our name of a tensor that the published files call `Qformer.bert.*` or `query_tokens`."""
    name = published.replace("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm.")
    name = name.replace("Qformer.bert.", "qformer.")
    return name.replace("attention.self.", "attention.attention.")


def is_text_branch(name: str) -> bool:
    """Whether a tensor (by our name) belongs to the Q-Former's text branch, which MiniGPT-4 leaves out."""
    return _TEXT_BRANCH.match(name) is not None


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """The published LLaMA-2 variant's way without Q-Former."""

    neighbours: int = 4
    """Consecutive patches joined to one query feature."""

    def __post_init__(self) -> None:
        """Refuse what joins nothing."""
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, found {self.neighbours}")


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

    @classmethod
    def from_config(cls, config: MergeConfig, vision_encoder: VisionEncoder) -> Merge:
        """Build for the encoder's patches."""
        return cls(config, vision_encoder)

    def forward(self, patch_features: Tensor) -> Tensor:
        """Return `query_features` (I, Q, Dq) with Q = P / neighbours and Dq = Dv * neighbours."""
        patches = patch_features[:, self.prefix :]
        return patches.reshape(len(patches), self.num_query_tokens, self.feature_dim)


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Average patches over a coarse grid; for small encoders."""

    grid: int = 4
    """Rows and columns of the grid; Q is its square."""
    position_features: bool = True
    """Append a one-hot of the cell to its features, so that `llama_proj` has a bias of its own for each cell."""
    scale: float = 1.0
    """Factor on all features; below 1 a fresh `llama_proj` starts no louder than the token embeds around it."""


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

    @classmethod
    def from_config(cls, config: PoolConfig, vision_encoder: VisionEncoder) -> Pool:
        """Build for the encoder's patch grid."""
        return cls(config, vision_encoder)

    def forward(self, patch_features: Tensor) -> Tensor:
        """Return `query_features` (I, grid * grid, Dv [+ Q]), float32, cells row by row."""
        images, _, width = patch_features.shape
        maps = patch_features[:, self.prefix :].transpose(1, 2).reshape(images, width, *self.patch_grid).float()
        cells = F.layer_norm(F.adaptive_avg_pool2d(maps, self.cells).flatten(2).transpose(1, 2), (width,))
        if not self.position_features:
            return self.scale * cells
        # As long as a feature vector, or the cell's bias would learn that much slower than its features.
        places = math.sqrt(width) * torch.eye(self.num_query_tokens, device=cells.device, dtype=cells.dtype)
        return self.scale * torch.cat([cells, places.expand(images, -1, -1)], dim=-1)
