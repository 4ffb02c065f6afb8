"""What a pair of image encoder and language model must do to be called supported.

The tiny pairs of `tiny.py` run by default. Your own pair, from a YAML with a `model` section:

    python -m pytest tests/conformance --pair my.yaml

The option may be repeated; then only the pairs given are run. Everything is held in float32, where answers of a batch
and of single prompts must be equal.
"""
