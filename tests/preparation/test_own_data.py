"""The page docs/own_data.md, done as it says: rows written, checked, and trained on without any Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.cli import main
from tests.conftest import read_metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[::-1])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the rows of the page and their images; it is the current one."""
    (tmp_path / "mine" / "images").mkdir(parents=True)
    for n, colour in enumerate(("red", "blue")):
        Image.new("RGB", (80, 60), colour).save(tmp_path / "mine" / "images" / f"{n}.png")
    (tmp_path / "mine" / "rows.jsonl").write_text(BLOCKS["json"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.mini
@pytest.mark.slow
def test_the_rows_of_the_page_are_valid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "validate", "mine/rows.jsonl", "--cfg-path", "mini"]) == 0
    assert "rows.jsonl (conversations): 2 rows, 2 usable" in capsys.readouterr().out
    assert main(["data", "preview", "mine/rows.jsonl", "--out", "sheet.html"]) == 0
    assert "A red circle on a white ground." in (folder / "sheet.html").read_text()
    (folder / "mine" / "images" / "1.png").unlink()
    assert main(["data", "validate", "mine/rows.jsonl"]) == 1
    shown = capsys.readouterr()
    assert "mine/rows.jsonl:2: image 'mine/images/1.png' not found; see image_dir" in shown.out
    assert "1 errors in the data" in shown.err


@pytest.mark.mini
@pytest.mark.long
def test_the_config_of_the_page_trains(folder: Path) -> None:
    config = folder / "mine.yaml"
    config.write_text(BLOCKS["yaml"].replace("extends: ", f"extends: {ROOT}/eval_configs/"))
    assert main(["train", "--cfg-path", str(config), "--options", "run.total_steps=2"]) == 0
    assert read_metrics(folder / "output" / "mine")[-1]["step"] == 2
