"""The manifest of a checkpoint: what was trained, how far, and beside which frozen parts.

Input: the assembled model and the run. Output: `manifest.json`. A checkpoint is loaded only beside the very parts it
was trained with; each kind of mismatch has its own message, before a single weight is copied.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.errors import CheckpointError
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.weights import fingerprint

FILE = "manifest.json"
FORMAT = 1
FROZEN_PARTS = ("vision_encoder", "resampler", "language_model")


@dataclass(frozen=True)
class PartIdentity:
    """Which frozen part stood beside the trained ones.

    Attributes:
        type: class name.
        source: path or asset it was loaded from, as the config had it.
        width: Dv, Dq or Dl.
        fingerprint: of its frozen tensors; see `minigpt4.weights.fingerprint`.
        settings: what else decides its features, such as image size and normalisation.
    """

    type: str
    source: str
    width: int
    fingerprint: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        format: version of the folder's layout.
        version: of the package that wrote it.
        step: optimiser steps done.
        total_steps: optimiser steps planned.
        template: name of the conversation template.
        trained: names and shapes of the trained tensors.
        parts: identities of the frozen parts.
        samples: training samples seen.
        tokens: supervised tokens seen.
        notes: what the parts from assets are, and their licences.
    """

    format: int
    version: str
    step: int
    total_steps: int
    template: str
    trained: dict[str, list[int]]
    parts: dict[str, PartIdentity]
    samples: int = 0
    tokens: int = 0
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a checkpoint folder.

        Raises:
            CheckpointError: there is none, or it is of a later format or damaged.
        """
        path = folder / FILE
        if not path.is_file():
            raise CheckpointError(f"{folder}: is no checkpoint, it has no {FILE}")
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] > FORMAT:
                raise CheckpointError(
                    f"{path}: format {values['format']}, but this version reads up to {FORMAT}; upgrade minigpt4"
                )
            values["parts"] = {name: PartIdentity(**part) for name, part in values["parts"].items()}
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged: {error!r}") from error


def identify(model: MiniGPT4, learnt: Collection[str]) -> dict[str, PartIdentity]:
    """Return the identities of the model's parts, as they are beside the tensors named in `learnt`."""
    widths = {
        "vision_encoder": model.vision_encoder.feature_dim,
        "resampler": model.resampler.feature_dim,
        "language_model": model.language_model.hidden_size,
    }
    identities = {}
    for name, width in widths.items():
        part = getattr(model, name)
        digest = fingerprint(model.tensors_beside(name, learnt))
        identities[name] = PartIdentity(type(part).__name__, part.source, width, digest, part.settings)
    return identities


def check_parts(manifest: Manifest, model: MiniGPT4, place: str) -> None:
    """Raise CheckpointError unless the model's parts are those beside which the checkpoint was trained."""
    found = identify(model, manifest.trained)
    for name in FROZEN_PARTS:
        theirs, ours = manifest.parts.get(name), found[name]
        if theirs is None:
            raise CheckpointError(f"{place}: its manifest does not tell the {name}")
        if theirs.width != ours.width:
            raise CheckpointError(
                f"{place}: trained with a {name} {theirs.width} wide ({theirs.source or theirs.type}); "
                f"yours is {ours.width} wide ({ours.source or ours.type})"
            )
        if theirs.type != ours.type:
            raise CheckpointError(f"{place}: trained with the {name} {theirs.type}; yours is {ours.type}")
        changed = [
            f"{key} {theirs.settings.get(key)} (yours: {ours.settings.get(key)})"
            for key in sorted(theirs.settings.keys() | ours.settings.keys())
            if theirs.settings.get(key) != ours.settings.get(key)
        ]
        if changed:
            raise CheckpointError(f"{place}: trained with other settings of the {name}: {', '.join(changed)}")
        if theirs.fingerprint != ours.fingerprint:
            raise CheckpointError(
                f"{place}: trained with another {name}: of the same size, but its weights differ "
                f"(fingerprint {theirs.fingerprint}, from {theirs.source!r}; "
                f"yours {ours.fingerprint}, from {ours.source!r})"
            )
