"""Checkpoints: our own folders, and the published files' names."""
