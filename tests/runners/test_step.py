"""One training step: what gets a gradient, what waits for the device, and how fast it says it was."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt4 import devices
from minigpt4.batch import Batch
from minigpt4.datasets.collate import collate, pack
from minigpt4.devices import peak_flops
from minigpt4.errors import DataError
from minigpt4.runners.batches import StepBatches
from minigpt4.runners.distributed import TrainingModel
from minigpt4.runners.state import Speed
from tests.conftest import read_metrics
from tests.models import parts
from tests.models.parts import FAMILIES
from tests.runners.parts import train

TURNS = [("What is it?", "A bird."), ("Is it red?", "Yes, it is.")]


def batches_of_each_kind() -> dict[str, Batch]:
    isolating = parts.encoder(isolate_turns=True)
    return {
        "padded": collate(parts.samples(), 0),
        "packed": pack(parts.samples(), 0, max_tokens=200),
        "isolated": collate([parts.sample("all", *TURNS, of=isolating), parts.sample("one", *TURNS[:1])], 0),
    }


class HostReads(TorchDispatchMode):
    """Collects the operations whose result depends on values: for these a program waits for its GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []
        self.of_transformers: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
        if func.overloadpacket is torch.ops.aten.index:  # by numbers, unless one of the indices is a mask
            reads = any(index is not None and index.dtype == torch.bool for index in args[1])
        if reads:
            in_library = any(Path(frame.filename).name == "masking_utils.py" for frame in traceback.extract_stack())
            (self.of_transformers if in_library else self.ours).append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_read_nothing_back_from_the_device(family, attention):
    """Transformers looks whether rows without a mask are packed, once for each kind of attention layer."""
    model = TrainingModel(parts.model(family=family, attention=attention).train())
    for name, batch in batches_of_each_kind().items():
        moved = batch.to("cpu")
        with HostReads() as reads:
            model(moved).backward()
        assert not reads.ours, name
        allowed = 0 if batch.has_structure else len(model.model.language_model.attention_kinds())
        assert len(reads.of_transformers) <= allowed, name


@pytest.mark.parametrize("kind", ["pool", "prefix", "qformer"])
@pytest.mark.parametrize("trainable", [["llama_proj"], ["llama_proj", "vision_encoder", "lora"]])
def test_encoder_resampler_adapters_and_validation_read_nothing_either(kind, trainable):
    model = parts.model(kind=kind, trainable=trainable).train()
    text = [parts.sample("none?", *TURNS, images=0)]
    for batch in (collate(parts.samples(), 0).to("cpu"), collate(text, 0).to("cpu")):
        with HostReads() as reads:
            TrainingModel(model)(batch).backward()
            model.losses_per_sample(batch)
        assert not reads.ours


@pytest.mark.parametrize("trainable", [["llama_proj"], ["vision_encoder"], ["llama_proj", "lora"], ["language_model"]])
def test_a_batch_without_an_image_gives_zero_gradients_to_what_it_does_not_reach(trainable):
    model = parts.model(trainable=trainable)
    batch = collate([parts.sample("none?", ("Say hello.", "Hello!"), images=0)], 0)
    loss = TrainingModel(model)(batch)
    loss.backward()
    with torch.no_grad():
        assert torch.equal(loss.detach(), model(batch))
    for name, parameter in model.named_parameters():
        in_front = not name.startswith("language_model.")
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or not in_front or not parameter.grad.any(), name


def test_a_batch_with_an_image_is_computed_as_the_model_computes_it():
    one, other = parts.model(), parts.model()
    batch = collate(parts.samples(), 0)
    TrainingModel(one)(batch).backward()
    other(batch).backward()
    assert torch.equal(one.llama_proj.weight.grad, other.llama_proj.weight.grad)
    assert not one.language_model._forward_pre_hooks


def test_a_moved_batch_brings_its_positions_along_and_a_changed_one_does_not():
    batch = collate(parts.samples(), 0)
    moved = batch.to("meta")
    assert moved.supervised_positions.shape == batch.supervised_positions.shape == (batch.num_supervised,)
    assert torch.equal(batch.image_mask.flatten().nonzero()[:, 0], batch.image_positions)
    blank = dataclasses.replace(batch, image_mask=torch.zeros_like(batch.image_mask))
    assert not len(blank.image_positions)


def test_an_error_in_reading_ahead_waits_for_the_step_that_needs_the_batches():
    batch = collate(parts.samples(), 0)

    def stream() -> Iterator[Batch]:
        yield from [batch] * 4
        raise DataError("no more")

    speed = Speed(torch.device("cpu"))
    batches = StepBatches(stream(), 2, torch.device("cpu"), speed)
    assert len(next(batches)) == 2
    batches.read_ahead()
    assert len(next(batches)) == 2
    batches.read_ahead()
    with pytest.raises(DataError, match="no more"):
        next(batches)
    assert speed.waited > 0


def test_a_line_of_metrics_has_speed_and_memory(tiny_values, tmp_path):
    train(tiny_values, tmp_path / "run", total_steps=6, log_every_steps=3, global_batch_size=8, batch_size_per_rank=4)
    first, *lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6]
    for line, steps in ((first, 1), (lines[0], 2), (lines[1], 3)):
        assert line["samples_per_second"] * line["seconds"] == pytest.approx(8 * steps, rel=0.05)
        assert line["tokens_per_second"] > 10 * line["samples_per_second"]  # the rows are longer than ten tokens
        assert 0 < line["data_wait"] <= 1
        assert 0.05 < line["rss_gb"] < 100
        assert line["mfu"] is line["peak_memory_gb"] is None  # not known for a CPU


def test_mfu_is_the_operations_of_a_step_over_what_the_devices_can_do(tiny_values, tmp_path, monkeypatch):
    monkeypatch.setitem(devices.PEAK_FLOPS, "cpu", 1e6)
    batch, speed = collate(parts.samples(), 0), Speed(torch.device("cpu"), ranks=2)
    with speed.measure(batch):
        torch.ones(10, 20, requires_grad=True).matmul(torch.ones(20, 30)).sum().backward()
    assert speed.flops_per_position * batch.input_ids.numel() == 2 * (2 * 10 * 20 * 30)
    speed.positions = 5 * batch.input_ids.numel()
    speed.started -= 10
    assert speed.metrics()["mfu"] == pytest.approx(5 * 24000 / 10 / 1e6 / 2, rel=0.1)
    train(tiny_values, tmp_path / "run", total_steps=2)
    assert all(line["mfu"] > 0 for line in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 9.89e14),
        ("NVIDIA H100 PCIe", 7.56e14),
        ("NVIDIA A100-SXM4-80GB", 3.12e14),
        ("NVIDIA GeForce RTX 4090", 1.65e14),
        ("NVIDIA L4", 1.21e14),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(name, peak):
    assert peak_flops(name) == peak
