"""`chat` without `--question` as a real process: questions from a pipe, and a conversation on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from minigpt4 import Chat, load_model

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
pytestmark = pytest.mark.slow
CTRL_C, CTRL_D = b"\x03", b"\x04"


@pytest.fixture(scope="module")
def folder(tiny_chat_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a tiny random model, and two images."""
    folder = tmp_path_factory.mktemp("terminal")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**tiny_chat_values, "chat": {"max_new_tokens": 12}}))
    Image.new("RGB", (30, 30), "red").save(folder / "red.png")
    Image.new("RGB", (30, 30), "blue").save(folder / "blue sky.png")
    return folder


def piped(folder: Path, questions: str, *arguments: str) -> tuple[int, str, str]:
    """Return exit status, standard output and standard error, as they are: an answer may hold a carriage return."""
    command = [sys.executable, "-m", "minigpt4", "chat", "--cfg-path", "tiny.yaml", "--device", "cpu", *arguments]
    done = subprocess.run(
        command, input=questions.encode(), capture_output=True, cwd=folder, env=ENVIRONMENT, timeout=180
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_each_line_from_a_pipe_is_a_question(folder):
    questions = "What is this?\n\n/image 'blue sky.png'\nAnd this?\n/regenerate\n/reset\nWhat is this?"
    status, answers, others = piped(folder, questions, "--image", "red.png")
    assert status == 0, others
    session = Chat(load_model(folder / "tiny.yaml", device="cpu")).session(images=[folder / "red.png"])
    first, second = session.ask("What is this?"), session.ask("And this?", images=[folder / "blue sky.png"])
    assert len({first, second}) == 2
    assert answers == "".join(f"{answer}\n" for answer in (first, second, second, first))
    assert re.fullmatch(r"loading tiny\.yaml \.\.\. \d+\.\d s\n", others)


@pytest.mark.long
def test_an_error_ends_a_pipe(folder):
    status, answers, others = piped(folder, "/image gone.png\nWhat is this?\n")
    assert (status, answers) == (1, "")
    assert re.search(r"^error: gone\.png: ", others, re.MULTILINE)
    assert "Traceback" not in others


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # where a shell ignores it for background jobs
            os.chdir(folder)
            command = [sys.executable, "-m", "minigpt4", "chat", "--cfg-path", "tiny.yaml", "--device", "cpu"]
            os.execve(sys.executable, [*command, *arguments], ENVIRONMENT)
        self.shown = ""

    def send(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def shows(self, pattern: str, seconds: float = 120) -> re.Match[str] | None:
        """Return the match of `pattern` in what is shown, waiting for it at most so long."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown, re.DOTALL)) is None and time.monotonic() < end:
            if select.select([self._master], [], [], 0.2)[0]:
                self.shown += os.read(self._master, 4096).decode(errors="replace")
        return found

    def wait_for(self, pattern: str) -> str:
        """Return what is shown up to the end of `pattern`; the next call searches after it."""
        found = self.shows(pattern)
        assert found is not None, self.shown
        shown, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return shown

    def ask(self, line: str) -> str:
        """Type a line and return what is shown until the next prompt."""
        self.send(f"{line}\n".encode())
        self.wait_for(re.escape(line) + r"\r?\n")
        return self.wait_for(r"\r?\n> ").removesuffix("> ").strip()

    def status(self) -> int:
        """Return the exit status, at most a minute later."""
        for _ in range(600):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        raise TimeoutError(self.shown)

    def close(self) -> None:
        os.close(self._master)


@pytest.fixture
def terminal(folder) -> Iterator[Terminal]:
    started = Terminal(folder, "--options", "chat.max_new_tokens=450")
    yield started
    started.close()


def test_a_conversation_on_a_terminal(terminal):
    loading = terminal.wait_for(r"Ctrl-D ends\.\r\n.*> ")
    line = re.search(r"(.*)\r\n", loading).group(1)
    assert re.search(r"\rloading tiny\.yaml \.\.\. \d+ s\rloading tiny\.yaml \.\.\. \d+\.\d s$", line)

    terminal.send(b"What is this?\n")
    terminal.wait_for(r"What is this\?\r?\n\S+ \S+")
    terminal.send(CTRL_C)
    stopped = terminal.wait_for(r"\(stopped\)\r\n> ")
    assert "Traceback" not in stopped
    assert len(stopped) < 2000

    assert "/regenerate" in terminal.ask("/help")
    assert "unknown command '/imag'. Did you mean '/image'?" in terminal.ask("/imag x")
    assert "gone.png" in terminal.ask("/image gone.png")
    assert "1 image for the next question" in terminal.ask("/image red.png")
    assert "2 images for the next question" in terminal.ask("/image blue sky.png")
    terminal.send(CTRL_C)
    if not terminal.shows(hint := r"\(Ctrl-D ends the conversation\)\r\n> ", seconds=5):
        terminal.send(CTRL_C)  # Python's readline can miss a signal between showing the prompt and waiting for a key
    terminal.wait_for(hint)

    assert "starts again" in terminal.ask("/reset")
    answer = terminal.ask("Say a word.")
    assert answer.endswith(terminal.ask("/regenerate").split("\n")[-1])
    terminal.send(CTRL_D)
    assert terminal.status() == 0
