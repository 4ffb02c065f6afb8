"""Code in a language model's folder is never run, and nobody is asked whether it should be."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minigpt4 import Chat, load_model
from minigpt4.cli import main
from minigpt4.errors import ConfigError, WeightsError
from minigpt4.models.language_model import load_causal_lm

ROOT = Path(__file__).parents[2]
CODE = {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M", "AutoModel": "m.M", "AutoTokenizer": ["t.T", None]}


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def folder(tiny_llm, tmp_path) -> Path:
    """A language model with code in its folder that leaves a mark when it is run."""
    copied = Path(shutil.copytree(tiny_llm, tmp_path / "llm"))
    for name in ("c", "m", "t"):
        (copied / f"{name}.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    edit(copied / "config.json", auto_map=CODE)
    return copied


@pytest.fixture
def config(tiny_values, folder, write_config, tmp_path):
    tiny_values["model"]["language_model"]["path"] = str(folder)
    yield write_config(tiny_values)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("verb", ["chat", "train"])
@pytest.mark.parametrize("family", ["my_llm", "clip"])
def test_a_model_that_needs_its_code_is_refused_at_once(verb, family, folder, config, capsys):
    """`clip` is known to transformers, but not as a language model."""
    edit(folder / "config.json", model_type=family)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert main([verb, "--cfg-path", str(config), *(["--question", "?"] if verb == "chat" else [])]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert len(errors) == 1
    assert (
        f"has no causal language model {family!r}: this model needs code from its folder, which is never" in errors[0]
    )
    assert "trust_remote_code" not in errors[0]
    with pytest.raises(WeightsError, match="needs code from its folder"):
        load_causal_lm(folder, "float32")


@pytest.mark.slow
def test_nothing_is_asked_on_a_terminal(folder, config):
    """transformers asks `Do you wish to run the custom code? [y/N]`; here a `y` waits for it."""
    edit(folder / "config.json", model_type="my_llm")
    ours, theirs = pty.openpty()
    os.write(ours, b"y\ny\ny\n")
    done = subprocess.run(
        [sys.executable, "-m", "minigpt4", "chat", "--cfg-path", str(config)],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    os.close(ours)
    os.close(theirs)
    shown = done.stdout.decode()
    assert done.returncode == 1
    assert "[y/N]" not in shown
    assert shown.count("needs code from its folder") == 1


def test_a_leftover_auto_map_of_a_known_model_is_ignored(folder, config, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]})
    assert isinstance(Chat(load_model(config, device="cpu")).session().ask("Why?"), str)


def test_a_tokenizer_that_needs_its_code_is_refused(folder, config, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    edit(folder / "config.json", auto_map={}, model_type="llama")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}, "tokenizer_class": "MyTokenizer"})
    )
    with pytest.raises((WeightsError, ConfigError), match="no usable tokenizer found"):
        load_model(config, device="cpu")
