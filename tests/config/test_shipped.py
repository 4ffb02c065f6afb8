"""Every YAML that travels with the package is a valid config, once what it marks as required is given."""

from __future__ import annotations

import re

import pytest

from minigpt4.config import Config, config_from_values, load_config, shipped
from minigpt4.errors import ConfigError

FILES = sorted(file for folder in ("configs", "eval_configs") for file in shipped(folder).rglob("*.yaml"))
REQUIRED = re.compile(r"^.+:\d+: (\S+) is required: set it in the YAML or pass --options \1=(PATH|VALUE)$")


def load_with_required(name: str) -> Config:
    """Load a config; where it asks for options, give it what it asks for, and nothing more."""
    problems: list[str] = []
    try:
        return load_config(name)
    except ConfigError as error:
        problems = error.problems
    asked = {problem: REQUIRED.match(problem) for problem in problems}
    assert [problem for problem, match in asked.items() if match is None] == []
    return load_config(name, [f"{match[1]}={_value(match[1])}" for match in asked.values() if match])


def _value(option: str) -> str:
    return "['shards/{000..010}.tar']" if option.endswith("urls") else "some_file"


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_shipped_config_is_valid_and_survives_saving(file: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = load_with_required(str(file))
    assert config_from_values(config.values, "again") == config
    saved = tmp_path_factory.mktemp("saved") / "config.yaml"
    saved.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(saved) == config
