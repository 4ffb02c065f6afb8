"""What makes a part the part it is, besides its weights: the settings that change its features."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

_NOT_IDENTITY = ("weights", "ln_vision_weights", "weights_match", "dtype")
"""Settings that say where weights are and how they are held, not what the part computes."""


def identity_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a part's config dataclass that belong to its identity, as plain values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists, as in a manifest
    return {key: value for key, value in plain.items() if key not in _NOT_IDENTITY}
