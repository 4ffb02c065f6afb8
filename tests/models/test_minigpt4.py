"""The wiring: what the loss depends on, and what a step changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from minigpt4.batch import IGNORE, Batch
from minigpt4.checkpoints.manifest import identify
from minigpt4.config.parts import LoraConfig
from minigpt4.datasets.collate import collate, pack
from minigpt4.errors import ConfigError
from minigpt4.models.freezing import count_parameters
from minigpt4.models.minigpt4 import MiniGPT4
from tests.models import parts
from tests.models.parts import CLOSE, FAMILIES


def total(model: MiniGPT4, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch)


def one_step(model: MiniGPT4, batch: Batch) -> set[str]:
    """Take a step in training mode; return the names of the tensors that it changed."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model(batch).backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_a_batch_is_the_sum_of_its_samples_packed_or_padded(family, attention):
    model = parts.model(family=family, attention=attention)
    samples = parts.samples()
    alone = sum(total(model, collate([s], 0)) for s in samples)
    torch.testing.assert_close(total(model, collate(samples, 0)), alone, **CLOSE)
    torch.testing.assert_close(total(model, collate(samples, 699)), alone, **CLOSE)  # another pad id
    packed = pack(samples, 0, sum(len(s.input_ids) for s in samples) + 5)
    assert len(packed) == 1
    assert packed.has_structure
    torch.testing.assert_close(total(model, packed), alone, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_are_left_out_change_neither_loss_nor_gradient(family):
    model, turns = parts.model(family=family), [("What is it?", "A bird."), ("Is it red?", "Yes, it is.")]
    isolated = parts.sample("all", *turns, of=parts.encoder(isolate_turns=True))
    found = []
    for samples in (parts.samples(), [isolated, *parts.samples()]):
        trimmed, whole = collate(samples, 0), collate(samples, 0, trim=False)
        assert int(trimmed.attention_mask.sum()) <= int(whole.attention_mask.sum()) - len(samples)
        for batch in (trimmed, whole):
            model.zero_grad()
            loss = model(batch)
            loss.backward()
            found.append((loss.detach(), model.llama_proj.weight.grad.clone()))
        torch.testing.assert_close(found[-1], found[-2], **CLOSE)


def test_ids_under_padding_and_images_do_not_matter():
    model, batch = parts.model(), collate(parts.samples(), 0)
    noise = torch.randint(0, parts.VOCABULARY, batch.input_ids.shape)
    free = batch.image_mask | ~batch.attention_mask
    other = dataclasses.replace(batch, input_ids=torch.where(free, noise, batch.input_ids))
    assert total(model, other) == total(model, batch)


def test_losses_per_sample_are_those_of_the_samples_alone():
    model, samples = parts.model(), parts.samples()
    sums, counts = model.losses_per_sample(collate(samples, 0))
    for n, sample in enumerate(samples):
        single = collate([sample], 0)
        torch.testing.assert_close(sums[n], total(model, single), **CLOSE)
        assert counts[n] == single.num_supervised == int((sample.labels[1:] != IGNORE).sum())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_isolated_turn_has_the_logits_of_the_same_question_alone(family, attention):
    model = parts.model(family=family, attention=attention)
    turns = [("What is it?", "A bird."), ("Is it red?", "Yes, it is."), ("Where does it sit?", "On a branch.")]
    isolated = collate([parts.sample("all", *turns, of=parts.encoder(isolate_turns=True))], 0)
    assert isolated.has_structure
    singles = [collate([parts.sample("all", turn)], 0) for turn in turns]
    with torch.no_grad():
        alone = torch.cat([model.logits(single) for single in singles])
        torch.testing.assert_close(model.logits(isolated), alone, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_supervised_positions_are_those_of_the_whole_row(family):
    model, batch = parts.model(family=family), collate(parts.samples(), 0)
    with torch.no_grad():
        whole = model.language_model(model.embed(batch), batch.attention_mask, batch.position_ids)
        some = model.logits(batch)
    assert some.shape == (batch.num_supervised, parts.VOCABULARY)
    torch.testing.assert_close(some, whole.flatten(0, 1)[batch.supervised_positions], **CLOSE)
    head = model.language_model.model.get_output_embeddings()
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("kind", ["merge", "pool", "prefix", "qformer"])
def test_cached_features_give_the_loss_of_their_images(kind):
    model, batch = parts.model(kind=kind), collate(parts.samples(), 0)
    features = model.query_features(batch.pixel_values)
    assert features.shape == (3, model.num_query_tokens, model.resampler.feature_dim)
    assert not features.requires_grad
    cached = dataclasses.replace(batch, pixel_values=None, query_features=features)
    assert total(model, cached) == total(model, batch)


def test_images_reach_the_loss_and_their_order_matters():
    model, batch = parts.model(), collate(parts.samples(), 0)
    swapped = dataclasses.replace(batch, pixel_values=batch.pixel_values[[0, 2, 1]])
    assert total(model, swapped) != total(model, batch)


@pytest.mark.parametrize(
    ("kind", "trainable", "changed"),
    [
        ("merge", ["llama_proj"], "llama_proj."),
        ("qformer", ["resampler"], "resampler."),
        ("qformer", ["vision_encoder"], "vision_encoder."),
        ("merge", ["language_model"], "language_model."),
        ("merge", ["lora"], ".lora_"),
    ],
)
def test_one_step_changes_what_is_trainable_and_nothing_else(kind, trainable, changed):
    model = parts.model(kind=kind, trainable=trainable)
    found = one_step(model, collate(parts.samples(), 0))
    if trainable == ["llama_proj"]:
        assert found == {"llama_proj.weight", "llama_proj.bias"}
    assert found
    assert all(changed in name for name in found)
    assert found <= model.trained_state().keys()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    if trainable != ["lora"]:
        unused = {"language_model.model.model.embed_tokens.weight"}  # rows of ids that do not occur stay; others not
        assert learning - found <= unused
    assert count_parameters(model)[trainable[0]][1] == 0


@pytest.mark.parametrize("trainable", [["llama_proj"], ["lora"], ["resampler", "llama_proj"]])
def test_frozen_parts_stay_in_eval(trainable):
    model = parts.model(kind="qformer", family="opt", trainable=trainable).train()
    training = {name for name, module in model.named_modules() if name and module.training}
    marks = [".lora_" if part == "lora" else part for part in trainable]
    assert training
    assert all(any(mark in name for mark in marks) for name in training)
    assert not any(module.training for module in model.eval().modules())


def test_dropout_of_a_frozen_language_model_stays_off_with_adapters():
    model = parts.model(family="opt", trainable=["lora"]).train()
    batch = collate(parts.samples(), 0)
    assert model.language_model.model.config.dropout > 0
    assert total(model, batch) == total(model, batch)  # B is still zero: only the frozen model could drop anything


def test_adapters_start_as_a_no_op():
    plain, adapted, batch = parts.model(), parts.model(trainable=["lora"]), collate(parts.samples(), 0)
    adapted.load_state_dict(plain.llama_proj.state_dict(prefix="llama_proj."), strict=False)
    torch.testing.assert_close(total(adapted.eval(), batch), total(plain, batch), **CLOSE)


def test_a_part_keeps_its_identity_with_adapters():
    model = parts.model()
    before = identify(model, model.trained_names())
    model.language_model.add_lora(LoraConfig(rank=2))
    adapted = MiniGPT4(model.vision_encoder, model.resampler, model.language_model, ["lora"])
    assert identify(adapted, adapted.trained_names()) == before


def test_unknown_and_empty_parts_are_errors():
    with pytest.raises(ConfigError, match="unknown part 'projector'; the parts are vision_encoder"):
        parts.model(trainable=["projector"])
    with pytest.raises(ConfigError, match="resampler has no parameters in this model"):
        parts.model(kind="merge", trainable=["resampler"])
    encoder, llm = parts.vision(), parts.language_model()
    with pytest.raises(ConfigError, match="lora has no parameters"):
        MiniGPT4(encoder, parts.resampler("merge", encoder), llm, ["lora"])


def test_parameters_are_counted_per_part():
    model = parts.model(kind="qformer")
    counts = count_parameters(model)
    assert counts["llama_proj"] == (16 * 32 + 32, 0)
    assert all(trainable == 0 for part, (trainable, _) in counts.items() if part != "llama_proj")
    assert sum(a + b for a, b in counts.values()) == sum(p.numel() for p in model.parameters())
