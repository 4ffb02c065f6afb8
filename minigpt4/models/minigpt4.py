"""The wiring: frozen image encoder, resampler, `llama_proj`, frozen language model.

Input: a `Batch`, or images and embeds for chat. Output: the summed loss, or logits. The parts are passed in, built.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.batch import Batch
from minigpt4.config.sections import ModelConfig
from minigpt4.models.freezing import frozen_tensors, part_of, set_trainable
from minigpt4.models.image_side import ImageSide
from minigpt4.models.language_model import LanguageModel
from minigpt4.models.loss import sample_losses, token_losses
from minigpt4.models.projector import Linear
from minigpt4.models.resampler import Resampler
from minigpt4.models.splice import splice
from minigpt4.models.vision import VisionEncoder


class MiniGPT4(nn.Module):
    """An image encoder and a language model, joined by a projector: one linear layer, unless the config says else."""

    Config = ModelConfig
    llama_proj: Any

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        resampler: Resampler,
        language_model: LanguageModel,
        trainable: Sequence[str] = ("llama_proj",),
        llama_proj: nn.Module | None = None,
    ) -> None:
        """Wire the parts.

        Args:
            vision_encoder: from `pixel_values` to `patch_features`.
            resampler: from `patch_features` to `query_features`.
            language_model: the language model.
            trainable: names of the parts that are trained.
            llama_proj: maps Dq to Dl, in float32; without it, one new linear layer.
        """
        super().__init__()
        self.vision_encoder = vision_encoder
        self.resampler = resampler
        self.language_model = language_model
        self.llama_proj = llama_proj or Linear(resampler.feature_dim, language_model.hidden_size)
        self.trainable = tuple(trainable)
        self.inherited: frozenset[str] = frozenset()
        set_trainable(self, self.trainable)
        self.train(self.training)

    @classmethod
    def from_config(
        cls, config: ModelConfig, image_side: ImageSide | None = None, language_model: LanguageModel | None = None
    ) -> MiniGPT4:
        """Build every part from its section, the language model last: it is the largest.

        Args:
            config: the model section.
            image_side: image encoder and resampler, where they are built already.
            language_model: the same.
        """
        seed = torch.initial_seed()
        if image_side is None:
            image_side = ImageSide.from_config(config)
        torch.manual_seed(seed)  # adapters and llama_proj start the same, whatever the parts before them have drawn
        if language_model is None:
            language_model = config.language_model.build()
        torch.manual_seed(seed)
        sizes = {"feature_dim": image_side.resampler.feature_dim, "hidden_size": language_model.hidden_size}
        projector = config.projector.build(**sizes)
        return cls(image_side.vision_encoder, image_side.resampler, language_model, config.trainable, projector)

    def train(self, mode: bool = True) -> MiniGPT4:
        """Set training mode on what trains; frozen parts stay in eval, so that their dropout stays off."""
        super().train(False)
        self.training = mode
        for name, module in self.named_modules():
            if name and part_of(f"{name}.") in self.trainable:
                module.training = mode
        return self

    @property
    def num_query_tokens(self) -> int:
        """Q, the positions an image takes in a row of tokens."""
        return self.resampler.num_query_tokens

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.llama_proj.parameters()).device

    def trained_names(self) -> set[str]:
        """Return the names of the tensors that training sets.

        These are the parameters with a gradient, the buffers of the parts that are trained (such as a batch norm's
        running means), what was calibrated, and what an earlier stage trained, even if it is frozen now.
        """
        parameters = {name for name, p in self.named_parameters() if p.requires_grad}
        buffers = {name for name, _ in self.named_buffers() if part_of(name) in self.trainable}
        return parameters | buffers | {f"resampler.{name}" for name in self.resampler.calibrated} | self.inherited

    def trained_state(self) -> dict[str, Tensor]:
        """Return the tensors that training sets, by name."""
        trained = self.trained_names()
        return {name: tensor.detach() for name, tensor in self.state_dict().items() if name in trained}

    def frozen_tensors(self, part: str, trained: Collection[str]) -> list[tuple[str, Tensor]]:
        """Return the parameters and buffers of a part whose names are not in `trained`; see `freezing`."""
        return frozen_tensors(getattr(self, part), part, trained)

    @torch.no_grad()
    def calibrate(self, pixel_values: Tensor) -> None:
        """Compute the statistics of the resampler from training images (I, 3, H, W)."""
        self.resampler.calibrate(torch.cat([self.vision_encoder(part) for part in pixel_values.split(32)]))

    def query_features(self, pixel_values: Tensor) -> Tensor:
        """Return (I, Q, Dq) for `pixel_values` (I, 3, H, W); without gradient where both parts are frozen."""
        learns = any(part in self.trainable for part in ("vision_encoder", "resampler"))
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            return self.resampler(self.vision_encoder(pixel_values))

    def project(self, query_features: Tensor) -> Tensor:
        """Return `image_embeds` (I, Q, Dl) for `query_features` (I, Q, Dq)."""
        embeds: Tensor = self.llama_proj(query_features.to(next(self.llama_proj.parameters()).dtype))
        return embeds

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return `image_embeds` (I, Q, Dl) for `pixel_values` (I, 3, H, W)."""
        return self.project(self.query_features(pixel_values))

    def embed(self, batch: Batch) -> Tensor:
        """Return the embeds (B, T, Dl) of a batch, images in their places."""
        features = batch.query_features
        if features is None and batch.pixel_values is not None:
            features = self.query_features(batch.pixel_values)
        image_embeds = None if features is None else self.project(features)
        token_embeds = self.language_model.embed(batch.input_ids)
        return splice(token_embeds, image_embeds, batch.image_mask, batch.image_positions)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits (N, V) at the N positions in `batch.supervised_positions`."""
        # Rows without structure are causal, start at position 0 and are padded on the right, where no token attends to
        # padding. That is what transformers computes without a mask, and with its fastest attention.
        masks, position_ids = None, None
        if batch.has_structure:
            masks, position_ids = self.language_model.structured_masks(batch), batch.position_ids
        return self.language_model(self.embed(batch), masks, position_ids, at=batch.supervised_positions)

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed loss over the batch's supervised tokens, in nats: a scalar.

        A sum, so that the caller can divide by the number of tokens of *all* ranks and accumulated batches.
        """
        return token_losses(self.logits(batch), batch).sum()

    @torch.no_grad()
    def losses_per_sample(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return, per row, the summed loss and the number of supervised tokens, each (B,)."""
        return sample_losses(token_losses(self.logits(batch), batch), batch)
