"""Where text and images meet: image embeds replace the token embeds at the image positions of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from minigpt4.batch import Batch, positions_of
from minigpt4.errors import DataError


def splice(
    token_embeds: Tensor, image_embeds: Tensor | None, image_mask: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Return `token_embeds` with `image_embeds` at the positions of `image_mask`, in order.

    Args:
        token_embeds: (B, T, Dl).
        image_embeds: (I, Q, Dl), or None when no row has an image.
        image_mask: (B, T) bool with I * Q true positions.
        positions: (I * Q,) what `positions_of(image_mask)` returns, where it is known; finding it makes the program
            wait for a GPU.

    Raises:
        DataError: the number of image positions is not the number of image embeds.
    """
    positions = positions_of(image_mask) if positions is None else positions
    found = 0 if image_embeds is None else image_embeds.shape[0] * image_embeds.shape[1]
    if len(positions) != found:
        raise DataError(
            f"the rows have {len(positions)} image positions, but the images make {found} embeds", cause="image count"
        )
    if image_embeds is None:
        return token_embeds
    rows = token_embeds.flatten(0, 1)
    return rows.index_copy(0, positions, image_embeds.flatten(0, 1).to(rows.dtype)).view_as(token_embeds)


def structured_mask(batch: Batch, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Return the additive attention mask of rows with segments and branches.

    It is additive because all attention implementations read such a mask alike; some misread a boolean one.

    Args:
        batch: its segments, branches and positions are read.
        dtype: of the attention scores.
        window: how many positions back a token sees, itself included; None: all of them. The distance is that of
            `position_ids`, so that a branch sees as much of its trunk as if it followed it directly.

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
