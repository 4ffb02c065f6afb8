"""From any image to the tensor that a vision encoder takes.

Input: a PIL image, the bytes of a file or its path, and the `ImageSpec` of the vision encoder (size, normalisation).
Output: a normalised float tensor, the same in training, chat and serving.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from minigpt4.config.parts import ImageProcessorConfig
from minigpt4.errors import ImageError

if TYPE_CHECKING:
    from torch import Tensor

ImageSource = Image.Image | bytes | str | Path
WHITE = (255, 255, 255)
MAX_PIXELS = 100_000_000
MAX_SHOWN = 200
"""Longest file name in a message, in characters."""
SHRINK_ABOVE = 16_000_000
"""An image with more pixels is halved until it has at most these, so that no larger RGB picture is held in memory.
Halving averages blocks of pixels; JPEG files are decoded at that size."""
_STRIP_PIXELS = 1_000_000
_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What to do for each value of the EXIF orientation."""
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

    Config = ImageProcessorConfig

    def __init__(self, config: ImageProcessorConfig, spec: ImageSpec) -> None:
        import torch  # here, because the command line checks images with `open_image` before it imports torch

        self.config = config
        self.spec = spec
        self._mean = torch.tensor(spec.mean).view(3, 1, 1)
        self._std = torch.tensor(spec.std).view(3, 1, 1)

    @classmethod
    def from_config(cls, config: ImageProcessorConfig, spec: ImageSpec) -> ImageProcessor:
        """Build the processor for the vision encoder that `spec` describes."""
        return cls(config, spec)

    def __call__(self, image: ImageSource, name: str = "image") -> Tensor:
        """Return the image as the encoder takes it.

        Args:
            image: a PIL image in any mode, the bytes of an image file, or its path.
            name: the name of the image in messages; its path if `image` is a path.

        Returns:
            (3, H, W) float32, normalised.

        Raises:
            ImageError: the image cannot be read, or is too large.
        """
        import torch

        picture = open_image(image, name, self.config.max_pixels)
        try:
            picture = self._fit(picture)
        except (ValueError, OSError) as error:
            size = f"{picture.width} x {picture.height}"
            raise ImageError(f"{name}: the image of {size} pixels cannot be resized ({error}); leave it out") from error
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub_(self._mean).div_(self._std)

    def _fit(self, picture: Image.Image) -> Image.Image:
        """Resize an RGB picture to the encoder's size."""
        spec, side = self.spec, self.config.max_side
        resample = _FILTERS[spec.interpolation]
        if 0 < side < max(picture.size):
            width, height = picture.size
            longest = max(width, height)
            size = (max(1, round(width / longest * side)), max(1, round(height / longest * side)))
            picture = picture.resize(size, resample)
        if self.config.resize == "stretch":
            return picture.resize((spec.width, spec.height), resample)
        scale = min(spec.width / picture.width, spec.height / picture.height)
        width, height = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        canvas = Image.new("RGB", (spec.width, spec.height), WHITE)
        corner = ((spec.width - width) // 2, (spec.height - height) // 2)
        canvas.paste(picture.resize((width, height), resample), corner)
        return canvas


def open_image(source: ImageSource, name: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return any image as RGB: rotated by its EXIF orientation, on white where transparent, the first of its frames.

    An image of more than `SHRINK_ABOVE` pixels is returned smaller.

    Original: converts files but not PIL images, ignores EXIF, and shows the hidden colour of transparent pixels.

    Args:
        source: a PIL image in any mode, the bytes of an image file, or its path.
        name: the name of the image in messages; its path if `image` is a path.
        max_pixels: the largest image that is decoded.

    Raises:
        ImageError: the file is missing, not an image, damaged or too large, or its colours cannot be converted.
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
    if image.format == "EPS":  # PIL would run the file's program in ghostscript
        raise ImageError(f"{name}: EPS files are not supported; convert the image to PNG")
    try:
        if image is not source and (factor := _factor(image)) > 1:
            size = max(1, image.width // factor), max(1, image.height // factor)
            image.draft(None, size)  # only the decoder of JPEG can do this
        image.load()
        return _rotate(_to_rgb(image), image)
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error ...
        raise ImageError(
            f"{name}: the image is damaged or cannot be converted ({error}); open and save it again, or leave it out"
        ) from error


def _open_lazily(source: bytes | str | Path, name: str) -> Image.Image:
    """Read a file's header; its pixels are decoded by `load`."""
    if isinstance(source, str | Path):
        _require_regular_file(source, name)
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}; make the image smaller", cause="image too large") from error
    except UnidentifiedImageError as error:
        empty = not (source if isinstance(source, bytes) else Path(source).stat().st_size)
        found = "the file is empty" if empty else "this is not an image, or its format is not supported by PIL"
        raise ImageError(f"{name}: {found}; convert it to PNG or JPEG, or leave it out") from error
    except Exception as error:  # a header that one of PIL's decoders cannot read
        raise ImageError(f"{name}: the image cannot be read ({error}); convert it to PNG or JPEG") from error


def _require_regular_file(path: str | Path, name: str) -> None:
    """Raise unless `path` is a regular file: reading a pipe or a device may never end."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:  # no file, a name that is too long, a loop of links, a NUL in the name
        shown = name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."
        why = "" if isinstance(error, FileNotFoundError) else f" ({getattr(error, 'strerror', None) or error})"
        raise ImageError(f"{shown}: image file not found{why}; correct the path", cause="missing image") from error
    if stat.S_ISDIR(mode):
        raise ImageError(f"{name}: this is a folder, not an image file; correct the path")
    if not stat.S_ISREG(mode):
        raise ImageError(f"{name}: this is a pipe or a device, not an image file; correct the path")


def _factor(image: Image.Image) -> int:
    """Return by what to divide the sides of an image so that it has at most `SHRINK_ABOVE` pixels: 1, 2, 4 ..."""
    factor = 1
    while image.width * image.height > SHRINK_ABOVE * factor**2:
        factor *= 2
    return factor


def _rotate(picture: Image.Image, image: Image.Image) -> Image.Image:
    """Rotate the picture by the EXIF orientation of the image that it was made from."""
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata and good pixels: keep the image as it is stored
        return picture
    rotation = _ROTATIONS.get(orientation)
    return picture if rotation is None else picture.transpose(rotation)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image; a large one strip by strip, since the conversion holds copies of 4 or 8 bytes a pixel."""
    factor = _factor(image)
    top = _largest_grey(image) if image.mode in _DEEP_MODES else 0.0
    if image.width * image.height <= _STRIP_PIXELS:
        return _strip_to_rgb(image, top)
    canvas = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for y, strip in _strips(image, factor):
        picture = _strip_to_rgb(strip, top)
        canvas.paste(picture if factor == 1 else picture.reduce(factor), (0, y // factor))
    return canvas


def _strips(image: Image.Image, factor: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """Yield the first row and the pixels of each strip; every strip but the last has a multiple of `factor` rows."""
    rows = max(1, _STRIP_PIXELS // (image.width * factor)) * factor
    for y in range(0, image.height, rows):
        yield y, image.crop((0, y, image.width, min(y + rows, image.height)))


def _strip_to_rgb(image: Image.Image, top: float) -> Image.Image:
    if image.mode in _DEEP_MODES:
        grey = np.clip(_greys(image) / top * 255 + 0.5, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(layer, mask=layer.getchannel("A"))
    return canvas


def _largest_grey(image: Image.Image) -> float:
    """Return the white of a 16-bit, 32-bit or float grey image; PIL's own conversion would clip it at 255.

    The range of the modes `I` and `F` is not known: it is the smallest of 1 (float), 255, 65,535 and 2^31 - 1 that
    covers every value.
    """
    if image.mode not in ("I", "F"):
        return 65_535.0
    largest = max(float(_greys(strip).max()) for _, strip in _strips(image))
    ranges = ([1.0] if image.mode == "F" else []) + [255.0, 65_535.0, 2_147_483_647.0]
    return next((limit for limit in ranges if largest <= limit), largest)


def _greys(strip: Image.Image) -> NDArray[np.float64]:
    return np.nan_to_num(np.asarray(strip).astype(np.float64))
