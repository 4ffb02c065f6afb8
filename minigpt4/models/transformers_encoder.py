"""Image encoders of transformers: any vision tower that `AutoModel` opens from a local folder.

Input: `pixel_values` (I, 3, H, W), normalised as the folder's own image processor says. Output: `patch_features`
(I, P, Dv): the hidden states of one block. Blocks behind it, poolers and heads are not kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging as library_logging

from minigpt4.assets import resolve
from minigpt4.config.parts import TransformersEncoderConfig
from minigpt4.errors import ConfigError, WeightsError
from minigpt4.models.language_model_files import weight_files
from minigpt4.models.tower_images import read_image_spec
from minigpt4.models.vision import VisionEncoder, identity_settings

_NORMS = ("post_layernorm", "layernorm", "norm", "rms_norm")
"""What transformers calls the norm behind the last block."""
_HEADS = ("head", "pooler")
"""What it calls the modules behind that norm, which make one vector of an image."""


class TransformersEncoder(VisionEncoder):
    """The tokens of one block of a vision tower, such as that of CLIP, SigLIP, DINOv2, DINOv3 or ViT.

    Attributes:
        tower: the tower up to the chosen block.
        norm: the tower's final norm, applied to the tokens; None without `post_norm`.
    """

    Config = TransformersEncoderConfig

    def __init__(self, config: TransformersEncoderConfig, tower: PreTrainedModel, spec: Any) -> None:
        super().__init__()
        self.settings = identity_settings(config)
        self.image_spec = spec
        self.tower: Any = tower
        self.norm = _cut(tower, config)
        self.has_resized_positions = False
        self._measure(config)

    @classmethod
    def from_config(cls, config: TransformersEncoderConfig) -> TransformersEncoder:
        """Load the tower from its folder; nothing is downloaded.

        Raises:
            WeightsError: the folder cannot be loaded, or tensors are missing.
            ConfigError: it is not a tower of blocks over a grid of patches, or it has no such block.
        """
        folder = resolve(config.path)
        tower = load_tower(folder)
        encoder = cls(config, tower, read_image_spec(folder, config))
        encoder.to(getattr(torch, config.dtype))
        encoder.source = config.path
        return encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return `patch_features` (I, P, Dv), patches row by row, in the precision of the weights."""
        tokens = self._tokens(pixel_values.to(next(self.tower.parameters()).dtype))
        return tokens[:, self._dropped :]

    def _tokens(self, pixel_values: Tensor) -> Tensor:
        options = {"interpolate_pos_encoding": True} if self.has_resized_positions else {}
        tokens = self.tower(pixel_values, **options).last_hidden_state
        return tokens if self.norm is None else self.norm(tokens)

    def _measure(self, config: TransformersEncoderConfig) -> None:
        """Set the sizes of the features from the tokens of one image.

        Raises:
            ConfigError: they are not a grid of patches, behind a class token or registers at most.
        """
        own, spec = self.tower.config, self.image_spec
        place = f"model.vision_encoder.path: {config.path} ({own.model_type})"
        patch = getattr(own, "patch_size", None)
        if not isinstance(patch, int):
            raise ConfigError(f"{place}: has no patches of one size; use type: timm")
        takes_sizes = "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters
        self.has_resized_positions = takes_sizes and getattr(own, "image_size", None) not in (spec.height, None)
        parameter = next(self.tower.parameters())
        try:
            with torch.no_grad():
                self.eval()
                tokens = self._tokens(torch.zeros(1, 3, spec.height, spec.width, dtype=parameter.dtype))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{place}: does not take images of {spec.height} x {spec.width} pixels as one tensor "
                f"({str(error).splitlines()[0]}); set image_size, or use a tower of a fixed size"
            ) from error
        rows, columns = spec.height // patch, spec.width // patch
        prefix = tokens.shape[1] - rows * columns if tokens.ndim == 3 else -1
        registers = getattr(own, "num_register_tokens", 0) or 0
        if not 0 <= prefix <= 2 + registers:
            raise ConfigError(
                f"{place}: its output of shape {tuple(tokens.shape)} is not a grid of {rows} x {columns} patches; use "
                "a plain vision transformer, or type: timm"
            )
        self.grid, self.feature_dim = (rows, columns), tokens.shape[2]
        self.num_prefix_tokens = prefix if config.class_token == "keep" else 0
        self._dropped = prefix - self.num_prefix_tokens


def load_tower(folder: Path) -> PreTrainedModel:
    """Load the vision tower of a folder in the precision of its files, without network access or code of the folder.

    Args:
        folder: as transformers saves a vision model, or a model with a vision tower, such as all of CLIP.

    Raises:
        WeightsError: it cannot be loaded, or tensors are missing.
    """
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"{folder}: no config.json found; set model.vision_encoder.path to a folder saved by transformers"
        )
    weight_files(folder)  # names the damaged file
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config: Any = AutoConfig.from_pretrained(folder, **local)
        tower_config = getattr(config, "vision_config", None) or config
        with _errors_only():  # a text tower that is left out is not worth a warning for each of its tensors
            loaded: Any = AutoModel.from_pretrained(
                folder, config=tower_config, output_loading_info=True, dtype=torch.float32, **local
            )
    except Exception as error:  # damaged files raise errors of many libraries
        raise WeightsError(f"{folder}: cannot be loaded as a vision tower: {error}") from error
    tower, info = loaded
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    missing = [name for name in missing if not name.removeprefix("vision_model.").startswith(_HEADS)]
    if missing:
        raise WeightsError(
            f"{folder}: {len(missing)} tensors of {type(tower).__name__} are missing or of another shape: "
            f"{', '.join(missing[:5])}. The weights do not belong to the model that config.json describes"
        )
    return tower


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence the warnings of transformers for a while."""
    verbosity = library_logging.get_verbosity()
    library_logging.set_verbosity_error()
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """Return the blocks of a tower.

    Raises:
        ConfigError: there is not one list of them.
    """
    config: Any = tower.config
    count = getattr(config, "num_hidden_layers", None)
    found = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise ConfigError(
            f"model.vision_encoder: {type(tower).__name__} is not one row of blocks, so `layer` cannot be counted; use "
            "a plain vision transformer, or type: timm"
        )
    return found[0]


def final_norm(tower: nn.Module) -> str:
    """Return the name of the norm behind the last block, empty if there is none."""
    modules = dict(tower.named_children())
    return next((n for n in _NORMS if n in modules and any(True for _ in modules[n].parameters())), "")


def _cut(tower: nn.Module, config: TransformersEncoderConfig) -> nn.Module | None:
    """Remove the blocks behind `layer`, poolers and heads; return the final norm if it is used."""
    blocks = blocks_of(tower)
    kept = len(blocks) + 1 + config.layer
    if kept < 1:
        raise ConfigError(
            f"model.vision_encoder.layer: {config.layer} is before the first of {len(blocks)} blocks; the first is "
            f"{-len(blocks)}"
        )
    name = final_norm(tower)
    if config.post_norm and not name:
        raise ConfigError(
            f"model.vision_encoder.post_norm: {type(tower).__name__} has no norm behind its last block; set it to false"
        )
    del blocks[kept:]
    norm = getattr(tower, name) if config.post_norm else None
    for other in filter(None, (name, *_HEADS)):
        if isinstance(getattr(tower, other, None), nn.Module):
            setattr(tower, other, nn.Identity())
    return norm
