"""Whole configs: what the YAML leaves out is filled in before it is read, and written out after.

`fill` goes from written values to complete ones, so that `${run.seed}` finds a seed that nobody wrote;
`plain` goes from dataclasses back to values that YAML can hold.
"""

from __future__ import annotations

import dataclasses
import typing
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from minigpt4.config.interpolation import escape
from minigpt4.errors import MiniGPT4Error
from minigpt4.registry import Component, Registry


@cache
def type_hints(cls: type) -> dict[str, Any]:
    """Return the annotations of a dataclass, text annotations resolved."""
    return typing.get_type_hints(cls)


def admits_null(hint: Any) -> bool:
    """Whether a field annotated `hint` may be None."""
    return hint is Any or type(None) in typing.get_args(hint)


def fill(cls: type, values: Any) -> Any:
    """Return `values` with the defaults of the dataclass `cls` for what is absent; wrong values stay."""
    if not isinstance(values, dict) or not dataclasses.is_dataclass(cls):
        return values
    filled = dict(values)
    for spec in dataclasses.fields(cls):
        name, hint = spec.name, type_hints(cls)[spec.name]
        if "registry" in spec.metadata:
            _fill_component(filled, spec, admits_null(hint))
        elif name in filled:
            filled[name] = _fill_nested(hint, filled[name])
        elif spec.default is not dataclasses.MISSING:
            filled[name] = escape(plain(spec.default))
        elif spec.default_factory is not dataclasses.MISSING:
            filled[name] = escape(plain(spec.default_factory()))
        elif dataclasses.is_dataclass(hint):
            filled[name] = fill(typing.cast(type, hint), {})
    return filled


def _fill_nested(hint: Any, value: Any) -> Any:
    """Fill every dataclass that a field annotated `hint` holds."""
    if dataclasses.is_dataclass(hint):
        return fill(typing.cast(type, hint), value)
    inner = [each for each in typing.get_args(hint) if each not in (type(None), Ellipsis)]
    if not inner:
        return value
    if isinstance(value, list):
        return [_fill_nested(inner[0], item) for item in value]
    if isinstance(value, dict):
        if len(inner) == 1:
            return _fill_nested(inner[0], value)
        return {key: _fill_nested(inner[-1], item) for key, item in value.items()}
    return value


def _fill_component(filled: dict[str, Any], spec: dataclasses.Field[Any], optional: bool) -> None:
    registry, default, many = (spec.metadata[key] for key in ("registry", "default", "many"))
    value = filled.get(spec.name)
    if many:
        value = {} if value is None else value
        if isinstance(value, dict):
            given = {name: item for name, item in value.items() if item is not None}  # null takes an inherited one away
            value = {name: _filled_component(registry, item, default) for name, item in given.items()}
    elif spec.name not in filled:
        value = None if optional and default is None else _filled_component(registry, {}, default)
    else:
        value = _filled_component(registry, value, default)
    filled[spec.name] = value


def _filled_component(registry: Registry, value: Any, default: str | None) -> Any:
    if not isinstance(value, dict):
        return value
    settings = {key: item for key, item in value.items() if key != "type"}
    name = value.get("type", default)
    if name is None:
        return settings
    try:
        config = getattr(registry.get(name), "Config", None)
    except MiniGPT4Error:
        config = None
    return {"type": name, **(fill(config, settings) if isinstance(config, type) else settings)}


def plain(value: Any) -> Any:
    """Return `value` as YAML can hold it: mappings, lists, text, numbers."""
    if isinstance(value, Component):
        return {"type": value.type, **plain(value.config)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {spec.name: plain(getattr(value, spec.name)) for spec in dataclasses.fields(value) if spec.init}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value
