"""Asking a trained model: sessions over one decode loop."""
