"""The model at its published sizes with random weights, and its training step: ours and the published way.

Input: sizes and a device. Output: a model made on that device, batches for it, and steps to time. `gpu.py` times them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from minigpt4.batch import IGNORE, Batch, Sample
from minigpt4.datasets.collate import collate
from minigpt4.models.language_model import LanguageModel
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.models.resampler import QFormer
from minigpt4.models.vision import EvaViTG

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PROMPT = {"stage1": (1, 0), "stage2": (8, 17), "chat": (42, 26)}
"""Tokens of each prompt before and after the image."""


@dataclass(frozen=True)
class Sizes:
    """The published sizes; of image encoder and Q-Former only what differs from the defaults of their settings."""

    vision: dict[str, Any] = field(default_factory=dict)
    qformer: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 32000
    llama_7b: tuple[int, int, int, int] = (4096, 11008, 32, 32)
    """Width, width of the MLP, layers, heads."""
    llama_13b: tuple[int, int, int, int] = (5120, 13824, 40, 40)
    batch: dict[str, int] = field(default_factory=lambda: {"stage1": 64, "stage2": 12, "chat": 16})
    answers: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {"stage1": (32, 25, 19, 12), "stage2": (140, 113, 87, 60)}
    )
    """Tokens of the answers of the first rows of a batch; the others repeat them."""
    largest: int = 256
    """The largest batch that is tried."""
    new_tokens: int = 64
    """Tokens of a chat answer."""
    matmul: int = 8192
    copied: int = 2**32
    """Bytes."""


TINY = Sizes(
    vision={"image_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2},
    qformer={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    vocab_size=200,
    llama_7b=(32, 64, 2, 2),
    llama_13b=(48, 64, 2, 2),
    batch={"stage1": 4, "stage2": 4, "chat": 2},
    answers={"stage1": (6, 4), "stage2": (9, 5)},
    largest=8,
    new_tokens=4,
    matmul=128,
    copied=2**20,
)


def make_model(sizes: Sizes, llm: str, device: torch.device, parts: Sequence[Any] = ()) -> MiniGPT4:
    """Return a model in bfloat16, made on the device.

    Args:
        sizes: of the parts.
        llm: 7b or 13b.
        device: where the weights are drawn.
        parts: an image encoder and a Q-Former to use again.
    """
    hidden, mlp, layers, heads = {"7b": sizes.llama_7b, "13b": sizes.llama_13b}[llm]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=2048,
    )
    with torch.device(device):
        if not parts:
            encoder = EvaViTG.from_config(EvaViTG.Config(weights="random", dtype="bfloat16", **sizes.vision))
            parts = encoder, QFormer.from_config(QFormer.Config(weights="random", **sizes.qformer), encoder)
        language_model = AutoModelForCausalLM.from_config(config, dtype=BF16, attn_implementation="sdpa")
        language_model.generation_config.eos_token_id = None  # nothing ends an answer before its length
        vision_encoder, resampler = parts
        return MiniGPT4(vision_encoder, resampler, LanguageModel(language_model))


def make_batch(
    model: MiniGPT4, sizes: Sizes, stage: str, rows: int, *, cached: bool = False, trim: bool = True
) -> Batch:
    """Return a padded batch of random images (or query features) and tokens.

    Stage 1 is `[BOS] image caption`, stage 2 `[BOS] prompt image prompt answer`. Without `trim`, rows keep their last
    token, as in the published code.
    """
    draw = torch.Generator().manual_seed(0)
    (before, after), queries, samples = PROMPT[stage], model.num_query_tokens, []
    for _, answer in zip(range(rows), itertools.cycle(sizes.answers[stage]), strict=False):
        conditions = before + queries + after
        ids = torch.randint(3, sizes.vocab_size, (conditions + answer,), generator=draw)
        places = torch.arange(len(ids))
        labels = ids.masked_fill(places < conditions, IGNORE)
        is_image = (places >= before) & (places < before + queries)
        samples.append(Sample("", ids, labels, is_image, places, torch.zeros_like(ids)))
    batch = collate(samples, pad_id=0, trim=trim).to(model.device)
    batch.images_per_row = torch.ones_like(batch.images_per_row)
    if cached:
        width = model.resampler.feature_dim
        batch.query_features = torch.randn(rows, queries, width, device=model.device, dtype=BF16)
    else:
        batch.pixel_values = make_images(model, rows)
    return batch


def make_images(model: MiniGPT4, number: int) -> Tensor:
    """Return random images (I, 3, H, W), float32 as the image processor makes them."""
    spec = model.vision_encoder.image_spec
    return torch.randn(number, 3, spec.height, spec.width, device=model.device)


@dataclass(frozen=True)
class Way:
    """How the frozen weights are held, and how the model runs."""

    vision: torch.dtype = BF16
    qformer: torch.dtype = BF16
    llm: torch.dtype = BF16
    autocast: torch.dtype | None = None
    scaled: bool = False
    attention: str = "sdpa"
    published: bool = False

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the autocast of the forward pass, if any."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)


WAYS = {
    "published_fp16": Way(F16, F32, F16, autocast=F16, scaled=True, attention="eager", published=True),
    "published_bf16": Way(BF16, F32, BF16, autocast=BF16, attention="eager", published=True),
    "bf16": Way(),  # all frozen weights in bfloat16, no autocast
    "bf16_eager": Way(attention="eager"),
    "bf16_lora": Way(autocast=BF16),  # as the shipped configs have it; adapters learn in float32
    "bf16_autocast": Way(F32, F32, BF16, autocast=BF16),  # with `dtype: float32` for image encoder and Q-Former
    "fp16_scaler": Way(F16, F32, F16, autocast=F16, scaled=True),
}


def hold(model: MiniGPT4, way: Way) -> None:
    """Convert the frozen weights in place, and choose the attention kernels."""
    encoder: Any = model.vision_encoder
    qformer: Any = model.resampler.qformer
    llm: Any = model.language_model.model
    encoder.to(way.vision)
    for module in encoder.modules() if way.published else ():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.float()
    model.resampler.to(way.qformer)
    for parameter in llm.parameters():  # its buffers, the rotary frequencies, stay float32
        parameter.data = parameter.data.to(way.llm)
    for block in encoder.vit.blocks:
        block.attn.fused_attn = way.attention == "sdpa"
    for part in (qformer, llm):
        part.set_attn_implementation(way.attention)
    model.train()  # ends recomputation, too


class Published(nn.Module):
    """The forward pass as MiniGPT-4's published code has it, on the parts of our model."""

    def __init__(self, model: MiniGPT4, batch: Batch) -> None:
        super().__init__()
        self.model = model
        start = int(batch.image_mask[0].int().argmax())
        self.image = slice(start, start + model.num_query_tokens)

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss over the supervised tokens of a batch of pixels."""
        model, llm = self.model, self.model.language_model.model
        with torch.no_grad():
            features = model.resampler(model.vision_encoder(batch.pixel_values))
        embed, image_embeds = llm.get_input_embeddings(), model.llama_proj(features)
        before, after = batch.input_ids[:, : self.image.start], batch.input_ids[:, self.image.stop :]
        embeds = torch.cat([embed(before), image_embeds, embed(after)], dim=1)
        labels = torch.full_like(batch.input_ids, IGNORE)
        labels.view(-1)[batch.supervised_positions + 1] = batch.targets
        return llm(inputs_embeds=embeds, attention_mask=batch.attention_mask.long(), labels=labels).loss


class Step:
    """One optimiser step on one batch: ours as the train runner makes it, or the published one."""

    def __init__(self, model: MiniGPT4, way: Way, batch: Batch) -> None:
        self.way, self.batch, self.device = way, batch, model.device
        self.module = Published(model, batch) if way.published else model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.05)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=way.scaled)
        self.tokens = 1 if way.published else batch.num_supervised

    def __call__(self) -> None:
        """Run it."""
        with self.way.context(self.device):
            loss = self.module(self.batch) / self.tokens
        self.scaler.scale(loss).backward()
        self.update()

    def update(self) -> None:
        """Let the optimiser use the gradients; the published code does not look at their norm."""
        if not self.way.published:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
