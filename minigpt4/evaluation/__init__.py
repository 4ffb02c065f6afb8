"""Scores of a model on questions with known answers."""
