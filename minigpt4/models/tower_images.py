"""The images that a vision tower takes, as the image processor in its folder declares them.

Input: a folder with `preprocessor_config.json` or `processor_config.json`, as transformers saves them. Output: an
`ImageSpec`. The files are read as data: no image processor is built.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from minigpt4.config.parts import TransformersEncoderConfig
from minigpt4.errors import ConfigError
from minigpt4.processors.image import ImageSpec
from minigpt4.strict_json import parse_json

_FILES = ("preprocessor_config.json", "processor_config.json")
_FILTERS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
"""The numbers that PIL gives to filters."""
_log = logging.getLogger(__name__)


def read_image_spec(folder: Path, config: TransformersEncoderConfig) -> ImageSpec:
    """Return size, mean and standard deviation of a tower's images; what the config sets goes first.

    Raises:
        ConfigError: a value is neither in the folder nor in the config, or cannot be followed.
    """
    own = _processor(folder)
    size = (config.image_size, config.image_size) if config.image_size else _size(own)
    if size is None:
        raise ConfigError(
            f"model.vision_encoder.image_size: {folder} has no image size in {' or '.join(_FILES)}; copy the file from "
            "where the weights come from, or set image_size, mean and std"
        )
    interpolation = _FILTERS.get(own.get("resample", 3))
    if interpolation is None:
        interpolation = "bicubic"
        _log.warning(
            "%s: images are resized with the bicubic filter, not with PIL's filter %s", folder, own["resample"]
        )
    mean, std = (_channels(own, key, getattr(config, key), folder) for key in ("mean", "std"))
    return ImageSpec(*size, mean, std, interpolation)


def _processor(folder: Path) -> dict[str, Any]:
    """Return the settings of the image processor in a folder, empty if there are none."""
    for name in _FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = parse_json(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: damaged: {error}") from error
        found = values.get("image_processor", values) if isinstance(values, dict) else None
        if isinstance(found, dict) and ("size" in found or "image_mean" in found):
            return found
    return {}


def _size(own: dict[str, Any]) -> tuple[int, int] | None:
    """Return height and width, those of the crop if there is one."""
    crops = own.get("do_center_crop", "crop_size" in own)
    given = own.get("crop_size") if crops and own.get("crop_size") else own.get("size")
    if isinstance(given, int):
        return (given, given)
    if isinstance(given, dict):
        height = given.get("height", given.get("shortest_edge"))
        width = given.get("width", given.get("shortest_edge"))
        if isinstance(height, int) and isinstance(width, int):
            return (height, width)
    return None


def _channels(own: dict[str, Any], key: str, given: list[float], folder: Path) -> tuple[float, float, float]:
    """Return the mean or the standard deviation of R, G and B."""
    factor = own.get("rescale_factor", 1 / 255) * 255
    if not given and (own.get("do_rescale") is False or abs(factor - 1) > 1e-4):
        raise ConfigError(f"model.vision_encoder.{key}: {folder} does not scale pixels to 0..1; set mean and std")
    if not given and own.get("do_normalize") is False:
        return (0.0, 0.0, 0.0) if key == "mean" else (1.0, 1.0, 1.0)
    values = given or own.get(f"image_{key}") or []
    if len(values) != 3:
        raise ConfigError(
            f"model.vision_encoder.{key}: {len(values)} values; give one for each of R, G and B"
            if given
            else f"model.vision_encoder.{key}: {folder} has no image_{key} in {' or '.join(_FILES)}; set it"
        )
    red, green, blue = map(float, values)
    return (red, green, blue)
