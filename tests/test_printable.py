"""Names with control characters are shown escaped: on the terminal, in the log, in a run's `log.txt`."""

from __future__ import annotations

import logging
import re
import sys

import pytest

from minigpt4.cli import main, set_up_logging
from minigpt4.cli.terminal import print_answer
from minigpt4.errors import ConfigError, ImageError
from minigpt4.printable import printable
from minigpt4.runners.folder import log_file

NAME = "a\x1b[2Jb\nerror: forged\u202e.png"
SHOWN = r"a\x1b[2Jb\nerror: forged\u202e.png"


def test_only_what_a_terminal_obeys_is_escaped():
    assert printable(NAME) == SHOWN
    assert printable("\r\x9b\x7f\u2028\udcff") == r"\r\x9b\x7f\u2028\udcff"
    for text in ("plain", "größe 图像 \u3000", "می\u200cخواهم", "\U0001f469\u200d\U0001f680"):
        assert printable(text) == text
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"


def test_values_in_the_log_are_escaped_and_our_own_lines_stay(capsys, tmp_path):
    set_up_logging()
    log = logging.getLogger("minigpt4.test")
    with log_file(tmp_path):
        log.warning("%s: cannot be read: %s (%d)", NAME, ValueError(NAME), 3)
        log.warning("%s", "a report\nof two lines\x1b")
    expected = [f"{SHOWN}: cannot be read: {SHOWN} (3)", "a report", r"of two lines\x1b"]
    assert capsys.readouterr().err.splitlines() == expected
    written = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.partition("WARNING ")[2] or line for line in written] == expected


def test_an_error_about_a_sample_is_one_line():
    assert str(ImageError(f"{NAME}: not an image")) == f"{SHOWN}: not an image"
    assert str(ConfigError(["one", "two"])) == "2 problems in the configuration:\none\ntwo"


@pytest.mark.parametrize("arguments", [["--image", NAME], ["--image", NAME, f"{NAME}2"]])
def test_errors_of_the_command_line_are_escaped(arguments, capsys):
    assert main(["chat", "--question", "x", *arguments]) == 1
    shown = capsys.readouterr().err
    assert f"{SHOWN}: image file not found" in shown
    assert "\x1b" not in shown
    assert not any(line.startswith("error: forged") for line in shown.splitlines())


def test_equal_errors_are_logged_once_and_counted(capsys):
    set_up_logging()
    log = logging.getLogger("minigpt4.test")
    for n in range(1234):
        try:
            raise ValueError(n)
        except ValueError:
            log.exception("an answer failed\nat %d", n)
    log.error("another one")
    for _ in range(2):
        log.info("not an error")
    shown = capsys.readouterr().err
    assert shown.count("Traceback") == 1
    shown = re.sub(r" in \d s\)", ")", shown)
    lines = [line for line in shown.splitlines() if not line.startswith((" ", "Traceback", "ValueError"))]
    assert lines == [
        "an answer failed",
        "at 0",
        "an answer failed (10 times)",
        "an answer failed (100 times)",
        "an answer failed (1000 times)",
        "another one",
        "not an error",
        "not an error",
    ]


@pytest.mark.parametrize(("on_terminal", "shown"), [(True, "a\\x1b[2J\nb\n"), (False, "a\x1b[2J\nb\n")])
def test_an_answer_cannot_control_the_terminal(on_terminal, shown, capsys, monkeypatch):
    """A pipe gets the answer as it is."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    print_answer(piece for piece in ("a\x1b", "[2J\nb"))
    assert capsys.readouterr().out == shown
