"""The language model of a trained model as a folder that transformers, and every server built on it, opens.

Input: a loaded model, whose adapters are merged into the layers. Output: config, weights and tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minigpt4.assets import resolve
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.models.freezing import part_of

SHARD = "2GB"


def trained_parts(loaded: LoadedModel) -> list[str]:
    """Return which of `language_model` and `lora` was trained; none if the original language model is unchanged."""
    return sorted({part_of(name) for name in loaded.model.trained_names()} & {"language_model", "lora"})


def export_language_model(loaded: LoadedModel, folder: Path) -> None:
    """Write the language model, in its own precision, for `transformers.AutoModelForCausalLM`.

    Args:
        loaded: the model and what belongs to it.
        folder: is made; what it contains is overwritten.
    """
    language_model = loaded.model.language_model
    llm: Any = language_model.model
    config = llm.config.get_text_config()
    tensors = {name: tensor.to(language_model.dtype) for name, tensor in language_model.merged_tensors()}
    tied = config.tie_word_embeddings
    try:
        config.tie_word_embeddings = language_model.is_tied
        llm.save_pretrained(folder, state_dict=tensors, max_shard_size=SHARD)
    finally:
        config.tie_word_embeddings = tied
    source_tokenizer(loaded).save_pretrained(folder)


def source_tokenizer(loaded: LoadedModel) -> Any:
    """Return the tokenizer of the language model, freshly read, without the settings of this process."""
    tokenizer = TextTokenizer.from_path(resolve(loaded.config.model.language_model.config.path)).tokenizer
    for key in ("local_files_only", "is_local", "trust_remote_code"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer
