"""A model of some thousand random weights, and samples for it, through the real encoder and collator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.conversation.encoder import ConversationEncoder, ConversationSection
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.models.language_model import LanguageModel, LoraConfig
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.models.resampler import Merge, MergeConfig, Pool, PoolConfig, QFormer, QFormerConfig, Resampler
from minigpt4.models.vision import EvaViTG, EvaViTGConfig, VisionEncoder
from minigpt4.models.visual_prefix import Prefix, PrefixConfig
from tests import REFERENCE

VOCABULARY = 700
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, Callable[[str], PreTrainedModel]] = {
    "llama": lambda a: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=a)),
    "qwen2": lambda a: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, attn_implementation=a)),
    "qwen3": lambda a: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, attn_implementation=a)),
    "gemma2": lambda a: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager"
        )
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
            attn_implementation=a,
        )
    ),
    "gpt_neox": lambda a: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, attn_implementation=a)),
}


def vision(**sizes: int) -> EvaViTG:
    settings = {"image_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2, **sizes}
    return EvaViTG(EvaViTGConfig(weights="random", **settings))


def language_model(family: str = "llama", attention: str = "sdpa") -> LanguageModel:
    return LanguageModel(FAMILIES[family](attention).eval())


def resampler(kind: str, encoder: VisionEncoder) -> Resampler:
    if kind == "qformer":
        small = {"num_query_tokens": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
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


def encoder(**settings: object) -> ConversationEncoder:
    values = {"template": "vicuna_v0", **settings}
    return ConversationEncoder(TextTokenizer.from_path(REFERENCE / "tokenizer.model"), 4, ConversationSection(**values))


def pixels(images: int, seed: int) -> Tensor:
    return torch.randn(images, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def sample(
    name: str, *turns: tuple[str, str], images: int = 1, of: ConversationEncoder | None = None, seed: int | None = None
) -> Sample:
    encoded = (of or encoder()).encode(Dialogue(tuple(Turn(*t) for t in turns)), num_images=images, sample_id=name)
    shown = pixels(images, len(name) if seed is None else seed) if images else None
    return Sample(id=name, pixel_values=shown, **vars(encoded))


def samples() -> list[Sample]:
    """Return samples of unlike lengths with one, two and no images."""
    return [
        sample("one", ("What is this?", "A red bird on a branch.")),
        sample("two!", ("Compare them.", "Same."), ("Why?", "Both are blue, I think."), images=2),
        sample("none?", ("Say hello to everybody.", "Hello!"), images=0),
    ]
