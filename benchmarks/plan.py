"""Peak memory as `plan` says it before a run, and as the run measures it: one JSON line for each configuration.

    python benchmarks/plan.py [--threads 1] [--limit 0.15]

Trains the mini model (`python -m minigpt4 assets mini`) for two steps on the CPU, in three configurations, each in a
process of its own, after its plan. `measured_gib` is the most memory that the process held (`rss_gb` of the metrics).
The exit status is 1 if a plan is further from the measurement than `--limit`, as a share.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GIB = 2**30
COMMON = ["run.device=cpu", "run.total_steps=2", "run.validation_samples=2", "model.init_from=''"]
CONFIGURATIONS = {
    "stage 1, batch of 32": ["mini_stage1"],
    "stage 1, activations recomputed": ["mini_stage1", "run.gradient_checkpointing=true"],
    "stage 2, batch of 12 rows of several turns": ["mini_stage2_long"],
}


def main() -> None:
    """Plan, run and compare each configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=0.15)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "passive"}
    found = [compare(name, *words) for name, words in CONFIGURATIONS.items()]
    sys.exit(any(abs(row["plan_over_measured"] - 1) > arguments.limit for row in found))


def compare(name: str, config: str, *options: str) -> dict[str, Any]:
    """Return the planned and the measured memory of a configuration, and print them."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        given = [*COMMON, *options, f"run.output_dir={run}"]
        plan = json.loads(minigpt4("plan", config, "--json", "--options", *given))
        minigpt4("train", "--cfg-path", config, "--options", *given)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = max(line["rss_gb"] for line in lines if "rss_gb" in line) * 1e9
    row = {
        "name": name,
        "plan_gib": round(plan["peak_bytes"] / GIB, 2),
        "measured_gib": round(measured / GIB, 2),
        "plan_over_measured": round(plan["peak_bytes"] / measured, 3),
    }
    print(json.dumps(row), flush=True)
    return row


def minigpt4(*arguments: str) -> str:
    """Run a verb and return what it prints."""
    command = [sys.executable, "-m", "minigpt4", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
