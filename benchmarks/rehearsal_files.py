"""Files of exactly the published layouts with random weights, in place of those that cannot be distributed.

From Python, as the tests do::

    files = write_all(folder)                     # tiny, a second; or size="full", only=["eva", "blip2", "vicuna_7b"]
    files["eva"], files["blip2"]                  # eva_vit_g.pth (fp16) and blip2_pretrained_flant5xxl.pth (fp32)
    files["blip2_hf"]                             # a Hugging Face BLIP-2 folder: encoder, Q-Former, a T5, three shards
    files["vicuna_7b"], files["vicuna_13b"]       # Vicuna v0 folders as FastChat writes them: 13B has the [PAD] row
    files["llama2"]                               # LLaMA-2-chat folder
    files["minigpt4_7b"], files["minigpt4_13b"], files["minigpt4_llama2"], files["minigpt4_7b_stage1"]
    load_config("minigpt4_7b", options(files, "7b"))   # what makes eval_configs/minigpt4_7b.yaml fit the tiny files

From a shell: `python benchmarks/rehearsal_files.py FOLDER --size full --only eva blip2 vicuna_7b minigpt4_7b`.

The values of a tensor depend only on its published name, so the BLIP-2 folder has the same numbers as the two `.pth`
files. Full-size files are written tensor by tensor, through memory-mapped files: a whole model is never in memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))
from minigpt4.exports.huggingface.weights import write_shards
from minigpt4.tensor_names import from_published, to_blip2

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "reference" / "tokenizer.model"
"""A SentencePiece model of 700 pieces, padded to the size of the vocabulary with pieces that no text contains."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Llm:
    """Sizes of one language model."""

    width: int
    mlp: int
    layers: int
    heads: int
    rows: int
    """Rows of the embedding; one more than the vocabulary where a padding token was added."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of all files; `full` is as published, `tiny` has the same names in fewer layers."""

    image: int = 224
    patch: int = 14
    vit_width: int = 1408
    vit_blocks: int = 40
    vit_heads: int = 16
    vit_mlp: int = 6144
    vit_classes: int = 1024
    queries: int = 32
    qformer_width: int = 768
    qformer_mlp: int = 3072
    qformer_layers: int = 12
    qformer_heads: int = 12
    vocabulary: int = 32000
    context: int = 2048
    llms: dict[str, Llm] = field(
        default_factory=lambda: {
            "vicuna_7b": Llm(4096, 11008, 32, 32, 32000),
            "vicuna_13b": Llm(5120, 13824, 40, 40, 32001),
            "llama2": Llm(4096, 11008, 32, 32, 32000),
        }
    )
    spread: float = 0.02
    shard_bytes: int = 1 << 30


SIZES = {
    "full": Sizes(),
    "tiny": Sizes(
        image=28,
        patch=7,
        vit_width=16,
        vit_blocks=3,
        vit_heads=2,
        vit_mlp=69,
        vit_classes=8,
        queries=4,
        qformer_width=16,
        qformer_mlp=24,
        qformer_layers=2,
        qformer_heads=2,
        vocabulary=700,
        context=512,
        llms={
            "vicuna_7b": Llm(32, 48, 2, 4, 700),
            "vicuna_13b": Llm(40, 64, 3, 4, 701),
            "llama2": Llm(32, 48, 2, 4, 700),
        },
        spread=0.2,
        shard_bytes=1 << 16,
    ),
}
RELEASED = {"7b": "vicuna_7b", "13b": "vicuna_13b", "llama2": "llama2"}


def write_all(folder: str | Path, size: str = "tiny", only: Collection[str] | None = None) -> dict[str, Path]:
    """Write the rehearsal files and return their paths by name.

    Args:
        folder: the folder to write to; created if it does not exist.
        size: `tiny` (some 100 kB together) or `full` (35 GB together).
        only: the names of the files to write; all by default.
    """
    folder, sizes = Path(folder), SIZES[size]
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, (file, write) in _files(sizes).items():
        if only is None or name in only:
            write(folder / file)
            paths[name] = folder / file
    return paths


def options(files: dict[str, Path], released: str, size: str = "tiny") -> list[str]:
    """Return the `--options` with which `eval_configs/minigpt4_<released>.yaml` reads the files of `write_all`.

    Args:
        files: the return value of `write_all`.
        released: `7b`, `13b` or `llama2`.
        size: the size of the files.
    """
    given = {
        "model.vision_encoder.weights": files["eva"],
        "model.language_model.path": files[RELEASED[released]],
        "model.init_from": files[f"minigpt4_{released}"],
        **architecture(size),
    }
    if released == "llama2":
        given = {key: value for key, value in given.items() if not key.startswith("model.resampler.")}
    else:
        given["model.resampler.weights"] = files["blip2"]
    return [f"{key}={value}" for key, value in given.items()]


def architecture(size: str = "tiny") -> dict[str, Any]:
    """Return the config keys and values for the sizes of encoder and Q-Former."""
    sizes = SIZES[size]
    encoder = {
        "image_size": sizes.image,
        "patch_size": sizes.patch,
        "embed_dim": sizes.vit_width,
        "depth": sizes.vit_blocks - 1,
        "num_heads": sizes.vit_heads,
        "mlp_ratio": 4.3637,
    }
    qformer = {
        "num_query_tokens": sizes.queries,
        "hidden_size": sizes.qformer_width,
        "num_hidden_layers": sizes.qformer_layers,
        "num_attention_heads": sizes.qformer_heads,
        "intermediate_size": sizes.qformer_mlp,
    }
    return {f"model.vision_encoder.{k}": v for k, v in encoder.items()} | {
        f"model.resampler.{k}": v for k, v in qformer.items()
    }


def _files(sizes: Sizes) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """Return, by name, the file and the function that writes it."""
    widths = {name: llm.width for name, llm in sizes.llms.items()}
    queries, merged = sizes.qformer_width, sizes.vit_width * 4
    vicuna, llama2 = "###Human: {} ###Assistant: ", "[INST] {} [/INST] "
    return {
        "eva": ("eva_vit_g.pth", lambda path: write_eva(path, sizes)),
        "blip2": ("blip2_pretrained_flant5xxl.pth", lambda path: write_blip2(path, sizes)),
        "blip2_hf": ("blip2-flan-t5-xxl", lambda path: write_blip2_folder(path, sizes)),
        "vicuna_7b": ("vicuna-7b-v0", lambda path: write_llm(path, sizes, "vicuna_7b")),
        "vicuna_13b": ("vicuna-13b-v0", lambda path: write_llm(path, sizes, "vicuna_13b")),
        "llama2": ("Llama-2-7b-chat-hf", lambda path: write_llm(path, sizes, "llama2")),
        "minigpt4_7b": (
            "prerained_minigpt4_7b.pth",  # as published
            lambda path: write_released(path, (widths["vicuna_7b"], queries), "Vicuna-7B", prompt=vicuna),
        ),
        "minigpt4_13b": (
            "pretrained_minigpt4.pth",
            lambda path: write_released(path, (widths["vicuna_13b"], queries), "Vicuna-13B", prompt=vicuna),
        ),
        "minigpt4_llama2": (
            "pretrained_minigpt4_llama2_7b.pth",
            lambda path: write_released(path, (widths["llama2"], merged), "LLaMA-2", prompt=llama2),
        ),
        "minigpt4_7b_stage1": (
            "pretrained_minigpt4_7b_stage1.pth",
            lambda path: write_released(path, (widths["vicuna_7b"], queries), "Vicuna-7B"),
        ),
    }


# --------------------------------------------------------------------------------------------- the published names


def eva_shapes(sizes: Sizes) -> Shapes:
    """Return names and shapes in `eva_vit_g.pth`: 40 blocks, of which 39 are used, final norm and head."""
    width, grid = sizes.vit_width, sizes.image // sizes.patch
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, 3, sizes.patch, sizes.patch),
        "patch_embed.proj.bias": (width,),
    }
    for block in range(sizes.vit_blocks):
        shapes |= {
            f"blocks.{block}.norm1.weight": (width,),
            f"blocks.{block}.norm1.bias": (width,),
            f"blocks.{block}.attn.q_bias": (width,),
            f"blocks.{block}.attn.v_bias": (width,),
            f"blocks.{block}.attn.qkv.weight": (3 * width, width),
            **_linear(f"blocks.{block}.attn.proj", width, width),
            f"blocks.{block}.norm2.weight": (width,),
            f"blocks.{block}.norm2.bias": (width,),
            **_linear(f"blocks.{block}.mlp.fc1", sizes.vit_mlp, width),
            **_linear(f"blocks.{block}.mlp.fc2", width, sizes.vit_mlp),
        }
    return shapes | {"norm.weight": (width,), "norm.bias": (width,), **_linear("head", sizes.vit_classes, width)}


def qformer_shapes(sizes: Sizes) -> Shapes:
    """Return names and shapes in `blip2_pretrained_flant5xxl.pth`, without `t5_proj`."""
    width, patches = sizes.qformer_width, sizes.vit_width
    shapes: Shapes = {
        "query_tokens": (1, sizes.queries, width),
        "ln_vision.weight": (patches,),
        "ln_vision.bias": (patches,),
        **_norm("Qformer.bert.embeddings.LayerNorm", width),
    }
    for layer in range(sizes.qformer_layers):
        at = f"Qformer.bert.encoder.layer.{layer}"
        shapes |= _attention(f"{at}.attention", width, width)
        if layer % 2 == 0:
            shapes |= _attention(f"{at}.crossattention", width, patches)
        shapes |= _linear(f"{at}.intermediate_query.dense", sizes.qformer_mlp, width)
        shapes |= _linear(f"{at}.output_query.dense", width, sizes.qformer_mlp)
        shapes |= _norm(f"{at}.output_query.LayerNorm", width)
    return shapes


def _attention(at: str, width: int, seen: int) -> Shapes:
    """Return the tensors of one BERT attention of `width` to vectors `seen` wide."""
    return {
        **_linear(f"{at}.self.query", width, width),
        **_linear(f"{at}.self.key", width, seen),
        **_linear(f"{at}.self.value", width, seen),
        **_linear(f"{at}.output.dense", width, width),
        **_norm(f"{at}.output.LayerNorm", width),
    }


def _linear(at: str, rows: int, columns: int) -> Shapes:
    return {f"{at}.weight": (rows, columns), f"{at}.bias": (rows,)}


def _norm(at: str, width: int) -> Shapes:
    return {f"{at}.weight": (width,), f"{at}.bias": (width,)}


# ----------------------------------------------------------------------------------------------------- the writers


def write_eva(path: Path, sizes: Sizes) -> None:
    """Write `eva_vit_g.pth`: a flat dictionary, fp16."""
    with _Scratch(path.parent) as scratch:
        content = {
            name: scratch.put(random_tensor(name, shape, sizes.spread).half())
            for name, shape in eva_shapes(sizes).items()
        }
        torch.save(content, path)


def write_blip2(path: Path, sizes: Sizes) -> None:
    """Write `blip2_pretrained_flant5xxl.pth`: query tokens, Q-Former, `ln_vision` and `t5_proj` under `model`, fp32."""
    shapes = qformer_shapes(sizes) | _linear("t5_proj", _t5_width(sizes), sizes.qformer_width)
    with _Scratch(path.parent) as scratch:
        content = {name: scratch.put(random_tensor(name, shape, sizes.spread)) for name, shape in shapes.items()}
        content["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
        torch.save({"model": content}, path)


def write_blip2_folder(folder: Path, sizes: Sizes) -> None:
    """Write a folder like `Salesforce/blip2-flan-t5-xxl`: fp32, sharded, with a sample of the language model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(_blip2_folder_tensors(sizes), folder, sizes.shard_bytes)
    config = {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "num_query_tokens": sizes.queries,
        "image_token_index": sizes.vocabulary,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": sizes.vit_width,
            "intermediate_size": sizes.vit_mlp,
            "num_hidden_layers": sizes.vit_blocks - 1,
            "num_attention_heads": sizes.vit_heads,
            "image_size": sizes.image,
            "patch_size": sizes.patch,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": sizes.qformer_width,
            "intermediate_size": sizes.qformer_mlp,
            "num_hidden_layers": sizes.qformer_layers,
            "num_attention_heads": sizes.qformer_heads,
            "encoder_hidden_size": sizes.vit_width,
        },
        "text_config": {"model_type": "t5", "d_model": _t5_width(sizes), "vocab_size": sizes.vocabulary},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_llm(folder: Path, sizes: Sizes, name: str) -> None:
    """Write a LLaMA folder: bf16 shards, config, and tokenizer files like those of FastChat and Meta."""
    llm = sizes.llms[name]
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=llm.rows,
        hidden_size=llm.width,
        intermediate_size=llm.mlp,
        num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads,
        max_position_embeddings=sizes.context * (2 if name == "llama2" else 1),
        rms_norm_eps=1e-5 if name == "llama2" else 1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0 if name != "llama2" else None,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in LlamaForCausalLM(config).state_dict().items()}
    tensors = ((n, random_tensor(f"{name} {n}", shape, sizes.spread, torch.bfloat16)) for n, shape in shapes.items())
    write_shards(tensors, folder, sizes.shard_bytes)
    config.save_pretrained(folder)
    _write_tokenizer(folder, sizes.vocabulary, padded=llm.rows > sizes.vocabulary)


def write_released(path: Path, shape: tuple[int, int], llm: str, *, prompt: str = "") -> None:
    """Write a released MiniGPT-4 file: `llama_proj`, two kinds of buffer, AdamW's state, config, scaler, epoch.

    Args:
        path: the file.
        shape: of `llama_proj.weight`.
        llm: name of the language model.
        prompt: the prompt template of stage 2; empty for stage 1.
    """
    width = shape[0]
    weight, bias = (random_tensor(f"{llm} {prompt} {s}", s, 0.05) for s in (shape, (width,)))
    stage = {"prompt_path": "prompts/alignment.txt", "prompt_template": prompt} if prompt else {}
    moments = {
        n: {"step": torch.tensor(1000.0), "exp_avg": torch.zeros_like(t), "exp_avg_sq": torch.ones_like(t)}
        for n, t in enumerate((weight, bias))
    }
    group = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05, "amsgrad": False, "params": [0]}
    content = {
        "model": {
            "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
            "Qformer.bert.embeddings.position_ids": torch.arange(512)[None],
            "llama_proj.weight": weight,
            "llama_proj.bias": bias,
        },
        "optimizer": {"state": moments, "param_groups": [group, {**group, "weight_decay": 0, "params": [1]}]},
        "config": {
            "model": {"arch": "mini_gpt4", "model_type": "pretrain", "llama_model": f"/somewhere/{llm}", **stage},
            "run": {"task": "image_text_pretrain", "init_lr": 3e-5, "max_epoch": 5, "iters_per_epoch": 200},
        },
        "scaler": {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 0,
        },
        "epoch": 4,
    }
    torch.save(content, path)


def random_tensor(name: str, shape: tuple[int, ...], spread: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random values that depend on the name of the tensor; those of norms' weights are around one."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.empty(shape, dtype=dtype).normal_(std=spread, generator=generator)
    is_scale = name.endswith(".weight") and ("norm" in name.lower() or name.startswith("ln_vision."))
    return values + 1 if is_scale else values


# ------------------------------------------------------------------------------------------ folders and their parts


def _blip2_folder_tensors(sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a Hugging Face BLIP-2 folder: encoder, Q-Former and a sample of the language model."""
    unused = (f"blocks.{sizes.vit_blocks - 1}.", "norm.", "head.")
    vision = {name: shape for name, shape in eva_shapes(sizes).items() if not name.startswith(unused)}
    for name, shape in (vision | qformer_shapes(sizes)).items():
        if name.endswith("attn.v_bias"):
            continue
        tensor = random_tensor(name, shape, sizes.spread)
        if name.endswith("attn.q_bias"):  # the folder has one bias for queries, keys and values; EVA has none for keys
            value = random_tensor(name.replace("q_bias", "v_bias"), shape, sizes.spread)
            tensor = torch.cat([tensor, torch.zeros_like(tensor), value])
        yield folder_name(name), tensor.half().float() if name in vision else tensor
    embedding = (sizes.vocabulary, _t5_width(sizes))
    language_model = {
        "language_model.shared.weight": embedding,
        "language_model.encoder.embed_tokens.weight": embedding,
        **_linear("language_projection", _t5_width(sizes), sizes.qformer_width),
    }
    for name, shape in language_model.items():
        yield name, random_tensor(name, shape, sizes.spread)


def folder_name(published: str) -> str:
    """Return the name that a tensor of the two `.pth` files has in a Hugging Face BLIP-2 folder."""
    is_eva = not published.startswith(("Qformer.", "query_tokens", "ln_vision."))
    return to_blip2(from_published(f"visual_encoder.{published}" if is_eva else published))


def _t5_width(sizes: Sizes) -> int:
    return 4096 if sizes is SIZES["full"] else 24


def _write_tokenizer(folder: Path, vocabulary: int, *, padded: bool) -> None:
    """Write a SentencePiece model of `vocabulary` pieces, with the other tokenizer files of old conversions."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(TOKENIZER.read_bytes())
    lowest = min(piece.score for piece in model.pieces)
    for number in range(len(model.pieces), vocabulary):
        model.pieces.add(piece=f"⟨unused {number}⟩", score=lowest - number)
    model.trainer_spec.vocab_size = vocabulary
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 2048,
    }
    if padded:
        settings["pad_token"] = "[PAD]"
        (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": vocabulary}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    named = {key: value for key, value in settings.items() if isinstance(value, str) and key.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))


class _Scratch:
    """Memory-mapped files for tensors, so that they are not all in RAM before `torch.save` writes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(dir=folder)
        self._count = 0

    def __enter__(self) -> _Scratch:
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def put(self, tensor: Tensor) -> Tensor:
        """Return the tensor, mapped from disk."""
        self._count += 1
        file = Path(self._folder.name) / str(self._count)
        held = np.memmap(file, dtype=tensor.numpy().dtype, mode="w+", shape=tuple(tensor.shape))
        held[...] = tensor.numpy()
        held.flush()
        return torch.from_numpy(held)


def main() -> None:
    """Write files from the command line, and print one JSON line with their paths."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--only", nargs="+", choices=sorted(_files(SIZES["tiny"])), help="default: all")
    arguments = parser.parse_args()
    paths = write_all(arguments.folder, arguments.size, arguments.only)
    print(json.dumps({name: str(path) for name, path in paths.items()}))


if __name__ == "__main__":
    main()
