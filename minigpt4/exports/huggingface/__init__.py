"""A folder that transformers opens without this package: `Blip2ForConditionalGeneration` with a LLaMA inside.

`folder` writes everything, `weights` the tensors, `card` the README. `example.py` is copied into the folder: it builds
prompts with exactly our token ids and needs only transformers.
"""
