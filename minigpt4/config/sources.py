"""Raw values from YAML files and `--options`, and where each of them was written.

Input: a file and the texts of the options. Output: nested plain values, `${...}` and `???` untouched, with an
`Origin` that knows `file:line` of each dotted key. A list item is a key too: `datasets.train.urls.0`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.errors import ConfigError

REQUIRED = "???"
"""Stands for a required value that a child file or an option must set."""
_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"


@dataclass
class Origin:
    """Where each dotted key was written: `file:line`, or the option."""

    source: str
    places: dict[str, str] = field(default_factory=dict)

    def of(self, key: str) -> str:
        """Return the place of `key`, of its nearest parent that has one, or the file."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key.rpartition(".")[0]
        return self.source

    def forget(self, key: str) -> None:
        """Drop the places of everything below `key`."""
        self.places = {name: place for name, place in self.places.items() if not name.startswith(f"{key}.")}


def read_sources(file: Path, options: Sequence[str]) -> tuple[dict[str, Any], Origin, list[str]]:
    """Read a file, what it extends, and the options on top.

    Returns:
        The values, their origin, and a problem for each option that cannot be applied.

    Raises:
        ConfigError: a file cannot be read as a mapping, or what it extends is missing or extends itself.
    """
    values, origin = _read(file, ())
    return values, origin, _apply_options(values, origin, options)


def read_saved_sources(file: Path, options: Sequence[str]) -> tuple[dict[str, Any], Origin, list[str]]:
    """Read the `config.yaml` of a checkpoint, which was saved complete, and the options on top; see `read_sources`.

    The file may come from somebody else, so it is data: `${...}` in it is text, and it cannot extend other files.
    """
    values, places = _parse(file)
    if "extends" in values:
        raise ConfigError(f"{places['extends']}: the config of a checkpoint is complete and cannot extend another file")
    values = _without_interpolations(values)
    origin = Origin(str(file), places)
    return values, origin, _apply_options(values, origin, options)


def _apply_options(values: dict[str, Any], origin: Origin, options: Sequence[str]) -> list[str]:
    """Set each option in `values`, in place; return a problem for each that cannot be applied."""
    problems = _repeated(options)
    # A new `type` empties its section, so it comes before the options that fill the section again.
    for option in sorted(options, key=_types_first):
        problem = _apply_option(values, origin, option)
        if problem:
            problems.append(f"--options {option}: {problem}")
    return problems


def _repeated(options: Sequence[str]) -> list[str]:
    """Return a problem for each key that is set twice; a shell turns `urls=[s{1..2}.tar]` into two options."""
    problems = []
    seen: dict[str, str] = {}
    for option in options:
        key, _, text = option.partition("=")
        if seen.setdefault(key.strip(), text) != text:
            first = f"{key}={seen[key.strip()]}"
            problems.append(f"--options {option}: {key.strip()} is already set by {first}; quote lists with braces")
    return problems


def _read(file: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], Origin]:
    """Return the values of `file` on top of those it extends, and the place of each key."""
    own, places = _parse(file)
    origin = Origin(str(file))
    chain = (*chain, file.resolve())
    merged: dict[str, Any] = {}
    for parent in _parents(file, own.pop("extends", None), places):
        if parent.resolve() in chain:
            names = " -> ".join(link.name for link in (*chain, parent))
            raise ConfigError(f"{places['extends']}: extends itself: {names}")
        values, parent_origin = _read(parent, chain)
        overlay(merged, values, origin)
        origin.places.update(parent_origin.places)
    overlay(merged, own, origin)
    origin.places.update(places)
    return merged, origin


def _parse(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of one file and the place of each of its keys."""
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{file}: the top level must be a mapping of sections, found {_kind(node)}")
        places = {key: f"{file}:{line}" for key, line in _lines(node, file, ())}
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        problem = str(getattr(error, "problem", None) or error)
        hint = "; inside { } and [ ] write '???' in quotes" if "found '?'" in problem else ""
        raise ConfigError(f"{place}: not valid YAML: {problem}{hint}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {first_line(error)}") from error
    return values, places  # type: ignore[return-value]


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value)


def _lines(node: yaml.Node, file: Path, within: tuple[yaml.Node, ...]) -> Iterator[tuple[str, int]]:
    """Yield every dotted key below `node` with its line, counted from 1."""
    line = node.start_mark.line + 1
    if node in within:
        raise ConfigError(f"{file}:{line}: an alias contains itself")
    children: list[tuple[str, yaml.Node, int]] = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            at = key.start_mark.line + 1
            if key.tag == _MERGE:
                continue
            if key.tag != _TEXT or not key.value or "." in key.value:
                raise ConfigError(f"{file}:{at}: the key {key.value!r} must be text without a dot (quote a number)")
            children.append((key.value, value, at))
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(index), item, item.start_mark.line + 1) for index, item in enumerate(node.value)]
    for name, value, at in children:
        yield name, at
        for inner, inner_line in _lines(value, file, (*within, node)):
            yield f"{name}.{inner}", inner_line


def _parents(file: Path, extends: Any, places: dict[str, str]) -> list[Path]:
    """Return the files that the value of `extends` names."""
    names = [extends] if isinstance(extends, str) else extends or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{places['extends']}: extends must be a file or a list of files, found {extends!r}")
    parents = [Path(os.path.normpath(file.parent / name)) for name in names]
    missing = [
        f"{places['extends']}: extends {name!r}, but there is no file {str(parent)!r}"
        for name, parent in zip(names, parents, strict=True)
        if not parent.is_file()
    ]
    if missing:
        raise ConfigError(missing)
    return parents


def overlay(base: dict[str, Any], top: dict[str, Any], origin: Origin, path: str = "") -> None:
    """Put `top` over `base`, in place.

    Mappings are merged, everything else (lists too) is replaced. A mapping with another `type` replaces the old one
    as a whole: the settings of one component mean nothing to another. `???` keeps what `base` has.
    """
    for key, value in top.items():
        here = f"{path}.{key}" if path else key
        old = base.get(key)
        if value == REQUIRED and old is not None:
            continue
        if isinstance(value, dict) and isinstance(old, dict) and not _changes_type(old, value):
            overlay(old, value, origin, here)
        else:
            base[key] = value
            origin.forget(here)


def _types_first(option: str) -> tuple[bool, int]:
    key = option.partition("=")[0].strip()
    is_type = key.endswith(".type")
    return not is_type, key.count(".") if is_type else 0


def _changes_type(old: dict[str, Any], new: dict[str, Any]) -> bool:
    kind = new.get("type", REQUIRED)
    return kind != REQUIRED and "type" in old and old["type"] != kind


def _apply_option(values: dict[str, Any], origin: Origin, option: str) -> str | None:
    """Set one `section.key=value` in `values`; return what is wrong with the option, or None."""
    key, _, text = option.partition("=")
    *parents, last = parts = key.strip().split(".")
    if not text.strip() or not all(parts):
        return "must have the form section.key=value (null and '' are values)"
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        return "the value is not valid YAML; quote it"
    value = parsed["value"]
    holder: Any = values
    for depth, name in enumerate(parents):
        here = ".".join(parts[: depth + 1])
        if isinstance(holder, dict) and holder.get(name) in (None, REQUIRED):
            holder[name] = {}
            origin.places[here] = f"--options {option}"
        elif problem := _not_in(holder, name, here):
            return problem
        holder = holder[int(name) if isinstance(holder, list) else name]
    if isinstance(holder, dict):
        if last == "type" and parents and holder.get("type", value) != value:
            holder.clear()
            origin.forget(".".join(parents))
        overlay(holder, {last: value}, origin, ".".join(parents))
    elif problem := _not_in(holder, last, ".".join(parts)):
        return problem
    else:
        holder[int(last)] = value
    origin.places |= dict.fromkeys(_keys(value, ".".join(parts)), f"--options {option}")
    return None


def _keys(value: Any, path: str) -> Iterator[str]:
    """Yield `path` and every dotted key below it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _keys(item, f"{path}.{key}")


def _not_in(holder: Any, name: str, path: str) -> str | None:
    """Return why `name` cannot be looked up in `holder`, or None."""
    parent = path.rpartition(".")[0]
    if isinstance(holder, list):
        if name.isdecimal() and int(name) < len(holder):
            return None
        return f"{parent} is a list of {len(holder)} items, counted from 0; there is no item {name!r}"
    return None if isinstance(holder, dict) else f"{parent} is {holder!r}, not a section"


def first_line(error: Exception) -> str:
    """Return the first line of an omegaconf error; the rest repeats the key in omegaconf's terms."""
    return str(error).splitlines()[0]


def escape(value: Any) -> Any:
    r"""Return plain `value` with each `${` in its texts written `\${`, which omegaconf reads as literal text."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(escape(item) for item in value)
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _without_interpolations(value: Any) -> Any:
    """Return `value` with each `${` that is not escaped yet escaped, so that it is text."""
    if isinstance(value, dict):
        return {key: _without_interpolations(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_interpolations(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[0] if len(found[1]) % 2 else escape(found[0]), value)
    return value


def to_yaml(values: dict[str, Any]) -> str:
    """Return plain values as YAML; nothing in it is an interpolation."""
    return OmegaConf.to_yaml(OmegaConf.create(escape(values)))
