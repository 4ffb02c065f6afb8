"""From embeds to token ids: the key-value cache, the choice of tokens, the one decode loop, beam search."""
