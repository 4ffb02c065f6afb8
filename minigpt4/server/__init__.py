"""An OpenAI-compatible service over chat: `python -m minigpt4 serve`."""
