"""`${run.seed}` and `${oc.env:HOME}` replaced by what they stand for.

Input: nested plain values. Output: the same with every interpolation resolved; `BROKEN` where that failed,
each failure a problem. `escape` is the way back: text that must not be read as an interpolation again.
"""

from __future__ import annotations

import re
from typing import Any, Final

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from minigpt4.config.sources import REQUIRED, Origin, first_line

BROKEN: Final = object()
"""Stands for a value whose interpolation failed: reported once, and no other complaint is made about it."""


def resolve(values: dict[str, Any], origin: Origin, problems: list[str]) -> dict[str, Any]:
    """Return `values` with interpolations resolved; add a line to `problems` for each that cannot be."""
    resolved: dict[str, Any] = _resolved(OmegaConf.create(values), "", origin, problems)
    return resolved


def _resolved(node: Any, path: str, origin: Origin, problems: list[str]) -> Any:
    if not isinstance(node, (DictConfig, ListConfig)):
        return node
    keys: Any = list(node.keys()) if isinstance(node, DictConfig) else range(len(node))
    found: dict[Any, Any] = {}
    for key in keys:
        here = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            found[key] = REQUIRED
            continue
        try:
            found[key] = _resolved(node[key], here, origin, problems)
        except InterpolationToMissingValueError:
            found[key] = BROKEN  # what it points to is required, and says so itself
        except OmegaConfBaseException as error:
            problems.append(f"{origin.of(here)}: {here}: {first_line(error)}")
            found[key] = BROKEN
    return found if isinstance(node, DictConfig) else list(found.values())


def escape(value: Any) -> Any:
    r"""Return plain `value` with each `${` in its texts written `\${`, as omegaconf wants literal text."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(escape(item) for item in value)
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
