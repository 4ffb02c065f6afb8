"""`python -m minigpt4 serve` as a process: its address, its key, its end; and errors before it starts."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from minigpt4.cli import main
from minigpt4.config.sections import ServerConfig
from minigpt4.errors import ServerError
from minigpt4.server.start import KEY_VARIABLE, bind, is_loopback, read_key
from tests.server.conftest import client_of

ROOT = Path(__file__).resolve().parents[2]
NO_FILES = """
model:
  vision_encoder: {type: eva_vit_g, weights: gone.pth}
  resampler: {type: merge}
  language_model: {path: gone}
"""


@pytest.fixture
def _processes_hear_sigint():
    """Shells start background jobs (`make test &`) with SIGINT ignored, and processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("_processes_hear_sigint")
@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_process_ends_quietly_and_finishes_what_it_has_begun(tiny_file, tmp_path, sent):
    key = tmp_path / "key"
    key.write_text("abc\n")
    command = [sys.executable, "-m", "minigpt4", "serve", "--cfg-path", str(tiny_file), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, "--api-key-file", str(key)], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        seen = ""
        while (found := re.search(r"serving tiny at (http://127\.0\.0\.1:\d+/v1) \(with a key\)", seen)) is None:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        client = client_of(found.group(1), "abc").with_options(max_retries=20)  # it listens a moment later
        asked: dict[str, Any] = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "What is this?"}],
            "max_tokens": 300,
        }
        chunks = client.chat.completions.create(**asked, stream=True)
        next(chunks)
        process.send_signal(sent)
        assert list(chunks)[-1].choices[0].finish_reason == "length"
        process.wait(20)
        assert "Traceback" not in process.stderr.read()
        assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGTERM)
    with pytest.raises(openai.APIConnectionError):
        client.with_options(max_retries=0).models.list()


def test_a_taken_port_is_reported_before_the_model_is_loaded(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(NO_FILES, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--cfg-path", str(config), "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1 port {port}: " in capsys.readouterr().err
    for host in ("no.such.host.invalid", "8.8.8.8"):
        with pytest.raises(ServerError, match=f"cannot listen on {host}"):
            bind(host, 0)


def test_a_key_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    file = tmp_path / "key"
    assert read_key("") == ""
    monkeypatch.setenv(KEY_VARIABLE, "of-the-environment")
    assert read_key("") == "of-the-environment"
    file.write_text(" of-the-file\n")
    assert read_key(str(file)) == "of-the-file"
    for wrong, message in (
        ("", "is empty"),
        ("a b", "printable ASCII without spaces"),
        ("schlüssel", "printable ASCII"),
    ):
        file.write_text(wrong)
        with pytest.raises(ServerError, match=message):
            read_key(str(file))
    with pytest.raises(ServerError, match="cannot be read"):
        read_key(str(tmp_path / "gone"))


def test_loopback():
    assert all(is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "example.org", "10.0.0.1", ""))


@pytest.mark.parametrize(("name", "value"), [("max_rows", 0), ("max_waiting", -1), ("body_seconds", 0)])
def test_limits_that_let_nothing_through(name, value):
    with pytest.raises(ValueError, match=f"{name}\n  Input should be greater than"):
        ServerConfig(**{name: value})


@pytest.mark.slow
def test_without_the_extra_the_message_names_it(tmp_path):
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from minigpt4.cli import main\nsys.exit(main(['serve', '--port', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the server needs the package 'uvicorn': pip install 'minigpt4[serve]'\n"
