"""`caption`: every image one line, in order, whatever is wrong with it and whenever the job is killed."""

from __future__ import annotations

import json
import os
import shutil
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
    assert "image file not found" in wrong["gone.png"]
    assert "loop.png" in wrong["loop.png"]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_size_changes_nothing(loaded, folder, tmp_path, batch_size):
    run(loaded, folder, tmp_path / "three.jsonl")
    run(loaded, folder, tmp_path / "other.jsonl", batch_size)
    assert (tmp_path / "other.jsonl").read_bytes() == (tmp_path / "three.jsonl").read_bytes()


@pytest.mark.slow
def test_a_file_cut_at_any_byte_is_completed(loaded, folder, tmp_path):
    out = tmp_path / "out.jsonl"
    run(loaded, folder, out)
    whole = out.read_bytes()
    for size in range(0, len(whole) + 1, 29):
        out.write_bytes(whole[:size])
        assert run(loaded, folder, out) == CaptionCount(5, 2)
        assert out.read_bytes() == whole


@pytest.mark.slow
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
    assert "continuing" in done.stderr
    names = [json.loads(line)["image"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert names == sorted(names)
    assert len(set(names)) == len(names) == 67


def test_a_name_that_is_not_utf8_is_captioned(loaded, folder, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (folder / name).write_bytes((folder / "c.png").read_bytes())
    out = tmp_path / "out.jsonl"
    assert run(loaded, folder, out) == CaptionCount(6, 2)
    rows = {row["image"]: row for row in map(json.loads, out.read_bytes().splitlines())}
    assert rows[name]["caption"] == rows["c.png"]["caption"]
    whole = out.read_bytes()
    assert run(loaded, folder, out) == CaptionCount(6, 2)
    assert out.read_bytes() == whole


def test_a_thin_image_is_captioned(loaded, folder, tmp_path):
    Image.new("RGB", (4000, 3), "red").save(folder / "banner.png")
    assert run(loaded, folder, tmp_path / "out.jsonl") == CaptionCount(6, 2)


def test_unreadable_images_are_tried_again(loaded, folder, tmp_path):
    out = tmp_path / "out.jsonl"
    run(loaded, folder, out)
    before = out.read_text(encoding="utf-8").splitlines()
    (folder / "bad.png").write_bytes((folder / "c.png").read_bytes())
    assert run(loaded, folder, out) == CaptionCount(6, 1)
    after = out.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["image"] for line in after] == [json.loads(line)["image"] for line in before]
    assert len(set(before) - set(after)) == 1
    assert not (tmp_path / "out.jsonl.new").exists()


def test_captions_of_another_model_decoding_or_folder_are_refused(loaded, folder, tmp_path, tiny_values, write_config):
    out = tmp_path / "out.jsonl"
    run(loaded, folder, out)
    whole = out.read_bytes()
    shutil.copytree(folder, tmp_path / "others")
    other_seed = load_model(write_config(tiny_values), ["run.seed=77"], device="cpu")
    other_decoding = load_model(write_config(tiny_values), ["chat.max_new_tokens=3"], device="cpu")
    for model, images, what in (
        (other_seed, folder, "model"), (other_decoding, folder, "decoding"), (loaded, tmp_path / "others", "folder"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=rf"out\.jsonl:1: made with another {what} "):
            run(model, images, out)
        assert out.read_bytes() == whole


def test_lines_that_do_not_say_who_made_them_are_refused(loaded, folder, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps({"image": "a.jpg", "prompt": PROMPT, "caption": "x"}) + "\n")
    with pytest.raises(DataError, match="does not say which model made it"):
        run(loaded, folder, out)


@pytest.mark.parametrize(
    "content", ["words", '{"images": []}', '{"image": "a.jpg", "text": "mine"}', "\ufeff", '{"image": "z.jpg"']
)
def test_a_foreign_file_without_a_final_newline_is_not_emptied(folder, tmp_path, content):
    out = tmp_path / "out.jsonl"
    out.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"out\.jsonl:1: not a line of captions"):
        CaptionRunner(folder, out, 2, PROMPT)
    assert out.read_text(encoding="utf-8") == content


def test_two_jobs_on_one_file_are_refused(loaded, folder, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out.jsonl"
    with out.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another job is writing this file"):
            run(loaded, folder, out)
    assert run(loaded, folder, out) == CaptionCount(5, 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.jpg", "caption": "x", "prompt": "Another?"}', r"out\.jsonl:1: the prompt is 'Another\?'"),
        ('{"image": "a.jpg"}', r"out\.jsonl:1: not a line of captions"),
        ("words", r"out\.jsonl:1: not a line of captions"),
        ("[1]", r"out\.jsonl:1: not a line of captions"),
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
    with pytest.raises(DataError, match="no image file"):
        CaptionRunner(tmp_path / "empty", tmp_path / "out.jsonl", 2, PROMPT)
    with pytest.raises(DataError, match="batch-size must be at least 1"):
        CaptionRunner(folder, tmp_path / "out.jsonl", 0, PROMPT)
    with pytest.raises(DataError, match="cannot be read"):
        CaptionRunner(folder, tmp_path, 1, PROMPT)
    assert main(["caption", "--images", str(tmp_path / "absent"), "--out", "x.jsonl"]) == 1
    assert "folder not found" in capsys.readouterr().err
