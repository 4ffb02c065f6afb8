"""A model of some thousand random weights, and samples for it, through the real encoder and collator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from minigpt4.batch import Sample
from minigpt4.config.parts import EvaViTGConfig, LoraConfig, MergeConfig, PoolConfig, PrefixConfig, QFormerConfig
from minigpt4.config.sections import ConversationConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.models.language_model import LanguageModel
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.models.resampler import Merge, Pool, Prefix, QFormer, Resampler
from minigpt4.models.vision import EvaViTG, VisionEncoder
from tests import REFERENCE

VOCABULARY = 700
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}


def attention(name: str) -> dict[str, Any]:
    """Return the setting of the attention, which every config takes and none declares."""
    return {"attn_implementation": name}


def sizes(attention_name: str) -> dict[str, Any]:
    return {**SIZES, **attention(attention_name)}


FAMILIES: dict[str, Callable[[str], PreTrainedModel]] = {
    "llama": lambda a: LlamaForCausalLM(LlamaConfig(**sizes(a))),
    "qwen2": lambda a: Qwen2ForCausalLM(Qwen2Config(**sizes(a), num_key_value_heads=2)),
    "qwen3": lambda a: Qwen3ForCausalLM(Qwen3Config(**sizes(a), num_key_value_heads=2, head_dim=8)),
    "gemma2": lambda a: Gemma2ForCausalLM(
        Gemma2Config(**sizes("eager"), num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0)
    ),
    "opt": lambda a: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=16,
            init_std=0.1,
            **attention(a),
        )
    ),
    "gpt_neox": lambda a: GPTNeoXForCausalLM(GPTNeoXConfig(**sizes(a))),
}


def vision(**sizes: int) -> EvaViTG:
    settings: dict[str, Any] = {"image_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2, **sizes}
    return EvaViTG(EvaViTGConfig(weights="random", **settings))


def language_model(family: str = "llama", attention: str = "sdpa") -> LanguageModel:
    return LanguageModel(FAMILIES[family](attention).eval())


def resampler(kind: str, encoder: VisionEncoder) -> Resampler:
    if kind == "qformer":
        small: dict[str, Any] = {
            "num_query_tokens": 4,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        return QFormer(QFormerConfig(weights="random", intermediate_size=24, **small), encoder.feature_dim)
    if kind == "prefix":
        return Prefix(PrefixConfig(num_query_tokens=4, components=8), encoder)
    return Pool(PoolConfig(grid=2), encoder) if kind == "pool" else Merge(MergeConfig(neighbours=4), encoder)


def model(
    *, kind: str = "merge", family: str = "llama", attention: str = "sdpa", trainable: Sequence[str] = ("llama_proj",)
) -> MiniGPT4:
    torch.manual_seed(0)
    encoder = vision()
    llm = language_model(family, attention)
    if "lora" in trainable:
        llm.add_lora(LoraConfig(rank=2, dropout=0.5))
    return MiniGPT4(encoder, resampler(kind, encoder), llm, trainable)


def encoder(**settings: Any) -> ConversationEncoder:
    values = {"template": "vicuna_v0", **settings}
    return ConversationEncoder(TextTokenizer.from_path(REFERENCE / "tokenizer.model"), 4, ConversationConfig(**values))


def pixels(images: int, seed: int) -> Tensor:
    return torch.randn(images, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def sample(
    name: str, *turns: tuple[str, str], images: int = 1, of: ConversationEncoder | None = None, seed: int | None = None
) -> Sample:
    encoded = (of or encoder()).encode_dialogue(
        Dialogue(tuple(Turn(*t) for t in turns)), num_images=images, sample_id=name
    )
    shown = pixels(images, len(name) if seed is None else seed) if images else None
    return Sample(id=name, pixel_values=shown, **vars(encoded))


def samples() -> list[Sample]:
    """Return samples of different lengths, with one, two and no images."""
    return [
        sample("one", ("What is this?", "A red bird on a branch.")),
        sample("two!", ("Compare them.", "Same."), ("Why?", "Both are blue, I think."), images=2),
        sample("none?", ("Say hello to everybody.", "Hello!"), images=0),
    ]
