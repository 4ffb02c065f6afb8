"""The validation loss, and its control: the same loss with the images of other samples.

If permuting the images among the samples does not make the loss worse, the model ignores its images, however good its
loss looks.
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
"""The shuffled loss must be higher by this fraction of the loss, or the model counts as ignoring its images."""


@dataclass(frozen=True)
class Validation:
    """Losses in nats per supervised token.

    Attributes:
        loss: over all samples.
        own_loss: over the batches whose images could be swapped, each sample with its own: the value to compare with.
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
    """Return the batch with its images given to other rows, or None if that is not possible.

    Of all rotations, the one under which most rows get the image of a row with other targets is taken, so that rows
    with the same text do not weaken the control.
    """
    images = batch.pixel_values if batch.pixel_values is not None else batch.query_features
    if images is None or len(images) < 2:
        return None
    owners = torch.repeat_interleave(torch.arange(len(batch)), batch.images_per_row.cpu())
    texts = [tuple(row.tolist()) for row in batch.targets_by_row]

    def differing(shift: int) -> int:
        return sum(texts[a] != texts[b] for a, b in zip(owners.tolist(), owners.roll(shift).tolist(), strict=True))

    shift = max(range(1, len(images)), key=differing)
    if not differing(shift):
        return None
    if batch.pixel_values is not None:
        return dataclasses.replace(batch, pixel_values=images.roll(shift, 0))
    return dataclasses.replace(batch, query_features=images.roll(shift, 0))


def validation_losses(model: MiniGPT4, batches: Sequence[Batch], accelerator: Accelerator) -> Validation:
    """Return the losses over `batches`, divided among the ranks; the model is left in eval mode."""
    model.eval()
    sums = []
    for first in range(0, len(batches), accelerator.num_processes):
        # Every rank runs the model as often as every other, since a language model may be sharded over them: a rank
        # without a batch of its own computes the last one, which does not count.
        turn = first + accelerator.process_index
        batch = batches[min(turn, len(batches) - 1)]
        shuffled = shuffle_images(batch)
        own, other = (_sum(model, each, accelerator) for each in (batch, batch if shuffled is None else shuffled))
        nothing = torch.zeros_like(own)
        counts, compares = turn < len(batches), turn < len(batches) and shuffled is not None
        sums.append(torch.stack([own if counts else nothing, *([own, other] if compares else [nothing, nothing])]))
    # In double precision on the CPU, since not every device has it.
    totals = torch.stack(sums).cpu().double().sum(0)
    totals = accelerator.reduce(totals.float().to(accelerator.device), "sum").cpu()
    return Validation(*(float(s / n) if n else math.nan for s, n in totals))


def _sum(model: MiniGPT4, batch: Batch, accelerator: Accelerator) -> Tensor:
    """Return the summed loss of a batch and its number of supervised tokens, (2,) float32, on the device."""
    with accelerator.autocast():
        sums, counts = model.losses_per_sample(batch.to(accelerator.device))
    return torch.stack([sums.sum(), counts.sum().float()])
