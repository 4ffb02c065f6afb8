"""From YAML files and `--options` to one typed, validated `Config`.

Input: a YAML path (or the name of a shipped one), options `section.key=value`. Output: a `Config` whose
sections are the dataclasses that the registry names. All problems are reported at once, each with its file,
line and nearest key.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from minigpt4.config.defaults import fill, plain
from minigpt4.config.interpolation import BROKEN, escape, resolve
from minigpt4.config.paths import find_config
from minigpt4.config.sources import Origin, read_sources
from minigpt4.config.validate import Validator
from minigpt4.errors import ConfigError
from minigpt4.registry import SECTIONS, Registry

COMPAT = ("ours", "published")
ORDER = ("model", "processors", "conversation", "datasets", "run", "tracking", "chat", "evaluation", "server", "demo")
"""The sections in the order in which a saved config shows them."""


@dataclass(frozen=True)
class Config:
    """A whole, validated configuration; a section that the YAML does not have holds its defaults.

    A section whose dataclass has required fields and that the YAML does not have is None.
    """

    model: Any
    processors: Any
    conversation: Any
    datasets: Any
    run: Any
    tracking: Any
    chat: Any
    evaluation: Any
    server: Any
    demo: Any
    compat: str
    plugins: tuple[str, ...]
    values: dict[str, Any]
    """The complete resolved values as plain Python, defaults included; see `config_from_values`."""
    source: str = field(compare=False)
    """Where it was read, for messages."""

    def to_yaml(self) -> str:
        """Return the resolved values as YAML: `config.yaml` of a run folder; `load_config` reads it."""
        return OmegaConf.to_yaml(OmegaConf.create(escape(self.values)))

    def require(self, *sections: str) -> None:
        """Check that the configuration has what a job needs.

        Raises:
            ConfigError: names every section in `sections` that is absent.
        """
        missing = [name for name in sections if getattr(self, name) is None]
        if missing:
            raise ConfigError([f"{self.source}: section {name!r} is required for this job" for name in missing])


def load_config(path: str | Path, options: Sequence[str] = (), *, sections: Registry = SECTIONS) -> Config:
    """Read, merge and validate a configuration.

    Args:
        path: a YAML file; a bare name such as `mini` or `mini_stage1` also finds the shipped files of that
            name in `configs/` and `eval_configs/`.
        options: overrides `section.key=value`, the value in YAML syntax; list items by number,
            `section.0.key=value`.
        sections: the table of sections; tests pass a small one.

    Raises:
        ConfigError: everything that is wrong, in one error.
    """
    file = find_config(path)
    values, origin, problems = read_sources(file, options)
    return _validated(values, origin, problems, sections)


def config_from_values(values: dict[str, Any], source: str, *, sections: Registry = SECTIONS) -> Config:
    """Validate values that are plain Python already, such as `Config.values`.

    Nothing in them is an interpolation; a file, a checkpoint's `config.yaml` too, is read by `load_config`.

    Args:
        values: nested values, not changed.
        source: what messages call them.
        sections: the table of sections.

    Raises:
        ConfigError: everything that is wrong, in one error.
    """
    return _validated(escape(values), Origin(source), [], sections)


def _validated(values: dict[str, Any], origin: Origin, problems: list[str], sections: Registry) -> Config:
    """Return the config of merged `values`, or raise all of `problems` and what is found here."""
    validator = Validator(origin, problems)
    plugins = _import_plugins(values.get("plugins"), validator)
    names = [name for name in ORDER if name in sections]
    validator.unknown_keys(values, [*names, "compat", "plugins", "extends"])
    given = {name for name in names if values.get(name) is not None}
    complete = {"compat": values.get("compat", "ours")}
    complete |= {name: fill(sections.get(name), values[name] if name in given else {}) for name in names}
    complete = resolve(complete, origin, problems)
    if complete["compat"] not in COMPAT and complete["compat"] is not BROKEN:
        validator.refuse("compat", f"must be one of {', '.join(COMPAT)}, found {complete['compat']!r}")
    built: dict[str, Any] = dict.fromkeys(ORDER)
    for name in names:
        checker = validator if name in given else Validator(origin, [])
        section = checker.section(sections.get(name), complete[name], name)
        built[name] = None if section is BROKEN else section
    if problems:
        raise ConfigError(problems)
    saved = {"compat": complete["compat"], "plugins": list(plugins)}
    saved |= {name: plain(section) for name, section in built.items() if section is not None}
    return Config(**built, compat=complete["compat"], plugins=plugins, values=saved, source=origin.source)


def _import_plugins(given: Any, validator: Validator) -> tuple[str, ...]:
    """Import the modules under `plugins:`, which register their classes; return their names."""
    plugins = [given] if isinstance(given, str) else given or []
    if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
        validator.refuse("plugins", f"must be a list of modules, found {given!r}")
        return ()
    for plugin in plugins:
        try:
            importlib.import_module(plugin)
        except ImportError as error:
            validator.refuse("plugins", f"cannot import {plugin!r}: {error}", separator=": ")
    return tuple(plugins)
