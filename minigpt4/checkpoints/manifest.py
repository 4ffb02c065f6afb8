"""The manifest of a checkpoint: what was trained, for how long, and with which frozen parts.

Input: the assembled model and the run. Output: `manifest.json`. A checkpoint is loaded only with the parts that it was
trained with; each kind of mismatch has its own message, before any weight is copied.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from minigpt4.config.schema import adapter
from minigpt4.errors import CheckpointError
from minigpt4.strict_json import parse_json

if TYPE_CHECKING:  # a manifest is read without the libraries of the models
    from torch import Tensor

    from minigpt4.models.image_side import ImageSide
    from minigpt4.models.language_model import LanguageModel
    from minigpt4.models.minigpt4 import MiniGPT4
    from minigpt4.models.resampler import Resampler
    from minigpt4.models.vision import VisionEncoder

FILE, WEIGHTS, LATEST = "manifest.json", "model.safetensors", "latest"
"""Names in the folder of a checkpoint, and of the link to the newest one."""
FORMAT = 2
IMAGE_PARTS = ("vision_encoder", "resampler")
FROZEN_PARTS = (*IMAGE_PARTS, "language_model")


@dataclass(frozen=True)
class PartIdentity:
    """A part that a checkpoint was trained with.

    Attributes:
        type: class name.
        source: path or asset that it was loaded from, as in the config.
        width: Dv, Dq or Dl.
        fingerprint: of its frozen tensors; see `minigpt4.weights.fingerprint`. Empty if unknown, as in the released
            files; then only the widths are compared.
        settings: what else decides its features, such as the image size.
        vocabulary: V of a language model, including rows added for padding; 0 for other parts, or if unknown.
        parameters: number of values in its frozen tensors; 0 if unknown.
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
    """What a checkpoint contains and where it comes from.

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
        notes: description and licence of the parts that come from assets.
        stage: 1 without `model.init_from`, otherwise the stage of that checkpoint plus 1; 0 if unknown.
        data: hash of the training data; see `minigpt4.datasets.source.data_hash`.
        checksums: sha256 of files in the folder, by name; empty for folders of earlier versions. They say nothing about
            the training, so manifests are compared without them.
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
    checksums: dict[str, str] = field(default_factory=dict, compare=False)

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a checkpoint folder.

        Raises:
            CheckpointError: it is missing, damaged, or has a later format.
        """
        path = folder / FILE
        if not path.is_file():
            raise CheckpointError(f"{folder}: is not a checkpoint: {FILE} is missing")
        try:
            values = parse_json(path.read_bytes())
            if values["format"] > FORMAT:
                raise CheckpointError(
                    f"{path}: format {values['format']}, but this version reads up to {FORMAT}; upgrade minigpt4"
                )
            manifest: Manifest = adapter(cast(Any, cls)).validate_python(values)
            return manifest
        except ValidationError as error:
            first = error.errors()[0]
            raise CheckpointError(f"{path}: damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged: {error!r}") from error


def identify(model: MiniGPT4, trained: Collection[str]) -> dict[str, PartIdentity]:
    """Return the identities of the model's parts without the tensors named in `trained`."""
    return {name: identify_part(getattr(model, name), model.frozen_tensors(name, trained)) for name in FROZEN_PARTS}


def identify_image_side(model: ImageSide, trained: Collection[str]) -> dict[str, PartIdentity]:
    """Return the identities of image encoder and resampler without the tensors named in `trained`."""
    return {name: identify_part(getattr(model, name), model.frozen_tensors(name, trained)) for name in IMAGE_PARTS}


def identify_part(
    part: VisionEncoder | Resampler | LanguageModel,
    tensors: Collection[tuple[str, Tensor]],
    *,
    with_fingerprint: bool = True,
) -> PartIdentity:
    """Return the identity of one part; a fingerprint reads from every tensor, which may be slow the first time.

    Args:
        part: the part.
        tensors: its frozen tensors, by name; see `MiniGPT4.frozen_tensors`.
        with_fingerprint: whether to compute it; it is empty otherwise.
    """
    from minigpt4.models.language_model import LanguageModel
    from minigpt4.weights import fingerprint

    if (recorded := getattr(part, "identity", None)) is not None:  # it stands for a part whose outputs are cached
        return PartIdentity(**recorded)
    return PartIdentity(
        type=type(part).__name__,
        source=part.source,
        width=part.hidden_size if isinstance(part, LanguageModel) else part.feature_dim,
        fingerprint=fingerprint(tensors) if with_fingerprint else "",
        settings=part.settings,
        vocabulary=part.vocab_size if isinstance(part, LanguageModel) else 0,
        parameters=sum(tensor.numel() for _, tensor in tensors),
    )


def stage_after(start: Manifest | None) -> int:
    """Return the stage of a run that starts from the checkpoint of `start`, or from none; see `Manifest.stage`."""
    if start is None:
        return 1
    return start.stage + 1 if start.stage else 0


def check_parts(manifest: Manifest, model: MiniGPT4 | ImageSide, place: str) -> None:
    """Raise CheckpointError unless the model's parts are those that the checkpoint was trained with."""
    for name in FROZEN_PARTS if hasattr(model, "language_model") else IMAGE_PARTS:
        check_part(manifest, model, name, place)


def check_part(manifest: Manifest, model: MiniGPT4 | ImageSide, name: str, place: str) -> None:
    """Raise CheckpointError unless one part of the model is the one that the checkpoint was trained with."""
    theirs = known_part(manifest, name, place)
    tensors = model.frozen_tensors(name, manifest.trained)
    ours = identify_part(getattr(model, name), tensors, with_fingerprint=bool(theirs.fingerprint))
    check_same(name, theirs, ours, place)


def known_part(manifest: Manifest, name: str, place: str) -> PartIdentity:
    """Return a part that a checkpoint was trained with, or raise CheckpointError if its manifest lacks it."""
    theirs = manifest.parts.get(name)
    if theirs is None:
        raise CheckpointError(f"{place}: its manifest does not describe the {name}")
    return theirs


def check_same(name: str, theirs: PartIdentity, ours: PartIdentity, place: str) -> None:
    """Raise CheckpointError unless two parts are the same, as far as their identities say.

    Args:
        name: of the part.
        theirs: the part that the checkpoint was trained with.
        ours: the part that it is used with.
        place: the checkpoint, for the message.
    """
    check_sizes(name, theirs, ours, place)
    if theirs.type and theirs.type != ours.type:
        raise CheckpointError(f"{place}: trained with the {name} {theirs.type}; yours is {ours.type}")
    if not theirs.fingerprint:
        return
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
            f"yours {ours.fingerprint}, from {ours.source!r}); use the one it was trained with"
        )


def check_sizes(name: str, theirs: PartIdentity, ours: PartIdentity, place: str) -> None:
    """Raise CheckpointError if a part has another size than in training; a size of 0 is unknown.

    Args:
        name: of the part.
        theirs: the part that the checkpoint was trained with.
        ours: the part that it is used with.
        place: the checkpoint, for the message.
    """
    what = "an LLM" if name == "language_model" else f"a {name}"
    known, own = theirs.source or theirs.type or "its file does not name it", ours.source or ours.type
    if theirs.width and theirs.width != ours.width:
        raise CheckpointError(
            f"{place}: trained with {what} {theirs.width} wide ({known}); yours is {ours.width} wide ({own})"
        )
    if theirs.vocabulary and ours.vocabulary and theirs.vocabulary != ours.vocabulary:
        raise CheckpointError(
            f"{place}: trained with {what} of {theirs.vocabulary} tokens ({known}); yours has {ours.vocabulary} ({own})"
        )
