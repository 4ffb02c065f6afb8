"""The config of a checkpoint is data: nothing in it is run, resolved or read from elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from minigpt4.config import load_config, load_saved_config
from minigpt4.errors import ConfigError


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved config in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(load_config("mini", ["chat.seed=7"]).to_yaml(), encoding="utf-8")
    return file


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_it_is_read_as_it_was_saved(saved: Path) -> None:
    assert load_saved_config(saved) == load_config("mini", ["chat.seed=7"])
    assert load_saved_config(saved, ["chat.seed=3"]).chat.seed == 3


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("${oc.env:HOME}", "${oc.env:HOME}"),
        ("${run.seed}", "${run.seed}"),
        ("\\${run.seed}", "${run.seed}"),
    ],
)
def test_interpolations_are_text(saved: Path, text: str, read: str) -> None:
    change(saved, "system: ''", f"system: '{text}'")
    assert load_saved_config(saved).conversation.system == read


def test_options_may_use_interpolations(saved: Path) -> None:
    assert load_saved_config(saved, ["conversation.system=seed ${run.seed}"]).conversation.system == "seed 42"


def test_it_extends_nothing(saved: Path) -> None:
    change(saved, "compat: ours", "extends: /etc/hostname\ncompat: ours")
    with pytest.raises(ConfigError, match=r"config.yaml:1: the config of a checkpoint is complete"):
        load_saved_config(saved)


def test_its_plugins_are_imported_only_when_the_user_names_them(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved.parent / "evil").mkdir()
    (saved.parent / "evil" / "__init__.py").write_text("open('ran', 'w').close()\n")
    (saved.parent / "evil" / "inner.py").write_text("")
    monkeypatch.syspath_prepend(str(saved.parent))
    change(saved, "plugins: []", "plugins: [evil.inner]")
    with pytest.raises(ConfigError, match=r":2: .*evil.inner \(in .*evil/__init__.py\).*plugins=\[evil.inner\]"):
        load_saved_config(saved)
    assert not (saved.parent / "ran").exists()
    try:
        assert load_saved_config(saved, ["plugins=[evil.inner]"]).plugins == ("evil.inner",)
        assert load_saved_config(saved).plugins == ("evil.inner",)
    finally:
        for name in ("evil", "evil.inner"):
            sys.modules.pop(name, None)
    assert (saved.parent / "ran").exists()
