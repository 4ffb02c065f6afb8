"""`evaluate`: the same file of answers after any interruption and for any number of ranks; scores from it alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from minigpt4.checkpoints.assemble import LoadedModel, load_configured
from minigpt4.cli import main
from minigpt4.config import config_from_values
from minigpt4.errors import ConfigError, DataError
from minigpt4.runners.evaluate import EvaluateRunner
from tests.evaluation.parts import values, write_rows
from tests.runners.parts import PROCESSES, train


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


@pytest.fixture(scope="module")
def loaded(tiny_chat_values, rows_file) -> LoadedModel:
    return load_configured(config_from_values(values(tiny_chat_values, rows_file, None), "test"), "cpu")


@pytest.fixture
def run(tiny_chat_values, rows_file, loaded):
    """Return a function that evaluates the tiny model into a file, and returns its content and the report."""

    def evaluate(output: Path, **others):
        file = others.pop("file", rows_file)
        config = config_from_values(values(tiny_chat_values, file, output, **others), "test")
        report = EvaluateRunner.from_config(config).evaluate(loaded)
        return output.read_bytes(), report

    return evaluate


def test_two_runs_are_byte_identical_and_hold_every_answer(run, tmp_path):
    first, report = run(tmp_path / "a.jsonl", controls=["shuffled", "blank", "none"])
    second, _ = run(tmp_path / "b.jsonl", controls=["shuffled", "blank", "none"])
    assert first == second
    for suffix in (".json", ".md", ".tex"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    head, *rows = map(json.loads, first.splitlines())
    assert [row["images"] for row in rows] == [name for name in ("own", "shuffled", "blank", "none") for _ in range(10)]
    assert all(row["shown"] != row["image"] for row in rows if row["images"] == "shuffled")
    assert len({row["answer"] for row in rows}) > 3
    assert {"config", "weights", "data", "seed", "decoding", "tasks"} <= head.keys()
    assert report.scores[0].questions == 10


def test_an_answer_equals_that_of_a_session(run, loaded, rows_file, tmp_path):
    from minigpt4 import Chat

    content, _ = run(tmp_path / "a.jsonl")
    for row in map(json.loads, content.splitlines()[1:]):
        session = Chat(loaded).session(images=[rows_file.parent / row["image"]])
        assert session.ask(row["question"], max_new_tokens=4) == row["answer"]


def test_a_file_cut_anywhere_is_completed(run, tmp_path):
    whole, _ = run(tmp_path / "a.jsonl")
    head = whole.index(b"\n") + 1
    for size in (0, 5, head, head + 7, len(whole) // 2, len(whole) - 1):
        (tmp_path / "b.jsonl").write_bytes(whole[:size])
        assert run(tmp_path / "b.jsonl")[0] == whole
        for aside in tmp_path.glob("b.jsonl.?"):
            aside.unlink()


def test_a_finished_file_is_not_asked_again(run, tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "a.jsonl")
    monkeypatch.delattr("minigpt4.runners.evaluate.ask")  # any question would fail
    assert run(tmp_path / "a.jsonl")[0] == whole


def test_other_settings_set_the_old_file_aside(run, tmp_path, caplog):
    whole, _ = run(tmp_path / "a.jsonl")
    other, _ = run(tmp_path / "a.jsonl", max_new_tokens=2)
    assert other != whole
    assert (tmp_path / "a.jsonl.1").read_bytes() == whole
    assert "was made with other config, tasks; it is now a.jsonl.1" in caplog.text
    (tmp_path / "a.jsonl").write_text("notes\n")
    assert run(tmp_path / "a.jsonl", max_new_tokens=2)[0] == other
    assert (tmp_path / "a.jsonl.2").read_text() == "notes\n"


def test_a_bad_image_is_counted_and_left_out(run, tmp_path):
    file = write_rows(tmp_path / "data", bad=True)
    content, report = run(tmp_path / "a.jsonl", file=file)
    rows = [json.loads(line) for line in content.splitlines()[1:]]
    assert [row["id"] for row in rows if "error" in row] == ["1what", "1where"]
    assert report.left_out == {"mine/own": 2}
    assert report.scores[0].questions == 8
    assert "2 questions are left out: their images cannot be read" in report.table()


def test_choices_are_scored_by_likelihood(run, loaded, tmp_path):
    """The losses are those of one dialogue at a time."""
    data = tmp_path / "data"
    write_rows(data)
    rows = [
        {"image": f"{n}.png", "question": "what?", "choices": ["a", "a long answer é"], "answer": "a"} for n in (0, 1)
    ]
    (data / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content, report = run(tmp_path / "a.jsonl", file=data / "c.jsonl", task={"scorer": "choices"})
    _head, *found = map(json.loads, content.splitlines())
    for row in found:
        for choice, loss, tokens, positions in zip(
            row["truth"]["choices"], row["losses"], row["tokens"], row["positions"], strict=True
        ):
            assert (loss, tokens, positions) == pytest.approx(
                _alone(loaded, data / row["image"], row["question"], choice)
            )
    assert {score.name for score in report.scores} == {"accuracy", "published rule"}


def _alone(loaded, image: Path, question: str, choice: str) -> tuple[float, int, int]:
    import torch
    import torch.nn.functional as F

    from minigpt4.conversation.dialogue import Dialogue, Turn
    from minigpt4.models.splice import splice

    encoded = loaded.conversation.encode_dialogue(Dialogue((Turn(question, choice),)), num_images=1, sample_id="x")
    with torch.no_grad():
        embeds = loaded.model.encode_images(loaded.image_processor(image).unsqueeze(0))
        tokens = loaded.model.language_model.embed(encoded.input_ids.unsqueeze(0))
        logits = loaded.model.language_model(splice(tokens, embeds, encoded.image_mask.unsqueeze(0)), None)[0]
    loss = F.cross_entropy(logits[:-1], encoded.labels[1:], ignore_index=-100, reduction="sum")
    return float(loss), int((encoded.labels != -100).sum()), len(encoded.input_ids)


def test_answers_are_scored_again_without_a_model(run, tmp_path, capsys, monkeypatch):
    run(tmp_path / "a.jsonl", controls=["none"])
    before = {suffix: (tmp_path / f"a{suffix}").read_bytes() for suffix in (".json", ".md", ".tex")}
    for suffix in before:
        (tmp_path / f"a{suffix}").unlink()
    monkeypatch.setitem(sys.modules, "minigpt4.checkpoints.assemble", None)  # importing it fails
    assert main(["evaluate", "--rescore", str(tmp_path / "a.jsonl")]) == 0
    assert {suffix: (tmp_path / f"a{suffix}").read_bytes() for suffix in before} == before
    assert "mine, own images: 10 questions, 5 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no answers_format"),
        (b'{"accuracy": 1}\n', "no answers_format 1"),
        (b"{]\n", ":1: not a line of JSON"),
        (b'{"answers_format": 1, "tasks": {}}\n{"task": "a"}\n', ":2: the row has no 'images'"),
    ],
)
def test_another_file_is_refused_with_its_line(content, message, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    assert main(["evaluate", "--rescore", str(file)]) == 1
    assert message in capsys.readouterr().err


def test_missing_files_and_bad_names_are_refused_before_a_model_is_loaded(tiny_chat_values, tmp_path):
    config = config_from_values(values(tiny_chat_values, tmp_path / "none.jsonl", None), "test")
    with pytest.raises(ConfigError, match=r"evaluation\.tasks\.mine\.path: there is no file"):
        EvaluateRunner.from_config(config)
    config = config_from_values(values(tiny_chat_values, write_rows(tmp_path / "d"), tmp_path / "a.json"), "test")
    with pytest.raises(DataError, match=r"end it in \.jsonl"):
        EvaluateRunner.from_config(config)


@pytest.mark.slow
def test_two_checkpoints_are_compared_by_one_command(tiny_values, rows_file, tmp_path, capsys):
    train(tiny_values, tmp_path / "run", total_steps=2, save_every_steps=1)
    steps = [str(tmp_path / "run" / "checkpoints" / f"step_{n}") for n in (1, 2)]
    mine = ["evaluation.tasks.mine.type=rows", f"evaluation.tasks.mine.path={rows_file}", "evaluation.samples=6"]
    options = [*mine, "evaluation.controls=[none]", "evaluation.device=cpu", "evaluation.max_new_tokens=3"]
    assert main(["compare", *steps, "--out", str(tmp_path / "c"), "--options", *options]) == 0
    scores = json.loads((tmp_path / "c.json").read_text())["scores"]
    assert [(line["images"], line["questions"]) for line in scores] == [("own", 6), ("none", 6)]
    first, second = ((tmp_path / f"c_{letter}.jsonl").read_text().splitlines()[0] for letter in "ab")
    assert json.loads(first)["weights"] != json.loads(second)["weights"]
    assert json.loads(first)["data"] == json.loads(second)["data"]
    assert "mine  own images" in capsys.readouterr().out


def start(file: Path, output: Path, environment: dict[str, str] | None = None):
    """Start `evaluate` as a process."""
    arguments = ["evaluate", "--cfg-path", str(file), "--options", f"evaluation.output={output}"]
    process = PROCESSES.Process(target=_command, args=(arguments, environment or {}), daemon=False)
    process.start()
    return process


def _command(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.exit(main(arguments))


@pytest.mark.slow
def test_two_ranks_equal_one_and_leave_one_file(tiny_chat_values, rows_file, run, write_config, tmp_path):
    whole, _ = run(tmp_path / "a.jsonl", controls=["blank"])
    file = write_config(values(tiny_chat_values, rows_file, None, controls=["blank"]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(file, tmp_path / "b.jsonl", {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in (0, 1)]
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert (tmp_path / "b.jsonl").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.glob("b.*")) == ["b.json", "b.jsonl", "b.md", "b.tex"]


@pytest.mark.long
def test_killed_at_ten_instants_and_resumed(tiny_chat_values, run, write_config, tmp_path):
    data = write_rows(tmp_path / "data", images=40)
    others = {"controls": ["shuffled", "none"], "max_new_tokens": 30}
    whole, _ = run(tmp_path / "a.jsonl", file=data, **others)
    file, output = write_config(values(tiny_chat_values, data, None, **others)), tmp_path / "b.jsonl"
    sizes = [len(whole) * n // 11 for n in range(1, 11)]
    killed = 0
    for size in sizes:
        process = start(file, output)
        while process.is_alive() and not (output.is_file() and output.stat().st_size >= size):
            time.sleep(0.001)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
    assert killed >= 8
    last = start(file, output)
    last.join()
    assert last.exitcode == 0
    assert output.read_bytes() == whole
