"""YAML in, typed config out.

`loader` is the way in: it reads files and options (`sources`), fills in what is not written (`defaults`),
resolves `${...}` (`interpolation`) and holds the result against the dataclasses the registry names
(`validate`). `files` looks for the paths a validated config mentions; `migration` rewrites configs of the
published code.
"""

from minigpt4.config.files import differences, missing_files
from minigpt4.config.loader import Config, config_from_values, load_config
from minigpt4.config.migration import Migrated, migrate
from minigpt4.config.paths import find_config, resolve_shipped, shipped, shipped_configs

__all__ = [
    "Config",
    "Migrated",
    "config_from_values",
    "differences",
    "find_config",
    "load_config",
    "migrate",
    "missing_files",
    "resolve_shipped",
    "shipped",
    "shipped_configs",
]
