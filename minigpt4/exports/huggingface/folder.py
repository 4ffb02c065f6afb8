"""Write a model as a folder for `transformers.AutoModelForImageTextToText`.

Input: a loaded model of EVA-ViT-g, Q-Former and a LLaMA. Output: config, sharded weights, tokenizer and image
processor, prompt format, `example.py` and a model card. The folder appears under its name when it is complete.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from minigpt4.assets import resolve
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.checkpoints.inspection import PROMPT_FORMAT
from minigpt4.conversation.dialogue import IMAGE_MARK
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.errors import ExportError
from minigpt4.exports.ends import end_token_ids
from minigpt4.exports.huggingface.card import model_card
from minigpt4.exports.huggingface.names import blip2_tensors
from minigpt4.exports.huggingface.shards import write_shards
from minigpt4.models.resampler import QFormer
from minigpt4.models.vision import EvaViTG
from minigpt4.processors.image import ImageProcessor

IMAGE_TOKEN = "<image>"
_INSTEAD = (
    "use --to prompt-embeds: it works with every model, and a stock server of the untouched language model answers"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _ImageToken:
    """Where `<image>` is in the vocabulary.

    Attributes:
        id: below `rows`.
        rows: of the embedding in the exported model.
        added_rows: the rows repeated behind the last one to make room.
    """

    id: int
    rows: int
    added_rows: tuple[int, ...] = ()


def export_huggingface(loaded: LoadedModel, out: Path, shard_bytes: int = 2 * 1024**3) -> None:
    """Write the folder `out`.

    Args:
        loaded: the model and what belongs to it, on any device.
        out: must not exist.
        shard_bytes: largest weight file.

    Raises:
        ExportError: the model does not fit the format, or `out` exists or cannot be written.
    """
    check_fits(loaded)
    if out.exists():
        raise ExportError(f"{out}: exists already; name a new folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(loaded, partial, out.name, shard_bytes)
        partial.replace(out)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_fits(loaded: LoadedModel) -> None:
    """Raise ExportError, with a word on what to use instead, unless the model is of the kind that Blip2 is."""
    model = loaded.model
    if type(model.vision_encoder) is not EvaViTG:
        kind = type(model.vision_encoder).__name__
        raise ExportError(f"Blip2's image encoder is EVA-ViT-g; this model's is {kind}: {_INSTEAD}")
    if type(model.resampler) is not QFormer:
        kind = type(model.resampler).__name__
        raise ExportError(f"Blip2 has a Q-Former behind its image encoder; this model has {kind}: {_INSTEAD}")
    family = model.language_model.model.config.model_type
    if family != "llama":
        raise ExportError(f"this format is written for LLaMA language models; this one is {family!r}: {_INSTEAD}")
    if type(loaded.image_processor) is not ImageProcessor:
        kind = type(loaded.image_processor).__name__
        raise ExportError(f"Blip2's image processor cannot do what the plugin {kind} does: {_INSTEAD}")


def _write(loaded: LoadedModel, folder: Path, name: str, shard_bytes: int) -> None:
    tokenizer = TextTokenizer.from_path(resolve(loaded.config.model.language_model.config.path)).tokenizer
    image_token = _add_image_token(tokenizer, loaded.model.language_model.vocab_size)
    config = _config(loaded, image_token)
    shapes = write_shards(blip2_tensors(loaded.model, image_token.added_rows), folder, shard_bytes)
    _check_shapes(shapes, config)
    config.save_pretrained(folder)
    _generation_config(loaded, image_token).save_pretrained(folder)
    spec = loaded.image_processor.spec
    image_processor = BlipImageProcessorPil(
        size={"height": spec.height, "width": spec.width}, image_mean=list(spec.mean), image_std=list(spec.std)
    )
    # Without num_query_tokens the processor leaves text alone; with it, it would put the image in front of BOS.
    Blip2Processor(image_processor, tokenizer, num_query_tokens=None).save_pretrained(folder)
    form = prompt_format(loaded, image_token.id)
    (folder / PROMPT_FORMAT).write_text(json.dumps(form, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    example = resources.files(__package__).joinpath("example.py").read_text(encoding="utf-8")
    (folder / "example.py").write_text(example, encoding="utf-8")
    card = model_card(loaded, name, image_token.id, norm_difference(loaded))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _add_image_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> _ImageToken:
    """Give the tokenizer `<image>` and find it a row of the embedding, a new one if need be.

    A new row of the head repeats that of the unknown token (or the last one), which no model says: a row of zeros
    could win against logits that are all negative. Two are new where the tokenizer has a padding token without a row,
    as old Vicuna folders have.
    """
    for key in ("local_files_only", "is_local"):  # of this machine, not of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    known = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if known is None:
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    place = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))  # type: ignore[arg-type]
    if place < rows:
        return _ImageToken(place, rows)
    unknown = tokenizer.unk_token_id
    repeated = rows - 1 if unknown is None or unknown >= rows else int(unknown)
    return _ImageToken(place, place + 1, (repeated,) * (place + 1 - rows))


def _config(loaded: LoadedModel, image_token: _ImageToken) -> Any:
    """Return the `Blip2Config`."""
    model = loaded.model
    llm: Any = model.language_model.model
    text: dict[str, Any] = llm.config.to_dict() | {
        "architectures": [type(llm).__name__],  # what vLLM resolves the language model by
        "vocab_size": image_token.rows,
    }
    text.pop("quantization_config", None)
    encoder: Any = model.vision_encoder
    block = encoder.vit.blocks[0]
    resampler: Any = model.resampler
    vision = {
        "hidden_size": encoder.feature_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(encoder.vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": loaded.image_processor.spec.height,
        "patch_size": encoder.vit.patch_embed.patch_size[0],
        "layer_norm_eps": block.norm1.eps,
    }
    config: Any = Blip2Config(
        vision_config=vision,
        qformer_config=resampler.qformer.config.to_dict(),
        text_config=text,
        num_query_tokens=resampler.num_query_tokens,
        image_token_index=image_token.id,
    )
    config.tie_word_embeddings = text["tie_word_embeddings"]
    config.architectures = ["Blip2ForConditionalGeneration"]
    config.dtype = str(model.language_model.dtype).removeprefix("torch.")
    return config


def _check_shapes(shapes: dict[str, tuple[int, ...]], config: Any) -> None:
    """Raise ExportError unless the tensors written are exactly those of the model that transformers will build."""
    with torch.device("meta"):
        model: nn.Module = Blip2ForConditionalGeneration(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.text_config.tie_word_embeddings:
        del wanted["language_model.lm_head.weight"]
    wrong = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    if wrong:
        raise ExportError(
            f"{len(wrong)} tensors do not fit Blip2ForConditionalGeneration of this version of transformers: "
            f"{', '.join(wrong[:5])}"
        )


def _generation_config(loaded: LoadedModel, image_token: _ImageToken) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=loaded.encoder.tokenizer.bos_id,
        eos_token_id=end_token_ids(loaded),
        max_new_tokens=loaded.config.chat.max_new_tokens,
        suppress_tokens=[image_token.id],
    )


def prompt_format(loaded: LoadedModel, image_token_id: int) -> dict[str, Any]:
    """Return what `example.py` needs to build the prompts of `ConversationEncoder`, as plain values."""
    encoder = loaded.encoder
    template = encoder.chat_template
    tokenizer = encoder.tokenizer
    has_bos = template.starts_with_bos and tokenizer.bos_id is not None
    return {
        "template": template.name,
        "bos": [tokenizer.bos_id] if has_bos else [],
        "opening": template.before_all(encoder.settings.system or None),
        "question": template.around_question(0),
        "next_question": template.around_question(1),
        "image": template.image.split(IMAGE_MARK),
        "end": encoder.training_template.end,
        "answers_apart": template.answers_apart,
        "isolate_turns": encoder.settings.isolate_turns,
        "special_tokens": tokenizer.special_tokens,
        "eos_token_ids": end_token_ids(loaded),
        "image_token_id": image_token_id,
        "num_query_tokens": encoder.tokens_per_image,
        "max_new_tokens": loaded.config.chat.max_new_tokens,
        **{key: asdict(loaded.image_processor.config)[key] for key in ("resize", "max_side")},
        "post_layernorm_eps": _last_norm(loaded).eps,
    }


@torch.no_grad()
def norm_difference(loaded: LoadedModel) -> tuple[float, float]:
    """Return by how much the image embeds of one image of noise change with transformers' epsilon, and their largest.

    transformers has one epsilon for all norms of the image encoder; MiniGPT-4's last norm has another.
    """
    spec, norm = loaded.image_processor.spec, _last_norm(loaded)
    noise = torch.randn(1, 3, spec.height, spec.width, generator=torch.Generator().manual_seed(0))
    noise = noise.to(loaded.model.device)
    exact, eps = loaded.model.encode_images(noise), norm.eps
    encoder: Any = loaded.model.vision_encoder
    try:
        norm.eps = encoder.vit.blocks[0].norm1.eps
        changed = loaded.model.encode_images(noise)
    finally:
        norm.eps = eps
    return float((exact - changed).abs().max()), float(exact.abs().max())


def _last_norm(loaded: LoadedModel) -> nn.LayerNorm:
    encoder: Any = loaded.model.vision_encoder
    norm: nn.LayerNorm = encoder.ln_vision
    return norm
