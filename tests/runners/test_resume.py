"""A run killed and resumed is the run that was never killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.errors import CheckpointError, ConfigError
from tests.conftest import read_metrics
from tests.runners.parts import series, start_command, train, weights, write

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def train_through_kills(file: Path, folder: Path, generator: random.Random, longest: float) -> int:
    """Start the run again and again, each time killed at a random instant, until it ends; return the kills."""
    kills = 0
    while True:
        process = start_command(["--cfg-path", str(file), "--options", "run.resume=true"])
        metrics = folder / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        deadline = time.monotonic() + 30
        while process.is_alive() and time.monotonic() < deadline:  # let it get to its steps
            if metrics.exists() and metrics.stat().st_mtime_ns != before and metrics.stat().st_size:
                break
            time.sleep(0.002)
        # The first two come soon, so that a fast run does not end first; a slow one needs longer between checkpoints.
        process.join(generator.uniform(0, min(longest, 0.05) if kills < 2 else longest * 1.1**kills))
        if not process.is_alive():
            assert process.exitcode == 0
            return kills
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        assert kills < 60


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_at_random_and_resumed_it_is_the_same_run(tiny_values, tmp_path, seed):
    """With accumulation, saves out of step with the log, and samples that are skipped."""
    rows = [{"image": f"{n}.jpg", "caption": f"row {n}"} for n in range(9)] + [{"image": "none.jpg", "caption": "x"}]
    data = Path(tiny_values["datasets"]["train"]["pairs"]["path"]) / "image"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    more = {"type": "conversations", "path": str(tmp_path / "rows.json"), "image_dir": str(data), "weight": 0.5}
    tiny_values["datasets"]["train"]["more"] = more
    run = {
        "total_steps": 40,
        "global_batch_size": 4,
        "batch_size_per_rank": 2,
        "log_every_steps": 3,
        "save_every_steps": 4,
        "max_skipped_fraction": 0.5,
    }
    train(tiny_values, tmp_path / "whole", **run)
    file = write(tiny_values, tmp_path / "killed", **run)
    whole_seconds = sum(line.get("seconds", 0.0) for line in read_metrics(tmp_path / "whole"))
    kills = train_through_kills(file, tmp_path / "killed", random.Random(seed), longest=whole_seconds / 4)
    assert kills >= 2
    assert series(tmp_path / "killed") == series(tmp_path / "whole")
    skips = [
        [line["skipped/missing image"] for line in read_metrics(tmp_path / name)][-1] for name in ("whole", "killed")
    ]
    assert skips[0] == skips[1] > 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)


def descendants(pid: int) -> list[int]:
    """Return the processes that `pid` started, and those that they did."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks into /proc")
def test_killed_with_two_workers_and_accumulation_as_a_user_would_run_it(tiny_values, tmp_path):
    run = {"total_steps": 60, "batch_size_per_rank": 1, "global_batch_size": 3, "num_workers": 2, "save_every_steps": 7}
    train(tiny_values, tmp_path / "whole", **run)
    file = write(tiny_values, tmp_path / "killed", **run)
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--cfg-path", file], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / "checkpoints" / "latest").exists():
        time.sleep(0.005)
    helpers = descendants(process.pid)
    assert len(helpers) >= 3  # the fork server and two workers
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while (left := [pid for pid in helpers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, "a killed run must leave no process behind"
    at = read_metrics(tmp_path / "killed")[-1]["step"]
    assert 7 <= at < 60
    train(tiny_values, tmp_path / "killed", **run, resume=True)
    assert series(tmp_path / "killed") == series(tmp_path / "whole")


def test_random_numbers_go_on_too(tiny_values, tmp_path):
    """Dropout inside LoRA draws from the generator that a checkpoint saves; and a copied run has no link `latest`."""
    pytest.importorskip("peft")
    tiny_values["model"]["trainable"] = ["llama_proj", "lora"]
    tiny_values["model"]["language_model"]["lora"] = {"rank": 2, "dropout": 0.5}
    train(tiny_values, tmp_path / "whole", total_steps=6)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_6")
    train(tiny_values, tmp_path / "again", total_steps=6, resume=True)
    assert series(tmp_path / "again") == series(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "again", "step_6")
    assert any("lora" in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_resumed_does_nothing(tiny_values, tmp_path):
    tiny_values["datasets"]["validation"] = tiny_values["datasets"]["train"]
    train(tiny_values, tmp_path / "run", total_steps=5)
    watched = [tmp_path / "run" / "metrics.jsonl", tmp_path / "run/checkpoints/step_5/model.safetensors"]
    before = [(file.read_bytes(), file.stat().st_ino) for file in watched[1:]], watched[0].read_bytes()
    process = start_command(["--cfg-path", str(write(tiny_values, tmp_path / "run", total_steps=5, resume=True))])
    process.join(60)
    assert process.exitcode == 0
    assert ([(file.read_bytes(), file.stat().st_ino) for file in watched[1:]], watched[0].read_bytes()) == before


def test_an_existing_run_is_refused_unless_it_is_to_be_resumed(tiny_values, tmp_path):
    train(tiny_values, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"already holds a run, up to step_4: pass --options run\.resume=true"):
        train(tiny_values, tmp_path / "run")


def test_resume_without_a_run_starts_one(tiny_values, tmp_path):
    train(tiny_values, tmp_path / "run", resume=True)
    assert len(read_metrics(tmp_path / "run")) == 4


def test_lines_of_a_run_killed_before_its_first_checkpoint_do_not_stay(tiny_values, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 99.0}\n{"step": 2, "lo')
    train(tiny_values, tmp_path / "run")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_line_cut_in_half_is_written_anew(tiny_values, tmp_path):
    run = {"total_steps": 6, "save_every_steps": 4}
    train(tiny_values, tmp_path / "run", **run)
    whole = series(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    train(tiny_values, tmp_path / "run", **run, resume=True)
    assert series(tmp_path / "run") == whole


def test_a_run_can_be_made_longer(tiny_values, tmp_path):
    train(tiny_values, tmp_path / "run", total_steps=4)
    train(tiny_values, tmp_path / "run", total_steps=6, resume=True)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("run", "model", "message"),
    [
        ({"num_workers": 2}, {}, r"was read by 1 rank\(s\) with 0 worker\(s\) each, this run has 1 with 2"),
        ({"seed": 7}, {}, r"the config has changed since \(run\.seed\)"),
        ({"group_by_length": 2, "pack": 200}, {}, r"has changed since \(run\.group_by_length, run\.pack\)"),
        ({}, {"trainable": ["llama_proj", "vision_encoder"]}, r"the config has changed since \(model\.trainable\)"),
    ],
)
def test_what_would_change_the_run_is_refused(tiny_values, tmp_path, run, model, message):
    train(tiny_values, tmp_path / "run")
    tiny_values["model"] |= model
    with pytest.raises(CheckpointError, match=message):
        train(tiny_values, tmp_path / "run", **{"total_steps": 8, "resume": True, **run})


def test_another_language_model_is_refused(tiny_values, tmp_path, other_llm):
    train(tiny_values, tmp_path / "run")
    tiny_values["model"]["language_model"]["path"] = str(other_llm)
    with pytest.raises(CheckpointError, match="another language_model"):
        train(tiny_values, tmp_path / "run", total_steps=8, resume=True)


def test_a_checkpoint_without_its_state_or_with_a_damaged_one_says_so(tiny_values, tmp_path):
    train(tiny_values, tmp_path / "run")
    state = tmp_path / "run/checkpoints/step_4/training_state.pt"
    longer: dict[str, Any] = {"total_steps": 8, "resume": True}
    state.write_bytes(state.read_bytes()[:100])
    train(tiny_values, tmp_path / "whole", total_steps=8)
    train(tiny_values, tmp_path / "run", **longer)
    assert series(tmp_path / "run") == series(tmp_path / "whole")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "training_state.pt: damaged" in log
    assert "step_4.damaged and the run continues from step_2" in log
    for state in (tmp_path / "run" / "checkpoints").glob("step_?/training_state.pt"):
        state.unlink()
    with pytest.raises(CheckpointError, match="can be used, but not resumed"):
        train(tiny_values, tmp_path / "run", **{**longer, "total_steps": 9})


def test_only_the_last_few_checkpoints_stay_and_what_a_kill_left_goes(tiny_values, tmp_path):
    left = tmp_path / "run" / "checkpoints" / ".step_3.partial"
    left.mkdir(parents=True)
    (left / "manifest.json").write_text("{")
    train(tiny_values, tmp_path / "run", total_steps=7, save_every_steps=1, keep_last=2)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step_6", "step_7"]


def test_a_resumed_run_keeps_the_attention_that_the_first_one_chose(tiny_values, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(tiny_values, tmp_path / "run", total_steps=2, measure_attention=True)
    chosen = torch.load(tmp_path / "run/checkpoints/step_2/training_state.pt", weights_only=True)["attention"]
    assert set(chosen) == {"language_model", "vision_encoder"}
    assert f"attention, by measurement: language_model {chosen['language_model']}" in caplog.text
    swapped = {"sdpa": "eager", "eager": "sdpa"}
    _change_state(tmp_path / "run/checkpoints/step_2", attention={part: swapped[k] for part, k in chosen.items()})
    loaded = train(tiny_values, tmp_path / "run", total_steps=4, resume=True, measure_attention=True)
    assert loaded.model.language_model.model.config._attn_implementation == swapped[chosen["language_model"]]


def test_a_run_stopped_inside_a_group_resumes_as_the_same_run(tiny_values, tmp_path):
    run: dict[str, Any] = {"group_by_length": 3, "batch_size_per_rank": 2, "global_batch_size": 2}
    run |= {"save_every_steps": 1, "min_learning_rate": 0.01}  # a constant rate, whatever the number of steps
    train(tiny_values, tmp_path / "whole", **run, total_steps=7)
    for end in (2, 4, 7):
        train(tiny_values, tmp_path / "parted", **run, total_steps=end, resume=True)
    assert [line[1] for line in series(tmp_path / "parted")] == [line[1] for line in series(tmp_path / "whole")]


def _change_state(checkpoint: Path, **values: Any) -> None:
    """Change values of a saved training state; folders without checksums are those of earlier versions."""
    file, manifest = checkpoint / "training_state.pt", checkpoint / "manifest.json"
    torch.save({**torch.load(file, weights_only=True), **values}, file)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "checksums": {}}))
