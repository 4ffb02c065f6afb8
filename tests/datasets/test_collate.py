"""Padding and packing change nothing but the shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.batch import IGNORE, Batch, Sample
from minigpt4.datasets.collate import collate, pack, padded_width
from minigpt4.errors import DataError

PAD = 2
"""Also the id of real tokens in these samples: masks must not care."""


def sample(length: int, images: int = 1, *, cached: bool = False, size: int = 4, name: str = "") -> Sample:
    generator = torch.Generator().manual_seed(length * 10 + images)
    ids = torch.randint(0, 5, (length,), generator=generator)
    pixels = torch.randn(images, 3, size, size, generator=generator) if images and not cached else None
    features = torch.randn(images, 2, 6, generator=generator) if images and cached else None
    branches = torch.arange(length) // 3
    return Sample(name or f"s{length}", ids, ids.clone(), ids == 1, torch.arange(length), branches, pixels, features)


shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(shapes)
def test_padding_is_on_the_right_and_known_by_length(sizes: list[tuple[int, int]]) -> None:
    samples = [sample(*size) for size in sizes]
    batch = collate(samples, PAD, trim=False)
    for row, one in enumerate(samples):
        n = len(one.input_ids)
        assert batch.attention_mask[row].tolist() == [True] * n + [False] * (batch.input_ids.shape[1] - n)
        assert torch.equal(batch.segment_ids[row], batch.attention_mask[row].long())
        for field in ("input_ids", "image_mask", "position_ids", "branch_ids"):
            assert torch.equal(getattr(batch, field)[row, :n], getattr(one, field))
        assert (batch.input_ids[row, n:] == PAD).all()
        assert not batch.image_mask[row, n:].any()
    assert batch.images_per_row.tolist() == [images for _, images in sizes]
    pixels = [one.pixel_values for one in samples if one.pixel_values is not None]
    assert (batch.pixel_values is None) == (not pixels)
    if pixels:
        assert torch.equal(batch.pixel_values, torch.cat(pixels))
    assert batch.ids == [one.id for one in samples]


@settings(max_examples=50, deadline=None)
@given(shapes)
def test_packing_keeps_every_token_in_a_segment_of_its_own(sizes: list[tuple[int, int]]) -> None:
    samples = [sample(*size, name=f"{n}") for n, size in enumerate(sizes)]
    batch = pack(samples, PAD, max_tokens=12, trim=False)
    assert batch.input_ids.shape[1] <= 12
    found = iter(batch.ids)
    for row in range(len(batch)):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            one = samples[int(next(found))]
            here = batch.segment_ids[row] == segment
            assert torch.equal(batch.input_ids[row, here], one.input_ids)
            assert torch.equal(batch.position_ids[row, here], one.position_ids)
    assert next(found, None) is None
    assert torch.equal(batch.attention_mask, batch.segment_ids > 0)
    assert batch.num_supervised == sum(len(one.labels) - 1 for one in samples)
    assert int(batch.images_per_row.sum()) == sum(images for _, images in sizes)


def test_packed_images_follow_their_rows() -> None:
    samples = [sample(7, 1), sample(8, 2), sample(3, 1)]
    batch = pack(samples, PAD, max_tokens=10, trim=False)
    assert batch.ids == ["s7", "s3", "s8"]
    assert batch.images_per_row.tolist() == [2, 2]
    expected = [samples[i].pixel_values for i in (0, 2, 1)]
    assert torch.equal(batch.pixel_values, torch.cat(expected))
    assert batch.has_structure


def trunk_and_branches(trunk: int, *branches: int, trained: list[int]) -> Sample:
    """Return a sample of ids 100, 101, ... of which those at `trained` are trained on, and one at 0 shows an image."""
    lengths = torch.tensor([trunk, *branches])
    ids = torch.arange(int(lengths.sum())) + 100
    labels = torch.full_like(ids, IGNORE)
    labels[trained] = ids[trained]
    branch_ids = torch.arange(len(lengths)).repeat_interleave(lengths)
    return Sample("s", ids, labels, ids == 100, torch.arange(len(ids)), branch_ids)


def told(batch: Batch) -> list[tuple[int, int]]:
    """Return the id that predicts and the id predicted, for each target."""
    return list(
        zip(batch.input_ids.flatten()[batch.supervised_positions].tolist(), batch.targets.tolist(), strict=True)
    )


def test_tokens_that_no_loss_depends_on_are_left_out() -> None:
    row = trunk_and_branches(6, trained=[3, 4])  # the last one is a text behind the answer
    assert collate([row], PAD).input_ids.tolist() == [[100, 101, 102, 103]]
    assert told(collate([row], PAD)) == told(collate([row], PAD, trim=False)) == [(102, 103), (103, 104)]


def test_the_last_token_of_every_branch_is_left_out() -> None:
    row = trunk_and_branches(3, 4, 3, trained=[5, 6, 9])
    batch = collate([row], PAD)
    assert batch.input_ids.tolist() == [[100, 101, 102, 103, 104, 105, 107, 108]]
    assert batch.branch_ids.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    assert told(batch) == told(collate([row], PAD, trim=False)) == [(104, 105), (105, 106), (108, 109)]


def test_an_answer_that_begins_a_branch_is_predicted_by_the_trunk() -> None:
    batch = collate([trunk_and_branches(2, 2, 1, trained=[2, 3, 4])], PAD)
    assert told(batch) == [(101, 102), (102, 103), (101, 104)]
    assert batch.input_ids.tolist() == [[100, 101, 102]]


def test_images_behind_the_last_answer_stay() -> None:
    row = trunk_and_branches(6, trained=[1])
    row.image_mask[4] = True
    assert collate([row], PAD).image_mask.tolist() == [[True, False, False, False, True]]


def test_a_row_is_full_only_with_what_is_kept() -> None:
    rows = [trunk_and_branches(6, trained=[4, 5]), trunk_and_branches(5, trained=[4])]
    batch = pack(rows, PAD, max_tokens=9)
    assert len(batch) == 1
    assert told(batch) == [(103, 104), (104, 105), (103, 104)]
    assert [row.tolist() for row in batch.targets_by_row] == [[104, 105, 104]]


def test_rows_are_padded_to_a_few_widths() -> None:
    widths = [padded_width(n) for n in range(1, 2049)]
    assert all(n <= width <= max(8, 1.125 * n + 8 * (n < 64)) for n, width in enumerate(widths, start=1))
    assert sorted({w for w in widths if 256 < w <= 512}) == list(range(288, 513, 32))
    samples = [sample(7, 1), sample(9, 2)]
    plain, wider = collate(samples, PAD, trim=False), collate(samples, PAD, trim=False, few_widths=True)
    assert wider.input_ids.shape == (2, 16)
    assert told(wider) == told(plain)
    assert torch.equal(wider.attention_mask.sum(1), plain.attention_mask.sum(1))


def test_cached_features() -> None:
    batch = collate([sample(4, 2, cached=True), sample(3, 0)], PAD)
    assert batch.pixel_values is None
    assert batch.query_features is not None
    assert batch.query_features.shape == (2, 2, 6)
    assert batch.images_per_row.tolist() == [2, 0]


def test_what_cannot_be_joined() -> None:
    with pytest.raises(DataError, match="s4 has pixel_values and s5 has query_features"):
        collate([sample(4), sample(5, cached=True)], PAD)
    with pytest.raises(DataError, match="all images of a batch must have one shape"):
        collate([sample(4), sample(5, size=6)], PAD)
    with pytest.raises(DataError, match="s13: 13 tokens do not fit into a packed row of 12"):
        pack([sample(13)], PAD, max_tokens=12, trim=False)
    with pytest.raises(DataError, match="at least one sample"):
        collate([], PAD)
