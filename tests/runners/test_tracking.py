"""Trackers besides metrics.jsonl: opt-in, and an error where they cannot be had."""

from __future__ import annotations

import shutil
import sys
import time

import pytest

from minigpt4.config.sections import TrackingConfig
from minigpt4.errors import MissingDependencyError
from minigpt4.runners.metrics import wanted_trackers
from tests.runners.parts import train

pytestmark = pytest.mark.slow


def test_tensorboard_writes_its_files_into_the_run_folder(tiny_values, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_values["tracking"] = {"tensorboard": True}
    train(tiny_values, tmp_path / "run")
    events = next((tmp_path / "run").rglob("events.out.tfevents.*"))
    found = EventAccumulator(str(events.parent))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4]


def test_wandb_offline_writes_into_the_run_folder(tiny_values, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    tiny_values["tracking"] = {"wandb": True, "project": "probe"}
    train(tiny_values, tmp_path / "run", total_steps=2)
    time.sleep(1.1)  # wandb names a folder by the second
    train(tiny_values, tmp_path / "run", resume=True)
    files = list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.stem for file in files}) == 1, "a resumed run is the same run at wandb"
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(tiny_values, tmp_path / "run", total_steps=1)
    files = list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert len({file.stem for file in files}) == 2, "one that begins anew is another"
    assert not (tmp_path / "wandb").exists()


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # a folder of its runs in the working directory is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    with pytest.raises(MissingDependencyError, match=r"tracking\.wandb needs the package 'wandb': pip install"):
        wanted_trackers(TrackingConfig(wandb=True))
    with pytest.raises(MissingDependencyError, match=r"tracking\.tensorboard needs the package 'tensorboard'"):
        wanted_trackers(TrackingConfig(tensorboard=True))
    assert wanted_trackers(TrackingConfig()) == []
