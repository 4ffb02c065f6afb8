"""From samples to a `Batch`: padded to one length, or packed several to a row.

Input: encoded samples. Output: a `Batch`. Every mask comes from lengths, never from an id: the pad id may also be
the id of a real token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt4.batch import IGNORE, Batch, Sample
from minigpt4.errors import DataError


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Return a batch with one sample per row, padded on the right.

    Args:
        samples: at least one; with several images or none, all with pixels or all with cached features.
        pad_id: the id of padding positions; nothing depends on it.

    Raises:
        DataError: there is no sample, or the images cannot be batched.
    """
    return _join([[sample] for sample in samples], pad_id)


def pack(samples: Sequence[Sample], pad_id: int, max_tokens: int) -> Batch:
    """Return a batch with as many samples per row as fit, in segments that do not see each other.

    Each sample goes to the first row with room. Position ids start again with each segment. The first token of a
    segment is not supervised, because the token before it belongs to another sample.

    Args:
        samples: at least one; with several images or none, all with pixels or all with cached features.
        pad_id: the id of padding positions; nothing depends on it.
        max_tokens: length of a row, image positions included.

    Raises:
        DataError: a sample is longer than a row, there is no sample, or the images cannot be batched.
    """
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        length = len(sample.input_ids)
        if length > max_tokens:
            raise DataError(
                f"{sample.id}: {length} tokens do not fit into a packed row of {max_tokens}; shorten the sample",
                cause="too long",
            )
        row = next((i for i, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[row].append(sample)
        room[row] -= length
    return _join(rows, pad_id)


def _join(rows: Sequence[Sequence[Sample]], pad_id: int) -> Batch:
    samples = [sample for row in rows for sample in row]
    if not samples:
        raise DataError("a batch needs at least one sample")
    images = _images(samples)
    lengths = torch.tensor([sum(len(sample.input_ids) for sample in row) for row in rows])
    width = int(lengths.max())

    def joined(field: str, value: int) -> Tensor:
        return _pad([torch.cat([getattr(sample, field) for sample in row]) for row in rows], width, value)

    segments = [[torch.full_like(s.input_ids, n) for n, s in enumerate(row, start=1)] for row in rows]
    segment_ids = _pad([torch.cat(row) for row in segments], width, 0)
    labels = joined("labels", IGNORE)
    labels[:, 1:][segment_ids[:, 1:] != segment_ids[:, :-1]] = IGNORE
    return Batch(
        input_ids=joined("input_ids", pad_id),
        labels=labels,
        attention_mask=torch.arange(width) < lengths[:, None],
        image_mask=joined("image_mask", 0),
        position_ids=joined("position_ids", 0),
        segment_ids=segment_ids,
        branch_ids=joined("branch_ids", 0),
        images_per_row=torch.tensor([sum(_num_images(sample) for sample in row) for row in rows]),
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
