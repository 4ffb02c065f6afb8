"""The script that converts BLIP's caption lists for img2dataset."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "dataset" / "to_tsv.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["to_tsv.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code


def test_rows_become_two_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "list.json", tmp_path / "out.tsv"
    source.write_text('[{"url": "u1", "caption": "a\\n b"}, {"url": "u2"}, 3, {"url": "u3", "caption": "c"}]')
    assert run(monkeypatch, str(source), str(target)) == 0
    assert "2 pairs written" in capsys.readouterr().out
    assert target.read_bytes().splitlines() == [b"url\tcaption", b"u1\ta b", b"u3\tc"]


def test_a_damaged_list_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text('[{"url": "u1", "caption": "a"},\n{"url"')
    assert run(monkeypatch, str(tmp_path / "list.json"), str(tmp_path / "out.tsv")) == 1
    assert "line 2: not valid JSON" in capsys.readouterr().err
