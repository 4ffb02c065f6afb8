"""The wiring: frozen image encoder, resampler, `llama_proj`, frozen language model.

Input: a `Batch`, or images and embeds for chat. Output: the summed loss, or logits. The parts are passed in, built.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minigpt4.batch import Batch
from minigpt4.models.freezing import part_of, set_trainable
from minigpt4.models.language_model import LanguageModel
from minigpt4.models.loss import sample_losses, token_losses
from minigpt4.models.resampler import Resampler
from minigpt4.models.splice import splice
from minigpt4.models.vision import VisionEncoder
from minigpt4.registry import (
    LANGUAGE_MODELS,
    MODELS,
    RESAMPLERS,
    VISION_ENCODERS,
    Component,
    component,
    name_field,
    path_field,
)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The parts of the model and what trains."""

    type: str = name_field(MODELS, "minigpt4")
    """Name of the model class."""
    vision_encoder: Component = component(VISION_ENCODERS)
    """The image encoder."""
    resampler: Component = component(RESAMPLERS)
    """What turns patches into query features."""
    language_model: Component = component(LANGUAGE_MODELS, default="causal_lm")
    """The language model."""
    trainable: list[str] = field(default_factory=lambda: ["llama_proj"])
    """Parts that learn: llama_proj, resampler, vision_encoder, lora, language_model."""
    init_from: str = path_field("")
    """Checkpoint folder whose trained parts are the starting point: stage 1, for stage 2."""

    def build(self) -> MiniGPT4:
        """Build the model class named by `type`."""
        return MODELS.get(self.type).from_config(self)


class MiniGPT4(nn.Module):
    """An image encoder and a language model, joined by one linear layer."""

    Config = ModelSection

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        resampler: Resampler,
        language_model: LanguageModel,
        trainable: Sequence[str] = ("llama_proj",),
    ) -> None:
        """Wire the parts; `llama_proj` (Dq -> Dl) starts as a default `nn.Linear` in float32."""
        super().__init__()
        self.vision_encoder = vision_encoder
        self.resampler = resampler
        self.language_model = language_model
        self.llama_proj = nn.Linear(resampler.feature_dim, language_model.hidden_size)
        self.trainable = tuple(trainable)
        self.inherited: frozenset[str] = frozenset()
        set_trainable(self, self.trainable)
        self.train(self.training)

    @classmethod
    def from_config(cls, config: ModelSection) -> MiniGPT4:
        """Build every part from its section, the language model last: it is the largest."""
        vision_encoder = config.vision_encoder.build()
        resampler = config.resampler.build(vision_encoder=vision_encoder)
        return cls(vision_encoder, resampler, config.language_model.build(), config.trainable)

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
        return self.llama_proj.weight.device

    def learnt_names(self) -> set[str]:
        """Return the names of the tensors that training sets.

        They are what has a gradient, the buffers beside it (such as a batch norm's running means), what was calibrated,
        and what an earlier stage trained, frozen as it may be now.
        """
        with_gradient = {name for name, p in self.named_parameters() if p.requires_grad}
        beside = {name for name, _ in self.named_buffers() if part_of(name) in self.trainable}
        return with_gradient | beside | {f"resampler.{name}" for name in self.resampler.calibrated} | self.inherited

    def trained_state(self) -> dict[str, Tensor]:
        """Return the tensors that training sets, by name."""
        learnt = self.learnt_names()
        return {name: tensor.detach() for name, tensor in self.state_dict().items() if name in learnt}

    def tensors_beside(self, part: str, learnt: Collection[str]) -> list[tuple[str, Tensor]]:
        """Return the parameters and buffers of a part that are not among the `learnt` names, for its fingerprint.

        Adapters change neither the tensors of a part nor, here, their names: the part beside them is the same one.
        """
        return [
            (name.replace(".base_layer.", "."), tensor)
            for name, tensor in getattr(self, part).state_dict().items()
            if f"{part}.{name}" not in learnt and part_of(f"{part}.{name}") != "lora"
        ]

    @torch.no_grad()
    def calibrate(self, pixel_values: Tensor) -> None:
        """Take the statistics that the resampler wants, from training images (I, 3, H, W)."""
        self.resampler.calibrate(torch.cat([self.vision_encoder(part) for part in pixel_values.split(32)]))

    def query_features(self, pixel_values: Tensor) -> Tensor:
        """Return (I, Q, Dq) for `pixel_values` (I, 3, H, W); without gradient where both parts are frozen."""
        learns = any(part in self.trainable for part in ("vision_encoder", "resampler"))
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            return self.resampler(self.vision_encoder(pixel_values))

    def project(self, query_features: Tensor) -> Tensor:
        """Return `image_embeds` (I, Q, Dl) for `query_features` (I, Q, Dq)."""
        return self.llama_proj(query_features.to(self.llama_proj.weight.dtype))

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return `image_embeds` (I, Q, Dl) for `pixel_values` (I, 3, H, W)."""
        return self.project(self.query_features(pixel_values))

    def embed(self, batch: Batch) -> Tensor:
        """Return the embeds (B, T, Dl) of a batch, images in their places."""
        features = batch.query_features
        if features is None and batch.pixel_values is not None:
            features = self.query_features(batch.pixel_values)
        image_embeds = None if features is None else self.project(features)
        embeds = splice(self.language_model.embed(batch.input_ids), image_embeds, batch.image_mask)
        if not torch.is_grad_enabled():
            return embeds
        return embeds + self._nothing(within_language_model=False).to(embeds.dtype)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits (N, V) at the N positions of `batch.supervised`, row by row."""
        embeds = self.embed(batch)
        masks = self.language_model.structured_masks(batch) if batch.has_structure else batch.attention_mask
        return self.language_model(embeds, masks, batch.position_ids, at=batch.supervised)

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed loss over the batch's supervised tokens, in nats: a scalar.

        A sum, so that the caller can divide by the number of tokens of *all* ranks and accumulated batches.
        """
        loss = token_losses(self.logits(batch), batch).sum()
        return loss + self._nothing(within_language_model=True) if torch.is_grad_enabled() else loss

    def _nothing(self, *, within_language_model: bool) -> Tensor:
        """Return 0, made of every tensor that trains within the language model, or of every other one.

        A batch without images must still touch all of them, or ranks would wait for its gradient forever. Those in
        front of the language model are touched there: then the backward pass goes through it on every rank, and ranks
        between which it is spread gather its layers together.
        """
        zero = torch.zeros((), device=self.device)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and name.startswith("language_model.") == within_language_model:
                zero = zero + 0.0 * parameter.float().sum()
        return zero

    @torch.no_grad()
    def losses_per_sample(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return, per row, the summed loss and the number of supervised tokens, each (B,)."""
        return sample_losses(token_losses(self.logits(batch), batch), batch)
