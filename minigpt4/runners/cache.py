"""The verb `cache`: the query features of all images of a config's data sets, written once.

Input: a config with `datasets.feature_cache`. Output: a feature cache. Image encoder and resampler are loaded, the
language model is not. How much disk it takes is said before the first image is encoded, and an interrupted job
continues where it stopped. Images that cannot be read are noted, so that training skips and counts them as ever.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import tqdm
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt4 import __version__
from minigpt4.assets import resolve
from minigpt4.checkpoints.assemble import build_image_side, check_files
from minigpt4.checkpoints.manifest import identify_image_side
from minigpt4.config import Config
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.datasets.loader import NOTES_PER_CAUSE, image_name
from minigpt4.datasets.source import Source, sample_error
from minigpt4.devices import choose_device, choose_precision
from minigpt4.errors import ConfigError, DataError, FeatureCacheError
from minigpt4.feature_cache.layout import (
    CALIBRATED,
    CONTENT,
    DTYPES,
    FORMAT,
    MADE_WITH,
    SHARD_FILES,
    digest_of,
    entry_bytes,
    read_description,
)
from minigpt4.feature_cache.origin import differences_from, origin_of
from minigpt4.feature_cache.writer import FeatureWriter, write_json
from minigpt4.models.image_side import ImageSide
from minigpt4.processors.image import ImageProcessor
from minigpt4.runners.batches import build_sources
from minigpt4.runners.calibration import calibration_images
from minigpt4.runners.folder import own_folder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheCount:
    """What is in a cache after a job.

    Attributes:
        images: images that have features.
        new: those that this job encoded.
        failed: images that cannot be read.
        bad_samples: samples of the data sets that cannot be used, so that their images were not looked at.
        bytes: size of the shards.
    """

    images: int
    new: int
    failed: int
    bad_samples: int
    bytes: int


@dataclass(frozen=True)
class _Image:
    """An image file: its hash, its content, and what messages call it."""

    digest: bytes
    content: bytes
    name: str


@dataclass(frozen=True)
class _Part:
    """A data set of the config, and how many of its samples are used: of a validation set only the first ones."""

    name: str
    source: Source
    limit: int | None

    def expected_images(self) -> int | None:
        count = self.source.expected_images()
        return count if count is None or self.limit is None else min(count, self.limit)


class CacheRunner:
    """Encodes every image of the data sets in `datasets.train` and `datasets.validation` that has no features yet."""

    def __init__(self, config: Config, dtype: str, batch_size: int) -> None:
        """Store features as `dtype` (bfloat16, float16, float32), computed `batch_size` images at a time."""
        self.config = config
        self.folder = Path(config.datasets.feature_cache)
        self.dtype = dtype
        self.batch_size = batch_size
        self.device = choose_device(config.run.device)
        self._bad_samples: Counter[str] = Counter()
        self._expected = 0

    @classmethod
    def from_config(cls, config: Config, dtype: str = "bfloat16", batch_size: int = 32) -> CacheRunner:
        """Build the runner of a config, after checking everything that can be checked without loading anything.

        Raises:
            ConfigError: values or files are missing.
        """
        problems = []
        try:
            check_files(config, "model", "datasets", without=("model.language_model", "datasets.feature_cache"))
        except ConfigError as error:
            problems += error.problems
        if not config.datasets.feature_cache:
            problems.append("datasets.feature_cache: is required: pass --options datasets.feature_cache=FOLDER")
        if not config.datasets.train:
            problems.append("datasets.train: names no data set whose images are to be encoded")
        if batch_size < 1:
            problems.append(f"--batch-size must be at least 1, found {batch_size}")
        if problems:
            raise ConfigError(problems)
        return cls(config, dtype, batch_size)

    def run(self) -> CacheCount:
        """Encode what is missing, and return what is in the cache.

        Raises:
            FeatureCacheError: the folder holds features of other parts, or the disk is too small.
            MiniGPT4Error: what else is wrong.
        """
        with own_folder(self.folder, "datasets.feature_cache"):
            if (self.folder / MADE_WITH).is_file():
                self._check_same(read_description(self.folder, MADE_WITH))
            train = build_sources(self.config.datasets.train)
            validation = build_sources(self.config.datasets.validation)
            limit = self.config.run.validation_samples
            parts = [_Part(name, source, None) for name, source in train.items()]
            parts += [_Part(name, source, limit) for name, source in validation.items()]
            if not (self.folder / MADE_WITH).is_file():
                self._describe(train)
            writer = FeatureWriter(self.folder)
            self._announce(parts, writer)
            failures: dict[str, list[str]] = {}
            try:
                with closing(writer):
                    self._encode_all(self._images(parts), writer, failures)
                    content = self._content(parts, failures, len(writer.known))
                    writer.finish(content)
            except OSError as error:
                raise FeatureCacheError(
                    f"{self.folder}: cannot be written: {error.strerror or error}; free some space and start the same "
                    "command again, which continues"
                ) from error
        return CacheCount(
            images=len(writer.known),
            new=len(writer.known) - writer.recovered,
            failed=len(content["failures"]),
            bad_samples=sum(self._bad_samples.values()),
            bytes=sum(file.stat().st_size for file in self.folder.glob(SHARD_FILES)),
        )

    @cached_property
    def _image_side(self) -> ImageSide:
        """Image encoder and resampler; loaded when the first image needs them."""
        image_side = build_image_side(self.config).to(self.device)
        stored = self.folder / CALIBRATED
        if image_side.resampler.calibrated and stored.is_file():
            image_side.resampler.load_state_dict(load_file(stored), strict=False)
        return image_side

    @cached_property
    def _processor(self) -> ImageProcessor:
        processor: ImageProcessor = self.config.processors.image.build(spec=self._image_side.vision_encoder.image_spec)
        return processor

    @property
    def _precision(self) -> str:
        return choose_precision(self.config.run.precision, self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return the precision in which training would compute the features."""
        if self._precision == "no":
            return nullcontext()
        dtype = torch.bfloat16 if self._precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def _check_same(self, made_with: dict[str, Any]) -> None:
        """Raise FeatureCacheError if the folder holds features that this config would not add to."""
        problems = differences_from(made_with["origin"], self.config)
        if made_with["dtype"] != self.dtype:
            problems.append(f"--dtype: {self.dtype} (cached with {made_with['dtype']})")
        if problems:
            raise FeatureCacheError(
                f"{self.folder}: holds features of other parts or settings:\n"
                + "\n".join(problems)
                + "\nChoose another folder: --options datasets.feature_cache=FOLDER"
            )

    def _describe(self, train: dict[str, Source]) -> None:
        """Calibrate the resampler if it needs that, and write what the features are made with."""
        image_side, start = self._image_side, self.config.model.init_from
        if image_side.resampler.calibrated and not start:
            image_side.calibrate(calibration_images(self._conversation(), self._processor, train).to(self.device))
        calibrated = image_side.calibrated_tensors()
        if calibrated:
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in calibrated.items()}, self.folder / CALIBRATED
            )
        parts = identify_image_side(image_side, {f"resampler.{name}" for name in calibrated})
        autocast = "without autocast" if self._precision == "no" else f"under {self._precision} autocast"
        made_with = {
            "format": FORMAT,
            "version": __version__,
            "dtype": self.dtype,
            "num_query_tokens": image_side.resampler.num_query_tokens,
            "feature_dim": image_side.resampler.feature_dim,
            "image_spec": dataclasses.asdict(image_side.vision_encoder.image_spec),
            "computed": f"on {self.device.type} {autocast}",
            "parts": {name: dataclasses.asdict(part) for name, part in parts.items()},
            "origin": origin_of(self.config),
        }
        write_json(self.folder / MADE_WITH, made_with)

    def _conversation(self) -> ConversationEncoder:
        """Return the encoder of dialogues: calibration uses the first samples that can be trained on."""
        tokenizer = TextTokenizer.from_path(resolve(self.config.model.language_model.config.path))
        queries = self._image_side.resampler.num_query_tokens
        return ConversationEncoder(tokenizer, queries, self.config.conversation, self.config.compat)

    def _announce(self, parts: Sequence[_Part], writer: FeatureWriter) -> None:
        """Say how much disk the cache takes, and refuse to begin if there is not enough."""
        made_with = read_description(self.folder, MADE_WITH)
        each = entry_bytes(made_with["num_query_tokens"], made_with["feature_dim"], DTYPES[self.dtype])
        counts = [(part.name, part.expected_images()) for part in parts]
        self._expected = sum(count or 0 for _, count in counts)
        unknown = [name for name, count in counts if count is None]
        free = shutil.disk_usage(self.folder).free
        missing = max(0, self._expected - writer.recovered) * each
        _log.info(
            "%s: about %s images x %s bytes = %.2f GB%s; %s are there already; %.2f GB are free",
            self.folder,
            f"{self._expected:,}",
            f"{each:,}",
            self._expected * each / 1e9,
            f", and those of {', '.join(unknown)}, whose number is not known" if unknown else "",
            f"{writer.recovered:,}",
            free / 1e9,
        )
        if missing > free:
            raise FeatureCacheError(
                f"{self.folder}: needs about {missing / 1e9:.2f} GB more, but its disk has {free / 1e9:.2f} GB free; "
                "choose another disk with --options datasets.feature_cache=FOLDER"
            )

    def _content(self, parts: Sequence[_Part], failures: dict[str, list[str]], images: int) -> dict[str, Any]:
        """Return what is in the cache; what earlier jobs added stays."""
        sets: dict[str, list[str]] = {}
        if (self.folder / CONTENT).is_file():
            before = read_description(self.folder, CONTENT)
            sets, failures = before["sets"], {**before["failures"], **failures}
        for part in parts:
            digest = part.source.digest()
            if digest and digest not in sets.setdefault(part.name, []):
                sets[part.name].append(digest)
        return {"images": images, "sets": sets, "failures": failures}

    def _images(self, parts: Sequence[_Part]) -> Iterator[_Image]:
        """Yield every image file of the data sets."""
        for part in parts:
            for item in islice(part.source.in_order(), part.limit):
                if isinstance(item, DataError):
                    self._skip(item)
                    continue
                for at, image in enumerate(item.images):
                    try:
                        content = image if isinstance(image, bytes) else image.read_bytes()
                    except OSError as error:
                        self._skip(sample_error(error, image_name(item, at)))
                        continue
                    yield _Image(digest_of(content), content, image_name(item, at))

    def _skip(self, error: DataError) -> None:
        self._bad_samples[error.cause] += 1
        if self._bad_samples[error.cause] <= NOTES_PER_CAUSE:
            _log.warning("skipped (%s): %s", error.cause, error)

    def _encode_all(self, images: Iterator[_Image], writer: FeatureWriter, failures: dict[str, list[str]]) -> None:
        """Encode the images that have no features yet, in batches."""
        batch: list[tuple[bytes, Tensor]] = []
        with tqdm(total=self._expected, desc="features", unit="image") as bar:
            for image, pixels in self._decoded(images, writer, bar):
                if isinstance(pixels, DataError):
                    if image.digest.hex() not in failures:
                        _log.warning("%s", pixels)
                    failures[image.digest.hex()] = [pixels.cause, str(pixels)[:300]]
                    bar.update()
                    continue
                batch.append((image.digest, pixels))
                if len(batch) == self.batch_size:
                    self._encode(batch, writer)
                    bar.update(len(batch))
                    batch = []
            if batch:
                self._encode(batch, writer)
                bar.update(len(batch))

    def _decoded(
        self, images: Iterator[_Image], writer: FeatureWriter, bar: Any
    ) -> Iterator[tuple[_Image, Tensor | DataError]]:
        """Yield new images with their pixels, or with what is wrong; threads decode ahead of the encoder."""
        begun: set[bytes] = set()
        waiting: deque[tuple[_Image, Future[Tensor | DataError]]] = deque()
        with ThreadPoolExecutor(max(1, self.config.run.num_workers)) as pool:
            for image in images:
                if image.digest in writer.known or image.digest in begun:
                    bar.update()
                    continue
                begun.add(image.digest)
                waiting.append((image, pool.submit(self._decode, image, self._processor)))
                if len(waiting) > 2 * self.batch_size:
                    first, pixels = waiting.popleft()
                    yield first, pixels.result()
            while waiting:
                first, pixels = waiting.popleft()
                yield first, pixels.result()

    @staticmethod
    def _decode(image: _Image, processor: ImageProcessor) -> Tensor | DataError:
        try:
            return processor(image.content, name=image.name)
        except Exception as error:  # one image never ends the job
            return sample_error(error, image.name)

    def _encode(self, batch: list[tuple[bytes, Tensor]], writer: FeatureWriter) -> None:
        pixels = torch.stack([each for _, each in batch]).to(self.device)
        with torch.no_grad(), self._autocast():
            features = self._image_side(pixels)
        stored = features.to(DTYPES[self.dtype]).cpu()
        if not torch.isfinite(stored).all():
            raise FeatureCacheError(
                f"{self.folder}: features with values that are not finite in {self.dtype}; use --dtype float32, or "
                "check the weights of the image encoder"
            )
        for (digest, _), one in zip(batch, stored, strict=True):
            writer.add(digest, one)
