"""Where text and images meet: image embeds go to the masked positions of a row of token embeds."""

from __future__ import annotations

import torch
from torch import Tensor

from minigpt4.batch import Batch
from minigpt4.errors import DataError


def splice(token_embeds: Tensor, image_embeds: Tensor | None, image_mask: Tensor) -> Tensor:
    """Return `token_embeds` with `image_embeds` at the positions of `image_mask`, in order.

    Args:
        token_embeds: (B, T, Dl).
        image_embeds: (I, Q, Dl), or None when no row has an image.
        image_mask: (B, T) bool with I * Q true positions.

    Raises:
        DataError: positions and image embeds differ in number.
    """
    places = int(image_mask.sum())
    found = 0 if image_embeds is None else image_embeds.shape[0] * image_embeds.shape[1]
    if places != found:
        raise DataError(
            f"the rows have {places} image positions, but the images make {found} embeds", cause="image count"
        )
    if image_embeds is None:
        return token_embeds
    return token_embeds.masked_scatter(image_mask.unsqueeze(-1), image_embeds.to(token_embeds.dtype))


def structured_mask(batch: Batch, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Return the additive attention mask of rows with segments and branches.

    Additive, because every attention implementation reads it alike; a boolean one is misread by some.

    Args:
        batch: its segments, branches and positions are read.
        dtype: of the attention scores.
        window: how many positions back a token sees, itself included; None: all of them. Counted in positions, not in
            places, so that a branch sees as much of its trunk as if it stood right behind it.

    Returns:
        (B, 1, T, T): 0 where token i may attend to token j, else the lowest value of `dtype`. A padding position
        attends to the padding before it, so that no row of the mask is empty.
    """
    segment_ids, branch_ids = batch.segment_ids, batch.branch_ids
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    reachable = (branch_ids[:, None, :] == 0) | (branch_ids[:, :, None] == branch_ids[:, None, :])
    allowed = causal & same_segment & reachable
    if window is not None:
        allowed &= batch.position_ids[:, :, None] - batch.position_ids[:, None, :] < window
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)
