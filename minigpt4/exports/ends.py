"""The token ids that end an answer, besides the template's end mark."""

from __future__ import annotations

from minigpt4.checkpoints.assemble import LoadedModel


def end_token_ids(loaded: LoadedModel) -> list[int]:
    """Return the end-of-sequence ids of the tokenizer and of the language model's generation config, sorted."""
    generation = getattr(loaded.model.language_model.model, "generation_config", None)
    also = getattr(generation, "eos_token_id", None)
    ids = {loaded.encoder.tokenizer.eos_id, *(also if isinstance(also, list) else [also])} - {None}
    return sorted(i for i in ids if i is not None)
