"""Keys and values of the rows that are being decoded, in buffers with room to spare.

transformers' own dynamic cache copies everything at every token. Here a step writes one column, and rows of other
lengths can join and leave: all rows end at the same column, and a shorter one has padding on its left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from minigpt4.errors import DecodingError


class BufferLayer(CacheLayerMixin):
    """Keys (B, H, C, D) and values (B, H, C, D) of one layer, of whose C columns the first `length` are filled."""

    is_sliding = False  # every column is kept; the mask of a sliding layer hides what is too far
    is_croppable = True
    keys: Tensor
    values: Tensor

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape, precision and place from the first states."""
        self.keys = _room(key_states, 0)
        self.values = _room(value_states, 0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new columns (B, H, T, D) and return all that are filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if end > self.keys.shape[-2]:
            self.hold(*self.filled(), end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.filled()

    def filled(self, first_column: int = 0) -> tuple[Tensor, Tensor]:
        """Return keys and values from `first_column` on, as views."""
        return self.keys[:, :, first_column : self.length], self.values[:, :, first_column : self.length]

    def hold(self, keys: Tensor, values: Tensor, columns: int = 0) -> None:
        """Copy these states (B, H, T, D) to new buffers with room for `columns` and some more."""
        self.length = keys.shape[-2]
        spare = max(columns, self.length) + max(columns, self.length) // 4 + 64
        room, values_room = _room(keys, spare), _room(values, spare)
        room[:, :, : self.length] = keys
        values_room[:, :, : self.length] = values
        self.keys, self.values = room, values_room
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a query of this length sees, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many columns are filled."""
        return self.length

    def get_max_length(self) -> int:
        """Return that there is no limit."""
        return -1


class RowCache(Cache):
    """The cache of a batch of rows."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=BufferLayer)

    @property
    def buffers(self) -> list[BufferLayer]:
        """One buffer per layer of the model, once something was fed."""
        return cast(list[BufferLayer], self.layers)

    @property
    def length(self) -> int:
        """Columns filled."""
        return int(self.get_seq_length())

    def cut(self, length: int) -> None:
        """Forget all but the first `length` columns."""
        for layer in self.buffers:
            layer.length = min(layer.length, length)

    def copy(self) -> RowCache:
        """Return a cache of its own with the same content."""
        other = RowCache()
        for layer in self.buffers:
            other.layers.append(BufferLayer())
            other.buffers[-1].hold(*layer.filled())
        return other

    def keep(self, rows: Sequence[int], first_column: int = 0) -> None:
        """Keep only these rows, and only the columns from `first_column` on."""
        for layer in self.buffers:
            keys, values = layer.filled(first_column)
            index = torch.tensor(rows, device=keys.device)
            layer.hold(keys.index_select(0, index), values.index_select(0, index))

    def join(self, other: RowCache) -> None:
        """Append the rows of another cache; whichever is shorter gets padding on the left."""
        for layer, more in zip(self.buffers, other.buffers, strict=True):
            (keys, values), (more_keys, more_values) = layer.filled(), more.filled()
            layer.hold(_stack(keys, more_keys), _stack(values, more_values))


def check_cacheable(model: PreTrainedModel) -> None:
    """Refuse architectures whose layers remember something else than keys and values.

    Raises:
        DecodingError: such as recurrent states, which cannot be cut or padded.
    """
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise DecodingError(
                f"{type(model).__name__} keeps a {type(layer).__name__} between tokens; chat needs a language model of "
                "attention layers alone"
            )


def _room(like: Tensor, columns: int) -> Tensor:
    batch, heads, _, width = like.shape
    return like.new_empty(batch, heads, columns, width)


def _stack(upper: Tensor, lower: Tensor) -> Tensor:
    """Join rows (B, H, T, D) of two lengths, aligned at their last column."""
    columns = max(upper.shape[-2], lower.shape[-2])
    # Zeros, not what memory holds: padding is masked, but a NaN times a weight of zero would still be one.
    both = upper.new_zeros(len(upper) + len(lower), upper.shape[1], columns, upper.shape[-1])
    both[: len(upper), :, columns - upper.shape[-2] :] = upper
    both[len(upper) :, :, columns - lower.shape[-2] :] = lower
    return both
