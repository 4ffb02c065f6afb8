"""The parity tests read any reference set, and wrong numbers in a set make them fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import REFERENCE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def other_set(tmp_path: Path) -> Path:
    """A copy of the project's reference set that a test may change."""
    return Path(shutil.copytree(REFERENCE, tmp_path / "reference"))


def run_parity(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run parity test files in a separate process against another set."""
    files = [str(Path("tests", "parity", name)) for name in tests]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, "MINIGPT4_REFERENCE_DIR": str(folder)},
        capture_output=True,
        text=True,
    )


def perturb(file: Path, key: str) -> None:
    """Shift one tensor of a file by one part in a thousand, and a little for zeros."""
    tensors = load_file(file)
    tensors[key] = tensors[key] * 1.001 + 1e-3
    save_file(tensors, file)


@pytest.mark.long
def test_each_perturbed_number_fails_its_own_test(other_set):
    perturb(other_set / "stage2_qformer.safetensors", "out.grad.llama_proj.weight")
    perturb(other_set / "stage2_no_qformer.safetensors", "out.ln_vision")
    perturb(other_set / "chat_qformer.safetensors", "chat.llama2.turn2.context")
    perturb(other_set / "processor.safetensors", "blip2_image_eval_56")
    meta = json.loads((other_set / "meta.json").read_text())
    meta["tokenizer"]["###"] = [1]
    meta["lr"]["stage2"]["values"]["500"] *= 1.001
    (other_set / "meta.json").write_text(json.dumps(meta))
    run = run_parity(other_set, "test_training.py", "test_chat.py", "test_small_numbers.py")
    assert run.returncode == 1
    assert "6 failed" in run.stdout, run.stdout


@pytest.mark.long
def test_perturbed_weights_fail_every_case_of_their_model(other_set):
    perturb(other_set / "weights_qformer.safetensors", "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight")
    run = run_parity(other_set, "test_training.py", "test_chat.py")
    assert run.returncode == 1
    assert "7 failed, 1 passed" in run.stdout, run.stdout


@pytest.mark.long
def test_a_smaller_set_runs_what_it_has(other_set):
    meta = json.loads((other_set / "meta.json").read_text())
    meta["cases"] = {name: case for name, case in meta["cases"].items() if not name.startswith("conversation")}
    del meta["chat"], meta["captions"]
    (other_set / "meta.json").write_text(json.dumps(meta))
    (other_set / "weights_no_qformer.safetensors").unlink()
    run = run_parity(other_set, "test_training.py", "test_chat.py", "test_small_numbers.py")
    assert run.returncode == 0, run.stdout
    assert "skipped" in run.stdout
