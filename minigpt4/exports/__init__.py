"""What goes out: a trained model in the formats of other tools.

`published` (written by `checkpoints/published.py`) for the published code, `huggingface` for transformers alone,
`prompt_embeds` for a stock server of the untouched language model.
"""
