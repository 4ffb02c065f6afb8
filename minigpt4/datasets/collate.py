"""From samples to a `Batch`: padded to one length, or packed several to a row.

Input: encoded samples. Output: a `Batch`. Every mask comes from lengths, never from an id: the pad id may also be
the id of a real token.

Tokens behind the last position of a branch that predicts something are left out: no token attends to them and no loss
reads them. That is at least the end mark of every answer at the end of a branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4.batch import IGNORE, Batch, Sample
from minigpt4.errors import DataError


@dataclass(frozen=True)
class _Piece:
    """A sample as a row holds it, the positions (N,) in it that predict, and the ids (N,) that they predict."""

    sample: Sample
    predictors: Tensor
    targets: Tensor


def collate(samples: Sequence[Sample], pad_id: int, *, trim: bool = True, few_widths: bool = False) -> Batch:
    """Return a batch with one sample per row, padded on the right.

    Args:
        samples: at least one; with several images or none, all with pixels or all with cached features.
        pad_id: the id of padding positions; nothing depends on it.
        trim: leave out the tokens that no loss depends on.
        few_widths: pad rows to one of a few widths, see `padded_width`.

    Raises:
        DataError: there is no sample, or the images cannot be batched.
    """
    return _join([[_piece(sample, trim)] for sample in samples], pad_id, few_widths)


def pack(
    samples: Sequence[Sample], pad_id: int, max_tokens: int, *, trim: bool = True, few_widths: bool = False
) -> Batch:
    """Return a batch with as many samples per row as fit, in segments that do not see each other.

    Each sample goes to the first row with room. Position ids start again with each segment.

    Args:
        samples: at least one; with several images or none, all with pixels or all with cached features.
        pad_id: the id of padding positions; nothing depends on it.
        max_tokens: length of a row, image positions included.
        trim: leave out the tokens that no loss depends on.
        few_widths: pad rows to one of a few widths, see `padded_width`.

    Raises:
        DataError: a sample is longer than a row, there is no sample, or the images cannot be batched.
    """
    rows: list[list[_Piece]] = []
    room: list[int] = []
    for sample in samples:
        piece = _piece(sample, trim)
        length = len(piece.sample.input_ids)
        if length > max_tokens:
            raise DataError(
                f"{sample.id}: {length} tokens do not fit into a packed row of {max_tokens}; shorten the sample",
                cause="too long",
            )
        row = next((i for i, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[row].append(piece)
        room[row] -= length
    return _join(rows, pad_id, few_widths)


def padded_width(width: int) -> int:
    """Return the next of the widths 8, 16, ..., 128, 144, 160, ...: eight up to each double, 12.5 % more at most."""
    step = max(8, 2 ** (width.bit_length() - 1) // 8)
    return -(-width // step) * step


def _piece(sample: Sample, trim: bool) -> _Piece:
    """Find which positions of a sample predict a token that is trained on, and leave out what is behind the last one.

    The first token of a branch is predicted by the end of the trunk, every other one by the token before it.
    """
    places, branches = torch.arange(len(sample.input_ids)), sample.branch_ids
    before = places - 1
    starts = branches[1:] != branches[:-1]
    before[1:][starts] = int((branches == 0).sum()) - 1
    trained = ((sample.labels != IGNORE) & (before >= 0)).nonzero().squeeze(1)
    predictors, targets = before[trained], sample.labels[trained]
    if not trim or not len(predictors):
        return _Piece(sample, predictors, targets)
    needed = sample.image_mask.clone()
    needed[predictors] = True
    last = torch.full((int(branches.max()) + 1,), -1).scatter_reduce(0, branches[needed], places[needed], "amax")
    keep = places <= last[branches]
    if keep[branches > 0].any():
        keep |= branches == 0  # every branch attends to all of the trunk
    kept = {field: getattr(sample, field)[keep] for field in _PER_TOKEN}
    return _Piece(dataclasses.replace(sample, **kept), (keep.cumsum(0) - 1)[predictors], targets)


_PER_TOKEN = ("input_ids", "labels", "image_mask", "position_ids", "branch_ids")


def _join(rows: Sequence[Sequence[_Piece]], pad_id: int, few_widths: bool) -> Batch:
    pieces = [piece for row in rows for piece in row]
    if not pieces:
        raise DataError("a batch needs at least one sample")
    samples = [piece.sample for piece in pieces]
    images = _images(samples)
    lengths = torch.tensor([sum(len(piece.sample.input_ids) for piece in row) for row in rows])
    width = padded_width(int(lengths.max())) if few_widths else int(lengths.max())

    def joined(field: str, value: int) -> Tensor:
        return _pad([torch.cat([getattr(piece.sample, field) for piece in row]) for row in rows], width, value)

    segments = [[torch.full_like(p.sample.input_ids, n) for n, p in enumerate(row, start=1)] for row in rows]
    positions = []
    for number, row in enumerate(rows):
        start = number * width
        for piece in row:
            positions.append(piece.predictors + start)
            start += len(piece.sample.input_ids)
    return Batch(
        input_ids=joined("input_ids", pad_id),
        supervised_positions=torch.cat(positions),
        targets=torch.cat([piece.targets for piece in pieces]),
        attention_mask=torch.arange(width) < lengths[:, None],
        image_mask=joined("image_mask", 0),
        position_ids=joined("position_ids", 0),
        segment_ids=_pad([torch.cat(row) for row in segments], width, 0),
        branch_ids=joined("branch_ids", 0),
        images_per_row=torch.tensor([sum(_num_images(piece.sample) for piece in row) for row in rows]),
        pixel_values=images["pixel_values"],
        query_features=images["query_features"],
        ids=[sample.id for sample in samples],
    )


def _pad(rows: list[Tensor], width: int, value: int) -> Tensor:
    padded = rows[0].new_full((len(rows), width), value)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def _num_images(sample: Sample) -> int:
    images = sample.query_features if sample.pixel_values is None else sample.pixel_values
    return 0 if images is None else len(images)


def _images(samples: Sequence[Sample]) -> dict[str, Tensor | None]:
    """Return all pixel values, or all cached features, in the order of the samples."""
    found = {field: _stack(samples, field) for field in ("pixel_values", "query_features")}
    if None not in found.values():
        first = {field: next(s.id for s in samples if getattr(s, field) is not None) for field in found}
        raise DataError(
            f"{first['pixel_values']} has pixel_values and {first['query_features']} has query_features: a batch needs "
            "the same for all samples; cache the features of all data sets or of none",
            cause="features",
        )
    return found


def _stack(samples: Sequence[Sample], field: str) -> Tensor | None:
    """Return the images of all samples in one tensor; they must have one shape."""
    found = [(s.id, images) for s in samples if (images := getattr(s, field)) is not None and len(images)]
    for sample_id, images in found:
        if images.shape[1:] != found[0][1].shape[1:]:
            raise DataError(
                f"{sample_id}: {field} of shape {tuple(images.shape[1:])}, but {found[0][0]} has "
                f"{tuple(found[0][1].shape[1:])}: all images of a batch must have one shape",
                cause="features",
            )
    return torch.cat([images for _, images in found]) if found else None
