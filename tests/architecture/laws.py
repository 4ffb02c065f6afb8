"""Reads a source tree with `ast` and says where it breaks the laws: one line `file:line: ...` each."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "minigpt4"
FLOORS: list[set[str]] = [
    {"errors"},
    {"registry"},
    {"config", "batch"},
    {"processors", "conversation", "weights", "assets", "feature_cache", "devices"},
    {"datasets", "models"},
    {"checkpoints", "planning"},
    {"chat"},
    {"server", "demo", "evaluation", "curation", "exports"},
    {"runners"},
    {"__init__"},  # its lazy public names
    {"cli"},
    {"__main__", "train.py", "demo.py"},
]
HOMES: dict[str, tuple[str, ...]] = {
    "omegaconf": ("config",),
    "yaml": ("config",),
    "timm": ("models/vision",),
    "webdataset": ("datasets",),
    "gradio": ("demo",),
    "starlette": ("server",),
    "uvicorn": ("server",),
    "accelerate": ("runners",),
    "transformers": ("models", "conversation/tokenizer", "chat/decoding", "assets", "exports/huggingface"),
    "peft": ("models",),
    "torchvision": (),
}
SCRIPTS = ("train.py", "demo.py")
PRINTING = (
    "cli/__init__.py",
    "cli/verbs.py",
    "exports/huggingface/example.py",
)  # the last is a script that travels with an export
DEVICE_HOME = "devices.py"
FORBIDDEN_NAME = re.compile(r"utils?|common|base|base_.*")
MAX_LINES = 300


@dataclass(frozen=True)
class Import:
    """One imported module name and where it is written."""

    target: str
    line: int
    for_types_only: bool


@dataclass(frozen=True)
class Module:
    """One source file; `name` is its path within the package (`models/vision.py`) or the script's name."""

    path: Path
    name: str
    is_script: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), str(self.path))

    @property
    def unit(self) -> str:
        """The name on a floor: the first part of the path."""
        first = Path(self.name).parts[0]
        return first if self.is_script else first.removesuffix(".py")

    @property
    def dotted(self) -> str:
        if self.is_script:
            return self.name.removesuffix(".py")
        parts = [PACKAGE, *Path(self.name).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, False))

    def _imports(self, node: ast.AST, types_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    yield from self._imports(ast.Module([statement], []), True)
                for statement in child.orelse:
                    yield from self._imports(ast.Module([statement], []), types_only)
                continue
            for target in self._targets(child):
                yield Import(target, child.lineno, types_only)  # type: ignore[attr-defined]
            yield from self._imports(child, types_only)

    def _targets(self, node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            package = self.dotted.split(".")
            if self.path.name != "__init__.py":
                package = package[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            return [f"{module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                return [node.args[0].value]
        return []


def read_tree(root: Path) -> list[Module]:
    """Return the modules of the package below `root`, and the scripts beside it."""
    package = root / PACKAGE
    files = [file for file in sorted(package.rglob("*.py")) if "shipped" not in file.parts]
    modules = [Module(file, file.relative_to(package).as_posix()) for file in files]
    return modules + [Module(root / name, name, True) for name in SCRIPTS if (root / name).is_file()]


def floor_of(unit: str) -> int | None:
    return next((number for number, units in enumerate(FLOORS) if unit in units), None)


def floors(modules: list[Module]) -> Iterator[str]:
    """Every module has a floor and imports only from floors below, or from its own package."""
    for module in modules:
        own = floor_of(module.unit)
        if own is None:
            yield f"{module.path}:1: {module.unit!r} has no floor"
            continue
        for found in module.imports:
            unit = _unit_of(found.target, modules)
            if unit is None or unit == module.unit:
                continue
            other = floor_of(unit)
            if other is None:
                yield f"{module.path}:{found.line}: imports {found.target}, which has no floor"
            elif other == own:
                yield f"{module.path}:{found.line}: {module.unit} imports its sibling {unit} ({found.target})"
            elif other > own:
                yield f"{module.path}:{found.line}: {module.unit} imports {unit}, a floor above ({found.target})"


def _unit_of(target: str, modules: list[Module]) -> str | None:
    parts = target.split(".")
    if parts[0] in {script.removesuffix(".py") for script in SCRIPTS}:
        return f"{parts[0]}.py"
    if parts[0] != PACKAGE or parts == [PACKAGE, "__version__"]:  # the version is no part of the house
        return None
    units = {module.unit for module in modules} | set().union(*FLOORS)
    return parts[1] if len(parts) > 1 and parts[1] in units else "__init__"


def cycles(modules: list[Module]) -> Iterator[str]:
    """No module imports itself through others (imports for type checkers left aside)."""
    by_name = {module.dotted: module for module in modules}
    edges: dict[str, dict[str, int]] = {name: {} for name in by_name}
    for module in modules:
        for found in module.imports:
            target = found.target if found.target in by_name else found.target.rpartition(".")[0]
            if target in by_name and target != module.dotted and not found.for_types_only:
                edges[module.dotted].setdefault(target, found.line)
    done: set[str] = set()

    def visit(name: str, chain: list[str]) -> Iterator[str]:
        for target, line in edges[name].items():
            if target in chain:
                ring = [*chain[chain.index(target) :], target]
                yield f"{by_name[name].path}:{line}: import cycle {' -> '.join(ring)}"
            elif target not in done:
                yield from visit(target, [*chain, target])
        done.add(name)

    for name in sorted(by_name):
        if name not in done:
            yield from visit(name, [name])


def homes(modules: list[Module]) -> Iterator[str]:
    """A library that has a home is imported nowhere else."""
    for module in modules:
        place = module.name.removesuffix(".py")
        for found in module.imports:
            library = found.target.split(".")[0]
            allowed = HOMES.get(library)
            if allowed is not None and not any(place == home or place.startswith(f"{home}/") for home in allowed):
                where = f"only in {', '.join(allowed)}" if allowed else "nowhere"
                yield f"{module.path}:{found.line}: imports {library}, whose home is {where}"


def names(modules: list[Module]) -> Iterator[str]:
    """A module is named for what it holds."""
    for module in modules:
        for part in Path(module.name.removesuffix(".py")).parts:
            if FORBIDDEN_NAME.fullmatch(part):
                yield f"{module.path}:1: {part!r} does not say what the module holds"


def statements(modules: list[Module]) -> Iterator[str]:
    """No assert anywhere, no print outside the command line."""
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Assert):
                yield f"{module.path}:{node.lineno}: assert; raise an error that says what to do"
            is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if is_print and module.name not in PRINTING:
                yield f"{module.path}:{node.lineno}: print; use logging"  # type: ignore[attr-defined]


def devices(modules: list[Module]) -> Iterator[str]:
    """No literal "cuda" outside one module; the choices of a config field (`Literal[...]`) are no device."""
    for module in modules:
        if module.name == DEVICE_HOME:
            continue
        choices = {
            id(inner)
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal")
            for inner in ast.walk(node.slice)
            if module.name == "config/sections.py"
        }
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in choices:
                continue
            if re.fullmatch(r"cuda(:.*)?", node.value):
                advice = f"devices are chosen in {DEVICE_HOME}"
                yield f"{module.path}:{node.lineno}: literal {node.value!r}; {advice}"


def docstrings(modules: list[Module]) -> Iterator[str]:
    """Every module says what it holds."""
    for module in modules:
        if not ast.get_docstring(module.tree):
            yield f"{module.path}:1: no docstring"


def sizes(modules: list[Module]) -> Iterator[str]:
    """No file is too long to read in one sitting."""
    for module in modules:
        count = len(module.path.read_text(encoding="utf-8").splitlines())
        if count > MAX_LINES:
            yield f"{module.path}:{MAX_LINES + 1}: {count} lines, more than {MAX_LINES}"


LAWS = (floors, cycles, homes, names, statements, devices, docstrings, sizes)
