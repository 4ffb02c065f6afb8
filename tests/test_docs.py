"""What the pages under docs/ show: every YAML is a valid config, every command is one, every Python block compiles."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from minigpt4 import Chat
from minigpt4.checkpoints.assemble import assemble
from minigpt4.cli.parser import build_parser
from minigpt4.config import config_from_values, load_config
from minigpt4.registry import VISION_ENCODERS

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}


def blocks(language: str) -> list[tuple[str, str]]:
    """Return (page, block) for every fenced block of a language."""
    return [
        (name, block)
        for name, text in PAGES.items()
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    ]


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    """The package that docs/own_parts.md writes."""
    (code,) = (block for _, block in blocks("python") if block.startswith("# my_package/__init__.py"))
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_package", None)
    VISION_ENCODERS._entries.pop("patches", None)


@pytest.mark.parametrize(("page", "block"), blocks("yaml"))
def test_every_yaml_is_a_valid_config(page, block, tmp_path, my_package):
    file = tmp_path / "page.yaml"
    file.write_text(block)
    config = load_config(file)
    assert config.model is not None


def test_the_class_of_the_page_is_a_part(my_package, tiny_llm):
    """Built from the page's own YAML, with a language model that is here."""
    (block,) = (block for _, block in blocks("yaml") if "plugins:" in block)
    values = yaml.safe_load(block)
    values["model"]["language_model"] = {"path": str(tiny_llm), "dtype": "float32"}
    values |= {"conversation": {"template": "vicuna_v0"}, "chat": {"max_new_tokens": 3}}
    loaded = assemble(config_from_values(values, "page"))
    assert loaded.model.vision_encoder.feature_dim == 48
    image = b"P6 2 2 255 " + bytes(range(12))
    assert isinstance(Chat(loaded).session(images=[image]).ask("What is it?"), str)


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_every_python_block_compiles(page, block):
    compile(block, page, "exec")


def test_every_command_of_ours_has_the_arguments_it_needs():
    commands = [line for _, block in blocks("sh") for line in block.splitlines() if " -m minigpt4 " in line]
    assert commands
    for command in commands:
        if "FORMAT" not in command:  # the line that says what the parts are called
            build_parser().parse_args(shlex.split(command, comments=True)[3:])


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in PAGES if f"(docs/{name})" not in readme] == []
