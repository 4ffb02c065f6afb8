"""Images put among the tokens, and the mask of rows with structure."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minigpt4.batch import Batch
from minigpt4.errors import DataError
from minigpt4.models.splice import splice, structured_mask


def test_images_come_in_order_row_by_row():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    tokens = torch.zeros(2, 6, 1)
    images = torch.arange(1.0, 7.0).reshape(3, 2, 1)
    found = splice(tokens, images, mask).squeeze(-1)
    assert found.tolist() == [[0, 1, 2, 0, 3, 4], [5, 6, 0, 0, 0, 0]]


def test_text_alone_stays_as_it_is():
    tokens = torch.randn(2, 3, 4)
    assert splice(tokens, None, torch.zeros(2, 3, dtype=torch.bool)) is tokens


@pytest.mark.parametrize(("images", "found"), [(torch.zeros(2, 2, 4), 4), (None, 0)])
def test_different_counts_are_named(images, found):
    mask = torch.tensor([[True, True, False]])
    with pytest.raises(DataError, match=f"2 image positions, but the images make {found} embeds") as error:
        splice(torch.zeros(1, 3, 4), images, mask)
    assert error.value.cause == "image count"


def test_gradients_flow_through_image_positions_to_images_and_through_text_positions_to_text():
    mask = torch.tensor([[False, True, True, False]])
    tokens = torch.randn(1, 4, 3, requires_grad=True)
    images = torch.randn(1, 2, 3, requires_grad=True)
    splice(tokens, images, mask).sum().backward()
    assert torch.equal(images.grad, torch.ones_like(images))
    assert torch.equal(tokens.grad, (~mask).unsqueeze(-1).expand_as(tokens).float())


def test_images_take_the_precision_of_the_tokens():
    found = splice(torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    assert found.dtype == torch.bfloat16


def batch_of(segments: Tensor, branches: Tensor, positions: Tensor) -> Batch:
    free, none = torch.zeros_like(segments), torch.zeros(0, dtype=torch.long)
    mask = segments > 0
    return Batch(free, none, none, mask, free > 0, positions, segments, branches, torch.zeros(len(segments)))


rows = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(rows, st.integers(1, 4) | st.none())
def test_mask_is_the_written_rule(row, window):
    segments, branches, positions = (torch.tensor([part]) for part in zip(*row, strict=True))
    mask = structured_mask(batch_of(segments, branches, positions), torch.float32, window)
    assert mask.shape == (1, 1, len(row), len(row))
    for i, (segment, branch, place) in enumerate(row):
        for j, (other_segment, other_branch, other_place) in enumerate(row):
            seen = j <= i and segment == other_segment and other_branch in (0, branch)
            seen = seen and (window is None or place - other_place < window)
            assert mask[0, 0, i, j] == (0 if seen else torch.finfo(torch.float32).min)


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_row_of_the_mask_is_empty(dtype, window):
    none = torch.zeros(1, 4, dtype=torch.long)
    mask = structured_mask(batch_of(torch.tensor([[1, 1, 0, 0]]), none, none), dtype, window)
    assert mask.dtype == dtype
    assert torch.isfinite(mask).all()
    assert (mask == 0).any(-1).all()
