"""Shards that are joined, damaged, compressed or laid out in another way: nothing in them is lost in silence."""

from __future__ import annotations

import gzip
import io
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.datasets.source import Example, Item
from minigpt4.errors import DataError
from tests.datasets.parts import image_bytes, web_pairs, write_shard

CASES = Path(__file__).parent.parent / "data" / "cases"


def items_of(file: Path) -> list[Item]:
    return list(web_pairs([str(file)]).in_order())


def errors(items: list[Item]) -> list[DataError]:
    return [item for item in items if isinstance(item, DataError)]


def shard(file: Path, count: int, first: int = 0) -> Path:
    samples = [{"__key__": f"{n:04}", "jpg": image_bytes(n), "txt": f"text {n}".encode()} for n in range(first, count)]
    return write_shard(file, samples)


def test_joined_archives_are_read_whole(tmp_path: Path) -> None:
    items = items_of(CASES / "13_joined_tar" / "joined.tar")
    assert len(items) == 3
    assert not errors(items)
    one, two = shard(tmp_path / "1.tar", 4), shard(tmp_path / "2.tar", 9, first=4)
    (tmp_path / "joined.tar").write_bytes(one.read_bytes() + two.read_bytes())
    items = items_of(tmp_path / "joined.tar")
    assert len(items) == 9
    assert not errors(items)


def test_one_bit_of_a_header_never_loses_a_sample_in_silence(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("figure: one bit of a shard flipped: samples read + counted as lost = samples written", 300)
    file = shard(tmp_path / "a.tar", 12)
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        headers = [member.offset for member in tar.getmembers()]
    rng = random.Random(5)
    for _ in range(300):
        place, bit = rng.choice(headers) + rng.randrange(512), rng.randrange(8)
        data = bytearray(whole)
        data[place] ^= 1 << bit
        file.write_bytes(data)
        items = items_of(file)
        read = [item for item in items if isinstance(item, Example)]
        lost = [error.cause for error in errors(items)]
        assert (len(read), lost) in ((12, []), (11, ["damaged shard"])), (place, bit)  # a few bits mean nothing


def test_one_bit_anywhere_keeps_the_number_of_samples(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("figure: one bit of a shard flipped: samples read + counted as lost = samples written", 200)
    file = shard(tmp_path / "a.tar", 12)
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    rng = random.Random(6)
    for _ in range(200):
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        data = bytearray(whole)
        data[place] ^= 1 << bit
        file.write_bytes(data)
        items = items_of(file)
        assert len(items) == 12 or (place >= end and len(items) == 13), (place, bit)  # an end mark may hide something


@pytest.mark.parametrize("size", [1, 511, 512, 4096, 20_000])
def test_zeros_or_noise_in_the_middle_are_a_fault(tmp_path: Path, size: int) -> None:
    file = shard(tmp_path / "a.tar", 12)
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        place = tar.getmembers()[9].offset
    for content in (bytes(size), random.Random(size).randbytes(size)):
        file.write_bytes(whole[:place] + content + whole[place + size :])
        items = items_of(file)
        read = sum(isinstance(item, Example) for item in items)
        assert read == 12 or errors(items)


def test_a_hole_in_a_shard_is_a_fault(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", 4).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole + bytes(3 * 1024**2) + whole)
    assert [error.cause for error in errors(items_of(tmp_path / "a.tar"))] == ["damaged shard"]


def test_a_compressed_shard_is_refused_with_advice(tmp_path: Path) -> None:
    file = shard(tmp_path / "a.tar", 2)
    file.write_bytes(gzip.compress(file.read_bytes()))
    (error,) = errors(items_of(file))
    assert "it is compressed, which is not supported: decompress it" in str(error)


def test_pipes_and_devices_are_not_shards(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    for url in (str(tmp_path / "pipe.tar"), "/dev/zero", "a" * 5000):
        with pytest.raises(DataError, match="1 of 1 shards are missing"):
            web_pairs([url])


@pytest.mark.parametrize(
    "url",
    [
        "{0..99999999999}.tar",
        "{a,b}" * 21 + ".tar",
        "{0..9999}{0..9999}.tar",
        "{" * 60 + "}" * 60,
        "{0.." + "9" * 99 + "}",
    ],
)
def test_braces_are_not_expanded_without_limit(url: str) -> None:
    with pytest.raises(DataError, match=r"stand for too many names"):
        web_pairs([url])


def test_layouts_that_lose_samples_say_what_to_do() -> None:
    folder = CASES / "25_shard_layouts_that_are_not_explained"
    assert "use no dots in file names but the last one" in str(errors(items_of(folder / "dotted.tar"))[0])
    assert "tar --sort=name" in str(errors(items_of(folder / "unsorted.tar"))[0])
    found = items_of(folder / "other_formats.tar")
    assert found
    assert not errors(found)


@pytest.mark.parametrize("ending", ["gif", "bmp", "tif", "tiff", "avif"])
def test_every_image_that_pillow_reads_is_read(tmp_path: Path, ending: str) -> None:
    Image.init()
    if f".{ending}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow does not read {ending}")
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, Image.registered_extensions()[f".{ending}"])
    (item,) = items_of(write_shard(tmp_path / "a.tar", [{"__key__": "k", ending: content.getvalue(), "txt": b"t"}]))
    assert isinstance(item, Example)


def test_two_images_of_one_sample_are_an_error(tmp_path: Path) -> None:
    sample = {"__key__": "k", "jpg": image_bytes(1), "png": image_bytes(2, "PNG"), "txt": b"t"}
    (error,) = errors(items_of(write_shard(tmp_path / "a.tar", [sample])))
    assert error.cause == "several images"


def test_a_caption_of_megabytes_is_a_skip(tmp_path: Path) -> None:
    sample = {"__key__": "k", "jpg": image_bytes(1), "txt": b"a " * 1_000_000}
    (error,) = errors(items_of(write_shard(tmp_path / "a.tar", [sample])))
    assert error.cause == "text too large"


def test_metadata_of_any_kind_is_read_or_counted(tmp_path: Path) -> None:
    texts = [b'{"caption": "x", "similarity": NaN}', b"[" * 100_000, b'{"caption": "x", "caption": "y"}', b"\xff"]
    samples = [{"__key__": str(n), "jpg": image_bytes(n), "json": text} for n, text in enumerate(texts)]
    items = items_of(write_shard(tmp_path / "a.tar", samples))
    assert [isinstance(item, Example) for item in items] == [True, False, False, False]
    assert {error.cause for error in errors(items)} == {"caption"}
