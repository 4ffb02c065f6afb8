"""`benchmarks/rehearsal.py`: the whole script at the tiny size, in processes of its own as at full size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NEVER_ZERO = (
    "train_total_seconds",
    "train_load_seconds",
    "train_peak_gib",
    "first_loss",
    "chat_load_seconds",
    "chat_tokens_per_second",
    "chat_peak_gib",
)
ROUNDED = ("train_step_seconds", "chat_first_token_seconds")
"""Tenths of a second, of which a tiny model may take none."""


@pytest.mark.long
def test_the_rehearsal_runs_and_prints_what_it_measured(tmp_path):
    command = [sys.executable, "benchmarks/rehearsal.py", str(tmp_path), "--size", "tiny", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"size", "threads", *NEVER_ZERO, *ROUNDED}
    assert all(found[name] > 0 for name in NEVER_ZERO), found
    (run,) = tmp_path.glob("run-*")
    assert (run / "checkpoints" / "step_2" / "model.safetensors").is_file()
