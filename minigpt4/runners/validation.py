"""The validation loss, and its control: the same loss with the images of other samples.

If permuting the images among the samples does not make the loss worse, the model ignores its images, however good
its loss looks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from minigpt4.batch import Batch
from minigpt4.models.minigpt4 import MiniGPT4

IGNORES_IMAGES_BELOW = 0.01
"""The shuffled loss must be higher by this part of the loss for the model to count as looking at its images."""


@dataclass(frozen=True)
class Validation:
    """Losses in nats per supervised token.

    Attributes:
        loss: over all samples.
        own_loss: over the batches whose images could be swapped, each sample with its own; what to compare with.
        shuffled_loss: over the same batches, with the images of other samples; NaN if none could be swapped.
    """

    loss: float
    own_loss: float
    shuffled_loss: float

    @property
    def ignores_images(self) -> bool:
        """Whether the image-shuffle control failed."""
        return self.shuffled_loss < self.own_loss * (1 + IGNORES_IMAGES_BELOW)


def shuffle_images(batch: Batch) -> Batch | None:
    """Return the batch with its images given to other rows, or None if that cannot be done.

    Of all rotations, the one under which most rows get the image of a row with other labels is taken, so that the
    control is not weakened by rows that happen to say the same.
    """
    images = batch.pixel_values if batch.pixel_values is not None else batch.query_features
    if images is None or len(images) < 2:
        return None
    owners = torch.repeat_interleave(torch.arange(len(batch)), batch.images_per_row.cpu())
    said = [tuple(row[row >= 0].tolist()) for row in batch.labels.cpu()]

    def differing(shift: int) -> int:
        return sum(said[a] != said[b] for a, b in zip(owners.tolist(), owners.roll(shift).tolist(), strict=True))

    shift = max(range(1, len(images)), key=differing)
    if not differing(shift):
        return None
    if batch.pixel_values is not None:
        return dataclasses.replace(batch, pixel_values=images.roll(shift, 0))
    return dataclasses.replace(batch, query_features=images.roll(shift, 0))


def validate(model: MiniGPT4, batches: Sequence[Batch], accelerator: Accelerator) -> Validation:
    """Return the validation losses over `batches`, divided among the ranks."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, 2, dtype=torch.float64)
    for first in range(0, len(batches), accelerator.num_processes):
        # Ranks between which a language model is spread must all run it as often: what is too much is not counted.
        turn = first + accelerator.process_index
        batch = batches[min(turn, len(batches) - 1)]
        shuffled = shuffle_images(batch)
        own, other = (_total(model, each, accelerator) for each in (batch, batch if shuffled is None else shuffled))
        if turn < len(batches):
            totals[0] += own
        if turn < len(batches) and shuffled is not None:
            totals[1:] += torch.stack([own, other])
    model.train(was_training)
    totals = accelerator.reduce(totals.float().to(accelerator.device), "sum").cpu()
    return Validation(*(float(s / n) if n else math.nan for s, n in totals))


def _total(model: MiniGPT4, batch: Batch, accelerator: Accelerator) -> Tensor:
    """Return the summed loss of a batch and its number of supervised tokens, (2,) float64."""
    with accelerator.autocast():
        sums, counts = model.losses_per_sample(batch.to(accelerator.device))
    return torch.tensor([float(sums.sum()), float(counts.sum())], dtype=torch.float64)
