"""Entries of a feature cache: written, found, recovered after a kill at any byte, and refused when damaged."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset as wds
from safetensors.torch import load
from torch import Tensor

from minigpt4.errors import DataError, FeatureCacheError
from minigpt4.feature_cache.layout import CONTENT, FORMAT, INDEX, MADE_WITH, SHARD, digest_of, entry_bytes
from minigpt4.feature_cache.reader import FeatureCache
from minigpt4.feature_cache.writer import FeatureWriter, write_json

SHAPE = (3, 5)
CONTENTS = [f"image {n}".encode() for n in range(23)]
MADE = {
    "format": FORMAT,
    "num_query_tokens": SHAPE[0],
    "feature_dim": SHAPE[1],
    "dtype": "float32",
    "computed": "here",
    "image_spec": {"height": 8, "width": 8, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
    "parts": {},
    "origin": {},
}


def features(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number)).to(dtype)


def write(folder: Path, numbers: range, shard_bytes: int = 4096, dtype: torch.dtype = torch.float32) -> FeatureWriter:
    """Write the features of some images, and leave the last shard open as a kill would."""
    folder.mkdir(exist_ok=True)
    write_json(folder / MADE_WITH, MADE)
    writer = FeatureWriter(folder, shard_bytes)
    for number in numbers:
        writer.add(digest_of(CONTENTS[number]), features(number, dtype))
    return writer


def finish(writer: FeatureWriter) -> FeatureCache:
    failures = {digest_of(b"broken").hex(): ["image", "not an image"]}
    writer.finish({"images": len(writer.known), "sets": {"a": ["x"]}, "failures": failures})
    return FeatureCache(writer.folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_image_has_its_own_features_in_the_precision_they_were_given_in(tmp_path, dtype):
    cache = finish(write(tmp_path / "cache", range(23), dtype=dtype))
    (tmp_path / "file").write_bytes(CONTENTS[7])
    for number, content in enumerate(CONTENTS):
        assert torch.equal(cache(content), features(number, dtype))
    assert torch.equal(cache(tmp_path / "file"), features(7, dtype))
    assert torch.equal(pickle.loads(pickle.dumps(cache))(CONTENTS[9]), features(9, dtype))


def test_an_image_that_is_not_there_ends_a_run_and_one_that_could_not_be_read_is_skipped_again(tmp_path):
    cache = finish(write(tmp_path / "cache", range(3)))
    with pytest.raises(FeatureCacheError, match=r"has no features of row 4: the image is new or has changed"):
        cache(b"another image", name="row 4")
    with pytest.raises(
        DataError, match=r"row 5: could not be read when its features were cached: not an image"
    ) as found:
        cache(b"broken", name="row 5")
    assert found.value.cause == "image"


def test_shards_are_webdataset_shards_of_safetensors(tmp_path):
    finish(write(tmp_path / "cache", range(9)))
    shards = sorted(map(str, (tmp_path / "cache").glob("shard-*.tar")))
    assert len(shards) > 2
    found = {sample["__key__"]: sample["safetensors"] for sample in wds.WebDataset(shards, shardshuffle=False)}
    assert list(found) == [digest_of(content).hex() for content in CONTENTS[:9]]
    assert torch.equal(load(found[digest_of(CONTENTS[4]).hex()])["query_features"], features(4))


def test_an_entry_takes_no_more_room_than_estimated(tmp_path):
    finish(write(tmp_path / "cache", range(9), shard_bytes=10**6))
    size = (tmp_path / "cache" / SHARD.format(0)).stat().st_size - 1024
    assert 0.6 * 9 * entry_bytes(*SHAPE, torch.float32) <= size <= 9 * entry_bytes(*SHAPE, torch.float32)
    assert 32 * 768 * 2 < entry_bytes(32, 768, torch.bfloat16) < 1.03 * 32 * 768 * 2


def test_cut_at_any_byte_a_cache_loses_at_most_the_entry_that_was_being_written(tmp_path):
    whole = write(tmp_path / "whole", range(5), shard_bytes=10**6)
    whole.close()
    content = (tmp_path / "whole" / f"{SHARD.format(0)}.partial").read_bytes()
    each = len(content) // 5
    cuts = {*range(0, len(content), 331), *(n * each + d for n in range(1, 6) for d in (-1, 0)), *range(1, 1200, 199)}
    for cut in sorted(cuts):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        write_json(folder / MADE_WITH, MADE)
        (folder / f"{SHARD.format(0)}.partial").write_bytes(content[:cut])
        writer = FeatureWriter(folder, 10**6)
        # The zeros behind an entry may be cut: it is whole without them.
        assert cut // each <= writer.recovered <= min(5, cut // each + 1)
        for number in range(5):
            writer.add(digest_of(CONTENTS[number]), features(number))
        cache = finish(writer)
        assert all(torch.equal(cache(CONTENTS[number]), features(number)) for number in range(5))
        assert (folder / SHARD.format(0)).read_bytes()[: len(content)] == content
        with tarfile.open(folder / SHARD.format(0)) as tar:
            assert len(tar.getnames()) == 5


def test_an_interrupted_cache_continues_and_one_that_is_complete_is_extended(tmp_path):
    write(tmp_path / "cache", range(8)).close()
    with pytest.raises(FeatureCacheError, match="is not complete"):
        FeatureCache(tmp_path / "cache")
    continued = write(tmp_path / "cache", range(12))
    assert continued.recovered == 8
    finish(continued)
    extended = write(tmp_path / "cache", range(23))
    assert extended.recovered == 12
    assert torch.equal(FeatureCache(tmp_path / "cache")(CONTENTS[11]), features(11))  # usable meanwhile
    cache = finish(extended)
    assert all(torch.equal(cache(content), features(number)) for number, content in enumerate(CONTENTS))


def test_a_damaged_shard_is_named(tmp_path):
    cache = finish(write(tmp_path / "cache", range(5), shard_bytes=10**6))
    shard = tmp_path / "cache" / SHARD.format(0)
    content = bytearray(shard.read_bytes())
    content[content.index(b"\0" * 100, 600) - 5] ^= 1  # at the end of the first entry
    shard.write_bytes(content)
    with pytest.raises(FeatureCacheError, match=r"shard-000000.tar: the cached features are damaged"):
        cache(CONTENTS[0])
    cache.close()
    shard.unlink()
    with pytest.raises(FeatureCacheError, match=r"shard-000000.tar: cannot be read"):
        cache(CONTENTS[1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (INDEX, b"", r"index.npy: missing or damaged"),
        (CONTENT, b"{", r"cache.json: damaged"),
        (CONTENT, b'{"format": 99}', r"format 99, but this version reads up to 1"),
        (MADE_WITH, None, r"is not a feature cache: made_with.json is missing"),
    ],
)
def test_a_damaged_description_is_named(tmp_path, name, content, message):
    finish(write(tmp_path / "cache", range(3)))
    file = tmp_path / "cache" / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(FeatureCacheError, match=message):
        FeatureCache(tmp_path / "cache")


def test_an_empty_cache_can_be_opened(tmp_path):
    cache = finish(write(tmp_path / "cache", range(0)))
    with pytest.raises(FeatureCacheError, match="has no features of image"):
        cache(CONTENTS[0])
