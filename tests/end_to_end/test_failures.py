"""What ends a run from outside: data workers that are killed or hang, no login, a read-only disk, data that is gone."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minigpt4.batch import Batch
from minigpt4.config.sections import TrackingConfig
from minigpt4.errors import ConfigError, DataError, TrainingError
from minigpt4.runners import metrics
from minigpt4.runners.state import Progress
from tests.conftest import read_metrics
from tests.runners.parts import start_command, train, write

pytestmark = pytest.mark.slow

CASES = Path(__file__).parents[1] / "data" / "cases"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "ended unexpectedly"),
        pytest.param(signal.SIGSTOP, r"delivered nothing for \d+ s", marks=pytest.mark.long),
    ],
)
def test_a_data_worker_that_is_killed_or_hangs_ends_the_run(tiny_values, tmp_path, number, message):
    run = {"total_steps": 5000, "num_workers": 1, "collective_timeout_seconds": 30}

    def harm() -> None:
        folder = tmp_path / "run" / "metrics.jsonl"
        while not folder.exists():
            time.sleep(0.05)
        for child in multiprocessing.active_children():
            if child.pid not in before:
                os.kill(child.pid or 0, number)

    before = {child.pid for child in multiprocessing.active_children()}
    threading.Thread(target=harm, daemon=True).start()
    with pytest.raises(DataError, match=message):
        train(tiny_values, tmp_path / "run", **run)
    assert not [c for c in multiprocessing.active_children() if c.pid not in before]


def test_wandb_without_a_login_is_refused_before_the_model_is_loaded(tiny_values, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    tiny_values["tracking"] = {"wandb": True}
    tiny_values["model"]["language_model"]["dtype"] = "bfloat16"
    with pytest.raises(ConfigError, match=r"tracking\.wandb: there is no login"):
        train(tiny_values, tmp_path / "run")
    assert not (tmp_path / "run" / metrics.FILE).exists()
    monkeypatch.setenv("WANDB_MODE", "offline")  # what the message advises helps in the same process
    assert metrics.wanted_trackers(TrackingConfig(wandb=True)) == ["wandb"]


def test_what_a_kill_between_two_renames_left_is_repaired(tiny_values, tmp_path):
    train(tiny_values, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step_2")
    (checkpoints / ".latest.partial").symlink_to("step_4")
    (checkpoints / ".step_5.partial").mkdir()
    process = start_command(["--cfg-path", str(write(tiny_values, tmp_path / "run", resume=True))])
    process.join(240)
    assert process.exitcode == 0
    assert (checkpoints / "latest").resolve().name == "step_4"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "step_2", "step_4"]


def test_rows_whose_images_are_not_read_end_the_command_with_one_message(tiny_values, tmp_path):
    case = CASES / "02_image_under_another_key"
    source = {"type": "conversations", "path": str(case / "rows.jsonl"), "image_dir": str(case / "images")}
    tiny_values["datasets"] = {"train": {"d": source}}
    command = [sys.executable, "-m", "minigpt4", "train", "--cfg-path", str(write(tiny_values, tmp_path / "run"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1
    assert "none of the 4 rows has an image; found the unknown keys 'image_path'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system that cannot be written")
def test_a_folder_that_cannot_be_written_is_found_before_anything_is_loaded(tiny_values, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], check=False).returncode:
        pytest.skip("cannot mount")
    llm = tiny_values["model"]["language_model"]
    llm["path"] = str(shutil.copytree(llm["path"], tmp_path / "llm"))
    (tmp_path / "llm" / "model.safetensors").write_bytes(b"damaged")  # an error, if it were loaded
    try:
        with pytest.raises(ConfigError, match=r"run\.output_dir: .*disk/run cannot be written: Read-only file system"):
            train(tiny_values, tmp_path / "run", output_dir=str(disk / "run"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_images_that_vanish_while_a_run_reads_them_are_counted_until_too_many_are_gone(tiny_values, pairs, tmp_path):
    copy = tmp_path / "pairs"
    shutil.copytree(pairs, copy)
    tiny_values["datasets"]["train"]["pairs"]["path"] = str(copy)

    def remove_images() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.01)
        shutil.rmtree(copy / "image")

    threading.Thread(target=remove_images).start()
    with pytest.raises((DataError, TrainingError), match=r"had to be skipped \(.*image|not found"):
        train(tiny_values, tmp_path / "run", total_steps=5000)


def test_cut_answers_are_counted_in_the_metrics(tiny_values, tmp_path):
    tiny_values["conversation"]["max_answer_tokens"] = 3
    train(tiny_values, tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["altered/answer cut to max_answer_tokens"] == 16
    assert "samples altered: 16 (answer cut to max_answer_tokens: 16)" in (tmp_path / "run" / "log.txt").read_text()


def test_counts_of_an_earlier_version_are_read_and_what_is_altered_is_summed_up():
    earlier = {"step": 3, "batches": 3, "samples": 9, "tokens": 4, "skipped": {"image": 2}, "nonfinite_steps": 0}
    progress = Progress.from_dict(earlier)
    progress.check_learning(3, expects_images=True)
    progress.altered["answer cut"] += 1
    assert Progress.from_dict(progress.to_dict()) == progress
    assert "samples skipped: 2 (image: 2); samples altered: 1 (answer cut: 1)" in progress.summary()
    assert Batch.__dataclass_fields__["altered"].default_factory is dict
