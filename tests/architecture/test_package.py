"""Laws of the package that neither import-linter nor ruff can say."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt4.registry import REGISTRIES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "minigpt4"
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if "shipped" not in file.parts]
HEAVY = ("torch", "transformers", "timm", "gradio", "wandb", "webdataset", "omegaconf", "accelerate", "PIL")
ENTRIES = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.names()]
WITHOUT_SETTINGS = ("models", "templates", "runners", "scorers")
"""Registries of what takes whole sections of a config, or is a value."""
VAGUE = re.compile(r"utils?|common|base|base_.*")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, minigpt4, minigpt4.registry, minigpt4.cli;"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=[f"{kind}:{name}" for kind, name in ENTRIES])
def test_every_registry_entry_resolves(kind: str, name: str) -> None:
    REGISTRIES[kind].get(name)
    if kind not in WITHOUT_SETTINGS:
        assert dataclasses.is_dataclass(REGISTRIES[kind].settings(name))


def test_public_names_are_declared_once() -> None:
    """What type checkers see is what `__getattr__` finds."""
    package = importlib.import_module("minigpt4")
    typed = {
        alias.name: node.module
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("minigpt4.")
        for alias in node.names
    }
    assert typed == package._HOMES
    assert set(package.__all__) == {*typed, "__version__"}
    assert set(package.__all__) <= set(dir(package))


def test_a_module_is_named_for_what_it_holds() -> None:
    names = {part for file in FILES for part in file.relative_to(PACKAGE).with_suffix("").parts}
    assert [name for name in sorted(names) if VAGUE.fullmatch(name)] == []


def cuda_literals(source: str) -> Iterator[int]:
    """Give the lines that name a CUDA device; the choices of a setting (`Literal[...]`) name none."""
    tree = ast.parse(source)
    choices = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal")
        for inner in ast.walk(node.slice)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in choices and re.match(r"cuda(:|$)", str(node.value)):
            yield node.lineno


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("\nx.to('cuda')", [2]),
        ("x.to('cuda:1')\nx.to(f'cuda:{n}')", [1, 2]),
        ("device: Literal['auto', 'cuda']", []),
        ("'cuda is mentioned'", []),
    ],
)
def test_a_cuda_literal_is_found(source: str, lines: list[int]) -> None:
    assert list(cuda_literals(source)) == lines


def test_devices_are_chosen_in_one_module() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in FILES
        if file.name != "devices.py"
        for line in cuda_literals(file.read_text(encoding="utf-8"))
    ]
    assert found == [], "only minigpt4/devices.py names a CUDA device"
