"""Training and chat on one NVIDIA GPU, as the same code runs on a CPU everywhere else; skipped without one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minigpt4 import Chat, load_model
from tests.conftest import read_metrics
from tests.runners.parts import losses, series, train, write

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def values(tiny_values: dict[str, Any]) -> dict[str, Any]:
    return {**tiny_values, "run": {**tiny_values["run"], "device": "cuda", "precision": "fp32"}}


def test_float32_training_is_that_of_the_cpu(values, tmp_path):
    train(values, tmp_path / "gpu")
    train(values, tmp_path / "cpu", device="cpu")
    assert torch.allclose(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), rtol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "auto"])
def test_the_loss_falls_in_half_precision(values, tmp_path, precision):
    train(values, tmp_path / "run", precision=precision, total_steps=40, save_every_steps=0)
    falling = losses(tmp_path / "run")
    assert falling[-8:].mean() < falling[:3].mean() - 0.3


def test_lines_of_metrics_have_the_device_memory_and_the_speed(values, tmp_path):
    train(values, tmp_path / "run", precision="bf16")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["peak_memory_gb"] > 0
    assert last["samples_per_second"] > 0
    assert last["tokens_per_second"] > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_continues_as_if_it_had_not_stopped(values, tmp_path, workers):
    settings = {"precision": "bf16", "num_workers": workers, "total_steps": 6, "save_every_steps": 3}
    run = tmp_path / "run"
    train(values, run, **settings)
    whole = losses(run)
    shutil.rmtree(run / "checkpoints" / "step_6")
    (run / "checkpoints" / "latest").unlink()
    command = [sys.executable, str(ROOT / "train.py"), "--cfg-path", str(write(values, run, resume=True, **settings))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in (run / "log.txt").read_text()
    assert len(losses(run)) == 6
    assert torch.allclose(losses(run), whole, rtol=2e-2)


def test_one_rank_by_torchrun_with_a_sharded_language_model_asked_for(values, tmp_path):
    file = write(values, tmp_path / "run", precision="bf16", shard_language_model=True, gradient_checkpointing=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run([*command, str(ROOT / "train.py"), "--cfg-path", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(series(tmp_path / "run")) == 4


def test_chat_on_the_gpu_gives_the_answers_of_the_cpu(values, tmp_path):
    train(values, tmp_path / "run", total_steps=8, save_every_steps=0)
    checkpoint = tmp_path / "run" / "checkpoints" / "latest"
    picture = Image.new("RGB", (60, 40), (220, 30, 30))
    answers = []
    for device in ("cpu", "cuda"):
        session = Chat(load_model(checkpoint, device=device)).session(images=[picture])
        answers.append([session.ask("What is it?"), session.ask("And now?")])
    assert answers[0] == answers[1]


def test_a_checkpoint_of_the_gpu_loads_on_the_cpu(values, tmp_path):
    trained = train(values, tmp_path / "run").model
    loaded = load_model(tmp_path / "run" / "checkpoints" / "latest", device="cpu").model
    assert torch.equal(trained.llama_proj.weight.detach().cpu(), loaded.llama_proj.weight)


def test_caption_runs_on_it(values, tmp_path):
    train(values, tmp_path / "run")
    (tmp_path / "images").mkdir()
    for n in range(3):
        Image.new("RGB", (50, 50 + n), (10, 200, 60)).save(tmp_path / "images" / f"{n}.png")
    command = [sys.executable, "-m", "minigpt4", "caption", "--device", "cuda", "--images", str(tmp_path / "images")]
    command += ["--cfg-path", str(tmp_path / "run" / "checkpoints" / "latest"), "--out", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len([row for row in rows if row.get("caption") is not None]) == 3
