"""Image and text processors: images to tensors, captions to clean text."""
