"""A run that is killed, or finds its disk full, at any event of its file system continues as if nothing had happened.

Python reports each opened, renamed, linked and removed file to an audit hook. The hook of these tests ends the process
just before the event of a given number, or refuses this event and all later ones, as a full disk does.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import read_metrics
from tests.runners.parts import PROCESSES, series, train, write

WRITING = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}
RUN = {"total_steps": 3, "global_batch_size": 4, "batch_size_per_rank": 2, "save_every_steps": 1, "keep_last": 1}


def _train(file: Path, folder: Path, output: Path, event: int, is_full: bool) -> None:
    """Run `python train.py`, with its event of number `event` hindered; write the number of events to `output`."""
    numbers = itertools.count(1)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        writes = name in WRITING or (name == "open" and isinstance(arguments[2], int) and arguments[2] & 3)
        if not writes or not str(arguments[0]).startswith(f"{folder}{os.sep}"):
            return
        number = next(numbers)
        output.write_text(str(number))
        if is_full and number >= event and name not in ("os.remove", "os.rmdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        if not is_full and number == event:
            os.kill(os.getpid(), signal.SIGKILL)

    from minigpt4.cli import main

    sys.stderr = output.with_suffix(".err").open("w", buffering=1)
    sys.addaudithook(hook)
    sys.exit(main(["train", "--cfg-path", str(file)]))


def start(file: Path, folder: Path, output: Path, event: int, is_full: bool) -> int | None:
    process = PROCESSES.Process(target=_train, args=(file, folder, output, event, is_full))
    process.start()
    process.join(240)
    return process.exitcode


@pytest.fixture
def values(tiny_values: dict[str, Any], pairs: Path) -> dict[str, Any]:
    """Two sources, two batches a step, a validation at each step."""
    source = tiny_values["datasets"]["train"]["pairs"]
    tiny_values["datasets"] = {
        "train": {"one": source, "two": {**source, "weight": 2.0}},
        "validation": {"pairs": source},
    }
    tiny_values["run"] |= {**RUN, "validate_every_steps": 1, "validation_samples": 4}
    return tiny_values


@pytest.mark.slow
@pytest.mark.parametrize("is_full", [False, True], ids=["killed", "disk full"])
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_a_run_hindered_at_any_event_continues_as_if_nothing_had_happened(
    values, tmp_path, every, is_full, record_property
):
    whole, output = tmp_path / "whole", tmp_path / "events"
    assert start(write(values, whole), whole, output, 10_000, is_full=False) == 0
    events = int(output.read_text())
    assert events > 30
    folder = tmp_path / "run"
    file = write(values, folder)
    hindered = 0
    for event in range(1, events + 1, every):
        shutil.rmtree(folder, ignore_errors=True)
        status = start(file, folder, output, event, is_full)
        if is_full and status == 0:  # what was refused is not needed: the log, or the removal of an old checkpoint
            assert series(folder) == series(whole)
            continue
        assert status == (1 if is_full else -signal.SIGKILL), event
        hindered += 1
        if is_full:
            errors = output.with_suffix(".err").read_text()
            assert errors.count("error:") == 1, (event, errors)
            assert "Traceback" not in errors, (event, errors)
            assert not list(folder.rglob("*.partial")), event
        train(values, folder, resume=True)
        assert series(folder) == series(whole), event
        assert _validations(folder) == _validations(whole), event
        assert {path.name for path in folder.rglob("*")} == {path.name for path in whole.rglob("*")}, event
    assert hindered > events / every / 2
    what = "disk full from a file event on" if is_full else "killed at a file event"
    record_property(f"figure: {what}, then resumed: the same losses, no file left over", len(range(0, events, every)))


def _validations(folder: Path) -> list[float]:
    return [line["validation_loss"] for line in read_metrics(folder) if "validation_loss" in line]
