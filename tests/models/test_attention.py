"""The choice of the attention kernel: what may be chosen, and that it changes no numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minigpt4.datasets.collate import collate
from minigpt4.models import attention
from minigpt4.models.attention import AttentionShape, choose_attention, open_attention, set_attention
from tests.models import parts
from tests.models.parts import CLOSE

SHAPE = AttentionShape(2, heads=4, kv_heads=2, tokens=9, head_dim=8, dtype=torch.float32, causal=True, trained=True)


def open_model(family: str = "llama"):
    model = parts.model(family=family)
    model.language_model.attention_is_open = True
    return model


def test_both_kernels_give_the_same_loss_and_gradient():
    model, batch, found = open_model(), collate(parts.samples(), 0), []
    for kernel in ("sdpa", "eager"):
        set_attention(model, {"language_model": kernel, "vision_encoder": kernel})
        assert model.language_model.model.config._attn_implementation == kernel
        assert {block.attn.fused_attn for block in model.vision_encoder.vit.blocks} == {kernel == "sdpa"}
        model.zero_grad()
        loss = model(batch)
        loss.backward()
        found.append((loss.detach(), model.llama_proj.weight.grad.clone()))
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt_neox"])
def test_the_shapes_are_those_that_the_model_computes(family, monkeypatch):
    model, batch, seen = open_model(family), collate(parts.samples(), 0), []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, *args, **kwargs):
        seen.append((query.shape, key.shape[-1], query.dtype))
        return sdpa(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model(batch)
    for shape in open_attention(model, batch).values():
        assert ((shape.rows, shape.heads, shape.tokens, shape.head_dim), shape.head_dim, shape.dtype) in seen
    assert set(choose_attention(model, batch)) == {"language_model", "vision_encoder"}
    assert set(choose_attention(model, batch).values()) <= {"sdpa", "eager"}


def test_what_a_config_sets_is_not_chosen():
    model, batch = parts.model(), collate(parts.samples(), 0)
    assert set(choose_attention(model, batch)) == {"vision_encoder"}
    assert not choose_attention(model, replace(batch, pixel_values=None, query_features=torch.zeros(3, 4, 64)))


@pytest.mark.parametrize("masked", [False, True])
def test_the_kernels_that_are_timed_compute_the_same(masked):
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    is_later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    mask = torch.zeros(2, 1, 9, 9).masked_fill(is_later, torch.finfo(torch.float32).min)
    eager = attention._eager(query, key, value, mask)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(attention._sdpa(query, key, value, mask if masked else None, not masked), eager)


@pytest.mark.parametrize("slow", ["eager", "sdpa"])
def test_the_faster_kernel_is_chosen(slow, monkeypatch):
    seconds = attention._seconds

    def delayed(kernel, inputs):
        is_eager = "_eager" in kernel.__code__.co_names
        return seconds(kernel, inputs) + (1.0 if is_eager == (slow == "eager") else 0.0)

    monkeypatch.setattr(attention, "_seconds", delayed)
    assert attention._eager_is_faster(SHAPE) == (slow == "sdpa")
