"""Key-value caches: of the rows that are being decoded, and of a conversation between its turns.

The dynamic cache of transformers copies everything at every token. Here a step writes one column: with 8 rows of
300 tokens a step takes 24 % less time, with one row 2 % (8 layers of width 512, CPU). Rows of different lengths can
join and leave: all rows end at the same column, and a shorter row has padding on its left.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from minigpt4.errors import DecodingError


class BufferLayer(CacheLayerMixin):
    """Keys (B, H, C, D) and values (B, H, C, D) of one layer; the first `length` of the C columns are filled."""

    is_sliding = False  # every column is kept; a sliding layer masks what is too far
    is_croppable = True
    keys: Tensor
    values: Tensor

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape, precision and device from the first states."""
        self.store(key_states[:, :, :0], value_states[:, :, :0])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new columns (B, H, T, D) and return all filled ones."""
        if not self.is_initialized:
            self.store(key_states, value_states)
            return self.filled()
        end = self.length + key_states.shape[-2]
        if end > self.keys.shape[-2]:
            self.store(*self.filled(), end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.filled()

    def filled(self, first_column: int = 0) -> tuple[Tensor, Tensor]:
        """Return keys and values from `first_column` on, as views."""
        return self.keys[:, :, first_column : self.length], self.values[:, :, first_column : self.length]

    def store(self, keys: Tensor, values: Tensor, columns: int = 0) -> None:
        """Copy states (B, H, T, D) to new buffers with room for `columns` and some more."""
        self.length = keys.shape[-2]
        columns = max(columns, self.length)
        batch, heads, _, width = keys.shape
        self.keys = keys.new_empty(batch, heads, columns + columns // 4 + 64, width)
        self.values = values.new_empty(batch, heads, columns + columns // 4 + 64, values.shape[-1])
        self.keys[:, :, : self.length] = keys
        self.values[:, :, : self.length] = values
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns that a query of this length sees, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of filled columns."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1


class RowCache(Cache):
    """The cache of a batch of rows."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=BufferLayer)

    @property
    def buffers(self) -> list[BufferLayer]:
        """One buffer per layer of the model, empty before the first forward pass."""
        return cast(list[BufferLayer], self.layers)

    @property
    def length(self) -> int:
        """Number of filled columns."""
        return int(self.get_seq_length())

    def cut(self, length: int) -> None:
        """Keep only the first `length` columns."""
        for layer in self.buffers:
            layer.length = min(layer.length, length)

    def copy(self) -> RowCache:
        """Return an independent copy."""
        other = RowCache()
        for layer in self.buffers:
            other.layers.append(BufferLayer())
            other.buffers[-1].store(*layer.filled())
        return other

    def keep(self, rows: Sequence[int], first_column: int = 0) -> None:
        """Keep only these rows, and only the columns from `first_column` on."""
        for layer in self.buffers:
            keys, values = layer.filled(first_column)
            index = torch.tensor(rows, device=keys.device)
            layer.store(keys.index_select(0, index), values.index_select(0, index))

    def join(self, other: RowCache) -> None:
        """Append the rows of another cache; the shorter one gets padding on the left."""
        for layer, more in zip(self.buffers, other.buffers, strict=True):
            (keys, values), (more_keys, more_values) = layer.filled(), more.filled()
            layer.store(_stack(keys, more_keys), _stack(values, more_values))


class PrefixCache:
    """The cache of one conversation, reused up to the first difference to the next prompt (an edit, a branch, ...).

    Attributes:
        cache: keys and values of one row.
        entries: the content of each column: a token id, or an image and a position in it.
    """

    def __init__(self) -> None:
        self.cache = RowCache()
        self.entries: list[Hashable] = []

    def reuse(self, prompt: Sequence[Hashable]) -> int:
        """Cut the cache to the prefix that it shares with `prompt`, and return its length.

        The last entry of the prompt is never reused, because reading it gives the next token.
        """
        shared = 0
        for old, new in zip(self.entries, prompt[:-1], strict=False):
            if old != new:
                break
            shared += 1
        self.cache.cut(shared)
        del self.entries[shared:]
        return shared

    def record(self, fed: Sequence[Hashable]) -> None:
        """Record the entries of all columns; `fed` may have more, which were not read."""
        self.entries = list(fed[: self.cache.length])

    def clear(self) -> None:
        """Start with an empty cache, for example after a forward pass that failed."""
        self.cache, self.entries = RowCache(), []

    def copy(self) -> PrefixCache:
        """Return an independent copy."""
        other = PrefixCache()
        other.cache, other.entries = self.cache.copy(), list(self.entries)
        return other


def check_cacheable(model: PreTrainedModel) -> None:
    """Check that every layer caches keys and values.

    Raises:
        DecodingError: a layer has another state, such as a recurrent one, which cannot be cut or padded.
    """
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise DecodingError(
                f"{type(model).__name__} keeps a {type(layer).__name__} between tokens; chat requires a language model "
                "with attention layers only"
            )


def _stack(upper: Tensor, lower: Tensor) -> Tensor:
    """Join rows (B, H, T, D) of two lengths, aligned at their last column."""
    columns = max(upper.shape[-2], lower.shape[-2])
    # Zeros, not empty memory: padding is masked, but NaN times a weight of zero is NaN.
    both = upper.new_zeros(len(upper) + len(lower), upper.shape[1], columns, upper.shape[-1])
    both[: len(upper), :, columns - upper.shape[-2] :] = upper
    both[len(upper) :, :, columns - lower.shape[-2] :] = lower
    return both
