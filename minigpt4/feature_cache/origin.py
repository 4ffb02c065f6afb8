"""What cached features were made with, and whether a config describes the same.

Input: a config, and the weight files it names. Output: the `origin` in a cache's description, and a line for everything
that differs. Nothing is loaded: weight files are compared by their content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt4.assets import PREFIX, is_cached, resolve
from minigpt4.config import Config
from minigpt4.config.schema import FilePath, marker, plain, type_hints
from minigpt4.registry import Component
from minigpt4.weights import RANDOM

Origin = dict[str, Any]
"""Plain values: for `vision_encoder` and `resampler` their type, settings and weight files, and the image processor."""
PARTS = ("vision_encoder", "resampler")
_NOT_COMPARED = ("dtype", "weights_match")
"""Settings that say how weights are read and stored, not which they are."""
_log = logging.getLogger(__name__)


def origin_of(config: Config) -> Origin:
    """Return everything that decides the query features of an image, with a hash of every weight file.

    Raises:
        OSError: a weight file cannot be read.
    """
    parts = {name: _described(getattr(config.model, name), config.run.seed) for name in PARTS}
    for name in PARTS:
        component: Component = getattr(config.model, name)
        for key, path in _paths(component):
            parts[name]["weights"][key] = {"path": path, "files": [_identity(file) for file in _files(path)]}
    return {**parts, "image_processor": plain(config.processors.image)}


def differences_from(origin: Origin, config: Config) -> list[str]:
    """Return one line for each way in which `config` would make other features than those of `origin`.

    A weight file that is not on this machine cannot have changed on it; it is logged and not compared.
    """
    found = []
    for name in PARTS:
        component: Component = getattr(config.model, name)
        ours, theirs = _described(component, config.run.seed), origin[name]
        option = f"model.{name}"
        found += _differing(option, theirs, ours, ("type", "settings", "seed"))
        weights = theirs["weights"]
        given = dict(_paths(component))
        for key in sorted(given.keys() | weights.keys()):
            if key not in given or key not in weights:
                found.append(f"{option}.{key}: {'is not set' if key in weights else given[key]}")
            elif (problem := _changed_file(weights[key], given[key])) is not None:
                found.append(f"{option}.{key}: {problem}")
    found += _differing("processors", origin, {"image_processor": plain(config.processors.image)}, ("image_processor",))
    return found


def _described(component: Component, seed: int) -> dict[str, Any]:
    """Return type and settings of a part without its paths, and the seed if its weights are random."""
    paths = {key for key, _ in _all_paths(component)}
    settings = {k: v for k, v in plain(component.config).items() if k not in paths and k not in _NOT_COMPARED}
    is_random = any(value == RANDOM for _, value in _all_paths(component))
    return {"type": component.type, "settings": settings, "seed": seed if is_random else None, "weights": {}}


def _all_paths(component: Component) -> Iterator[tuple[str, str]]:
    """Yield the settings of a part that name files, with their values."""
    hints = type_hints(component.config.__class__)
    for spec in dataclasses.fields(component.config):
        if marker(hints[spec.name], FilePath) is not None:
            yield spec.name, getattr(component.config, spec.name)


def _paths(component: Component) -> Iterator[tuple[str, str]]:
    """Yield those that are set, and are not the word for random weights."""
    yield from ((key, value) for key, value in _all_paths(component) if value and value != RANDOM)


def _files(path: str) -> list[Path]:
    """Return the files behind a config value: itself, or those in the folder."""
    found = resolve(path)
    return sorted(file for file in found.iterdir() if file.is_file()) if found.is_dir() else [found]


def _identity(file: Path) -> dict[str, Any]:
    stat = file.stat()
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"name": file.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, "sha256": digest}


def _changed_file(recorded: dict[str, Any], path: str) -> str | None:
    """Return what is wrong with a weight file or folder, compared with the one that was recorded."""
    is_here = is_cached(path.removeprefix(PREFIX)) if path.startswith(PREFIX) else Path(path).exists()
    if not is_here:
        _log.warning("%s is not on this machine: it is not compared with the one that made the cached features", path)
        return None
    files = {file.name: file for file in _files(path)}
    known = {each["name"]: each for each in recorded["files"]}
    if len(files) == len(known) == 1:  # a single file may have another name
        known = dict(zip(files, known.values(), strict=True))
    if files.keys() != known.keys():
        return f"{path} has other files than {recorded['path']}, which made the features"
    for name, file in files.items():
        stat = file.stat()
        if (stat.st_size, stat.st_mtime_ns) == (known[name]["bytes"], known[name]["modified_ns"]):
            continue
        if stat.st_size != known[name]["bytes"] or _identity(file)["sha256"] != known[name]["sha256"]:
            return f"{file} is not the file that made the features ({recorded['path']}): its content differs"
    return None


def _differing(option: str, theirs: dict[str, Any], ours: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """Return one line for each value that differs, down to single settings."""
    found = []
    for key in keys:
        one, other, place = theirs.get(key), ours.get(key), f"{option}.{key}"
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differing(place, one, other, tuple(sorted(one.keys() | other.keys())))
        elif one != other:
            found.append(f"{place.replace('.settings', '')}: {other} (cached with {one})")
    return found
