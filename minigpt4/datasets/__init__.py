"""From files to batches: sources, their mixture, the collator and the loader."""
