"""The model and its parts: vision encoder, resampler, `llama_proj`, language model."""
