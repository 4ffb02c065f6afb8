"""The training loss: cross-entropy over supervised positions, as a sum and a count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt4.batch import Batch


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy of each supervised token, in float32.

    Args:
        logits: (N, V), one row per true position of `batch.supervised`, in row order.
        batch: the batch they were computed for.

    Returns:
        (N,) losses in nats.
    """
    targets = batch.labels.roll(-1, dims=1)[batch.supervised]
    return F.cross_entropy(logits.float(), targets, reduction="none")


def sample_losses(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return, per row, the sum of its token losses and the number of its supervised tokens, each (B,)."""
    rows = torch.arange(len(batch), device=losses.device).unsqueeze(1).expand_as(batch.labels)[batch.supervised]
    sums = torch.zeros(len(batch), device=losses.device).index_add_(0, rows, losses)
    return sums, torch.bincount(rows, minlength=len(batch))
