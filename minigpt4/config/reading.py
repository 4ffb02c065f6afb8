"""From YAML files and `--options` to one typed, validated `Config`.

Input: a YAML path (or the name of a shipped one) and options `section.key=value`. Output: a `Config`. The values are
read in one pass: defaults are added and unknown keys found, `${...}` is replaced, and pydantic turns the result into
the settings classes. All problems are reported at once, each with its file, line and nearest key.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import ValidationError

from minigpt4.config.paths import find_config
from minigpt4.config.schema import (
    FilePath,
    NameIn,
    OneOf,
    adapter,
    describe_problems,
    marker,
    plain,
    shown,
    split_hint,
    type_hints,
)
from minigpt4.config.sections import Config
from minigpt4.config.sources import REQUIRED, Origin, escape, first_line, read_saved_sources, read_sources
from minigpt4.errors import ConfigError, MiniGPT4Error
from minigpt4.registry import nearest

Schema = TypeVar("Schema")
_PLACEHOLDER = re.compile(r"[./]*path/to\b")


def load_config(path: str | Path, options: Sequence[str] = (), *, paths_required: bool = True) -> Config:
    """Read, merge and validate a configuration.

    Args:
        path: a YAML file; a bare name such as `mini` or `mini_stage1` also finds the shipped files of that name in
            `configs/` and `eval_configs/`.
        options: overrides `section.key=value`, the value in YAML syntax; list items by number, `section.0.key=value`.
        paths_required: whether a path that the file leaves open (`???`) is a problem; else it is empty.

    Raises:
        ConfigError: everything that is wrong, in one error.
    """
    return read_config(Config, path, options, paths_required=paths_required)


def load_saved_config(path: str | Path, options: Sequence[str] = ()) -> Config:
    """Read the `config.yaml` of a checkpoint, which may come from somebody else, as plain values.

    Nothing in it is resolved from other files or from the environment, and its plugins are not imported: they must be
    named in `options`, or be imported already.

    Args:
        path: the file.
        options: overrides, as in `load_config`.

    Raises:
        ConfigError: everything that is wrong, in one error; a plugin that is needed and not imported.
    """
    values, origin, problems = read_saved_sources(Path(path), options)
    plugins = values.get("plugins") or []
    chosen = any(option.partition("=")[0].strip().startswith("plugins") for option in options)
    absent = [] if chosen else [str(name) for name in plugins if str(name) not in sys.modules]
    if absent:
        names = ", ".join(absent)
        raise ConfigError(
            f"{origin.of('plugins')}: this checkpoint was trained with plugins, and importing them runs their code: "
            f"{names} ({', '.join(_module_file(name) for name in absent)}). If you trust them, pass --options "
            f"'plugins=[{names}]'"
        )
    return _Reading(origin, problems).read(Config, values)


def _module_file(name: str) -> str:
    """Return where a module would be imported from, without importing it or the packages that it is in."""
    spec = importlib.machinery.PathFinder.find_spec(name.partition(".")[0])
    found = (spec.origin or ", ".join(spec.submodule_search_locations or ())) if spec else ""
    return f"in {found}" if found else "not installed"


def config_from_values(values: dict[str, Any], source: str) -> Config:
    """Validate values that are plain Python already, such as `Config.values`.

    Nothing in them is an interpolation; a file is read by `load_config`.

    Args:
        values: nested values, not changed.
        source: the name of the values in messages.

    Raises:
        ConfigError: everything that is wrong, in one error.
    """
    return read_values(Config, values, source)


def read_config(
    schema: type[Schema], path: str | Path, options: Sequence[str] = (), *, paths_required: bool = True
) -> Schema:
    """Read a YAML file as `schema`, a settings class whose fields are the sections; see `load_config`."""
    values, origin, problems = read_sources(find_config(path), options)
    return _Reading(origin, problems, paths_required=paths_required).read(schema, values)


def read_values(schema: type[Schema], values: dict[str, Any], source: str) -> Schema:
    """Read plain values as `schema`; see `config_from_values`."""
    return _Reading(Origin(source), []).read(schema, escape(values))


class _Reading:
    """One reading of a configuration: where its values were written, and what is wrong with them.

    Attributes:
        origin: `file:line` of each key.
        problems: one line each.
        reported: keys with a problem, so that no second one is reported for them.
    """

    def __init__(self, origin: Origin, problems: list[str], *, paths_required: bool = True) -> None:
        self.origin = origin
        self.paths_required = paths_required
        self.problems = problems
        self.reported: set[str] = set()

    def read(self, schema: type[Schema], values: dict[str, Any]) -> Schema:
        """Return the validated config of merged `values`, or raise all problems."""
        given = {key: value for key, value in values.items() if value is not None}  # `run:` is an empty section
        if isinstance(given.get("plugins"), str):
            given["plugins"] = [given["plugins"]]
        self._import_plugins(given.get("plugins"))
        complete = self._complete(schema, given, "")
        resolved = self._resolve(OmegaConf.create(complete), "")
        config = None
        try:
            config = adapter(typing.cast(Any, schema)).validate_python(resolved)
        except ValidationError as error:
            for place, problem in describe_problems(error):
                key = ".".join(map(str, place))
                if not any(key == known or known.startswith(f"{key}.") for known in self.reported):
                    self.problem(key, problem)
        if config is None or self.problems:
            raise ConfigError(self.problems)
        return typing.cast(Schema, config)

    def problem(self, key: str, text: str) -> None:
        """Note a problem with the value of a key."""
        self.problems.append(f"{self.origin.of(key)}: {key}{text}")
        self.reported.add(key)

    def _import_plugins(self, given: Any) -> None:
        """Import the modules under `plugins:`, which register their classes."""
        if given is not None and not (isinstance(given, list) and all(isinstance(name, str) for name in given)):
            self.problem("plugins", f" must be a list of modules, found {shown(given)}")
            return
        for plugin in given or []:
            try:
                importlib.import_module(plugin)
            except ImportError as error:
                self.problem("plugins", f": cannot import {plugin!r}: {error}")

    def _complete(self, hint: Any, value: Any, key: str) -> Any:
        """Return a value annotated `hint` with the defaults of everything in it that is not written."""
        base, inner = split_hint(hint)[0], typing.get_args(split_hint(hint)[0])
        choice = marker(hint, OneOf)
        if choice is not None:
            return self._complete_component(choice, value, key)
        if dataclasses.is_dataclass(base):
            return self._complete_fields(typing.cast(type, base), value, key)
        if typing.get_origin(base) in (typing.Union, types.UnionType):
            members = [each for each in inner if each is not type(None)]
            return self._complete(members[0], value, key) if len(members) == 1 and value is not None else value
        if isinstance(value, list) and inner:
            return [self._complete(inner[0], item, f"{key}.{n}") for n, item in enumerate(value)]
        if isinstance(value, dict) and len(inner) == 2:
            # null removes an inherited data set
            given = {name: item for name, item in value.items() if item is not None or marker(inner[1], OneOf) is None}
            return {name: self._complete(inner[1], item, f"{key}.{name}") for name, item in given.items()}
        if value == REQUIRED and not self.paths_required and marker(hint, FilePath) is not None:
            return [] if typing.get_origin(base) is list else ""
        self._check_leaf(hint, base, value, key)
        return value

    def _check_leaf(self, hint: Any, base: Any, value: Any, key: str) -> None:
        """Find what pydantic would convert without a word, and names that do not exist."""
        names = marker(hint, NameIn)
        if isinstance(value, str) and value == REQUIRED:
            kind = "VALUE" if marker(hint, FilePath) is None else "PATH"
            self.problem(key, f" is required: set it in the YAML or pass --options {key}={kind}")
        elif base in (int, float) and isinstance(value, bool):
            self.problem(key, f" must be a {'whole ' * (base is int)}number, found {shown(value)}")
        elif base is str and isinstance(value, (bool, float)):
            self.problem(key, f" must be text, found {shown(value)}; put it in quotes")  # 1.10 would become 1.1
        elif names is not None and value not in names.names() and "${" not in str(value):
            near = nearest(value, names.names())
            hint_ = f"; did you mean {near!r}?" if near else ""
            self.problem(key, f" must be one of {', '.join(names.names())}, found {shown(value)}{hint_}")

    def _complete_fields(self, cls: type, value: Any, key: str) -> Any:
        """Complete the fields of a dataclass."""
        if not isinstance(value, dict):
            self.problem(key, f" must be a mapping, found {shown(value)}")
            return value
        fields = {spec.name: spec for spec in dataclasses.fields(cls) if spec.init}
        self._find_unknown([name for name in value if name not in fields], list(fields), key)
        complete = {}
        for name, spec in fields.items():
            hint, here = type_hints(cls)[name], f"{key}.{name}" if key else name
            if name in value:
                complete[name] = self._complete(hint, value[name], here)
            elif spec.default is not dataclasses.MISSING:
                complete[name] = escape(plain(spec.default))
            elif spec.default_factory is not dataclasses.MISSING:
                complete[name] = escape(plain(spec.default_factory()))
            elif not key:
                self.problems.append(f"{self.origin.of(name)}: section {name!r} is required")
                self.reported.add(name)
            elif marker(hint, OneOf) is not None or dataclasses.is_dataclass(split_hint(hint)[0]):
                complete[name] = self._complete(hint, {}, here)
            else:
                complete[name] = self._complete(hint, REQUIRED, here)
        return complete

    def _complete_component(self, choice: OneOf, value: Any, key: str) -> Any:
        """Complete the settings of the class that `type` names."""
        if not isinstance(value, dict):
            self.problem(key, f" must be a mapping with a type, found {shown(value)}")
            return value
        name = value.get("type", choice.default)
        if isinstance(name, str) and "${" in name:
            return value
        if name is None or name == REQUIRED:
            names = ", ".join(choice.registry.names())
            self.problem(f"{key}.type", f" is required, one of {names}: pass --options {key}.type=NAME")
            return value
        try:
            cls = choice.registry.settings(name)
        except MiniGPT4Error as error:  # an unknown name, or an optional package that is not installed
            self.problem(f"{key}.type", f": {error}")
            return value
        others = {other: item for other, item in value.items() if other != "type"}
        return {"type": name, **self._complete_fields(cls, others, key)}

    def _find_unknown(self, unknown: Sequence[str], known: Sequence[str], key: str) -> None:
        for name in unknown:
            here = f"{key}.{name}" if key else name
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else f"known here: {', '.join(sorted(known)) or 'nothing'}"
            self.problems.append(f"{self.origin.of(here)}: unknown key {here!r}; {hint}")

    def _resolve(self, node: Any, key: str) -> Any:
        """Return a value as plain Python with every `${...}` in it replaced."""
        if isinstance(node, str) and _PLACEHOLDER.match(node):
            advice = f"set it in the YAML or pass --options {key}=PATH"
            self.problem(key, f" is still a placeholder, {node!r}: {advice}")
        if not isinstance(node, (DictConfig, ListConfig)):
            return node
        names: Any = list(node.keys()) if isinstance(node, DictConfig) else range(len(node))
        found: dict[Any, Any] = {}
        for name in names:
            here = f"{key}.{name}" if key else str(name)
            try:
                missing = OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name)
                found[name] = None if missing else self._resolve(node[name], here)
            except InterpolationToMissingValueError:
                found[name] = None
                self.reported.add(here)  # the required value it refers to has a problem of its own
            except OmegaConfBaseException as error:
                found[name] = None
                self.problem(here, f": {first_line(error)}")
        return found if isinstance(node, DictConfig) else list(found.values())
