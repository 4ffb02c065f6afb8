"""The language model: any causal LM of transformers, from a folder or a GGUF file, frozen unless declared otherwise.

Input: token ids, or embeds with images already spliced in. Output: embeds and logits.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel

from minigpt4.assets import resolve
from minigpt4.batch import Batch
from minigpt4.devices import fast_dtype
from minigpt4.errors import ConfigError, MissingDependencyError, WeightsError
from minigpt4.models.llm_folder import weight_files
from minigpt4.models.splice import structured_mask
from minigpt4.registry import path_field

_FULL, _WINDOWED = "full_attention", "sliding_attention"
"""transformers' names of the two kinds of attention layer."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters inside the language model (needs the extra `lora`)."""

    rank: int = 0
    """Rank of the adapters; 0 is none."""
    alpha: float = 16.0
    """Scale: the adapters' output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout in front of the adapters, as a probability."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the linear layers that get one."""


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Where the language model is, and how it is held."""

    path: str = path_field()
    """Folder with config.json, weights and tokenizer; or a GGUF file; or `asset:NAME`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16"
    """Precision in which the weights are held; `auto` is bfloat16 where this machine is fast at it, else float32."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel; `auto` is transformers' choice for the architecture."""
    lora: LoraConfig = LoraConfig()
    """Adapters."""


class LanguageModel(nn.Module):
    """A causal LM behind the few calls that alignment needs."""

    Config = LanguageModelConfig

    def __init__(self, model: PreTrainedModel, source: str = "") -> None:
        super().__init__()
        self.model = model
        self.source = source
        self.settings: dict[str, Any] = {}
        if model.get_output_embeddings() is None:
            raise WeightsError(f"{type(model).__name__} has no output embeddings; a causal LM is needed")

    @classmethod
    def from_config(cls, config: LanguageModelConfig) -> LanguageModel:
        """Load the model from disk; nothing is downloaded.

        Raises:
            WeightsError: the folder cannot be loaded, or lacks tensors the architecture has.
            MissingDependencyError: LoRA is asked for and peft is absent.
        """
        path = resolve(config.path)
        loaded = cls(load_causal_lm(path, config.dtype, config.attn_implementation), source=config.path)
        if config.lora.rank:
            loaded.add_lora(config.lora)
        return loaded

    def add_lora(self, config: LoraConfig) -> None:
        """Put low-rank adapters beside the named linear layers; they start as a no-op."""
        try:
            import peft
        except ImportError as error:
            raise MissingDependencyError("peft", "model.language_model.lora", "lora") from error
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
        )
        try:
            peft.inject_adapter_in_model(settings, self.model)
        except ValueError as error:
            raise WeightsError(f"model.language_model.lora.target_modules: {error}") from error

    def merged_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors under the names of the model without adapters, each adapter added into its layer.

        A merged tensor is new, in the precision of the layer; all others are the model's own.
        """
        for name, tensor in self.model.state_dict().items():
            if ".lora_" in name:
                continue
            layer, adapted, leaf = name.rpartition(".base_layer.")
            if adapted and leaf == "weight":
                adapters: Any = self.model.get_submodule(layer)
                deltas = [adapters.get_delta_weight(adapter) for adapter in adapters.active_adapters]
                tensor = sum(deltas, tensor).to(tensor.dtype).detach()
            yield (f"{layer}.{leaf}" if adapted else name), tensor

    @property
    def hidden_size(self) -> int:
        """Dl."""
        return self._embedding.shape[1]

    @property
    def vocab_size(self) -> int:
        """V, the rows of the input embedding."""
        return self._embedding.shape[0]

    @property
    def context_length(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit or sys.maxsize  # models with relative positions, such as BLOOM, name no limit

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the embeddings, and so of what goes through the model."""
        return self._embedding.dtype

    @property
    def _embedding(self) -> Tensor:
        return cast(Tensor, self.model.get_input_embeddings().weight)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the token embeds (B, T, Dl) of `input_ids` (B, T)."""
        return self.model.get_input_embeddings()(input_ids)

    def structured_masks(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Return the additive mask (B, 1, T, T) of rows with segments and branches; one for each kind of layer if some
        see a window only.

        transformers uses a mask of this shape as it is, in every layer: the window must be in it.

        Raises:
            ConfigError: the model cannot keep the parts of a row apart.
        """
        kinds = self.attention_kinds()
        config = self.model.config.get_text_config()
        masks = {
            kind: structured_mask(batch, self.dtype, config.sliding_window if kind == _WINDOWED else None)
            for kind in kinds
        }
        has_kinds = getattr(config, "layer_types", None) is not None
        return masks if has_kinds and _WINDOWED in kinds else next(iter(masks.values()))

    def attention_kinds(self) -> set[str]:
        """Return the kinds of attention layer of a model that can keep the parts of a row apart.

        Raises:
            ConfigError: it cannot, because masks and positions do not decide all that a token sees.
        """
        config = self.model.config.get_text_config()
        windowed = getattr(config, "sliding_window", None) is not None
        kinds = set(getattr(config, "layer_types", None) or [_WINDOWED if windowed else _FULL])
        kinds |= {f"{kind} attention" for kind in getattr(config, "attention_layers", []) if kind != "global"}
        reason = ""
        if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(self.model.forward).parameters:
            reason = "takes no positions from outside"
        elif not kinds <= {_FULL, _WINDOWED}:
            reason = f"has layers of {', '.join(sorted(kinds - {_FULL, _WINDOWED}))}"
        if reason:
            raise ConfigError(
                f"{config.model_type} {reason}, so the parts of a row cannot be kept apart: set "
                "conversation.isolate_turns to false"
            )
        return kinds

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Return logits, at chosen positions only if `at` is given.

        Args:
            inputs_embeds: (B, T, Dl).
            attention_mask: (B, T) bool, or what `structured_masks` returns, or None.
            position_ids: (B, T) or None.
            at: (B, T) bool, the positions whose logits are wanted.

        Returns:
            (B, T, V), or (N, V) for the N true positions of `at`, row by row.
        """
        keep = None if at is None else _only_at(self.model.get_output_embeddings(), at)
        try:
            logits = self.model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            ).logits
        finally:
            if keep is not None:
                keep.remove()
        return logits if at is None else logits[0]


def _only_at(head: nn.Module, at: Tensor) -> Any:
    """Make `head` compute only the rows of `at`, until the returned handle is removed.

    The full logits of a batch are its largest tensor by far. Cutting at the head's input, and not after the body,
    leaves each family's own scaling and capping of logits in place.
    """
    return head.register_forward_pre_hook(lambda _, args: (args[0][at].unsqueeze(0), *args[1:]))


def load_causal_lm(path: Path, dtype: str, attn_implementation: str = "auto") -> PreTrainedModel:
    """Load a causal LM from a folder or a GGUF file, without touching the network.

    Raises:
        WeightsError: it cannot be loaded, or tensors are missing.
    """
    options: dict[str, Any] = {"dtype": fast_dtype() if dtype == "auto" else getattr(torch, dtype)}
    if attn_implementation != "auto":
        options["attn_implementation"] = attn_implementation
    folder = path
    if path.suffix == ".gguf":
        folder = path.parent
        options |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    elif not (path / "config.json").is_file():
        raise WeightsError(f"{path}: no config.json there; give a folder saved by transformers, or a .gguf file")
    else:
        weight_files(path)  # says which file is damaged, where transformers names the folder at most
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # damaged files raise whatever the library below transformers raises
        raise WeightsError(f"{path}: cannot be loaded as a causal language model: {error}") from error
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        more = sorted(map(str, info["unexpected_keys"]))
        unknown = f"; {len(more)} that it has no place for: {', '.join(more[:5])}" if more else ""
        raise WeightsError(
            f"{path}: {len(lacking)} tensors missing or misshapen, the first: {', '.join(lacking[:5])}{unknown}. "
            "The weights are not those of the model that its config.json describes"
        )
    return model


def declared_width(path: Path) -> int:
    """Return the Dl that a folder's `config.json` declares, or 0 if it cannot be told without loading the model."""
    if not (path / "config.json").is_file():
        return 0
    try:
        config: Any = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # loading it will say what is wrong
    return getattr(config, "word_embed_proj_dim", 0) or getattr(config, "hidden_size", 0)
