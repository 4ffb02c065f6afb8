"""The contracts of pyproject.toml (`[tool.importlinter]`): the package keeps them, and each of them can be broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]

BROKEN = {
    "a floor above": ("Floors", "datasets/planted.py", "from minigpt4.chat import engine\n"),
    "a floor above, in a function": ("Floors", "datasets/planted.py", "def f():\n    import minigpt4.cli\n"),
    "a floor above, through the public names": ("Floors", "weights.py", "from minigpt4 import load_model\n"),
    "a sibling": ("Floors", "datasets/planted.py", "from ..models import splice\n"),
    "a module without a floor": ("Floors", "planted.py", ""),
    "a cycle": ("Cycles", "batch.py", "from .demo import page\n"),
    "heavy": ("Light", "config/sections.py", "import torch\n"),
    "heavy, through another module": ("Light", "errors.py", "from minigpt4.models import vision\n"),
    "away from home": ("Homes", "runners/planted.py", "from yaml import dump\n"),
    "a library without a home": ("Homes", "models/planted.py", "import torchvision\n"),
    "a script": ("Homes", "cli/planted.py", "import demo\n"),
}
"""What is wrong: the contract that says so, the file it is written to, the line that is added."""


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "COLUMNS": "200"}
    return subprocess.run(LINT, cwd=root, env=environment, capture_output=True, text=True)


def test_the_package_keeps_every_contract() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_contract_is_found(case: str, tmp_path: Path) -> None:
    contract, name, line = BROKEN[case]
    shutil.copytree(ROOT / "minigpt4", tmp_path / "minigpt4", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "minigpt4" / name).open("a", encoding="utf-8") as file:
        file.write(line)
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [text.partition(":")[0] for text in done.stdout.splitlines() if " BROKEN" in text]
    assert contract in broken
    assert Path(name).stem in done.stdout.partition("Broken contracts")[2]
