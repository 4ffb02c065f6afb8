"""A config is typed, and reading one is light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "timm", "numpy", "PIL", "wandb", "webdataset", "gradio", "accelerate")


@pytest.mark.long
@pytest.mark.slow
def test_a_misspelt_key_fails_the_type_checker(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from minigpt4 import load_config\n"
        "config = load_config('mini')\n"
        "reveal_type(config.run)\n"
        "config.run.total_stepz\n"
        "config.rum\n"
        "steps: int = config.run.total_steps\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(script)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert 'Revealed type is "minigpt4.config.sections.RunConfig"' in found
    assert '"RunConfig" has no attribute "total_stepz"; maybe "total_steps"?' in found
    assert '"Config" has no attribute "rum"' in found
    assert "Found 2 errors" in found


def test_reading_a_config_imports_no_heavy_library() -> None:
    script = f"import sys; from minigpt4 import load_config; load_config('mini'); print(*sys.modules.keys() & {HEAVY})"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
