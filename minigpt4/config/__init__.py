"""YAML in, typed config out.

`sections` and `parts` are the settings of everything, one page each; `schema` is what they are made of. `reading`
merges files and options (`sources`) and validates the result. `files` looks for the paths that a validated config
names; `migration` rewrites configs of the published code.
"""

from minigpt4.config.files import differences, missing_files
from minigpt4.config.migration import Migrated, migrate
from minigpt4.config.paths import find_config, resolve_shipped, shipped, shipped_configs
from minigpt4.config.reading import config_from_values, load_config, load_saved_config
from minigpt4.config.schema import FilePath, NameIn, OneOf, settings
from minigpt4.config.sections import Config

__all__ = [
    "Config",
    "FilePath",
    "Migrated",
    "NameIn",
    "OneOf",
    "config_from_values",
    "differences",
    "find_config",
    "load_config",
    "load_saved_config",
    "migrate",
    "missing_files",
    "resolve_shipped",
    "settings",
    "shipped",
    "shipped_configs",
]
