"""Shards: their order, their shares, and everything that can be wrong with them."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from minigpt4.datasets.source import Example
from minigpt4.errors import DataError
from tests.datasets.parts import answers, image_bytes, web_pairs, write_shard, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"), shards=5, each=12)


def caption(text: object) -> bytes:
    return json.dumps({"caption": text}).encode()


def test_an_epoch_holds_every_pair_once(shards: list[str]) -> None:
    stream = web_pairs(shards, shuffle_buffer=7).stream(1, 0, 1)
    epochs = [answers(list(islice(stream, 60))) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"caption {n}" for n in range(60))
    assert epochs[0] != epochs[1]


def test_order_depends_on_the_seed_alone(shards: list[str]) -> None:
    first, again, other = (list(islice(web_pairs(shards).stream(seed, 0, 1), 40)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("readers", [2, 3, 5, 8])
def test_readers_share_an_epoch(shards: list[str], readers: int) -> None:
    source = web_pairs(shards, shuffle_buffer=5)
    seen: Counter[str] = Counter()
    for reader in range(readers):
        size = len(list(source._epoch(1, reader, readers, 0)))
        seen.update(answers(list(islice(source.stream(1, reader, readers), size))))
    assert seen == Counter(f"caption {n}" for n in range(60))


@pytest.mark.parametrize("readers", [1, 2, 8])
@pytest.mark.parametrize("start", [1, 17, 60, 75])
def test_start_equals_draining(shards: list[str], readers: int, start: int) -> None:
    source = web_pairs(shards, shuffle_buffer=6)
    unbroken = list(islice(source.stream(3, 1 % readers, readers), start + 10))
    assert list(islice(source.stream(3, 1 % readers, readers, start), 10)) == unbroken[start:]


def test_png_webp_and_txt(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.tar",
        [
            {"__key__": "x", "png": image_bytes(1, "PNG"), "txt": b"of txt\n"},
            {"__key__": "y", "webp": image_bytes(2, "WEBP"), "json": caption("of json"), "txt": b"not this"},
            {"__key__": "z", "JPEG": image_bytes(3), "json": caption(None), "txt": b"json is null"},
        ],
    )
    items = list(web_pairs([str(tmp_path / "*.tar")]).in_order())
    assert answers(items) == ["of txt", "of json", "json is null"]
    assert isinstance(items[0], Example)
    assert items[0].id == "a.tar/x"
    assert items[0].images == (image_bytes(1, "PNG"),)
    assert items[0].dialogue.turns[0].question == ""


def test_another_caption_key(tmp_path: Path) -> None:
    fields = json.dumps({"caption": "raw", "blip": "better"}).encode()
    write_shard(tmp_path / "a.tar", [{"__key__": "x", "jpg": image_bytes(1), "json": fields}])
    assert answers(list(web_pairs([str(tmp_path / "a.tar")], caption_key="blip").in_order())) == ["better"]


@pytest.mark.parametrize(
    ("sample", "cause", "words"),
    [
        ({"jpg": b"x", "json": caption(None)}, "caption", "bad.tar/k: the caption is missing: no text under 'caption'"),
        ({"jpg": b"x", "json": caption("  ")}, "caption", "no text under 'caption'"),
        ({"jpg": b"x", "json": caption(["a list"])}, "caption", "no text under 'caption'"),
        ({"jpg": b"x", "json": b"[1, 2]"}, "caption", "no text under 'caption'"),
        ({"jpg": b"x", "json": b"{broken"}, "caption", "the caption cannot be read"),
        ({"jpg": b"x", "txt": b"\xff\xfe\xfa"}, "caption", "the caption cannot be read"),
        ({"jpg": b"x"}, "caption", "the sample has jpg"),
        (
            {"json": caption("no picture")},
            "missing image",
            "expected an image (jpg, jpeg, png, webp, gif, bmp, tif, tiff, avif), found only json",
        ),
    ],
)
def test_a_bad_sample_is_an_error_between_good_ones(
    tmp_path: Path, sample: dict[str, bytes], cause: str, words: str
) -> None:
    good = {"jpg": image_bytes(1), "json": caption("good")}
    file = write_shard(
        tmp_path / "bad.tar", [{"__key__": "a", **good}, {"__key__": "k", **sample}, {"__key__": "z", **good}]
    )
    items = list(web_pairs([str(file)]).in_order())
    assert answers(items) == ["good", f"error: {cause}", "good"]
    assert words in str(items[1])


def test_a_truncated_tar_keeps_its_good_samples_and_the_next_one_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=2, each=6)
    first = tmp_path / "00000.tar"
    data = first.read_bytes()
    for cut in (len(data) // 2, len(data) // 2 + 512, 700):
        first.write_bytes(data[:cut])
        found = answers(list(web_pairs([str(tmp_path / "*.tar")]).in_order()))
        assert found.count("error: damaged shard") == 1, cut
        assert [f"caption {n}" for n in range(6, 12)] == found[-6:]


@pytest.mark.parametrize("content", [b"", b"this is not a tar file" * 100])
def test_a_file_that_is_not_a_tar(tmp_path: Path, content: bytes) -> None:
    write_shards(tmp_path, shards=1, each=3)
    (tmp_path / "zzz.tar").write_bytes(content)
    items = list(web_pairs([str(tmp_path / "*.tar")]).in_order())
    assert answers(items[3:]) == ["error: damaged shard"]
    assert "zzz.tar: the tar file is damaged or cut" in str(items[3])


def test_an_empty_tar_is_counted(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=1, each=3)
    with tarfile.open(tmp_path / "zzz.tar", "w"):
        pass
    items = list(web_pairs([str(tmp_path / "*.tar")]).in_order())
    assert answers(items[3:]) == ["error: empty shard"]


def test_a_duplicate_member_is_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("k.jpg", image_bytes(1)), ("k.jpg", image_bytes(2)), ("k.txt", b"text")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    items = list(web_pairs([str(tmp_path / "a.tar")]).in_order())
    assert answers(items) == ["text", "error: duplicate member"]


@pytest.mark.parametrize("readers", [1, 4])
def test_an_epoch_without_a_good_sample_ends(tmp_path: Path, readers: int) -> None:
    file = write_shard(tmp_path / "a.tar", [{"__key__": str(n), "jpg": b"x"} for n in range(3)])
    stream = web_pairs([str(file)]).stream(1, 0, readers)
    with pytest.raises(DataError, match=r"web: reader 0 of . found no usable sample in a whole epoch \(caption: 3"):
        list(islice(stream, 1000))


def test_more_readers_than_samples_all_find_some(tmp_path: Path) -> None:
    source = web_pairs(write_shards(tmp_path, shards=1, each=2))
    for reader in range(7):
        assert "error" not in "".join(answers(list(islice(source.stream(1, reader, 7), 5))))


def test_missing_shards_are_listed_at_once(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=2, each=1)
    with pytest.raises(DataError, match=r"laion: 5 of 7 shards are missing \(.*00002.tar, .*, and 2 more\)"):
        web_pairs([f"{tmp_path}/{{00000..00006}}.tar"], name="laion")
    with pytest.raises(DataError, match=r"1 of 1 shards are missing .*nothing-\*\.tar"):
        web_pairs([f"{tmp_path}/nothing-*.tar"])
    with pytest.raises(DataError, match="urls is empty"):
        web_pairs([])
    with pytest.raises(DataError, match="not a local path"):
        web_pairs(["https://example.org/0.tar"])
    with pytest.raises(DataError, match="braces"):
        web_pairs([f"{tmp_path}/{{0..1.tar"])


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="shuffle_buffer"):
        web_pairs([], shuffle_buffer=-1)
    with pytest.raises(ValueError, match="weight"):
        web_pairs([], weight=0.0)
