"""Tiny language models of many families on disk, each with another kind of tokenizer, and encoders for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaTokenizer,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests import REFERENCE
from tests.conftest import EVA
from tests.towers import write_tower

EACH, DONE = "{% for m in messages %}", "{% endfor %}"
CHATML = (
    EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + DONE
) + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + (EACH + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}")
    + ("<end_of_turn>\n" + DONE + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
)
PHI = (
    EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + DONE
) + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


@dataclass(frozen=True)
class Llm:
    """A language model: its config, given the size of its vocabulary, its tokenizer, and its template."""

    config: Callable[[int], PreTrainedConfig]
    tokenizer: Callable[[], Any]
    template: str


def byte_tokenizer(*marks: str, chat_template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges; `special` names its bos, eos, pad and unk tokens."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in (*special.values(), *marks)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = chat_template
    return tokenizer


def sizes(rows: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 640,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **more,
    }


WINDOW = 40  # shorter than the longest rows, long enough for two layers to reach back to the image
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}

LLMS: dict[str, Llm] = {
    "llama": Llm(
        lambda rows: LlamaConfig(**sizes(rows, bos_token_id=1, eos_token_id=2, num_key_value_heads=2)),
        lambda: LlamaTokenizer.from_pretrained(REFERENCE, local_files_only=True),
        "vicuna_v0",
    ),
    "qwen2": Llm(
        lambda rows: Qwen2Config(**sizes(rows + 9, num_key_value_heads=2, tie_word_embeddings=True)),
        lambda: byte_tokenizer("<|im_start|>", eos_token="<|im_end|>", pad_token="<|end|>", chat_template=CHATML),
        "tokenizer",
    ),
    "qwen3": Llm(
        lambda rows: Qwen3Config(**sizes(rows, **GROUPED)),
        lambda: byte_tokenizer("<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML),
        "tokenizer",
    ),
    "gemma2": Llm(
        lambda rows: Gemma2Config(**sizes(rows, **GROUPED, sliding_window=WINDOW, final_logit_softcapping=2.0)),
        lambda: byte_tokenizer("<start_of_turn>", "<end_of_turn>", **GEMMA_SPECIAL),
        "tokenizer",
    ),
    "gemma3": Llm(
        lambda rows: Gemma3TextConfig(**sizes(rows, **GROUPED, sliding_window=WINDOW)),
        lambda: byte_tokenizer("<start_of_turn>", "<end_of_turn>", **GEMMA_SPECIAL),
        "tokenizer",
    ),
    "phi3": Llm(
        lambda rows: Phi3Config(**sizes(rows, sliding_window=WINDOW)),
        lambda: byte_tokenizer(
            *("<|user|>", "<|system|>", "<|assistant|>", "<|end|>"),
            **{"bos_token": "<s>", "eos_token": "<|endoftext|>", "chat_template": PHI},
        ),
        "tokenizer",
    ),
    "opt": Llm(
        lambda rows: OPTConfig(
            **sizes(
                rows, ffn_dim=48, word_embed_proj_dim=16, init_std=0.1, bos_token_id=rows - 2, eos_token_id=rows - 2
            )
        ),
        lambda: byte_tokenizer(bos_token="</s>", eos_token="</s>", pad_token="<pad>"),
        "vicuna_v0",
    ),
    "gpt_neox": Llm(
        lambda rows: GPTNeoXConfig(**sizes(rows)),
        lambda: byte_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"),
        "chatml",
    ),
}
GEMMA_SPECIAL: dict[str, Any] = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "chat_template": GEMMA,
}

QFORMER = {
    "type": "qformer",
    "weights": "random",
    "num_query_tokens": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "dtype": "float32",
}


def backbone(name: str, **settings: Any) -> dict[str, Any]:
    return {"type": "timm", "name": name, "weights": "random", "image_size": 64, "dtype": "float32", **settings}


def tower(kind: str, **settings: Any) -> dict[str, Any]:
    """A vision tower of `tests.towers`, whose folder `write_pair` writes."""
    return {"type": "transformers", "path": kind, **settings}


POOL = {"type": "pool", "grid": 2}
IDEFICS3 = {"layer": -1, "post_norm": True}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "eva, qformer, llama": (EVA, QFORMER, "llama"),
    "eva, merge, opt": (EVA, {"type": "merge", "neighbours": 4}, "opt"),
    "vit, pool, qwen2": (backbone("test_vit"), POOL, "qwen2"),
    "vit, qformer, qwen3": (backbone("test_vit"), QFORMER, "qwen3"),
    "convnext, pool, gemma2": (backbone("test_convnext"), POOL, "gemma2"),
    "convnext levels, pool, gemma3": (backbone("test_convnext", feature_levels=[2, 3]), POOL, "gemma3"),
    "efficientnet, pool, phi3": (backbone("test_efficientnet"), POOL, "phi3"),
    "efficientnet, merge, gpt_neox": (backbone("test_efficientnet"), {"type": "merge", "neighbours": 2}, "gpt_neox"),
    "clip, patches, mlp, llama": (tower("whole clip"), {"type": "patches"}, "llama"),
    "siglip, pixel shuffle, linear, qwen3": (tower("siglip", **IDEFICS3), {"type": "pixel_shuffle"}, "qwen3"),
    "dinov3 and its registers, patches, qwen2": (tower("dinov3", class_token="keep"), {"type": "patches"}, "qwen2"),
}
PROJECTORS: dict[str, dict[str, Any]] = {
    "clip, patches, mlp, llama": {"type": "mlp"},
    "siglip, pixel shuffle, linear, qwen3": {"type": "linear", "bias": False},
}
"""By the name of the pair; all others have the default."""


def write_pair(name: str, folder: Path) -> Path:
    """Write the language model and the YAML of a tiny pair; return the YAML."""
    encoder, resampler, family = PAIRS[name]
    if encoder["type"] == "transformers":
        encoder = {**encoder, "path": str(write_tower(encoder["path"], folder / "tower"))}
    llm = folder / family
    write_llm(family, llm)
    values = {
        "model": {
            "vision_encoder": encoder,
            "resampler": resampler,
            "projector": PROJECTORS.get(name, {"type": "linear"}),
            "language_model": {"path": str(llm), "dtype": "float32"},
        },
        "conversation": {"template": LLMS[family].template},
    }
    file = folder / "pair.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def write_llm(family: str, folder: Path) -> None:
    """Write a language model of random weights and its tokenizer, as transformers saves them."""
    torch.manual_seed(0)
    tokenizer = LLMS[family].tokenizer()
    model = AutoModelForCausalLM.from_config(LLMS[family].config(len(tokenizer)))
    if family == "llama":  # it must not generate its pieces for single bytes: random ones are not text
        with torch.no_grad():
            model.lm_head.weight[3:259] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
