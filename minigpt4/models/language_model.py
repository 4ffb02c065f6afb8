"""The language model: any causal LM of transformers, from a folder or a GGUF file, frozen by default.

Input: token ids, or embeds that already contain the images. Output: embeds and logits.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedModel,
    __version__,
)
from transformers.pytorch_utils import Conv1D

from minigpt4.assets import resolve
from minigpt4.batch import Batch
from minigpt4.config.parts import LanguageModelConfig, LoraConfig
from minigpt4.devices import dtype_named
from minigpt4.errors import ConfigError, MissingDependencyError, WeightsError
from minigpt4.models.blip2_weights import folder_config
from minigpt4.models.language_model_files import weight_files
from minigpt4.models.splice import structured_mask

_FULL, _WINDOWED = "full_attention", "sliding_attention"
"""transformers' names of the two kinds of attention layer."""


class LanguageModel(nn.Module):
    """A causal LM of transformers, with the few methods that alignment needs.

    Attributes:
        model: the transformers model.
        source: where its weights come from, as in the config.
        settings: none; see `minigpt4.models.vision.identity_settings`.
        attention_is_open: whether a run may choose between sdpa and eager attention.
    """

    Config = LanguageModelConfig

    def __init__(self, model: PreTrainedModel, source: str = "") -> None:
        super().__init__()
        self.model = model
        self.source = source
        self.settings: dict[str, Any] = {}
        self.attention_is_open = False
        if model.get_output_embeddings() is None:
            raise WeightsError(f"{type(model).__name__} has no output embeddings; a causal LM is required")

    @classmethod
    def from_config(cls, config: LanguageModelConfig) -> LanguageModel:
        """Load the model from disk; nothing is downloaded.

        Raises:
            WeightsError: the folder cannot be loaded, or tensors of the architecture are missing.
            MissingDependencyError: LoRA is configured and peft is not installed.
        """
        path = resolve(config.path)
        loaded = cls(load_causal_lm(path, config.dtype, config.attn_implementation), source=config.path)
        # What transformers chose itself may be changed; another choice than sdpa has a reason in the architecture.
        loaded.attention_is_open = (
            config.attn_implementation == "auto" and loaded.model.config._attn_implementation == "sdpa"
        )
        if config.lora.rank:
            loaded.add_lora(config.lora)
        return loaded

    @classmethod
    def without_weights(cls, config: LanguageModelConfig) -> LanguageModel:
        """Build the model that `config.json` describes, with tensors as new ones are; inside `torch.device("meta")`,
        with none. No weight file is opened.

        Raises:
            WeightsError: there is no description of a causal language model.
            MissingDependencyError: LoRA is configured and peft is not installed.
        """
        path = resolve(config.path)
        folder, options = path, {}
        if path.suffix == ".gguf":
            folder, options = path.parent, {"gguf_file": path.name}
        elif reason := needs_own_code(path):
            raise WeightsError(reason)
        elif not (path / "config.json").is_file():
            raise WeightsError(f"{path}: no config.json found, which describes the language model")
        kernel = {} if config.attn_implementation == "auto" else {"attn_implementation": config.attn_implementation}
        try:
            declared = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
            model = AutoModelForCausalLM.from_config(declared, dtype=dtype_named(config.dtype), **kernel)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path}: its config does not describe a causal language model: {error}") from error
        built = cls(model.eval(), source=config.path)
        if config.lora.rank:
            built.add_lora(config.lora)
        return built

    def add_lora(self, config: LoraConfig) -> None:
        """Add low-rank adapters to the named linear layers; at first they change nothing."""
        try:
            import peft
        except ImportError as error:
            raise MissingDependencyError("peft", "model.language_model.lora", "lora") from error
        modules = dict(self.model.named_modules())
        linear = {name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, (nn.Linear, Conv1D))}
        gone = [t for t in config.target_modules if not any(f".{name}".endswith(f".{t}") for name in modules)]
        if gone:
            raise WeightsError(
                f"model.language_model.lora.target_modules: {self.model.config.model_type} has no layer "
                f"{', '.join(map(repr, gone))}; its linear layers are {', '.join(sorted(linear))}"
            )
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
        """Yield the tensors under their names in the model without adapters, each adapter merged into its layer.

        A merged tensor is a new one, in the precision of the layer; all others are the model's own.
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
    def is_tied(self) -> bool:
        """Whether head and embedding are one tensor; with an adapter on either, the merged ones differ."""
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        adapted = any("lora_" in name for end in ends for name, _ in end.named_parameters())
        return bool(self.model.config.get_text_config().tie_word_embeddings) and not adapted

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
        """The longest sequence that the model supports, in tokens."""
        limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit or sys.maxsize  # models with relative positions, such as BLOOM, declare no limit

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the embeddings, and so of the activations."""
        return self._embedding.dtype

    @property
    def _embedding(self) -> Tensor:
        return cast(Tensor, self.model.get_input_embeddings().weight)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the token embeds (B, T, Dl) of `input_ids` (B, T)."""
        return self.model.get_input_embeddings()(input_ids)

    def structured_masks(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Return the additive mask (B, 1, T, T) of rows with segments and branches.

        transformers uses a mask of this shape unchanged in every layer, so a sliding window must be part of it. Models
        with windowed layers get one mask for each kind of layer.

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
        """Return the kinds of attention layer in a model that can keep the parts of a row apart.

        Raises:
            ConfigError: it cannot, because what a token attends to depends on more than masks and positions.
        """
        config = self.model.config.get_text_config()
        windowed = getattr(config, "sliding_window", None) is not None
        kinds = set(getattr(config, "layer_types", None) or [_WINDOWED if windowed else _FULL])
        kinds |= {f"{kind} attention" for kind in getattr(config, "attention_layers", []) if kind != "global"}
        reason = ""
        if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(self.model.forward).parameters:
            reason = "does not accept position_ids"
        elif not kinds <= {_FULL, _WINDOWED}:
            reason = f"has layers of {', '.join(sorted(kinds - {_FULL, _WINDOWED}))}"
        if reason:
            raise ConfigError(
                f"{config.model_type} {reason}, so the parts of a row cannot be kept apart: set "
                "conversation.isolate_turns to false, and run.pack to 0"
            )
        return kinds

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Return logits, of all positions or of those in `at`.

        Args:
            inputs_embeds: (B, T, Dl).
            attention_mask: (B, T) bool, or what `structured_masks` returns, or None.
            position_ids: (B, T) or None.
            at: (N,) int64, the positions whose logits are returned, in the rows laid end to end.

        Returns:
            (B, T, V), or (N, V) for the N positions in `at`.
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
    """Make `head` compute only the positions `at`, until the returned handle is removed.

    The full logits are by far the largest tensor of a batch. Selecting at the head's input keeps each family's own
    scaling and capping of logits in place.
    """

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, at).unsqueeze(0), *inputs[1:])

    return head.register_forward_pre_hook(select)


def load_causal_lm(path: Path, dtype: str, attn_implementation: str = "auto") -> PreTrainedModel:
    """Load a causal LM from a folder or a GGUF file, without network access.

    Raises:
        WeightsError: it cannot be loaded, or tensors are missing.
    """
    options: dict[str, Any] = {"dtype": dtype_named(dtype)}
    if attn_implementation != "auto":
        options["attn_implementation"] = attn_implementation
    folder = path
    if path.suffix == ".gguf":
        folder = path.parent
        options |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    elif reason := needs_own_code(path):
        raise WeightsError(reason)
    elif not (path / "config.json").is_file():
        raise WeightsError(
            f"{path}: no config.json found; set the path to a folder saved by transformers or to a .gguf file"
        )
    else:
        weight_files(path)  # names the damaged file, where transformers names the folder at most
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # damaged files raise errors of many libraries
        raise WeightsError(f"{path}: cannot be loaded as a causal language model: {error}") from error
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        unexpected = sorted(map(str, info["unexpected_keys"]))
        also = f"; {len(unexpected)} unexpected: {', '.join(unexpected[:5])}" if unexpected else ""
        raise WeightsError(
            f"{path}: {len(missing)} tensors missing or of another shape: {', '.join(missing[:5])}{also}. The weights "
            "do not belong to the model that config.json describes"
        )
    return model


def needs_own_code(path: Path) -> str:
    """Return why a folder cannot be loaded without running code in it, or nothing; such code is never run.

    Many folders have a leftover `auto_map` from before transformers had their model; these need no code.
    """
    config = folder_config(path)
    code, family = config.get("auto_map"), config.get("model_type")
    known = (
        isinstance(family, str) and family in CONFIG_MAPPING and CONFIG_MAPPING[family] in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    if not code or known:
        return ""
    return (
        f"{path}: config.json has auto_map, and transformers {__version__} has no causal language model {family!r}: "
        "this model needs code from its folder, which is never run; use a model that transformers has"
    )


def declared_width(path: Path) -> int:
    """Return the Dl that a folder's `config.json` declares, or 0 if only loading the model can say it."""
    if not (path / "config.json").is_file():
        return 0
    try:
        config: Any = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # loading the model reports what is wrong
    return getattr(config, "word_embed_proj_dim", 0) or getattr(config, "hidden_size", 0)
