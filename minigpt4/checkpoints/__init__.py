"""Checkpoints: folders of this package, and the released MiniGPT-4 files."""
