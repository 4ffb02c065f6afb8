"""The pairs under test: those of `--pair`, or the tiny ones; each is built once, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from minigpt4.checkpoints.assemble import LoadedModel, assemble
from minigpt4.config import Config, load_config
from tests.conformance.tiny import PAIRS, write_pair


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair" in metafunc.fixturenames:
        given = metafunc.config.getoption("--pair")
        quick, *slow = PAIRS
        pairs = given or [quick, *(pytest.param(pair, marks=pytest.mark.slow) for pair in slow)]
        metafunc.parametrize("pair", pairs, indirect=True, scope="package")


@pytest.fixture(scope="package")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a pair, its parts in float32."""
    if request.param in request.config.getoption("--pair"):
        file = Path(request.param)
    else:
        file = write_pair(request.param, tmp_path_factory.mktemp("pair"))
    values = load_config(file).values["model"]
    held = [part for part in ("vision_encoder", "language_model") if "dtype" in values[part]]
    return load_config(file, [f"model.{part}.dtype=float32" for part in held])


@pytest.fixture(scope="package")
def loaded(pair: Config) -> LoadedModel:
    """The pair, built as training and chat build it."""
    loaded = assemble(pair)
    loaded.model.eval()
    return loaded
