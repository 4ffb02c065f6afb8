"""One training batch of each published case: features, embeds, loss and gradients."""

from __future__ import annotations

import pytest
import torch

from minigpt4.batch import Batch
from minigpt4.datasets.collate import collate
from tests.parity.conftest import META, TOLERANCE, reference
from tests.parity.parity_cases import encoder_for, samples_of


@pytest.mark.parametrize("case", sorted(META.get("cases", {})))
def test_training_batch_equals_the_published_one(case, models, tokenizer):
    numbers = reference(case)
    variant = "no_qformer" if case.endswith("no_qformer") else "qformer"
    if variant not in models:
        pytest.skip(f"the set has no weights of the variant {variant}")
    model = models[variant]
    encoder = encoder_for(META["cases"][case], tokenizer, model.num_query_tokens)
    batch: Batch = collate(samples_of(META, case, encoder, numbers["input.image"]), tokenizer.filler_id)

    images = numbers["input.image"]
    torch.testing.assert_close(model.vision_encoder.vit.forward_features(images), numbers["out.vit"], **TOLERANCE)
    torch.testing.assert_close(model.vision_encoder(images), numbers["out.ln_vision"], **TOLERANCE)
    torch.testing.assert_close(model.encode_images(images), numbers["out.image_embeds"], **TOLERANCE)

    model.zero_grad()
    loss = model(batch) / batch.num_supervised
    loss.backward()
    torch.testing.assert_close(loss.detach().reshape(1), numbers["out.loss"], **TOLERANCE)
    assert loss.item() == pytest.approx(META["cases"][case]["loss"], abs=2e-5)
    for name in ("weight", "bias"):
        gradient = getattr(model.llama_proj, name).grad
        torch.testing.assert_close(gradient, numbers[f"out.grad.llama_proj.{name}"], **TOLERANCE)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"llama_proj.weight", "llama_proj.bias"}
