"""Every picture a person may have becomes the same kind of tensor, or a message that names it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4.errors import ImageError
from minigpt4.processors.image import ImageProcessor, ImageSpec, open_image

SPEC = ImageSpec(16, 24, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
GREY_16 = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (20, 1))


def processor(**settings: Any) -> ImageProcessor:
    return ImageProcessor.from_config(ImageProcessor.Config(**settings), SPEC)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_values_are_pil_bicubic_then_normalised() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(pixels).resize((24, 16), Image.Resampling.BICUBIC))
    expected = (resized / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)
    tensor = processor()(Image.fromarray(pixels))
    assert tensor.shape == (3, 16, 24)
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_every_mode_is_read(mode: str) -> None:
    source = Image.fromarray(GREY_16) if mode == "I;16" else Image.new("RGB", (9, 5), (200, 30, 60))
    if mode == "PA":
        source = source.convert("P").convert("PA")
    elif mode != "I;16":
        source = source.convert("L").convert(mode) if mode in ("I", "F") else source.convert(mode)
    assert source.mode == mode
    tensor = processor()(source)
    assert tensor.shape == (3, 16, 24)
    assert tensor.isfinite().all()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_bytes_path_and_pil_image_give_the_same(format: str, tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (40, 30), (10, 200, 90)), format)
    file = tmp_path / "picture.any"
    file.write_bytes(data)
    of_bytes = processor()(data)
    assert torch.equal(of_bytes, processor()(file))
    assert torch.equal(of_bytes, processor()(str(file)))
    assert torch.equal(of_bytes, processor()(Image.open(file)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_are_white(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image = {"RGBA": clear, "LA": clear.convert("LA"), "PA": clear.convert("P").convert("PA")}[mode]
    if mode == "PA":
        image = Image.new("PA", (4, 4), (0, 0))
    assert open_image(image).getpixel((1, 1)) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour_is_put_on_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((3, 3), 1)
    picture = open_image(encoded(image, transparency=0))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((3, 3)) == (0, 0, 255)


def test_half_transparent_black_is_grey() -> None:
    assert open_image(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(format: str) -> None:
    picture = np.asarray(open_image(encoded(Image.fromarray(GREY_16), format)))[0, :, 0]
    np.testing.assert_allclose(picture, np.linspace(0, 255, 32), atol=1)


@pytest.mark.parametrize(("mode", "top"), [("I", 255), ("I", 65535), ("I", 2**31 - 1), ("F", 1.0), ("F", 255.0)])
def test_wide_modes_keep_their_greys(mode: str, top: float) -> None:
    values = np.linspace(0, top, 16).astype(np.int32 if mode == "I" else np.float32)[None].repeat(3, 0)
    picture = np.asarray(open_image(Image.fromarray(values)))[0, :, 0].astype(float)
    np.testing.assert_allclose(picture, values[0] * (255 / top), atol=1)


def test_exif_turn_is_applied() -> None:
    image = Image.new("RGB", (8, 4), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = open_image(encoded(image, exif=exif))
    assert picture.size == (4, 8)
    assert picture.getpixel((3, 0)) == (255, 255, 255)


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    picture = open_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert picture.getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1)])
@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_odd_sizes(size: tuple[int, int], resize: str) -> None:
    assert processor(resize=resize)(Image.new("RGB", size)).shape == (3, 16, 24)


def test_large_pictures_are_shrunk_first_where_wanted() -> None:
    large = Image.effect_noise((90, 60), 80).convert("RGB")
    before = large.copy()
    small = large.resize((30, 20), Image.Resampling.BICUBIC)
    shrinking = processor(max_side=30)
    assert torch.equal(shrinking(large), processor()(small))
    assert not torch.equal(shrinking(large), processor()(large))
    assert torch.equal(shrinking(small), processor()(small))
    assert large == before
    with pytest.raises(ValueError, match="max_side"):
        processor(max_side=-1)


def test_letterbox_keeps_proportions_on_white() -> None:
    tensor = processor(resize="letterbox")(Image.new("RGB", (100, 100)))
    pixels = tensor * torch.tensor(SPEC.std).view(3, 1, 1) + torch.tensor(SPEC.mean).view(3, 1, 1)
    assert pixels[:, :, 4:20].max() < 1e-6
    assert pixels[:, :, :4].min() > 0.999
    assert pixels[:, :, 20:].min() > 0.999


def _bomb() -> bytes:
    """A PNG header that announces 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    begin = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return begin + struct.pack(">I", 4) + b"IDAT" + bytes(8)


PNG = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 50, 3), dtype=np.uint8)))
JPEG = encoded(Image.open(io.BytesIO(PNG)), "JPEG")


@pytest.mark.parametrize(
    ("data", "cause", "words"),
    [
        (b"", "image", "the file is empty"),
        (b"not an image at all", "image", "not an image"),
        (PNG[: len(PNG) // 2], "image", "damaged"),
        (JPEG[: len(JPEG) // 2], "image", "damaged"),
        (PNG[:20], "image", "cannot be read|not an image|damaged"),
        (_bomb(), "image too large", "make the image smaller"),
        (encoded(Image.new("RGB", (4, 4)), "EPS"), "image", "EPS"),
    ],
)
def test_what_cannot_be_read_is_named(data: bytes, cause: str, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        processor()(data, name="00012.tar/000120034")
    assert str(caught.value).startswith("00012.tar/000120034: ")
    assert caught.value.cause == cause


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cat\.jpg: image file not found"):
        open_image(tmp_path / "cat.jpg")
    with pytest.raises(ImageError, match="a folder"):
        open_image(tmp_path)


def test_the_pixel_cap_holds_for_pil_images_too() -> None:
    with pytest.raises(ImageError, match=r"photo: 30 x 20 pixels are more than the allowed 599"):
        processor(max_pixels=599)(Image.new("RGB", (30, 20)), name="photo")


def test_an_image_without_pixels_is_an_error() -> None:
    with pytest.raises(ImageError, match="empty"):
        open_image(Image.new("RGB", (0, 0)))


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_pixels"):
        ImageProcessor.Config(max_pixels=0)
