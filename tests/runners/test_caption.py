"""`caption`: every image one line, in order, whatever is wrong with it and whenever the job is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.checkpoints.assemble import LoadedModel, load_model
from minigpt4.cli import main
from minigpt4.errors import DataError
from minigpt4.runners.caption import CaptionCount, CaptionRunner

PROMPT = "What is this?"


@pytest.fixture
def loaded(tiny_values, write_config) -> LoadedModel:
    return load_model(write_config(tiny_values), device="cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven images, one of them in a folder of its own, two of them bad, and a file that is none."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for n, name in enumerate(["c.png", "a.jpg", "B.PNG", "more/d.webp", "e é.png"]):
        Image.effect_noise((30 + n, 20), 60 + 20 * n).convert("RGB").save(folder / name)
    (folder / "bad.png").write_text("words")
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:100])
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(loaded: LoadedModel, folder: Path, out: Path, batch_size: int = 3) -> CaptionCount:
    return CaptionRunner(folder, out, batch_size, PROMPT).run(loaded)


def test_one_line_per_image_in_order_with_bad_ones_counted(loaded, folder, tmp_path):
    count = run(loaded, folder, tmp_path / "new" / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["image"] for row in rows] == ["B.PNG", "a.jpg", "bad.png", "c.png", "cut.jpg", "e é.png", "more/d.webp"]
    assert count == CaptionCount(captions=5, bad_images=2)
    assert ["error" in row for row in rows] == [row["image"] in ("bad.png", "cut.jpg") for row in rows]
    assert "this is not an image" in rows[2]["error"]
    assert len({row["caption"] for row in rows if "caption" in row}) > 1
    assert all(row["prompt"] == PROMPT for row in rows)


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(loaded, folder, tmp_path):
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    assert run(loaded, folder, tmp_path / "out.jsonl") == CaptionCount(captions=5, bad_images=4)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    wrong = {row["image"]: row["error"] for row in rows if "error" in row}
    assert "there is no such image file" in wrong["gone.png"]
    assert "loop.png" in wrong["loop.png"]


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_size_changes_nothing(loaded, folder, tmp_path, batch_size):
    run(loaded, folder, tmp_path / "three.jsonl")
    run(loaded, folder, tmp_path / "other.jsonl", batch_size)
    assert (tmp_path / "other.jsonl").read_bytes() == (tmp_path / "three.jsonl").read_bytes()


def test_a_file_cut_at_any_byte_is_completed(loaded, folder, tmp_path):
    out = tmp_path / "out.jsonl"
    run(loaded, folder, out)
    whole = out.read_bytes()
    for size in range(0, len(whole) + 1, 29):
        out.write_bytes(whole[:size])
        assert run(loaded, folder, out) == CaptionCount(5, 2)
        assert out.read_bytes() == whole


def test_a_killed_job_goes_on(tiny_values, write_config, folder, tmp_path):
    for n in range(60):
        Image.effect_noise((24, 24), 50 + n).convert("RGB").save(folder / f"n{n:02}.png")
    config, out = write_config(tiny_values), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "minigpt4", "caption", "--cfg-path", str(config), "--images", str(folder)]
    command += ["--out", str(out), "--batch-size", "2", "--device", "cpu"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size > 300) and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.005)
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    assert job.returncode == -signal.SIGKILL
    assert 0 < len(out.read_text().splitlines()) < 67
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert "65 captions, 2 images that cannot be read" in done.stdout
    assert "going on" in done.stderr
    names = [json.loads(line)["image"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert names == sorted(names)
    assert len(set(names)) == len(names) == 67


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.jpg", "prompt": "Another?", "caption": "x"}', r"out\.jsonl:1: was asked 'Another\?'"),
        ('{"image": "a.jpg"}', r"out\.jsonl:1: is no line of captions"),
        ("words", r"out\.jsonl:1: is no line of captions"),
        ("[1]", r"out\.jsonl:1: is no line of captions"),
    ],
)
def test_a_file_of_another_job_is_not_touched(folder, tmp_path, line, message):
    out = tmp_path / "out.jsonl"
    out.write_text(line + "\nhalf")
    with pytest.raises(DataError, match=message):
        CaptionRunner(folder, out, 2, PROMPT)
    assert out.read_text() == line + "\nhalf"


def test_what_cannot_be_captioned(folder, tmp_path, capsys):
    with pytest.raises(DataError, match="there is no such folder"):
        CaptionRunner(tmp_path / "absent", tmp_path / "out.jsonl", 2, PROMPT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no image file"):
        CaptionRunner(tmp_path / "empty", tmp_path / "out.jsonl", 2, PROMPT)
    with pytest.raises(DataError, match="batch-size must be at least 1"):
        CaptionRunner(folder, tmp_path / "out.jsonl", 0, PROMPT)
    with pytest.raises(DataError, match="cannot be read"):
        CaptionRunner(folder, tmp_path, 1, PROMPT)
    assert main(["caption", "--images", str(tmp_path / "absent"), "--out", "x.jsonl"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
