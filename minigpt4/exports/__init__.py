"""Trained models in the formats of other tools.

`published` for the published code, `huggingface` for transformers alone, `prompt_embeds` for a server of the unchanged
language model.
"""
