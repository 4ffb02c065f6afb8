"""The training loss: cross-entropy over supervised positions, as a sum and a count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt4.batch import Batch


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy of each supervised token, in float32.

    Args:
        logits: (N, V), one row per position in `batch.supervised_positions`.
        batch: the batch they were computed for.

    Returns:
        (N,) losses in nats.
    """
    return F.cross_entropy(logits.float(), batch.targets, reduction="none")


def sample_losses(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return, per row, the sum of its token losses and the number of its supervised tokens, each (B,)."""
    rows = batch.supervised_positions // batch.input_ids.shape[1]
    sums = torch.zeros(len(batch), device=losses.device).index_add_(0, rows, losses)
    counts = torch.zeros(len(batch), dtype=rows.dtype, device=rows.device).index_add_(0, rows, torch.ones_like(rows))
    return sums, counts
