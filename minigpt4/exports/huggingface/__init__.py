"""A folder that transformers opens without this package: `Blip2ForConditionalGeneration` with a LLaMA inside.

`names` maps tensors, `folder` writes everything, `card` the README, and `example.py` travels along: it builds prompts
with our exact token ids from transformers alone.
"""
