"""What the language model has read of one conversation, and the keys and values it made of it.

Input: the tokens of the next prompt. Output: how many of them need not be read again. Whatever happened to the
conversation since, an edit, a branch, a turn taken back, the common start of both is what is known.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from minigpt4.chat.decoding.cache import RowCache


class Memory:
    """The cache of one row, and what stands in each of its columns.

    Attributes:
        cache: keys and values.
        read: one entry per column: a token's id, or an image and a place in it.
    """

    def __init__(self) -> None:
        self.cache = RowCache()
        self.read: list[Hashable] = []

    def recall(self, prompt: Sequence[Hashable]) -> int:
        """Forget what `prompt` does not start with, and return how many of its entries are known.

        One is always left to read: the model's next token comes from reading something.
        """
        known = 0
        for old, new in zip(self.read, prompt[:-1], strict=False):
            if old != new:
                break
            known += 1
        self.cache.cut(known)
        del self.read[known:]
        return known

    def note(self, fed: Sequence[Hashable]) -> None:
        """Note what was fed since: the columns of the cache say how much of it was read."""
        self.read = list(fed[: self.cache.length])

    def forget(self) -> None:
        """Forget everything, as after a pass that broke off in the middle."""
        self.cache, self.read = RowCache(), []

    def copy(self) -> Memory:
        """Return a memory of its own of the same conversation."""
        other = Memory()
        other.cache, other.read = self.cache.copy(), list(self.read)
        return other
