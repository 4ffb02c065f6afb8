"""Images to tensors, captions to clean text."""
