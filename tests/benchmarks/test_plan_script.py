"""The plan's peak memory is within 15 % of the measured one, for three configurations on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.mini
@pytest.mark.long
def test_planned_memory_is_near_the_measured_one():
    done = subprocess.run(
        [sys.executable, "benchmarks/plan.py", "--limit", "0.15"], cwd=ROOT, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 3, done.stderr
    assert done.returncode == 0, rows
