"""Damaged checkpoints: flipped bits are found, values that no training produces are refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4 import load_model
from minigpt4.checkpoints.manifest import WEIGHTS, Manifest
from minigpt4.checkpoints.store import STATE, CheckpointStore, read_state, read_trained
from minigpt4.errors import CheckpointError, MiniGPT4Error
from tests.checkpoints.parts import save
from tests.runners.parts import train

pytestmark = pytest.mark.slow

FLIPS = 150


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.fixture
def checkpoint(tiny_values, tmp_path) -> Path:
    train(tiny_values, tmp_path / "run", total_steps=2)
    return (tmp_path / "run" / "checkpoints" / "latest").resolve()


@pytest.mark.parametrize("name", [WEIGHTS, STATE])
def test_a_flipped_bit_is_found_wherever_it_is(checkpoint, name, record_property):
    record_property("figure: one bit of a checkpoint flipped: refused", FLIPS)
    file = checkpoint / name
    whole, draw = file.read_bytes(), random.Random(0)
    for n in range(FLIPS):  # half of them in the headers, where names, shapes and offsets are
        flip(file, draw.randrange(8 * (len(whole) if n % 2 else 400)))
        with pytest.raises(MiniGPT4Error, match=name):
            read_trained(checkpoint, Manifest.read(checkpoint)) if name == WEIGHTS else read_state(checkpoint)
        file.write_bytes(whole)
    read_trained(checkpoint, Manifest.read(checkpoint))
    read_state(checkpoint)


def test_a_flipped_bit_among_the_weights_is_named_as_damage(checkpoint):
    file = checkpoint / WEIGHTS
    flip(file, 8 * file.stat().st_size - 17)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: damaged, or changed after it was saved: its sha256 is \w+"):
        load_model(checkpoint, device="cpu")


@pytest.mark.parametrize("name", [WEIGHTS, STATE])
def test_a_run_resumes_from_the_checkpoint_before_the_flipped_bit(tmp_path, name, caplog):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    flip(newer / name, 8 * (newer / name).stat().st_size // 2)
    assert CheckpointStore(tmp_path).resumable() == older
    assert f"{name}: damaged" in caplog.text
    assert (tmp_path / "step_2.damaged").is_dir()


def without_checksums(folder: Path) -> Path:
    """Make a checkpoint one of an earlier version."""
    values = json.loads((folder / "manifest.json").read_text())
    del values["checksums"]
    (folder / "manifest.json").write_text(json.dumps(values))
    return folder


def test_a_checkpoint_of_an_earlier_version_still_loads(checkpoint):
    weight = load_model(checkpoint, device="cpu").model.llama_proj.weight
    without_checksums(checkpoint)
    assert torch.equal(load_model(checkpoint, device="cpu").model.llama_proj.weight, weight)
    assert read_state(checkpoint)["progress"]["step"] == 2


VALUES: dict[str, tuple[Any, str]] = {
    "integers": (lambda t: t.int(), r"llama_proj.weight is torch.int32, should be torch.float32"),
    "bools": (lambda t: t > 0, r"llama_proj.weight is torch.bool"),
    "complex numbers": (lambda t: t.to(torch.complex64), r"llama_proj.weight is torch.complex64"),
    "not numbers": (lambda t: t.index_fill(0, torch.tensor([1]), float("nan")), r"has 64 of 2,048 values that are not"),
    "infinite": (lambda t: t / 0, r"llama_proj.weight has 2,048 of 2,048 values that are not finite"),
    "too large": (lambda t: t.double().abs() + 1e300, r"has 2,048 of 2,048 values that are not finite"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_are_not_those_of_a_trained_model_are_refused(checkpoint, kind, tmp_path):
    change, message = VALUES[kind]
    tensors = load_file(checkpoint / WEIGHTS)
    tensors["llama_proj.weight"] = change(tensors["llama_proj.weight"])
    released = tmp_path / "released.pth"
    torch.save({"model": tensors}, released)
    save_file(tensors, without_checksums(checkpoint) / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint, device="cpu")
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint / "config.yaml", [f"model.init_from={released}"], device="cpu")


def test_counters_of_a_trained_encoder_are_integers_and_stay(tiny_values, tmp_path):
    """A batch norm counts its batches in an integer, which is trained state."""
    tiny_values["model"] |= {
        "vision_encoder": {"type": "timm", "name": "test_efficientnet", "weights": "random", "image_size": 64},
        "resampler": {"type": "pool", "grid": 2},
        "trainable": ["llama_proj", "vision_encoder"],
    }
    train(tiny_values, tmp_path / "run", total_steps=1)
    folder = tmp_path / "run" / "checkpoints" / "latest"
    counters = {name for name, tensor in load_file(folder / WEIGHTS).items() if not tensor.is_floating_point()}
    assert counters
    load_model(folder, device="cpu")


def test_a_copied_checkpoint_is_complete(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert set(Manifest.read(tmp_path / "copy").checksums) == {WEIGHTS, STATE}
    load_model(tmp_path / "copy", device="cpu")
