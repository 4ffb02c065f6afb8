"""Writes small YAML files and reads them as the small configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt4.config.reading import read_config
from minigpt4.errors import ConfigError

from .parts import Small

Write = Callable[..., Path]
Load = Callable[..., Small]
Refuse = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "c.yaml") -> Path:
        file = Path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write


@pytest.fixture
def load(write: Write) -> Load:
    """Write one YAML file and load it."""

    def load(text: str, *options: str) -> Small:
        return read_config(Small, write(text), options)

    return load


@pytest.fixture
def refuse(load: Load) -> Refuse:
    """Load what must be refused; return the problems."""

    def refuse(text: str, *options: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *options)
        return caught.value.problems

    return refuse
