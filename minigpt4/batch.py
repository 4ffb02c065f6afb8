"""The contract between data and model: `Sample`, `Batch`, and the legend of shape letters.

Data produces samples, the collator joins them to a `Batch`, the model reads the batch. Neither side knows the other.

Legend of shape letters, used in every docstring:

    B   samples (rows) in a batch              T   tokens in a row, image positions included
    I   images in a batch, all rows together   H W image height and width in pixels
    P   patches of an image                    Dv  width of a patch feature
    Q   query tokens an image becomes          Dq  width of a query feature
    V   vocabulary of the language model       Dl  width of the language model

`image_mask` alone says where images go; the ids under it are fillers. What is trained on does not depend on ids either:
a sample's `labels` are `IGNORE` everywhere else, and a batch lists the positions and their targets.

Rows are padded on the right. Since a token never attends to a later one, padding needs no attention mask.

Rows with structure. `segment_ids` says which sample of a packed row a token belongs to (0 is padding). `branch_ids`
splits a sample into a trunk (0) and branches (1, 2, ...): a branch sees the trunk and itself, but no other branch. So
several questions about one image share the image and do not see each other. Token i attends to token j when j <= i,
both are in the same segment, and j is in the trunk or in the branch of i.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""The label of a position that is not trained on (the default of `cross_entropy`)."""


@dataclass
class Sample:
    """One encoded training sample.

    Attributes:
        id: where the sample comes from, for messages: `captions.jsonl:17`, `00012.tar/000120034`.
        input_ids: (T,) int64, fillers at image positions.
        labels: (T,) int64, `IGNORE` where the sample is not trained on. Position t holds the label of token t itself;
            the collator finds the position that predicts it.
        image_mask: (T,) bool, true at the Q positions of each image.
        position_ids: (T,) int64; each branch continues from the end of the trunk, all else counts 0, 1, 2, ...
        branch_ids: (T,) int64, 0 for the trunk.
        pixel_values: (images, 3, H, W) float32, or None when features are cached or there is no image.
        query_features: (images, Q, Dq) cached output of the resampler, or None.
        altered: what was cut or cannot be shown as it is, by kind (`"answer cut"`), with how often.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    image_mask: Tensor
    position_ids: Tensor
    branch_ids: Tensor
    pixel_values: Tensor | None = None
    query_features: Tensor | None = None
    altered: dict[str, int] = field(default_factory=dict)


@dataclass
class Batch:
    """Samples padded to one length; the input of a model's `forward`.

    Attributes:
        input_ids: (B, T) int64.
        supervised_positions: (N,) int64, the positions that predict a token which is trained on, in the rows laid end
            to end; the logits are computed there and nowhere else. The last position in front of several branches may
            occur several times.
        targets: (N,) int64, the ids of these tokens.
        attention_mask: (B, T) bool, false at padding, which is on the right.
        image_mask: (B, T) bool.
        position_ids: (B, T) int64.
        segment_ids: (B, T) int64, 0 at padding.
        branch_ids: (B, T) int64, 0 in the trunk.
        images_per_row: (B,) int64; the images of row 0 come first in `pixel_values`, then those of row 1, ...
        pixel_values: (I, 3, H, W) float32 or None.
        query_features: (I, Q, Dq) or None.
        ids: the samples' ids.
        skipped: samples skipped since the worker's last batch, by cause.
        altered: alterations of the samples read since then, by kind; see `Sample.altered`.
        reader: the number of the stream reader that made the batch.
        position: raw samples that this reader has consumed when a resumed run continues: those before the batch's group
            of batches, or with the group if the batch is its last one.
        given: batches of the group that were given, this one included; 0 if it is the last one. A resumed run reads the
            group again and leaves these out.
    """

    input_ids: Tensor
    supervised_positions: Tensor
    targets: Tensor
    attention_mask: Tensor
    image_mask: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    branch_ids: Tensor
    images_per_row: Tensor
    pixel_values: Tensor | None = None
    query_features: Tensor | None = None
    ids: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    altered: dict[str, int] = field(default_factory=dict)
    reader: int = 0
    position: int = 0
    given: int = 0

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on `device`."""
        in_background = torch.device(device).type != "cpu"
        return self._map(lambda tensor: tensor.to(device, non_blocking=in_background))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which a GPU copies while it computes; a DataLoader calls it."""
        return self._map(Tensor.pin_memory)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def targets_by_row(self) -> list[Tensor]:
        """The targets of each row, each (n,) int64."""
        rows = self.supervised_positions // self.input_ids.shape[1]
        return [self.targets[rows == row] for row in range(len(self))]

    @cached_property
    def image_positions(self) -> Tensor:
        """(I * Q,) int64: where `image_mask` is true, in the rows laid end to end."""
        return positions_of(self.image_mask)

    @cached_property
    def has_structure(self) -> bool:
        """Whether rows hold several segments or branches, so that a plain causal mask would leak."""
        return bool((self.segment_ids > 1).any() or (self.branch_ids > 0).any())

    @property
    def num_supervised(self) -> int:
        """Number of tokens that the loss is computed over."""
        return len(self.supervised_positions)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return a copy with every tensor changed. What must be read from values is read before and kept: on a GPU,
        reading it waits for everything that the GPU has still to compute."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        copy = dataclasses.replace(self, **{f.name: changed(getattr(self, f.name)) for f in dataclasses.fields(self)})
        for name in ("image_positions", "has_structure"):
            vars(copy)[name] = changed(getattr(self, name))
        return copy


def positions_of(mask: Tensor) -> Tensor:
    """Return where a mask (B, T) is true in the rows laid end to end: (N,) int64."""
    return mask.flatten().nonzero().squeeze(1)
