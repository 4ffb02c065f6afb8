"""Any picture a person may have, to the tensor a vision encoder takes.

Input: a PIL image, the bytes of a file or its path, and the `ImageSpec` of the vision encoder, which alone
knows its size and normalisation. Output: a normalised float tensor. Training, chat and serving all come
through here.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minigpt4.errors import ImageError

ImageSource = Image.Image | bytes | str | Path
WHITE = (255, 255, 255)
MAX_PIXELS = 100_000_000
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class ImageSpec:
    """What a vision encoder expects.

    Attributes:
        height: in pixels.
        width: in pixels.
        mean: per channel (R, G, B), for values in 0..1.
        std: per channel, for values in 0..1.
        interpolation: filter of the resize.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


class ImageProcessor:
    """Opens, resizes and normalises one image at a time."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """How images are fitted to the encoder's size."""

        resize: Literal["stretch", "letterbox"] = "stretch"
        """`stretch` changes the proportions (published); `letterbox` keeps them and pads with white."""
        max_side: int = 0
        """Pictures with a side longer than this, in pixels, are shrunk to it first; 0: none are. For a model that has
        seen small pictures only: a large one has edges sharper than any it knows."""
        max_pixels: int = MAX_PIXELS
        """Largest image decoded, in pixels, against decompression bombs (PIL itself refuses above
        178,956,970)."""

        def __post_init__(self) -> None:
            if self.max_side < 0:
                raise ValueError(f"max_side must be 0 or more, found {self.max_side}")
            if self.max_pixels < 1:
                raise ValueError(f"max_pixels must be at least 1, found {self.max_pixels}")

    def __init__(self, config: Config, spec: ImageSpec) -> None:
        self.config = config
        self.spec = spec
        self._mean = torch.tensor(spec.mean).view(3, 1, 1)
        self._std = torch.tensor(spec.std).view(3, 1, 1)

    @classmethod
    def from_config(cls, config: Config, spec: ImageSpec) -> ImageProcessor:
        """Build the processor for the vision encoder that `spec` describes."""
        return cls(config, spec)

    def __call__(self, image: ImageSource, name: str = "image") -> Tensor:
        """Return the image as the encoder takes it.

        Args:
            image: a PIL image in any mode, the bytes of an image file, or its path.
            name: what the image is called in messages (its path, where a path is given).

        Returns:
            (3, H, W) float32, normalised.

        Raises:
            ImageError: the image cannot be read, or is too large.
        """
        picture = self._fit(open_image(image, name, self.config.max_pixels))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(torch.float32).div(255)
        return (pixels - self._mean) / self._std

    def _fit(self, picture: Image.Image) -> Image.Image:
        """Resize an RGB picture to the encoder's size."""
        spec, side = self.spec, self.config.max_side
        resample = _FILTERS[spec.interpolation]
        if 0 < side < max(picture.size):
            picture = ImageOps.contain(picture, (side, side), resample)
        if self.config.resize == "stretch":
            return picture.resize((spec.width, spec.height), resample)
        scale = min(spec.width / picture.width, spec.height / picture.height)
        width, height = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        canvas = Image.new("RGB", (spec.width, spec.height), WHITE)
        corner = ((spec.width - width) // 2, (spec.height - height) // 2)
        canvas.paste(picture.resize((width, height), resample), corner)
        return canvas


def open_image(source: ImageSource, name: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return any image as RGB: turned as its EXIF says, on white where it is transparent, the first frame of
    many.

    Original: converts files but not PIL images, ignores EXIF, and shows the hidden colour of transparent
        pixels.

    Args:
        source: a PIL image in any mode, the bytes of an image file, or its path.
        name: what the image is called in messages (its path, where a path is given).
        max_pixels: the largest image that is decoded.

    Raises:
        ImageError: not an image, damaged, too large, missing, or in colours that cannot be converted.
    """
    if isinstance(source, str | Path):
        name = str(source)
    image = source if isinstance(source, Image.Image) else _open_lazily(source, name)
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{name}: {image.width} x {image.height} pixels are more than the allowed {max_pixels:,}; "
            "make the image smaller or raise processors.image.max_pixels",
            cause="image too large",
        )
    if image.width * image.height == 0:
        raise ImageError(f"{name}: the image is empty ({image.width} x {image.height} pixels); leave it out")
    if image.format == "EPS":  # PIL would start ghostscript on a stranger's program
        raise ImageError(f"{name}: EPS files are not read; convert the image to PNG")
    try:
        image.load()
        return _to_rgb(_turn(image))
    except Exception as error:  # PIL's many decoders raise whatever they meet: OSError, SyntaxError, struct.error ...
        raise ImageError(
            f"{name}: the image is damaged or cannot be converted ({error}); open and save it again, or leave it out"
        ) from error


def _open_lazily(source: bytes | str | Path, name: str) -> Image.Image:
    """Read a file's header; its pixels are decoded by `load`."""
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: there is no such image file; correct the path", cause="missing image") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name}: this is a folder, not an image file; correct the path") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}; make the image smaller", cause="image too large") from error
    except UnidentifiedImageError as error:
        empty = not (source if isinstance(source, bytes) else Path(source).stat().st_size)
        found = "the file is empty" if empty else "this is not an image, or of a format that PIL cannot read"
        raise ImageError(f"{name}: {found}; convert it to PNG or JPEG, or leave it out") from error
    except Exception as error:  # a header that one of PIL's decoders stumbles over
        raise ImageError(f"{name}: the image cannot be read ({error}); convert it to PNG or JPEG") from error


def _turn(image: Image.Image) -> Image.Image:
    """Turn the image as its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata around good pixels: the picture is shown as it is stored
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_MODES:
        return _to_eight_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(layer, mask=layer.getchannel("A"))
    return canvas


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale a 16-bit, 32-bit or float grey image to 0..255; PIL's own conversion would clip it.

    The modes `I` and `F` do not say their range: it is taken as the smallest of 1 (float), 255, 65,535 and
    2^31 - 1 that holds every value.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    top = 65_535.0
    if image.mode in ("I", "F"):
        ranges = ([1.0] if image.mode == "F" else []) + [255.0, 65_535.0, 2_147_483_647.0]
        top = next((limit for limit in ranges if values.max() <= limit), float(values.max()))
    return Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
