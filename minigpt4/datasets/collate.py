"""Samples to a `Batch`: padded to one length, or packed several to a row.

Input: encoded samples. Output: a `Batch`. Every mask comes from lengths, never from an id: the pad id may
equal any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt4.batch import IGNORE, Batch, Sample
from minigpt4.errors import DataError


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Return a batch with one sample a row, padded on the right.

    Args:
        samples: at least one; with several images or none, all with pixels or all with cached features.
        pad_id: the id written into padding; nothing depends on it.

    Raises:
        DataError: no sample, or images that do not go together.
    """
    return _join([[sample] for sample in samples], pad_id)


def pack(samples: Sequence[Sample], pad_id: int, max_tokens: int) -> Batch:
    """Return a batch with as many samples a row as fit, in segments that do not see one another.

    Each sample goes to the first row with room. Position ids start anew with each segment, and the first
    token of a segment is never learnt, since the token before it belongs to another sample.

    Args:
        samples: at least one; with several images or none, all with pixels or all with cached features.
        pad_id: the id written into padding; nothing depends on it.
        max_tokens: length of a row, image positions included.

    Raises:
        DataError: a sample is longer than a row, no sample, or images that do not go together.
    """
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        length = len(sample.input_ids)
        if length > max_tokens:
            raise DataError(
                f"{sample.id}: {length} tokens do not fit a packed row of {max_tokens}; cut it",
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
        raise DataError("there is no sample to make a batch of")
    pixel_values, query_features = _images(samples)
    lengths = torch.tensor([sum(len(sample.input_ids) for sample in row) for row in rows])
    width = int(lengths.max())
    return Batch(
        input_ids=_pad([torch.cat([s.input_ids for s in row]) for row in rows], width, pad_id),
        labels=_pad([torch.cat([_labels(s, i) for i, s in enumerate(row)]) for row in rows], width, IGNORE),
        attention_mask=torch.arange(width) < lengths[:, None],
        image_mask=_pad([torch.cat([s.image_mask for s in row]) for row in rows], width, 0),
        position_ids=_pad([torch.cat([s.position_ids for s in row]) for row in rows], width, 0),
        segment_ids=_pad([_segments(row) for row in rows], width, 0),
        branch_ids=_pad([torch.cat([s.branch_ids for s in row]) for row in rows], width, 0),
        images_per_row=torch.tensor([sum(_num_images(sample) for sample in row) for row in rows]),
        pixel_values=pixel_values,
        query_features=query_features,
        ids=[sample.id for sample in samples],
    )


def _pad(rows: list[Tensor], width: int, value: int) -> Tensor:
    padded = rows[0].new_full((len(rows), width), value)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def _labels(sample: Sample, place_in_row: int) -> Tensor:
    if place_in_row == 0:
        return sample.labels
    labels = sample.labels.clone()
    labels[:1] = IGNORE
    return labels


def _segments(row: Sequence[Sample]) -> Tensor:
    return torch.cat([torch.full_like(sample.input_ids, i) for i, sample in enumerate(row, start=1)])


def _num_images(sample: Sample) -> int:
    images = sample.query_features if sample.pixel_values is None else sample.pixel_values
    return 0 if images is None else len(images)


def _images(samples: Sequence[Sample]) -> tuple[Tensor | None, Tensor | None]:
    """Return all pixels, or all cached features, in the order of the samples."""
    pixels = {sample.id: sample.pixel_values for sample in samples if sample.pixel_values is not None}
    features = {sample.id: sample.query_features for sample in samples if sample.query_features is not None}
    if pixels and features:
        raise DataError(
            f"{next(iter(pixels))} has pixel_values and {next(iter(features))} has query_features: "
            "a batch takes one or the other; cache the features of all data sets, or of none",
            cause="features",
        )
    return _stack(samples, "pixel_values"), _stack(samples, "query_features")


def _stack(samples: Sequence[Sample], field: str) -> Tensor | None:
    """Join the images of all samples; they must have one shape."""
    found = [(s.id, images) for s in samples if (images := getattr(s, field)) is not None and len(images)]
    for sample_id, images in found:
        if images.shape[1:] != found[0][1].shape[1:]:
            raise DataError(
                f"{sample_id}: {field} of shape {tuple(images.shape[1:])} beside {found[0][0]} with "
                f"{tuple(found[0][1].shape[1:])}: all images of a batch must have one shape",
                cause="features",
            )
    return torch.cat([images for _, images in found]) if found else None
