"""What is imported is declared in pyproject.toml."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWN = {"minigpt4", "tests", "benchmarks", "train", "demo"}
EXTRA_OF = {"demo": "demo", "server": "serve"}
"""Packages of minigpt4 that only a command with an extra imports, and that extra."""


def distribution(name: str) -> str:
    """Return the name of a package as indexes compare it: `PyYAML>=6` is `pyyaml`."""
    found = re.match(r"[\w.-]+", name)
    return re.sub(r"[-_.]+", "-", found.group() if found else name).lower()


REQUIRED = {distribution(line) for line in PROJECT["dependencies"]}
EXTRAS = {
    extra: {distribution(line) for line in lines if not line.startswith("minigpt4[")}
    for extra, lines in PROJECT["optional-dependencies"].items()
}
PROVIDED_BY: Mapping[str, list[str]] = packages_distributions()


def imports(file: Path) -> Iterator[tuple[str, bool, int]]:
    """Give each library that a file imports, whether that happens when the file is imported, and the line."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom) and not child.level:
                names = [child.module or ""]
            for name in names:
                yield name.partition(".")[0], at_import, child.lineno  # type: ignore[attr-defined]
            yield from walk(child, at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    for name, at_import, line in walk(ast.parse(file.read_text(encoding="utf-8")), True):
        if name not in sys.stdlib_module_names and name not in OWN:
            yield name, at_import, line


def used(*folders: str) -> Iterator[tuple[Path, str, bool, str]]:
    """Give file, distribution, whether it is imported with the file, and `file:line`, for each import below folders."""
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for name, at_import, line in imports(file):
                providers = {distribution(provider) for provider in PROVIDED_BY.get(name, [name])}
                provider = min(providers & REQUIRED.union(*EXTRAS.values()) or providers)
                yield file.relative_to(ROOT), provider, at_import, f"{file.relative_to(ROOT)}:{line}: {name}"


def test_every_import_of_the_package_is_declared() -> None:
    wrong = []
    for file, provider, at_import, place in used("minigpt4"):
        own_extra = EXTRAS.get(EXTRA_OF.get(file.parts[1], ""), set())
        lazily = set() if at_import else set().union(*(names for extra, names in EXTRAS.items() if extra != "dev"))
        if provider not in REQUIRED | own_extra | lazily:
            wrong.append(place)
    assert not wrong, "\n".join(["add to `dependencies`, or to an extra and import inside the function:", *wrong])


def test_every_import_of_tests_and_tools_is_declared() -> None:
    declared = REQUIRED.union(*EXTRAS.values())
    wrong = [place for _, provider, _, place in used("tests", "benchmarks") if provider not in declared]
    assert not wrong, "\n".join(["add to the extra `dev`:", *wrong])


def test_versions_are_ranges() -> None:
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        assert [line for line in lines if not re.search(r"\]$|>=", line) or "==" in line] == []
