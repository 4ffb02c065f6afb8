"""The rehearsal files of the tests, and loading a model from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.rehearsal_files import RELEASED, options, write_all
from minigpt4 import load_model
from minigpt4.checkpoints.assemble import LoadedModel

QUICK = ["chat.max_new_tokens=3", "chat.temperature=0"]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny files of every published layout; read-only."""
    return write_all(tmp_path_factory.mktemp("published"))


@pytest.fixture
def files(written: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """A copy of them that a test may change."""
    folder = tmp_path / "files"
    shutil.copytree(next(iter(written.values())).parent, folder)
    return {name: folder / path.name for name, path in written.items()}


def load(files: dict[str, Path], released: str = "7b", *more: str) -> LoadedModel:
    return load_model(f"minigpt4_{released}", [*options(files, released), *QUICK, *more], device="cpu")


__all__ = ["QUICK", "RELEASED", "files", "load", "options", "written"]
