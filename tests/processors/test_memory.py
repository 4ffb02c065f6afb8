"""Large images need little memory: measured in a process of its own, and with a limit on its address space."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt4.processors import image as module
from minigpt4.processors.image import SHRINK_ABOVE, open_image

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

ROOT = Path(__file__).resolve().parents[2]
MEASURE = """
import re, resource, sys
from pathlib import Path
from minigpt4.processors.image import open_image
def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
from PIL import Image
Image.init()
content = Path(sys.argv[1]).read_bytes()
limit = status("VmSize") + int(sys.argv[2]) * 1_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
picture = open_image(content)
print(picture.mode, *picture.size, picture.getpixel((5, 5)))
"""


def images() -> dict[str, tuple[Image.Image, str, int]]:
    """Return images of one colour, their format, and the megabytes in which each must be opened."""
    grey = np.full((5000, 5000), 40_000, np.uint16)
    return {
        "RGB": (Image.new("RGB", (5000, 5000), (10, 20, 30)), "PNG", 190),
        "RGBA": (Image.new("RGBA", (5000, 5000), (10, 20, 30, 128)), "PNG", 190),
        "palette": (Image.new("P", (5000, 5000)), "PNG", 190),
        "16 bits": (Image.fromarray(grey), "PNG", 190),
        "float": (Image.fromarray(np.full((5000, 5000), 0.5, np.float32)), "TIFF", 300),
        "JPEG": (Image.new("RGB", (9000, 10_000), (10, 20, 30)), "JPEG", 100),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", images())
def test_a_large_image_is_opened_within_a_limit(name, tmp_path):
    """One copy of float64 of the 16-bit image has 200 MB, one RGB copy of 25 million pixels 100 MB."""
    image, format, megabytes = images()[name]
    file = tmp_path / "image"
    image.save(file, format)
    command = [sys.executable, "-c", MEASURE, str(file), str(megabytes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RGB ")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16", "I", "F"])
@pytest.mark.parametrize("size", [(47, 61), (1, 300), (300, 1)])
def test_strips_change_no_pixel(mode, size, monkeypatch):
    """The image is converted in one strip and in many."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 200)
    elif mode in ("I", "F"):
        image = Image.fromarray(noise[..., 0].astype(np.int32 if mode == "I" else np.float32) * 3)
    else:
        image = image.convert(mode)
    whole = np.asarray(open_image(image))
    monkeypatch.setattr(module, "_STRIP_PIXELS", 100)
    assert np.array_equal(np.asarray(open_image(image)), whole)


def test_an_image_above_the_limit_is_halved_and_one_below_is_not(monkeypatch):
    colours = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(colours.repeat(2, 0).repeat(2, 1))  # 120 x 80, each colour four times
    monkeypatch.setattr(module, "SHRINK_ABOVE", 120 * 80)
    assert np.array_equal(np.asarray(open_image(image)), np.asarray(image))
    monkeypatch.setattr(module, "SHRINK_ABOVE", 120 * 80 - 1)
    monkeypatch.setattr(module, "_STRIP_PIXELS", 500)
    assert np.array_equal(np.asarray(open_image(image)), colours)
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        image.save(buffer, format, exif=exif)
        assert open_image(buffer.getvalue()).size == (40, 60)
    assert SHRINK_ABOVE == 16_000_000
    odd = image.crop((0, 0, 119, 79)).resize((1201, 11))
    assert open_image(odd).size == (601, 6)
