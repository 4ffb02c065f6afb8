"""Reading a feature cache: from an image file to its features, without decoding it.

Input: the folder of a cache. Output: a `FeatureCache`, which takes the place of the image processor in training. What
was not made with the parts of the config is refused, and so is an image that the cache does not have.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from minigpt4.config import Config
from minigpt4.errors import DataError, FeatureCacheError, ImageError
from minigpt4.feature_cache.layout import (
    CALIBRATED,
    CONTENT,
    INDEX,
    MADE_WITH,
    SHARD,
    digest_of,
    features_of,
    read_description,
)
from minigpt4.feature_cache.origin import differences_from
from minigpt4.processors.image import ImageSpec

OPEN_SHARDS = 64
"""Shards that one reader keeps open."""
AGAIN = "run python -m minigpt4 cache again, which adds what is new"


class FeatureCache:
    """The query features of images, by the content of their files; picklable, so that data workers get a copy.

    Attributes:
        folder: the cache.
        num_query_tokens: Q.
        feature_dim: Dq.
        image_spec: size and normalisation of the images that were encoded.
        parts: identities of the image encoder and the resampler, as a checkpoint's manifest has them.
        images: number of images that have features.
        about: how they are stored and were computed, for the log.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a complete cache.

        Raises:
            FeatureCacheError: it is missing, incomplete or damaged.
        """
        self.folder = Path(folder)
        self._made_with = read_description(self.folder, MADE_WITH)
        self._content = read_description(self.folder, CONTENT)
        self.num_query_tokens: int = self._made_with["num_query_tokens"]
        self.feature_dim: int = self._made_with["feature_dim"]
        spec = self._made_with["image_spec"]
        self.image_spec = ImageSpec(**{**spec, "mean": tuple(spec["mean"]), "std": tuple(spec["std"])})
        self.parts: dict[str, dict[str, Any]] = self._made_with["parts"]
        self.images: int = self._content["images"]
        self.about = f"{self._made_with['dtype']}, computed {self._made_with['computed']}"
        self._failures: dict[str, list[str]] = self._content["failures"]
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self._index = self._read_index()

    def check(self, config: Config, digests: Sequence[tuple[str, str]]) -> None:
        """Raise FeatureCacheError unless the features are those that training with `config` would compute.

        Args:
            config: of the run.
            digests: the name of each data set of the run, and what `Source.digest` returns for it: empty if unknown.
        """
        problems = differences_from(self._made_with["origin"], config)
        if problems:
            raise FeatureCacheError(
                f"{self.folder}: the cached features were made with other settings or weights:\n"
                + "\n".join(problems)
                + "\nCorrect the config, or write another cache: python -m minigpt4 cache with another "
                "datasets.feature_cache"
            )
        known = {digest for cached in self._content["sets"].values() for digest in cached}
        new = [name for name, digest in digests if digest and digest not in known]
        if new:
            raise FeatureCacheError(
                f"{self.folder}: {', '.join(new)}: not cached, or changed since: its files differ from those of "
                f"{', '.join(self._content['sets'])}; {AGAIN}"
            )

    def calibrated(self) -> dict[str, Tensor]:
        """Return the tensors of the resampler that were calibrated when the cache was made, by name."""
        file = self.folder / CALIBRATED
        return load_file(file) if file.is_file() else {}

    def __call__(self, image: bytes | str | Path, name: str = "image") -> Tensor:
        """Return the features (Q, Dq) of an image file, in the precision in which they are stored.

        Args:
            image: the content of the file, or its path.
            name: the name of the image in messages.

        Raises:
            ImageError: the image could not be read when the cache was made.
            FeatureCacheError: the cache does not have the image, or its entry is damaged.
        """
        try:
            content = image if isinstance(image, bytes) else Path(image).read_bytes()
        except OSError as error:
            raise ImageError(f"{name}: cannot be read: {error.strerror or error}") from error
        digest = digest_of(content)
        failed = self._failures.get(digest.hex())
        if failed is not None:
            cause, reason = failed
            raise DataError(f"{name}: could not be read when its features were cached: {reason}", cause=cause)
        place = self._find(digest)
        if place is None:
            raise FeatureCacheError(
                f"{self.folder}: has no features of {name}: the image is new or has changed since the cache was made; "
                + AGAIN
            )
        return self._read(*place)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be sent to another process."""
        return {**self.__dict__, "_open": OrderedDict(), "_index": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the index again."""
        self.__dict__.update(state)
        self._index = self._read_index()

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def _read_index(self) -> NDArray[np.uint64]:
        """Return the index (5, images), mapped from the disk."""
        file = self.folder / INDEX
        try:
            index: NDArray[np.uint64] = np.load(file, mmap_mode="r" if self.images else None)
        except (OSError, ValueError, EOFError) as error:
            raise FeatureCacheError(f"{file}: missing or damaged ({error}); {AGAIN}") from error
        if index.shape != (5, self.images) or index.dtype != np.uint64:
            raise FeatureCacheError(f"{file}: has {index.shape[-1:]} entries, {CONTENT} says {self.images}; {AGAIN}")
        return index

    def _find(self, digest: bytes) -> tuple[int, int, int] | None:
        """Return shard, offset and size of an entry, or None."""
        first, rest = (np.uint64(int.from_bytes(half, "big")) for half in (digest[:8], digest[8:]))
        at = int(np.searchsorted(self._index[0], first))
        while at < self.images and self._index[0, at] == first:
            if self._index[1, at] == rest:
                shard, offset, size = map(int, self._index[2:, at])
                return shard, offset, size
            at += 1
        return None

    def _read(self, shard: int, offset: int, size: int) -> Tensor:
        file = self.folder / SHARD.format(shard)
        try:
            if shard not in self._open:
                if len(self._open) >= OPEN_SHARDS:
                    self._open.popitem(last=False)[1].close()
                self._open[shard] = file.open("rb")
            self._open.move_to_end(shard)
            self._open[shard].seek(offset)
            content = self._open[shard].read(size)
        except OSError as error:
            raise FeatureCacheError(f"{file}: cannot be read: {error.strerror or error}; {AGAIN}") from error
        return features_of(content, str(file))
