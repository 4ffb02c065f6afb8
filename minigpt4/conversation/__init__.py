"""Dialogues, templates and the tokenizer: from text to token ids, for training and chat."""
