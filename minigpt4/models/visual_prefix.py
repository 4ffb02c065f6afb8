"""A resampler for small encoders and simple pictures: one global feature, from which every image token is made.

Input: `patch_features` (I, P, Dv). Output: `query_features` (I, Q, Q * (components + 1)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt4.errors import ConfigError
from minigpt4.models.identity import identity_settings
from minigpt4.models.resampler import Resampler
from minigpt4.models.vision import VisionEncoder

WHITENING_FLOOR = 1e-3
"""Added to every variance before whitening, in units of the largest one."""


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """A visual prefix: every image token made from the whole image; for small encoders and simple pictures."""

    num_query_tokens: int = 16
    """Q."""
    components: int = 32
    """Principal directions of the images' features that are kept, each brought to variance 1."""
    scale: float = 0.2
    """Factor on all features; a fresh `llama_proj` should start no louder than the token embeds around it."""

    def __post_init__(self) -> None:
        """Refuse what makes no token."""
        if min(self.num_query_tokens, self.components) < 1:
            raise ValueError("num_query_tokens and components must be at least 1")


class Prefix(Resampler):
    """What stands out in an image, as one vector, in a slot of its own for each query token.

    So one linear layer makes Q different tokens of one global feature, each with a bias of its own: the visual prefix
    of Frozen (Tsimpoukelli et al. 2021, section 3.1). The principal directions are taken once from training images,
    without their texts: a fixed linear map, after which what varies little, such as colour beside shape, is learnt as
    soon as the rest.
    """

    Config = PrefixConfig
    calibrated = ("mean", "directions")
    mean: Tensor
    directions: Tensor

    def __init__(self, config: PrefixConfig, vision_encoder: VisionEncoder) -> None:
        super().__init__()
        width = vision_encoder.feature_dim
        if config.components > width:
            raise ConfigError(f"model.resampler.components: {config.components} of a feature that is only {width} wide")
        self.settings = identity_settings(config)
        self.prefix = vision_encoder.num_prefix_tokens
        self.components = config.components
        self.scale = config.scale
        self.num_query_tokens = config.num_query_tokens
        self.feature_dim = config.num_query_tokens * (config.components + 1)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("directions", torch.eye(width, config.components))

    @classmethod
    def from_config(cls, config: PrefixConfig, vision_encoder: VisionEncoder) -> Prefix:
        """Build for the encoder's patch width."""
        return cls(config, vision_encoder)

    def forward(self, patch_features: Tensor) -> Tensor:
        """Return `query_features` (I, Q, Q * (components + 1)), float32; token n is zero outside its slot n."""
        with torch.autocast(patch_features.device.type, enabled=False):  # small differences are lifted: be exact
            found = (self._salient(patch_features) - self.mean) @ self.directions
        # The constant is as long as the features, or a token's bias would learn that much slower.
        constant = found.new_full((len(found), 1), math.sqrt(self.components))
        slots = torch.eye(self.num_query_tokens, device=found.device, dtype=found.dtype)
        spread = slots[None, :, :, None] * torch.cat([found, constant], dim=1)[:, None, None, :]
        return self.scale * spread.flatten(2)

    @torch.no_grad()
    def calibrate(self, patch_features: Tensor) -> None:
        """Set mean and whitening from training images; directions that hardly vary are damped, not blown up."""
        found = self._salient(patch_features).cpu()  # some accelerators have no eigenvalues
        mean = found.mean(0)
        centred = found - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))  # in ascending order
        kept = variances.flip(0)[: self.components].clamp(min=0)
        self.mean.copy_(mean)
        self.directions.copy_(
            directions.flip(1)[:, : self.components] * (kept + WHITENING_FLOOR * variances.max()).rsqrt()
        )

    def _salient(self, patch_features: Tensor) -> Tensor:
        """Return the layer-normalised mean (I, Dv) of how patches differ from their image's mean.

        Each counts by the square of its difference: an object by all of itself, however small, a plain background not
        at all.
        """
        patches = patch_features[:, self.prefix :].float()
        away = patches - patches.mean(1, keepdim=True)
        weights = away.square().sum(-1, keepdim=True)
        salient = (away * weights).sum(1) / weights.sum(1).clamp(min=torch.finfo(weights.dtype).tiny)
        return F.layer_norm(salient, salient.shape[-1:])
