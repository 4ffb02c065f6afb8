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
FORMAT = 2
FROZEN_PARTS = ("vision_encoder", "resampler", "language_model")


@dataclass(frozen=True)
class PartIdentity:
    """Which frozen part stood beside the trained ones.

    Attributes:
        type: class name.
        source: path or asset it was loaded from, as the config had it.
        width: Dv, Dq or Dl.
        fingerprint: of its frozen tensors; see `minigpt4.weights.fingerprint`. Empty: not known, as in the released
            files; then nothing but the widths can be compared.
        settings: what else decides its features, such as image size and normalisation.
        vocabulary: V of a language model, rows added for padding included; 0 elsewhere, or where it was not noted.
        parameters: numbers in its frozen tensors; 0 where it was not noted.
    """

    type: str
    source: str
    width: int
    fingerprint: str
    settings: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 0
    parameters: int = 0


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
        stage: 1 for what was trained from a fresh start, one more for each `model.init_from`; 0 where it is not known.
        data: hash of the training data; see `minigpt4.datasets.source.data_hash`.
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
    stage: int = 0
    data: str = ""

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
    return {name: _identify_part(model, name, learnt) for name in FROZEN_PARTS}


def _identify_part(
    model: MiniGPT4, name: str, learnt: Collection[str], *, with_fingerprint: bool = True
) -> PartIdentity:
    """Return the identity of one part; a fingerprint reads from every tensor, which takes time on a cold disk."""
    widths = {
        "vision_encoder": model.vision_encoder.feature_dim,
        "resampler": model.resampler.feature_dim,
        "language_model": model.language_model.hidden_size,
    }
    part = getattr(model, name)
    tensors = model.tensors_beside(name, learnt)
    return PartIdentity(
        type=type(part).__name__,
        source=part.source,
        width=widths[name],
        fingerprint=fingerprint(tensors) if with_fingerprint else "",
        settings=part.settings,
        vocabulary=part.vocab_size if name == "language_model" else 0,
        parameters=sum(tensor.numel() for _, tensor in tensors),
    )


def stage_after(start: Manifest | None) -> int:
    """Return the stage of a run that starts from a checkpoint, or from none; see `Manifest.stage`."""
    if start is None:
        return 1
    return start.stage + 1 if start.stage else 0


def check_parts(manifest: Manifest, model: MiniGPT4, place: str) -> None:
    """Raise CheckpointError unless the model's parts are those beside which the checkpoint was trained."""
    for name in FROZEN_PARTS:
        theirs = manifest.parts.get(name)
        if theirs is None:
            raise CheckpointError(f"{place}: its manifest does not tell the {name}")
        ours = _identify_part(model, name, manifest.trained, with_fingerprint=bool(theirs.fingerprint))
        check_sizes(name, theirs, ours, place)
        if theirs.type and theirs.type != ours.type:
            raise CheckpointError(f"{place}: trained with the {name} {theirs.type}; yours is {ours.type}")
        if not theirs.fingerprint:
            continue
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
                f"yours {ours.fingerprint}, from {ours.source!r}); take the one it was trained with"
            )


def check_sizes(name: str, theirs: PartIdentity, ours: PartIdentity, place: str) -> None:
    """Raise CheckpointError if two identities of a part are of different sizes; a size of 0 is not known.

    Args:
        name: of the part.
        theirs: beside which the checkpoint was trained.
        ours: beside which it is to be used.
        place: the checkpoint, for the message.
    """
    what = "an LLM" if name == "language_model" else f"a {name}"
    known, own = theirs.source or theirs.type or "its file does not say which", ours.source or ours.type
    if theirs.width and theirs.width != ours.width:
        raise CheckpointError(
            f"{place}: trained with {what} {theirs.width} wide ({known}); yours is {ours.width} wide ({own})"
        )
    if theirs.vocabulary and ours.vocabulary and theirs.vocabulary != ours.vocabulary:
        raise CheckpointError(
            f"{place}: trained with {what} of {theirs.vocabulary} tokens ({known}); yours has {ours.vocabulary} ({own})"
        )
