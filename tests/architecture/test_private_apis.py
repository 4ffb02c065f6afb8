"""The private parts of libraries that the package uses: the whole list, and a test that each is still there.

Ruff's SLF001 refuses any other (`extend-ignore-names` in pyproject.toml).
"""

from __future__ import annotations

import importlib
import inspect
import tomllib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Private:
    """A private attribute of a library's class, the last version it was tried on, who uses it and why."""

    owner: str
    name: str
    parameters: tuple[str, ...] | None
    tried: str
    used_by: str
    why: str


PRIVATE = [
    Private(
        owner="accelerate.state:AcceleratorState",
        name="_reset_state",
        parameters=("reset_partial_state",),
        tried="accelerate 1.15.0",
        used_by="minigpt4/runners",
        why="a second run in the same process (a notebook) may want another device or precision",
    ),
    Private(
        owner="torch.nn.parallel:DistributedDataParallel",
        name="_set_params_and_buffers_to_ignore_for_model",
        parameters=("module", "params_and_buffers_to_ignore"),
        tried="torch 2.14.1",
        used_by="minigpt4/runners",
        why="parameters spread over ranks (FSDP) cannot be synchronised by DDP as well",
    ),
    Private(
        owner="transformers:LlamaForCausalLM",
        name="_no_split_modules",
        parameters=None,
        tried="transformers 5.24.0",
        used_by="minigpt4/runners",
        why="the class names of a model's layers, which are spread over ranks one by one",
    ),
    Private(
        owner="transformers:PreTrainedConfig",
        name="_attn_implementation",
        parameters=None,
        tried="transformers 5.24.0",
        used_by="minigpt4/checkpoints",
        why="flash_attention_2 does not take the masks of `conversation.isolate_turns`",
    ),
]


@pytest.mark.parametrize("private", PRIVATE, ids=lambda private: private.name)
def test_it_is_still_there(private: Private) -> None:
    library = private.tried.split()[0]
    place = f"{private.owner}.{private.name} of {library} {version(library)} (tried on {private.tried})"
    advice = f"{private.used_by} uses it: {private.why}. Find another way, or require an older {library}."
    module, _, owner = private.owner.partition(":")
    found = getattr(getattr(importlib.import_module(module), owner), private.name, None)
    assert found is not None, f"{place} is gone. {advice}"
    if private.parameters is not None:
        assert tuple(inspect.signature(found).parameters) == private.parameters, f"{place} has changed. {advice}"


def test_ruff_allows_these_and_no_others() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert settings["flake8-self"]["extend-ignore-names"] == sorted(private.name for private in PRIVATE)


@pytest.mark.parametrize("private", PRIVATE, ids=lambda private: private.name)
def test_it_is_still_used(private: Private) -> None:
    files = (ROOT / private.used_by).rglob("*.py")
    assert any(f".{private.name}" in file.read_text(encoding="utf-8") for file in files), "take it off the list"
