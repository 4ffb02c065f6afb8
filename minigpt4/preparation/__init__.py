"""Preparing data: `data pack`, `data validate` and `data preview` write and check what `minigpt4.datasets` reads."""
