"""The contract between data and model: `Sample`, `Batch`, and the legend of shape letters.

Data produces samples, the collator joins them to a `Batch`, the model reads the batch. Neither side knows the other.

Legend of shape letters, used in every docstring:

    B   samples (rows) in a batch              T   tokens in a row, image positions included
    I   images in a batch, all rows together   H W image height and width in pixels
    P   patches of an image                    Dv  width of a patch feature
    Q   query tokens an image becomes          Dq  width of a query feature
    V   vocabulary of the language model       Dl  width of the language model

`image_mask` alone says where images go; the ids under it are fillers. Labels, too, never depend on an id: `labels`
is `IGNORE` wherever nothing is learnt, padding included.

Rows with structure. `segment_ids` says which sample of a packed row a token belongs to (0 is padding).
`branch_ids` splits a sample into a trunk (0) and branches (1, 2, ...): a branch sees the trunk and itself, never
another branch. So several questions about one image share the image and stay strangers. Token i attends to token j
when j <= i, both are of one segment, and j is of the trunk or of i's own branch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""The label of a position that nothing is learnt from (the field's convention, `cross_entropy`'s default)."""


@dataclass
class Sample:
    """One encoded training sample.

    Attributes:
        id: where the sample comes from, for messages: `captions.jsonl:17`, `00012.tar/000120034`.
        input_ids: (T,) int64, fillers at image positions.
        labels: (T,) int64, `IGNORE` where nothing is learnt. Position t holds the label of token t itself; the model
            shifts.
        image_mask: (T,) bool, true at the Q positions of each image.
        position_ids: (T,) int64; a branch counts on from the end of the trunk.
        branch_ids: (T,) int64, 0 for the trunk.
        pixel_values: (images, 3, H, W) float32, or None when features are cached or there is no image.
        query_features: (images, Q, Dq) cached output of the resampler, or None.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    image_mask: Tensor
    position_ids: Tensor
    branch_ids: Tensor
    pixel_values: Tensor | None = None
    query_features: Tensor | None = None


@dataclass
class Batch:
    """Samples padded to one length; what a model's `forward` takes.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64, `IGNORE` where nothing is learnt.
        attention_mask: (B, T) bool, false at padding.
        image_mask: (B, T) bool.
        position_ids: (B, T) int64.
        segment_ids: (B, T) int64, 0 at padding.
        branch_ids: (B, T) int64, 0 in the trunk.
        images_per_row: (B,) int64; the images of row 0 come first in `pixel_values`, then those of row 1, ...
        pixel_values: (I, 3, H, W) float32 or None.
        query_features: (I, Q, Dq) or None.
        ids: the samples' ids.
        skipped: samples left out since the worker's last batch, by cause.
        reader: the number of the stream reader that made the batch.
        position: raw samples that reader has consumed, this batch included; where it goes on after a resume.
    """

    input_ids: Tensor
    labels: Tensor
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
    reader: int = 0
    position: int = 0

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def supervised(self) -> Tensor:
        """(B, T) bool: positions whose *next* token is learnt; logits are needed there and nowhere else."""
        mask = torch.zeros_like(self.labels, dtype=torch.bool)
        mask[:, :-1] = self.labels[:, 1:] != IGNORE
        return mask

    @property
    def num_supervised(self) -> int:
        """Number of tokens the loss is taken over."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    @property
    def has_structure(self) -> bool:
        """Whether rows hold several segments or branches, so that a plain causal mask would leak."""
        return bool((self.segment_ids > 1).any() or (self.branch_ids > 0).any())
