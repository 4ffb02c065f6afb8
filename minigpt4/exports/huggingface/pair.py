"""Write a pair of a vision tower and a language model as a folder of transformers: LLaVA or Idefics3.

Input: a loaded model that fits. Output: config, weights under the names that runtimes know, processor with tokenizer
and chat template, generation config and a model card. The weights are shared with the loaded model, not copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from minigpt4.assets import resolve
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.errors import ExportError
from minigpt4.exports.fitting import check_fits
from minigpt4.exports.huggingface.pair_card import pair_card
from minigpt4.exports.huggingface.weights import write_shards
from minigpt4.exports.linear_projector import Layout, as_two_layers
from minigpt4.exports.prompt_embeds import stops
from minigpt4.exports.stock_processor import (
    IMAGE_TOKEN,
    PROCESSORS,
    TokenizerWithImage,
    select_strategy,
    tokenizer_with_image,
)
from minigpt4.exports.writing import write_complete
from minigpt4.models.transformers_encoder import load_tower

Format = Literal["llava", "idefics3"]
_TOWER = {"llava": "model.vision_tower.", "idefics3": "model.vision_model."}
_LLM = {"llava": "model.language_model.", "idefics3": "model.text_model."}
_PROJECTOR = {"llava": "model.multi_modal_projector.", "idefics3": "model.connector.modality_projection.proj."}
_LLAVA_NAMES = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_IDEFICS3_VISION = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size", "num_channels", "hidden_act", "layer_norm_eps"),
)
"""What the vision tower of Idefics3 shares with SigLIP."""
SHARD_BYTES = 2 * 1024**3


def export_pair(loaded: LoadedModel, to: Format, out: Path, layout: Layout = "exact") -> None:
    """Write the folder `out`.

    Args:
        loaded: the model and what belongs to it, on any device.
        to: the architecture.
        out: must not exist.
        layout: how LLaVA's two layers hold a linear projector; see `minigpt4.exports.linear_projector`.

    Raises:
        ExportError: the model does not fit, or `out` exists or cannot be written.
    """
    check_fits(loaded, to)
    with write_complete(out) as partial:
        partial.mkdir()
        _write(loaded, to, partial, out.name, layout)


def _write(loaded: LoadedModel, to: Format, folder: Path, name: str, layout: Layout) -> None:
    with_image = tokenizer_with_image(loaded)
    processor = PROCESSORS[to](loaded, with_image)
    tower = load_tower(resolve(loaded.config.model.vision_encoder.config.path))  # with the blocks that we do not keep
    activation, projector = _projector(loaded, to, layout)
    config = _config(loaded, to, tower.config, with_image, activation, has_bias="linear_1.bias" in projector)
    tensors = {
        **{f"{_TOWER[to]}{key}": tensor for key, tensor in _tower_tensors(loaded, to, tower)},
        **{f"{_PROJECTOR[to]}{key}": tensor for key, tensor in projector.items()},
        **dict(_language_model_tensors(loaded, to, with_image.added_rows)),
    }
    _check_tensors(to, config, tensors)
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_shards(((_published(to, key), t.detach().cpu()) for key, t in tensors.items()), folder, SHARD_BYTES)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=loaded.conversation.tokenizer.bos_id,
        eos_token_id=stops(loaded)["stop_token_ids"],
        max_new_tokens=loaded.config.chat.max_new_tokens,
        suppress_tokens=[with_image.image_token_id],
    ).save_pretrained(folder)
    processor.save_pretrained(folder)
    if to == "idefics3":
        _name_image_token(folder)
    (folder / "README.md").write_text(pair_card(loaded, to, name, activation, layout), encoding="utf-8")


def _projector(loaded: LoadedModel, to: Format, layout: Layout) -> tuple[str, dict[str, Tensor]]:
    """Return the activation of LLaVA's projector, empty for Idefics3, and the tensors of either."""
    if to == "llava":
        return as_two_layers(loaded.model.llama_proj, layout)
    return "", {"weight": loaded.model.llama_proj.weight}


def _check_tensors(to: Format, config: Any, tensors: dict[str, Tensor]) -> None:
    """Raise ExportError unless these are exactly the tensors of the model that transformers builds."""
    model = _empty(to, config)
    try:
        # Detached: `assign` sets `requires_grad` of the parameters that it is given.
        model.load_state_dict({name: t.detach() for name, t in tensors.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise ExportError(
            f"the tensors do not fit {type(model).__name__} of this version of transformers: {error}"
        ) from error


def _published(to: Format, name: str) -> str:
    """Return the name that a tensor has in the folders that the authors of LLaVA and Idefics3 publish.

    Runtimes read these names; those of the modules of transformers change from one version to the next.
    """
    if to == "idefics3":
        return name
    for inner, outer in _LLAVA_NAMES:
        if name.startswith(inner):
            return outer + name.removeprefix(inner)
    return name


def _empty(to: Format, config: Any) -> nn.Module:
    """Return the model of transformers without memory for its parameters."""
    with torch.device("meta"):
        model: nn.Module = (LlavaForConditionalGeneration if to == "llava" else Idefics3ForConditionalGeneration)(
            config
        )
    return model.eval()


def _config(
    loaded: LoadedModel, to: Format, tower: Any, with_image: TokenizerWithImage, activation: str, has_bias: bool
) -> Any:
    """Return the config of the whole model."""
    model = loaded.model
    llm: Any = model.language_model.model
    text: dict[str, Any] = llm.config.to_dict() | {
        "architectures": [type(llm).__name__],
        "vocab_size": model.language_model.vocab_size + len(with_image.added_rows),
        "tie_word_embeddings": model.language_model.is_tied,
    }
    for key in ("quantization_config", "auto_map"):
        text.pop(key, None)
    common: dict[str, Any] = {
        "text_config": text,
        "image_token_id": with_image.image_token_id,
        "tie_word_embeddings": model.language_model.is_tied,
    }
    config: Any
    if to == "llava":
        config = LlavaConfig(
            **common,
            vision_config=tower.to_dict(),
            projector_hidden_act=activation,
            multimodal_projector_bias=has_bias,
            vision_feature_layer=model.vision_encoder.settings["layer"],
            vision_feature_select_strategy=select_strategy(loaded),
            image_seq_length=model.num_query_tokens,
        )
    else:
        resampler: Any = model.resampler
        config = Idefics3Config(
            **common,
            vision_config={key: getattr(tower, key) for key in _IDEFICS3_VISION},
            scale_factor=resampler.factor,
        )
    config.architectures = [type(_empty(to, config)).__name__]
    config.dtype = str(model.language_model.dtype).removeprefix("torch.")
    return config


def _tower_tensors(loaded: LoadedModel, to: Format, tower: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the whole tower: ours, and for what we do not keep, those of its folder."""
    encoder: Any = loaded.model.vision_encoder
    ours = encoder.tower.state_dict()
    if encoder.norm is not None:
        ours |= {f"post_layernorm.{name}": tensor for name, tensor in encoder.norm.state_dict().items()}
    for name, tensor in tower.state_dict().items():
        if name.startswith("head.") and to == "idefics3":
            continue
        kept = ours.get(name)
        yield name, kept if kept is not None else tensor.to(next(iter(ours.values())).dtype)


def _language_model_tensors(loaded: LoadedModel, to: Format, added_rows: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the language model's tensors, adapters merged, with a row for `<image>` if it had none."""
    for name, tensor in loaded.model.language_model.merged_tensors():
        if added_rows and name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = torch.cat([tensor, tensor[added_rows]])
        yield name if name.startswith("lm_head.") else _LLM[to] + name.removeprefix("model."), tensor


def _name_image_token(folder: Path) -> None:
    """Let the tokenizer know `<image>` as its `image_token`, which the processor of DeepSeek-VL asks it for."""
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["model_specific_special_tokens"] = {"image_token": IMAGE_TOKEN}
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
