"""Checks on the paths in a config before a job loads anything, so that all missing files are named at once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt4.config.paths import resolve_shipped
from minigpt4.config.schema import FilePath, marker, type_hints
from minigpt4.config.sections import Config
from minigpt4.registry import Component

_ELSEWHERE = re.compile(r"asset:|pipe:|[a-z][a-z0-9+.-]*://")
"""Values that are found or fetched elsewhere: assets, commands, URLs."""
_PATTERN = re.compile(r"[{*?\[]")
"""Where a path stops being one file: `{00000..00099}.tar`, `*.tar`."""


def missing_files(config: Config, *only: str) -> list[str]:
    """Return one line for each file or folder in `config` that does not exist, with the option that sets it.

    Fields marked `FilePath` are checked; for a pattern, `shards/{000..010}.tar`, its folder.

    Args:
        config: a validated config.
        only: the sections that are checked; all if none is named.
    """
    names = only or tuple(spec.name for spec in dataclasses.fields(config))
    sections = {name: getattr(config, name) for name in names}
    return [
        f"{option}: there is no file {path!r}: pass --options {option}=PATH"
        for name, section in sections.items()
        for option, path in _paths(section, name)
        if not _exists(path)
    ]


def _paths(value: Any, option: str) -> Iterator[tuple[str, str]]:
    """Yield every path below `value` with the option that sets it."""
    if isinstance(value, Component):
        yield from _paths(value.config, option)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, f"{option}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _paths(item, f"{option}.{index}")
    elif dataclasses.is_dataclass(value):
        for spec in dataclasses.fields(value):
            item, here = getattr(value, spec.name), f"{option}.{spec.name}"
            mark = marker(type_hints(value.__class__)[spec.name], FilePath)
            if mark is None:
                yield from _paths(item, here)
                continue
            is_list = isinstance(item, (list, tuple))
            given = {f"{here}.{i}": each for i, each in enumerate(item)} if is_list else {here: item}
            yield from ((key, path) for key, path in given.items() if path and path not in mark.words)


def _exists(path: str) -> bool:
    if _ELSEWHERE.match(path):
        return True
    found = _PATTERN.search(path)
    if found is None or Path(path).exists():
        return resolve_shipped(path).exists()
    return Path(path[: found.start()] + "_").parent.is_dir()


def differences(one: Config, other: Config, *sections: str) -> list[str]:
    """Return the dotted keys in which two configs differ, those of file and folder paths left out.

    Args:
        one: a validated config.
        other: another one.
        sections: the sections compared.
    """
    return [key for name in sections for key in _differing(getattr(one, name), getattr(other, name), name)]


def _differing(one: Any, other: Any, key: str) -> Iterator[str]:
    if isinstance(one, Component) and isinstance(other, Component) and one.type == other.type:
        yield from _differing(one.config, other.config, key)
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for name in one:
            yield from _differing(one[name], other[name], f"{key}.{name}")
    elif dataclasses.is_dataclass(one) and type(one) is type(other) and not isinstance(one, Component):
        for spec in dataclasses.fields(one):
            if marker(type_hints(one.__class__)[spec.name], FilePath) is None:
                yield from _differing(getattr(one, spec.name), getattr(other, spec.name), f"{key}.{spec.name}")
    elif one != other:
        yield key
