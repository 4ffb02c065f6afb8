"""Write a model as a folder for `transformers.AutoModelForImageTextToText`.

Input: a loaded model of EVA-ViT-g, Q-Former and a LLaMA. Output: config, sharded weights, tokenizer and image
processor, prompt format, `example.py` and a model card.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    GenerationConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from minigpt4.chat.engine import Engine
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.checkpoints.inspection import PROMPT_FORMAT
from minigpt4.conversation.dialogue import IMAGE_MARK
from minigpt4.errors import ExportError
from minigpt4.exports.fitting import check_fits
from minigpt4.exports.huggingface.card import model_card
from minigpt4.exports.huggingface.weights import blip2_tensors, write_shards
from minigpt4.exports.stock_processor import tokenizer_with_image
from minigpt4.exports.writing import write_complete
from minigpt4.models.vision import EvaViTG


def export_huggingface(loaded: LoadedModel, out: Path, shard_bytes: int = 2 * 1024**3) -> None:
    """Write the folder `out`.

    Args:
        loaded: the model and what belongs to it, on any device.
        out: must not exist.
        shard_bytes: largest weight file.

    Raises:
        ExportError: the model does not fit the format, or `out` exists or cannot be written.
    """
    check_fits(loaded, "huggingface")
    with write_complete(out) as partial:
        partial.mkdir()
        _write(loaded, partial, out.name, shard_bytes)


def _write(loaded: LoadedModel, folder: Path, name: str, shard_bytes: int) -> None:
    with_image = tokenizer_with_image(loaded)
    tokenizer, image_token_id, added_rows = with_image.tokenizer, with_image.image_token_id, with_image.added_rows
    config = _config(loaded, image_token_id, len(added_rows))
    shapes = write_shards(blip2_tensors(loaded.model, added_rows), folder, shard_bytes)
    _check_shapes(shapes, config)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=loaded.conversation.tokenizer.bos_id,
        eos_token_id=Engine(loaded).end_ids,
        max_new_tokens=loaded.config.chat.max_new_tokens,
        suppress_tokens=[image_token_id],
    ).save_pretrained(folder)
    spec = loaded.image_processor.spec
    image_processor = BlipImageProcessorPil(
        size={"height": spec.height, "width": spec.width}, image_mean=list(spec.mean), image_std=list(spec.std)
    )
    # Without num_query_tokens the processor does not change the text; with it, it would put the image before BOS.
    Blip2Processor(image_processor, tokenizer, num_query_tokens=None).save_pretrained(folder)
    form = prompt_format(loaded, image_token_id)
    (folder / PROMPT_FORMAT).write_text(json.dumps(form, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    example = resources.files(__package__).joinpath("example.py").read_text(encoding="utf-8")
    (folder / "example.py").write_text(example, encoding="utf-8")
    card = model_card(loaded, name, image_token_id, norm_difference(loaded))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _config(loaded: LoadedModel, image_token_id: int, added_rows: int) -> Any:
    """Return the `Blip2Config`."""
    model = loaded.model
    llm: Any = model.language_model.model
    text: dict[str, Any] = llm.config.to_dict() | {
        "architectures": [type(llm).__name__],  # vLLM finds the class of the language model by it
        "vocab_size": model.language_model.vocab_size + added_rows,
        "tie_word_embeddings": model.language_model.is_tied,
    }
    for key in ("quantization_config", "auto_map"):
        text.pop(key, None)
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
        image_token_index=image_token_id,
    )
    config.tie_word_embeddings = text["tie_word_embeddings"]
    config.architectures = ["Blip2ForConditionalGeneration"]
    config.dtype = str(model.language_model.dtype).removeprefix("torch.")
    return config


def _check_shapes(shapes: dict[str, tuple[int, ...]], config: Any) -> None:
    """Raise ExportError unless exactly the tensors of the model that transformers builds were written."""
    with torch.device("meta"):
        model: nn.Module = Blip2ForConditionalGeneration(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.text_config.tie_word_embeddings:
        del expected["language_model.lm_head.weight"]
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        raise ExportError(
            f"{len(wrong)} tensors do not fit Blip2ForConditionalGeneration of this version of transformers: "
            f"{', '.join(wrong[:5])}"
        )


def prompt_format(loaded: LoadedModel, image_token_id: int) -> dict[str, Any]:
    """Return the values with which `example.py` builds the same prompts as `ConversationEncoder`."""
    encoder, vision_encoder = loaded.conversation, cast(EvaViTG, loaded.model.vision_encoder)
    template, tokenizer = encoder.chat_template, encoder.tokenizer
    has_bos = template.starts_with_bos and tokenizer.bos_id is not None
    return {
        "template": template.name,
        "bos": [tokenizer.bos_id] if has_bos else [],
        "opening": template.before_all(encoder.settings.system or None),
        "question": template.around_question(0),
        "next_question": template.around_question(1),
        "image": template.image.split(IMAGE_MARK),
        "end": encoder.training_template.end,
        "before_answer": template.before_answer,
        "stripped": sorted(template.stripped),
        "answers_apart": template.answers_apart,
        "isolate_turns": encoder.settings.isolate_turns,
        "special_tokens": tokenizer.special_tokens,
        "eos_token_ids": Engine(loaded).end_ids,
        "image_token_id": image_token_id,
        "num_query_tokens": encoder.tokens_per_image,
        "max_new_tokens": loaded.config.chat.max_new_tokens,
        **{key: asdict(loaded.image_processor.config)[key] for key in ("resize", "max_side")},
        "post_layernorm_eps": vision_encoder.ln_vision.eps,
    }


@torch.no_grad()
def norm_difference(loaded: LoadedModel) -> tuple[float, float]:
    """Return the largest change in the image embeds of a noise image with transformers' epsilon, and the largest embed.

    transformers has one epsilon for all norms of the image encoder; MiniGPT-4's last norm has another.
    """
    spec, encoder = loaded.image_processor.spec, cast(Any, loaded.model.vision_encoder)
    noise = torch.randn(1, 3, spec.height, spec.width, generator=torch.Generator().manual_seed(0))
    noise = noise.to(loaded.model.device)
    norm, eps = encoder.ln_vision, encoder.ln_vision.eps
    exact = loaded.model.encode_images(noise)
    try:
        norm.eps = encoder.vit.blocks[0].norm1.eps
        changed = loaded.model.encode_images(noise)
    finally:
        norm.eps = eps
    return float((exact - changed).abs().max()), float(exact.abs().max())
