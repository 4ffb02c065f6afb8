"""The requirements for a supported pair of image encoder and language model.

The tiny pairs of `tiny.py` run by default. Your own pair, from a YAML with a `model` section:

    python -m pytest tests/conformance --pair my.yaml

The option may be repeated; then only the given pairs are run. All weights are in float32, where answers of a batch and
of single prompts must be equal.
"""
