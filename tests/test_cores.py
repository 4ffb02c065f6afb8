"""How many cores are free, and what a short command makes of it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minigpt4.cores import CpuTimes, cpu_times, free_cores, usable_cores

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("idle", "own", "free"), [(0.0, 0.0, 1), (0.0, 2.0, 1), (2.0, 2.0, 2), (6.0, 2.0, 4), (30.0, 2.0, 4), (1.0, 1.4, 1)]
)
def test_a_core_is_free_if_it_is_idle_or_ours(idle, own, free):
    """Two seconds on four cores."""
    assert free_cores(CpuTimes(10, 5, 100), CpuTimes(10 + idle, 5 + own, 102), usable=4) == free


def test_without_counters_or_time_nothing_is_known(tmp_path):
    assert cpu_times(tmp_path / "gone") is None
    (tmp_path / "stat").write_text("cpu  1 2\n")
    assert cpu_times(tmp_path / "stat") is None
    assert free_cores(None, CpuTimes(1, 1, 1), 4) is None
    assert free_cores(CpuTimes(1, 1, 1), CpuTimes(1, 1, 1.01), 4) is None


def _spin() -> None:
    while True:
        pass


@pytest.mark.skipif(cpu_times() is None, reason="the system has no counters of its cores")
def test_cores_that_others_use_are_not_free():
    spinning = [multiprocessing.get_context("fork").Process(target=_spin, daemon=True) for _ in range(usable_cores())]
    for process in spinning:
        process.start()
    try:
        before = cpu_times()
        time.sleep(0.6)
        assert free_cores(before, cpu_times(), usable_cores()) == 1
    finally:
        for process in spinning:
            process.kill()


@pytest.mark.parametrize(
    "arguments", [["inspect", "gone"], ["plan", "gone"], ["chat", "--cfg-path", "gone"]], ids=" ".join
)
def test_verbs_that_end_the_process_at_once_keep_their_status_and_their_output(arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "minigpt4", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
