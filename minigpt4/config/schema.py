"""What settings classes are made of: the decorator, the markers of their fields, and the words for wrong values.

A settings class is a frozen dataclass. Bounds are declared (`Annotated[int, Ge(1)]`), checks over several fields stand
in `__post_init__`, and the docstring under a field is its documentation. Values are checked by pydantic, both when a
YAML file is read and when a class is called from Python.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import core_schema

from minigpt4.errors import UnknownNameError
from minigpt4.registry import Component, Registry

Class = TypeVar("Class", bound=type)
Mark = TypeVar("Mark")

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "none": "null",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "dataclass": "a mapping",
}
_BOUNDS = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: Class) -> Class:
    """Class decorator: make a settings class, a frozen keyword-only dataclass whose values are checked."""
    rules = ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False, coerce_numbers_to_str=True)
    return typing.cast(Class, pydantic_dataclass(cls, frozen=True, kw_only=True, config=rules))


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Marks a `Component` field: a mapping whose `type` is a name in `registry`.

    Attributes:
        registry: where `type` is looked up.
        default: the `type` of a mapping that has none; without it `type` is required.
    """

    registry: Registry
    default: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Tell pydantic how such a field is checked."""
        return core_schema.no_info_plain_validator_function(self._component)

    def _component(self, value: Any) -> Component:
        if isinstance(value, Component):
            return value
        if not isinstance(value, dict) or "type" not in value:
            raise ValueError("must be a mapping with a type")
        name, others = value["type"], {key: item for key, item in value.items() if key != "type"}
        try:
            settings_class = self.registry.settings(name)
        except UnknownNameError as error:
            raise ValueError(str(error)) from error
        return Component(self.registry, name, adapter(settings_class).validate_python(others))


@dataclasses.dataclass(frozen=True)
class NameIn:
    """Marks a `str` field that holds a name in `registry`, or one of `others`."""

    registry: Registry
    others: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Return every name the field may hold, sorted."""
        return sorted([*self.registry.names(), *self.others])


@dataclasses.dataclass(frozen=True)
class FilePath:
    """Marks a field that holds the path of a file or folder, or a list of them.

    `minigpt4.config.missing_files` names every such path that does not exist. Empty text, `asset:NAME`, URLs and the
    values in `words` are not paths.
    """

    words: tuple[str, ...] = ("random",)


@cache
def type_hints(cls: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass with their markers."""
    return typing.get_type_hints(cls, include_extras=True)


def split_hint(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the type in an annotation and its markers."""
    return (hint.__origin__, hint.__metadata__) if typing.get_origin(hint) is typing.Annotated else (hint, ())


def marker(hint: Any, kind: type[Mark]) -> Mark | None:
    """Return the marker of class `kind` in an annotation, or None."""
    return next((mark for mark in split_hint(hint)[1] if isinstance(mark, kind)), None)


@cache
def adapter(cls: Any) -> TypeAdapter[Any]:
    """Return what turns plain values into an instance of a dataclass."""
    return TypeAdapter(cls)


def plain(value: Any) -> Any:
    """Return settings as values that YAML can hold: mappings, lists, text, numbers."""
    if isinstance(value, Component):
        return {"type": value.type, **plain(value.config)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {spec.name: plain(getattr(value, spec.name)) for spec in dataclasses.fields(value) if spec.init}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def describe_problems(error: ValidationError) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield the place and the description of everything that pydantic found wrong, one per place."""
    found: dict[tuple[str | int, ...], list[dict[str, Any]]] = {}
    for each in typing.cast(list[dict[str, Any]], error.errors(include_url=False)):
        place = each["loc"]
        too_short = each["type"] == "missing" and isinstance(place[-1], int)
        if too_short or (place and place[-1] in ("int", "str", "float", "bool")):  # the last is a member of a union
            place = place[:-1]
        found.setdefault(place, []).append(each)
    for place, errors in found.items():
        first = errors[0]
        kind, context = first["type"], first.get("ctx", {})
        if kind == "value_error":
            yield place, f": {context['error']}"
        elif kind in _BOUNDS:
            yield place, f" must be {_BOUNDS[kind].format(**context)}, found {shown(first['input'])}"
        elif kind == "literal_error":
            expected = context["expected"].replace("'", "").replace(" or ", ", ")
            yield place, f" must be one of {expected}, found {shown(first['input'])}"
        elif kind in ("missing", "too_long"):
            yield place, f" has the wrong number of values, found {shown(first['input'])}"
        else:
            words = dict.fromkeys(_EXPECTED.get(each["type"].split("_")[0], each["msg"]) for each in errors)
            yield place, f" must be {' or '.join(words)}, found {shown(first['input'])}"


def shown(value: Any) -> str:
    """Return a value as YAML would have it, shortened for a message."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
