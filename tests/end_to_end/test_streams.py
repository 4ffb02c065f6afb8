"""Pipes without a reader, terminals of other encodings, arguments in other bytes, a cache that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from minigpt4 import Chat, load_model
from minigpt4.cli import NO_READER

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
VERBS = {
    "version": ["--version"],
    "list": ["list"],
    "config": ["config", "--markdown"],
    "inspect": ["inspect", "{llm}"],
    "chat": ["chat", "--cfg-path", "tiny.yaml", "--question", "Why?"],
    "caption": ["caption", "--cfg-path", "tiny.yaml", "--images", "images", "--out", "captions.jsonl"],
    "export": ["export", "tiny.yaml", "--to", "published", "--out", "out.pth"],
}
LOADING = ("inspect", "chat", "caption", "export")
"""The verbs that import torch."""


@pytest.fixture(scope="module")
def folder(tiny_chat_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a tiny random model, and an image whose name is not UTF-8."""
    folder = tmp_path_factory.mktemp("streams")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**tiny_chat_values, "chat": {"max_new_tokens": 12}}))
    (folder / "images").mkdir()
    Image.new("RGB", (30, 30), "red").save(folder / "images" / "caf\udce9.png")
    return folder


def run(folder: Path, *arguments: str | bytes, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    changes = settings.pop("environment", {})
    return subprocess.run(
        [sys.executable, "-m", "minigpt4", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **changes},
        stdin=subprocess.DEVNULL,
        timeout=180,
        **settings,
    )


@pytest.mark.parametrize(
    ("verb", "unbuffered"),
    [
        *((verb, "") for verb in VERBS if verb not in LOADING),
        ("list", "1"),
        *(pytest.param(verb, "", marks=pytest.mark.long) for verb in LOADING),
        pytest.param("chat", "1", marks=pytest.mark.long),
    ],
)
def test_without_a_reader_every_verb_ends_quietly(folder, tiny_llm, verb, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [part.format(llm=tiny_llm) for part in VERBS[verb]]
    for rest in ("captions.jsonl", "out.pth"):
        (folder / rest).unlink(missing_ok=True)
    done = run(folder, *arguments, stdout=writer, stderr=subprocess.PIPE, environment={"PYTHONUNBUFFERED": unbuffered})
    os.close(writer)
    assert done.returncode == NO_READER == 141
    shown = done.stderr.decode()
    assert not any(word in shown for word in ("Traceback", "Error", "error"))


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"PYTHONIOENCODING": "ascii"}, id="ascii"),
        pytest.param({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, id="C", marks=pytest.mark.long),
    ],
)
def test_an_answer_that_the_terminal_cannot_show_is_escaped(folder, environment):
    question = "What is caf\u00e9?"
    done = run(
        folder,
        *("chat", "--cfg-path", "tiny.yaml", "--device", "cpu", "--question", question.encode()),
        capture_output=True,
        environment=environment,
    )
    assert done.returncode == 0, done.stderr
    answer = Chat(load_model(folder / "tiny.yaml", device="cpu")).session().ask(question)
    assert done.stdout.decode() == answer.encode("ascii", errors="backslashreplace").decode() + "\n"


@pytest.mark.long
def test_names_of_files_may_be_any_bytes(folder):
    name = b"images/caf\xe9.png"
    chat = ("chat", "--cfg-path", "tiny.yaml", "--question", "Why?", "--image")
    done = run(folder, *chat, name, capture_output=True)
    assert done.returncode == 0, done.stderr
    out = ("export", "tiny.yaml", "--to", "published", "--out", b"caf\xe9.pth")
    done = run(folder, *out, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"caf\xe9.pth\n")
    done = run(folder, *chat, b"gone\xe9.png", capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"error: gone\\udce9.png: image file not found; correct the path\n")


@pytest.mark.parametrize("option", ["question", "options"])
def test_text_that_is_not_utf8_is_one_message_before_the_model_is_loaded(folder, option):
    text = b"conversation.system=caf\xe9"
    done = run(folder, "chat", "--cfg-path", "tiny.yaml", f"--{option}", text, capture_output=True)
    assert done.returncode == 1
    given = "'conversation.system=caf\\udce9'"
    given = f"[{given}]" if option == "options" else given
    message = f"error: --{option} {given}: is not UTF-8; type it again, in UTF-8\n"
    assert done.stderr.decode() == message


def test_a_cache_that_cannot_be_made_is_one_message(folder):
    environment = {"HOME": "/proc/nope", "XDG_CACHE_HOME": "", "MINIGPT4_CACHE": ""}
    done = run(folder, "assets", "easy-vqa", capture_output=True, environment=environment)
    error = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert error[-1].startswith("error: /proc/nope/.cache/minigpt4/easy-vqa-")
    assert error[-1].endswith("set MINIGPT4_CACHE to a folder for downloads")
    assert "Traceback" not in done.stderr.decode()
