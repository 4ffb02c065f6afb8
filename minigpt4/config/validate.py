"""Holding values against dataclasses: every problem found, none raised.

Input: complete plain values (`defaults.fill`) and the dataclass of a section. Output: an instance, or lines
for the problem report. Converting a single value is omegaconf's work; sections, lists and components
(sections with a `type:` key) are walked here, because omegaconf stops at the first problem.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable
from enum import Enum
from functools import cache
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.config.defaults import admits_null, type_hints
from minigpt4.config.interpolation import BROKEN, escape
from minigpt4.config.sources import REQUIRED, Origin
from minigpt4.errors import MiniGPT4Error
from minigpt4.registry import Component, Registry, nearest

_PLACEHOLDER = re.compile(r"[./]*path/to\b")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


class Validator:
    """Turns plain values into dataclasses, collecting problems; a value it refuses becomes `BROKEN`."""

    def __init__(self, origin: Origin, problems: list[str]) -> None:
        self.origin = origin
        self.problems = problems

    def section(self, cls: type, values: Any, path: str) -> Any:
        """Return an instance of `cls`, or `BROKEN` after noting what is wrong with `values`."""
        if not isinstance(values, dict):
            return self.refuse(path, f"must be a mapping, found {_shown(values)}")
        fields = {spec.name: spec for spec in dataclasses.fields(cls) if spec.init}
        self.unknown_keys(values, fields, path)
        arguments = {
            name: self._field(spec, type_hints(cls)[name], values.get(name, REQUIRED), f"{path}.{name}")
            for name, spec in fields.items()
        }
        if any(key not in fields for key in values) or any(value is BROKEN for value in arguments.values()):
            return BROKEN
        try:
            return cls(**arguments)
        except (ValueError, MiniGPT4Error) as error:  # a dataclass's own check across its fields
            return self.refuse(path, str(error), separator=": ")

    def unknown_keys(self, keys: Iterable[str], known: Iterable[str], path: str = "") -> None:
        """Note every key that nobody reads, with the nearest one that somebody does."""
        known = sorted(known)
        for key in keys:
            if key not in known:
                here = f"{path}.{key}" if path else key
                near = nearest(key, known)
                hint = f"did you mean {near!r}?" if near else f"known here: {', '.join(known) or 'nothing'}"
                self.problems.append(f"{self.origin.of(here)}: unknown key {here!r}; {hint}")

    def refuse(self, path: str, problem: str, separator: str = " ") -> Any:
        """Note a problem with the value at `path`; return `BROKEN`."""
        self.problems.append(f"{self.origin.of(path)}: {path}{separator}{problem}")
        return BROKEN

    def _field(self, spec: dataclasses.Field[Any], hint: Any, value: Any, path: str) -> Any:
        if "registry" in spec.metadata:
            return self._components(spec, hint, value, path)
        if isinstance(value, str) and value == REQUIRED:
            kind = "PATH" if spec.metadata.get("path") else "VALUE"
            return self.refuse(path, f"is required: set it in the YAML or pass --options {path}={kind}")
        if "names" in spec.metadata and value not in spec.metadata["names"]:
            return self._unknown_name(spec.metadata["names"], value, path)
        return self._value(hint, value, path)

    def _value(self, hint: Any, value: Any, path: str) -> Any:
        """Convert `value` to the type `hint`, item by item where it is a container."""
        if value is BROKEN:
            return BROKEN
        inner = typing.get_args(hint)
        if admits_null(hint) and value is None:
            return None
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            rest = [each for each in inner if each is not type(None)]
            return self._value(rest[0], value, path) if len(rest) == 1 else self._leaf(hint, value, path)
        if dataclasses.is_dataclass(hint):
            return self.section(typing.cast(type, hint), value, path)
        container = typing.get_origin(hint)
        if container in (list, tuple) and isinstance(value, (list, tuple)):
            fixed = container is tuple and inner[-1] is not Ellipsis
            if fixed and len(inner) != len(value):
                return self.refuse(path, f"must be {describe(hint)}, found {_shown(value)}")
            kinds = inner if fixed else inner[:1] * len(value)
            items = [
                self._value(kind, item, f"{path}.{i}") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
            ]
            return BROKEN if BROKEN in items else container(items)
        if container is dict and isinstance(value, dict):
            entries = {key: self._value(inner[1], item, f"{path}.{key}") for key, item in value.items()}
            return BROKEN if BROKEN in entries.values() else entries
        return self._leaf(hint, value, path)

    def _leaf(self, hint: Any, value: Any, path: str) -> Any:
        """Convert one plain value."""
        schema = _schema(hint)
        try:
            if hint in (str, str | None) and isinstance(value, (bool, float)):
                raise ValueError("put it in quotes")  # 1.10 would become the text 1.1
            merged = OmegaConf.merge(schema, {"value": escape(value)})
            converted: Any = OmegaConf.to_container(merged, resolve=True)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            advice = f"; {error}" if type(error) is ValueError else ""
            return self.refuse(path, f"must be {describe(hint)}, found {_shown(value)}{advice}")
        converted = converted["value"]
        if isinstance(converted, str) and _PLACEHOLDER.match(converted):
            advice = f"set it in the YAML or pass --options {path}=PATH"
            return self.refuse(path, f"is still a placeholder, {converted!r}: {advice}")
        return converted

    def _components(self, spec: dataclasses.Field[Any], hint: Any, value: Any, path: str) -> Any:
        registry: Registry = spec.metadata["registry"]
        if not spec.metadata["many"]:
            return None if value is None and admits_null(hint) else self._component(registry, value, path)
        if not isinstance(value, dict):
            return self.refuse(path, f"must map names to sections, found {_shown(value)}")
        parts = {name: self._component(registry, item, f"{path}.{name}") for name, item in value.items()}
        return BROKEN if BROKEN in parts.values() else parts

    def _component(self, registry: Registry, value: Any, path: str) -> Any:
        if value is BROKEN:
            return BROKEN
        if not isinstance(value, dict):
            return self.refuse(path, f"must be a mapping with a type, found {_shown(value)}")
        name = value.get("type", REQUIRED)
        if name is BROKEN:
            return BROKEN
        if name is None or name == REQUIRED:
            choices = ", ".join(registry.names())
            return self.refuse(f"{path}.type", f"is required, one of {choices}: pass --options {path}.type=NAME")
        try:
            cls = registry.get(name)
        except MiniGPT4Error as error:  # unknown, or its optional package is not installed
            return self.refuse(f"{path}.type", str(error), separator=": ")
        if not dataclasses.is_dataclass(getattr(cls, "Config", None)):
            return self.refuse(f"{path}.type", f"{cls.__qualname__} has no dataclass Config", separator=": ")
        config = self.section(cls.Config, {key: item for key, item in value.items() if key != "type"}, path)
        return BROKEN if config is BROKEN else Component(registry, name, config)

    def _unknown_name(self, registry: Registry, value: Any, path: str) -> Any:
        if value is BROKEN:
            return BROKEN
        near = nearest(value, registry.names())
        hint = f"; did you mean {near!r}?" if near else ""
        return self.refuse(path, f"must be one of {', '.join(registry.names())}, found {_shown(value)}{hint}")


def describe(hint: Any) -> str:
    """Return what a value annotated `hint` must be, in words."""
    inner = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(hint.__members__)}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(each) for each in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)} values"
    if origin in (list, tuple):
        return "a list"
    return "a mapping" if origin is dict else _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _shown(value: Any) -> str:
    if value is BROKEN:
        return "a value that could not be resolved"
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def _schema(hint: Any) -> Any:
    """Return omegaconf's view of one value annotated `hint`."""
    spec = ("value", hint, dataclasses.field(default=REQUIRED))
    return OmegaConf.structured(dataclasses.make_dataclass("Value", [spec]))
