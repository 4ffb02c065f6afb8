"""The half of the model in front of `llama_proj`: image encoder and resampler, or what stands for them in training from
cached features.

Input: `pixel_values` (I, 3, H, W). Output: `query_features` (I, Q, Dq).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from minigpt4.config.sections import ModelConfig
from minigpt4.errors import FeatureCacheError
from minigpt4.models.freezing import frozen_tensors
from minigpt4.models.resampler import Resampler
from minigpt4.models.vision import VisionEncoder
from minigpt4.processors.image import ImageSpec


class ImageSide(nn.Module):
    """Image encoder and resampler, frozen."""

    def __init__(self, vision_encoder: VisionEncoder, resampler: Resampler) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.resampler = resampler
        self.requires_grad_(False).eval()

    @classmethod
    def from_config(cls, config: ModelConfig) -> ImageSide:
        """Build both parts from the model section."""
        vision_encoder = config.vision_encoder.build()
        return cls(vision_encoder, config.resampler.build(vision_encoder=vision_encoder))

    @classmethod
    def from_cache(
        cls,
        parts: Mapping[str, Mapping[str, Any]],
        image_spec: ImageSpec,
        sizes: tuple[int, int],
        calibrated: Mapping[str, Tensor],
    ) -> ImageSide:
        """Return what stands for both parts where their outputs are cached.

        Args:
            parts: the identities of both, as a checkpoint's manifest has them.
            image_spec: of the images that were encoded.
            sizes: Q and Dq.
            calibrated: the tensors of the resampler that training images set, by name.
        """
        return cls(
            FromCache(parts["vision_encoder"], image_spec), ResampledInCache(parts["resampler"], sizes, calibrated)
        )

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return `query_features` (I, Q, Dq) for `pixel_values` (I, 3, H, W)."""
        features: Tensor = self.resampler(self.vision_encoder(pixel_values))
        return features

    @torch.no_grad()
    def calibrate(self, pixel_values: Tensor) -> None:
        """Compute the statistics of the resampler from training images (I, 3, H, W)."""
        self.resampler.calibrate(torch.cat([self.vision_encoder(part) for part in pixel_values.split(32)]))

    def calibrated_tensors(self) -> dict[str, Tensor]:
        """Return what `calibrate` sets, by name in the resampler."""
        return {name: getattr(self.resampler, name).detach() for name in self.resampler.calibrated}

    def frozen_tensors(self, part: str, trained: Collection[str]) -> list[tuple[str, Tensor]]:
        """Return the tensors of a part whose names are not in `trained`; see `freezing`."""
        return frozen_tensors(getattr(self, part), part, trained)


class FromCache(VisionEncoder):
    """Stands for an image encoder that is not loaded, because its outputs are cached.

    Attributes:
        identity: of the encoder, as a checkpoint's manifest has it.
    """

    def __init__(self, identity: Mapping[str, Any], image_spec: ImageSpec) -> None:
        super().__init__()
        self.identity = dict(identity)
        self.feature_dim = self.identity["width"]
        self.settings = self.identity["settings"]
        self.source = self.identity["source"]
        self.image_spec = image_spec

    def forward(self, pixel_values: Tensor) -> NoReturn:
        """Raise FeatureCacheError: there is nothing to encode an image with."""
        _refuse()


class ResampledInCache(Resampler):
    """Stands for a resampler that is not loaded; it keeps what was calibrated, which checkpoints save.

    Attributes:
        identity: of the resampler, as a checkpoint's manifest has it.
    """

    def __init__(self, identity: Mapping[str, Any], sizes: tuple[int, int], calibrated: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.identity = dict(identity)
        self.num_query_tokens, self.feature_dim = sizes
        self.settings = self.identity["settings"]
        self.source = self.identity["source"]
        self.calibrated = tuple(sorted(calibrated))
        for name, tensor in calibrated.items():
            self.register_buffer(name, tensor)

    def forward(self, patch_features: Tensor) -> NoReturn:
        """Raise FeatureCacheError: there is nothing to resample with."""
        _refuse()


def _refuse() -> NoReturn:
    raise FeatureCacheError(
        "this model was built to train from cached features and has no image encoder; load its checkpoint to show it "
        "an image"
    )
