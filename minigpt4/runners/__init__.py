"""One class per job, found through the registry and run by `python -m minigpt4` or a script."""
