"""The checkpoint in `model.init_from`: a checkpoint folder, or a released MiniGPT-4 file.

Input: a path. Output: a manifest and the trained tensors. Here everything is checked that takes a few kilobytes to
read, before a language model is loaded for minutes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from minigpt4.assets import resolve
from minigpt4.checkpoints.manifest import Manifest, PartIdentity, check_sizes
from minigpt4.checkpoints.released import read_released
from minigpt4.checkpoints.store import read_trained
from minigpt4.config import resolve_shipped
from minigpt4.errors import CheckpointError
from minigpt4.models.language_model import declared_width

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A checkpoint that a model starts from.

    Attributes:
        place: file or folder, for messages.
        manifest: what it says about itself.
        read: reads its trained tensors, by name.
    """

    place: Path
    manifest: Manifest
    read: Callable[[], dict[str, Tensor]]

    @classmethod
    def at(cls, path: str | Path) -> Start:
        """Return the checkpoint at `path`, a checkpoint folder or a released file.

        Raises:
            CheckpointError, WeightsError: it is neither, or damaged.
        """
        place = resolve_shipped(str(path))
        if place.is_dir():
            manifest = Manifest.read(place)
            return cls(place, manifest, lambda: read_trained(place, manifest))
        released = read_released(place)
        _log.info(
            "%s: released MiniGPT-4 checkpoint, trained with %s; %d buffers of other parts ignored: %s",
            place,
            released.manifest.parts["language_model"].source or "a language model that it does not name",
            len(released.ignored),
            ", ".join(released.ignored[:2]) or "none",
        )
        return cls(place, released.manifest, lambda: released.tensors)

    def check_language_model(self, path: str, trained_with: str = "") -> None:
        """Raise CheckpointError if the config of the language model at `path` declares another width.

        So it may if that of `trained_with`, from which the projection is then moved, declares the right one.
        """
        if trained_with and self.manifest.parts.get("language_model"):
            width = declared_width(resolve(trained_with))
            if width in (0, self.manifest.parts["language_model"].width):
                return
        theirs, width = self.manifest.parts.get("language_model"), declared_width(resolve(path))
        if theirs is not None and width:
            check_sizes("language_model", theirs, PartIdentity("", path, width, ""), str(self.place))

    def check_template(self, template: str) -> None:
        """Raise CheckpointError if a model was trained with another conversation template than `template`.

        After stage 1 a model has not seen questions, so any template may be tried.
        """
        theirs = self.manifest.template
        if theirs in ("", template):
            return
        if theirs != "plain":
            raise CheckpointError(
                f"{self.place}: trained with the template {theirs!r}; conversation.template is {template!r}. A model "
                f"answers only in the format that it was trained with: pass --options conversation.template={theirs}"
            )
        _log.warning(
            "%s was trained with captions only and is used with the template %r: answers may be poor",
            self.place,
            template,
        )
