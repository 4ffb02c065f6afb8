"""Checkpoint folders on disk: complete or absent, the newest is found, the last few are kept."""

from __future__ import annotations

import time

import pytest
import torch

from minigpt4.checkpoints.manifest import Manifest
from minigpt4.checkpoints.store import CheckpointStore, read_state, read_trained
from minigpt4.errors import CheckpointError
from tests.checkpoints.parts import TENSORS, manifest, save, save_forever, state
from tests.runners.parts import PROCESSES


def test_what_is_saved_is_read(tmp_path):
    path = save(tmp_path, 5)
    assert CheckpointStore(tmp_path).latest() == path == (tmp_path / "latest").resolve()
    assert Manifest.read(path) == manifest(5)
    assert all(torch.equal(read_trained(path, manifest(5))[name], tensor) for name, tensor in TENSORS.items())
    assert read_state(path) == state(5)


def test_killed_at_any_instant_of_writing_the_latest_is_usable(tmp_path):
    """The writer only writes, so every kill interrupts a write."""
    interrupted = 0
    for n in range(6):
        latest = CheckpointStore(tmp_path).latest()
        first = int(latest.name.removeprefix("step_")) + 1 if latest else 1
        writer = PROCESSES.Process(target=save_forever, args=(tmp_path, first))
        writer.start()
        while not ((tmp_path / f"step_{first}").exists() and (tmp_path / "latest").exists()):
            time.sleep(0.001)  # the first `latest` is there an instant after its checkpoint
        time.sleep(0.005 * n)
        writer.kill()
        writer.join()
        interrupted += bool(list(tmp_path.glob(".*.partial")))
        latest = CheckpointStore(tmp_path).latest()
        for path in (latest, (tmp_path / "latest").resolve()):
            found = Manifest.read(path)
            assert read_trained(path, found)["llama_proj.weight"].shape == (1000, 1000)
            assert read_state(path)["progress"]["step"] == found.step
    assert interrupted


def test_leftovers_of_a_kill_are_not_checkpoints_and_are_removed_by_the_next_save(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step_2.partial").mkdir()
    (tmp_path / "step_9").mkdir()  # without a manifest
    assert CheckpointStore(tmp_path).latest() == tmp_path / "step_1"
    save(tmp_path, 2)
    assert not (tmp_path / ".step_2.partial").exists()


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_10", "step_100"]


def test_an_error_of_the_disk_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "file" / "checkpoints", 1)
