"""The files of a feature cache, and the form of one entry.

A cache is a folder of WebDataset shards `shard-000000.tar`, ...; a member `HASH.safetensors` holds the tensor
`query_features` (Q, Dq) of the image whose content has this hash, with a checksum. The shards alone hold the features:
`index.npy` is made from them, so that entries are found without reading the shards.

    made_with.json        what the features were made with; written first
    resampler.safetensors what was calibrated from training images, if anything was
    shard-000000.tar      features
    index.npy             where each entry is; written at the end
    cache.json            what is in the cache; written last, so a folder without it is not complete
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from minigpt4.errors import FeatureCacheError

MADE_WITH, CONTENT, INDEX, CALIBRATED = "made_with.json", "cache.json", "index.npy", "resampler.safetensors"
SHARD, SHARD_FILES = "shard-{:06d}.tar", "shard-*.tar"
PARTIAL = ".partial"
FORMAT = 1
TENSOR = "query_features"
SUFFIX = ".safetensors"
DIGEST_BYTES = 16
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
"""How a tar file ends."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEADER_BYTES = 256
"""Room for the header of an entry in the estimate of its size."""


@dataclass(frozen=True)
class Entry:
    """Where an entry is: in which shard, at which byte its content begins, and how long it is."""

    digest: bytes
    shard: int
    offset: int
    size: int


def digest_of(content: bytes) -> bytes:
    """Return the 16 bytes under which the features of an image file with this content are stored."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def entry_bytes(num_query_tokens: int, feature_dim: int, dtype: torch.dtype) -> int:
    """Return how many bytes of a shard an image takes, at most."""
    content = num_query_tokens * feature_dim * dtype.itemsize + HEADER_BYTES
    return BLOCK + -(-content // BLOCK) * BLOCK


def member(digest: bytes, features: Tensor) -> bytes:
    """Return an entry as the bytes of a tar file: header, content, and zeros up to the next block."""
    features = features.contiguous().cpu()
    checksum = zlib.crc32(features.view(-1).view(torch.uint8).numpy().tobytes())
    content = safetensors.torch.save({TENSOR: features}, {"crc32": f"{checksum:08x}"})
    info = tarfile.TarInfo(digest.hex() + SUFFIX)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


def features_of(content: bytes, place: str) -> Tensor:
    """Return the features in the content of an entry.

    Raises:
        FeatureCacheError: it is damaged.
    """
    try:
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        data = content[end:]
        if f"{zlib.crc32(data):08x}" != header["__metadata__"]["crc32"]:
            raise ValueError("its checksum differs")
        return safetensors.torch.load(content)[TENSOR]
    except Exception as error:  # what a damaged file raises depends on the byte
        raise FeatureCacheError(
            f"{place}: the cached features are damaged ({str(error)[:100]}); delete this shard and {CONTENT}, and run "
            "python -m minigpt4 cache again"
        ) from error


def entries(file: Path, number: int, *, check: bool = False) -> Iterator[Entry]:
    """Yield the entries of a shard, in order, up to the first that is incomplete.

    Args:
        file: the shard.
        number: of the shard, for the entries.
        check: also read each entry, and stop at one that is damaged.
    """
    with file.open("rb") as shard:
        size, offset = os.fstat(shard.fileno()).st_size, 0
        while offset + BLOCK <= size:
            found = _header(shard, offset)
            if found is None or offset + BLOCK + found[1] > size:
                return
            entry = Entry(found[0], number, offset + BLOCK, found[1])
            if check and not _is_whole(shard, entry):
                return
            yield entry
            offset += BLOCK + -(-entry.size // BLOCK) * BLOCK


def _header(shard: BinaryIO, offset: int) -> tuple[bytes, int] | None:
    """Return digest and size of the entry whose header is at `offset`, or None if none is there."""
    shard.seek(offset)
    try:
        info = tarfile.TarInfo.frombuf(shard.read(BLOCK), "ascii", "strict")
        return bytes.fromhex(info.name.removesuffix(SUFFIX)), info.size
    except (tarfile.HeaderError, ValueError):
        return None


def _is_whole(shard: BinaryIO, entry: Entry) -> bool:
    shard.seek(entry.offset)
    try:
        features_of(shard.read(entry.size), "")
    except FeatureCacheError:
        return False
    return True


def read_description(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of one of the JSON files of a cache.

    Raises:
        FeatureCacheError: it is missing, damaged, or of a later format.
    """
    file = folder / name
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
        written = found["format"]
    except FileNotFoundError as error:
        what = "is not complete" if (folder / MADE_WITH).is_file() else "is not a feature cache"
        raise FeatureCacheError(f"{folder}: {what}: {name} is missing; run python -m minigpt4 cache") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FeatureCacheError(f"{file}: damaged: {error!r}") from error
    if written > FORMAT:
        raise FeatureCacheError(f"{file}: format {written}, but this version reads up to {FORMAT}; upgrade minigpt4")
    return found
