"""The laws of the architecture, enforced on the package; and proof that each of them can fail."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minigpt4.registry import REGISTRIES

from . import laws

EVERY_ENTRY_EXISTS = False
"""True when the house is whole: a registry entry whose module is absent then fails; until then it skips."""

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "timm", "gradio", "wandb", "webdataset", "omegaconf", "accelerate", "PIL")
ENTRIES = [(title, name) for title, registry in REGISTRIES.items() for name in registry.names()]
WITHOUT_CONFIG = ("sections", "runners", "models")
"""Registries of what is no component: sections are dataclasses; runners and models take a whole config."""

Law = Callable[[list[laws.Module]], Iterator[str]]


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_the_package_keeps_the_law(law: Law) -> None:
    broken = list(law(laws.read_tree(ROOT)))
    assert not broken, "\n".join([law.__doc__ or law.__name__, *broken])


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, minigpt4, minigpt4.registry, minigpt4.cli;"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("title", "name"), ENTRIES, ids=[f"{title}:{name}" for title, name in ENTRIES])
def test_every_registry_entry_resolves(title: str, name: str) -> None:
    registry = REGISTRIES[title]
    place = registry._entries[name]
    if isinstance(place, str) and not EVERY_ENTRY_EXISTS and not module_exists(place.partition(":")[0]):
        pytest.skip(f"{place} is not written yet")
    cls = registry.get(name)
    if title == "sections":
        assert dataclasses.is_dataclass(cls)
        return
    assert hasattr(cls, "from_config"), f"{place} has no from_config"
    if title not in WITHOUT_CONFIG:
        assert dataclasses.is_dataclass(getattr(cls, "Config", None)), f"{place} has no dataclass Config"


def module_exists(dotted: str) -> bool:
    try:
        return importlib.util.find_spec(dotted) is not None
    except ModuleNotFoundError:
        return False


def test_public_names_are_declared_once() -> None:
    """What type checkers see is what `__getattr__` finds."""
    package = importlib.import_module("minigpt4")
    tree = ast.parse((ROOT / "minigpt4" / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("minigpt4.")
        for alias in node.names
    }
    assert typed == package._HOMES
    assert set(package.__all__) == {*typed, "__version__"}
    assert set(package.__all__) <= set(dir(package))


# Each law fails on a tree that breaks it, and names the file and the line.
WRONG: list[tuple[Law, dict[str, str], str]] = [
    (
        laws.floors,
        {"registry.py": "\nfrom minigpt4.models import vision\n"},
        "registry.py:2: .*a floor above",
    ),
    (laws.floors, {"registry.py": "def f():\n    import minigpt4.cli\n"}, "registry.py:2: .*a floor above"),
    (laws.floors, {"datasets/a.py": "from ..models.b import c"}, "datasets/a.py:1: .*its sibling models"),
    (laws.floors, {"datasets/a.py": "from .. import models"}, "datasets/a.py:1: .*its sibling models"),
    (laws.floors, {"errors.py": "from minigpt4 import load_model"}, "errors.py:1: errors imports __init__"),
    (laws.floors, {"chat/a.py": "import demo"}, "a.py:1: chat imports demo.py"),
    (laws.floors, {"extras/a.py": ""}, "extras/a.py:1: 'extras' has no floor"),
    (
        laws.floors,
        {"batch.py": "if TYPE_CHECKING:\n    from minigpt4.config import Config\n"},
        "batch.py:2: .*its sibling config",
    ),
    (
        laws.cycles,
        {"chat/a.py": "from minigpt4.chat import b", "chat/b.py": "import os\nfrom minigpt4.chat.a import x"},
        r"b.py:2: import cycle minigpt4.chat.a -> minigpt4.chat.b -> minigpt4.chat.a",
    ),
    (
        laws.cycles,
        {"chat/__init__.py": "from minigpt4.chat.a import x", "chat/a.py": "from minigpt4.chat import y"},
        r"import cycle minigpt4.chat -> minigpt4.chat.a -> minigpt4.chat",
    ),
    (laws.homes, {"models/splice.py": "import timm.layers"}, "splice.py:1: imports timm, .*models/vision"),
    (laws.homes, {"models/visions.py": "import timm"}, "visions.py:1: imports timm"),
    (
        laws.homes,
        {"runners/a.py": "from yaml import dump"},
        "a.py:1: imports yaml, whose home is only in config",
    ),
    (
        laws.homes,
        {"datasets/a.py": "import torchvision"},
        "a.py:1: imports torchvision, whose home is nowhere",
    ),
    (laws.homes, {"chat/a.py": "importlib.import_module('peft')"}, "a.py:1: imports peft"),
    (laws.names, {"models/utils.py": ""}, "utils.py:1: 'utils' does not say"),
    (laws.names, {"common/a.py": ""}, "common/a.py:1: 'common'"),
    (laws.names, {"models/base_model.py": ""}, "'base_model'"),
    (laws.statements, {"batch.py": "x = 1\nassert x"}, "batch.py:2: assert"),
    (laws.statements, {"batch.py": "\n\nprint(1)"}, "batch.py:3: print"),
    (laws.devices, {"chat/a.py": "\nx.to('cuda')"}, "a.py:2: literal 'cuda'"),
    (laws.devices, {"chat/a.py": "x.to(f'cuda:{n}')"}, "a.py:1: literal 'cuda:'"),
    (laws.docstrings, {"batch.py": "x = 1"}, "batch.py:1: no docstring"),
    (laws.sizes, {"batch.py": "x = 1\n" * 301}, "batch.py:301: 301 lines"),
]

RIGHT: list[tuple[Law, dict[str, str]]] = [
    (laws.floors, {"chat/a.py": "from minigpt4.models.b import c\nfrom .d import e\nimport torch"}),
    (
        laws.cycles,
        {"chat/a.py": "if TYPE_CHECKING:\n    from .b import X\n", "chat/b.py": "from .a import Y"},
    ),
    (laws.homes, {"models/vision.py": "import timm", "models/vision/a.py": "import timm"}),
    (laws.names, {"models/commonsense.py": "", "datasets/basement.py": ""}),
    (laws.statements, {"cli/verbs.py": "print(1)"}),
    (laws.devices, {laws.DEVICE_HOME: "x = 'cuda'", "config/sections.py": "x: Literal['auto', 'cuda']"}),
    (laws.docstrings, {"batch.py": '"""What it holds."""'}),
    (laws.sizes, {"batch.py": "x = 1\n" * 300}),
]


def plant(root: Path, files: dict[str, str]) -> list[laws.Module]:
    for name, text in files.items():
        file = root / laws.PACKAGE / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return laws.read_tree(root)


@pytest.mark.parametrize(("law", "files", "message"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_tree_is_found(law: Law, files: dict[str, str], message: str, tmp_path: Path) -> None:
    found = list(law(plant(tmp_path, files)))
    assert len(found) == 1, found
    assert re.search(message, found[0])
    assert re.match(rf"{re.escape(str(tmp_path))}\S+\.py:\d+: ", found[0])


@pytest.mark.parametrize(("law", "files"), RIGHT, ids=lambda value: getattr(value, "__name__", ""))
def test_a_right_tree_passes(law: Law, files: dict[str, str], tmp_path: Path) -> None:
    assert list(law(plant(tmp_path, files))) == []


def test_every_law_is_proved_both_ways() -> None:
    assert {law for law, *_ in WRONG} == {law for law, _ in RIGHT} == set(laws.LAWS)
