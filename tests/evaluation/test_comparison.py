"""`compare A B`: a paired test of two answer files; what cannot be compared is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigpt4.cli import main
from minigpt4.evaluation.comparison import compare_files

HEAD = {
    "answers_format": 1,
    "config": "c",
    "data": {"mine": "d"},
    "tasks": {"mine": {"scorer": "exact", "questions": 40, "max_new_tokens": 8}},
    "seed": 3,
}


def write(file: Path, right: set[int], head=HEAD, images=("own", "shuffled"), unreadable=(), shown="s.png") -> Path:
    rows = []
    for name in images:
        for n in range(40):
            row = {"task": "mine", "images": name, "id": str(n), "image": f"{n}.png", "truth": {"answer": "x"}}
            row |= {"shown": shown} if name == "shuffled" else {}
            is_right = n in right and name == "own"
            rows.append({**row, "error": "bad"} if n in unreadable else {**row, "answer": "x" if is_right else "y"})
    file.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))
    return file


def test_a_better_model_is_found_and_its_control_is_not(tmp_path, capsys):
    first, second = write(tmp_path / "a.jsonl", set(range(10))), write(tmp_path / "b.jsonl", set(range(5, 38)))
    assert main(["compare", str(first), str(second), "--out", str(tmp_path / "new" / "c")]) == 0
    own, shuffled = json.loads((tmp_path / "new" / "c.json").read_text())["scores"]
    assert (own["first"], own["second"], own["questions"], own["images"]) == (0.25, 0.825, 40, "own")
    assert own["p_value"] < 0.001
    assert own["low"] < 0.575 < own["high"]
    assert (shuffled["first"], shuffled["second"], shuffled["p_value"]) == (0, 0, 1)
    assert "25.0" in capsys.readouterr().out
    assert "| mine | own images | accuracy % | 25.0 | 82.5 |" in (tmp_path / "new" / "c.md").read_text()
    assert "mine & own images & accuracy \\% & 25.0 & 82.5" in (tmp_path / "new" / "c.tex").read_text()


def test_swapping_the_models_turns_the_sign(tmp_path):
    first, second = write(tmp_path / "a.jsonl", {1, 2, 3}), write(tmp_path / "b.jsonl", {3, 4, 5, 6, 7, 8})
    one, other = compare_files(first, second).lines[0].difference, compare_files(second, first).lines[0].difference
    assert (one.first, one.second, one.p_value) == (other.second, other.first, pytest.approx(other.p_value, abs=0.05))
    assert one.low == pytest.approx(-other.high)


def test_what_only_one_model_answered_is_left_out_and_counted(tmp_path):
    first = write(tmp_path / "a.jsonl", {1}, unreadable={7, 8})
    second = write(tmp_path / "b.jsonl", {1, 2}, images=("own",))
    found = compare_files(first, second)
    assert [line.images for line in found.lines] == ["own"]
    assert found.lines[0].difference.questions == 38
    assert found.left_out == 80 + 40 - 2 * 38
    assert "44 answers are left out" in found.table()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": {**HEAD, "data": {"mine": "e"}}}, "task 'mine' has other questions, images or another scorer"),
        ({"head": {**HEAD, "tasks": {"other": {}}}}, "have no task in common"),
        ({"shown": "t.png"}, "the shuffled images are others than in"),
    ],
)
def test_other_questions_are_refused(change, message, tmp_path, capsys):
    first, second = write(tmp_path / "a.jsonl", {1}), write(tmp_path / "b.jsonl", {1}, **change)
    assert main(["compare", str(first), str(second), "--out", str(tmp_path / "c")]) == 1
    assert message in capsys.readouterr().err


def test_what_is_neither_answers_nor_a_checkpoint_is_refused(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "none"), str(tmp_path), "--out", str(tmp_path / "c")]) == 1
    assert "must be an answer file (.jsonl) or the folder of a checkpoint" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), str(tmp_path), "--out", str(tmp_path / "c")]) == 1
    assert "config.yaml is missing" in capsys.readouterr().err
