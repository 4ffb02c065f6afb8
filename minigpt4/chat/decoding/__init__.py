"""Decoding: the loop over tokens, and the key-value caches that it reads and writes."""
