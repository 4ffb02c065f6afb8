"""From a mixture to batches, with or without worker processes, resumable at any batch.

Input: a mixture, the conversation encoder, the image processor, and a `StreamPlan`. Output: endless `Batch`es
that know how far their reader has come, so that the run saves positions and nothing else.

Readers. Every worker of every rank is one reader: reader = rank * workers + worker. Batch i of a rank comes
from worker i mod workers. A new loader begins its round at worker 0 again, so after a resume the workers play
the readers shifted by the batches already consumed, and the batches go on as if nothing had happened.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from minigpt4.batch import Batch, Sample
from minigpt4.conversation.dialogue import Dialogue
from minigpt4.datasets.collate import collate
from minigpt4.datasets.mixture import Mixture
from minigpt4.datasets.source import Example, Item, Source
from minigpt4.datasets.workers import start_worker
from minigpt4.errors import DataError

logger = logging.getLogger(__name__)

NOTES_PER_CAUSE = 3
"""Skipped samples of one cause whose message is logged, per reader; further ones are only counted."""
MAX_SKIPS_IN_A_ROW = 1000
"""Samples skipped without a good one between them before a reader gives up; no batch would ever say so."""


class DialogueEncoder(Protocol):
    """What the loader asks of `conversation.encoder.ConversationEncoder`."""

    def encode(self, dialogue: Dialogue, *, num_images: int, sample_id: str) -> Any:
        """Return an object with the (T,) tensors of a `Sample`; raises DataError."""


class PixelProcessor(Protocol):
    """What the loader asks of an image processor."""

    def __call__(self, image: Any, name: str = ...) -> Tensor:
        """Return (3, H, W) float32; raises DataError."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """Which part of the data a rank reads, and from where.

    Attributes:
        seed: of the data order.
        batch_size: samples in a batch.
        pad_id: the id written into padding.
        rank: number of this process.
        world_size: number of processes.
        num_workers: reading processes of this rank; 0 reads in this one.
        positions: items each reader has consumed, from the `reader` and `position` of the batches seen; empty
            at start.
        consumed: batches this rank has consumed.
    """

    seed: int
    batch_size: int
    pad_id: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    positions: Mapping[int, int] = field(default_factory=dict)
    consumed: int = 0

    def reader_of(self, worker: int) -> int:
        """Return the number of the reader that a worker plays."""
        workers = max(1, self.num_workers)
        return self.rank * workers + (self.consumed + worker) % workers

    @property
    def readers(self) -> int:
        """Number of readers over all ranks."""
        return self.world_size * max(1, self.num_workers)


@dataclass
class Delivery:
    """What a worker sends: a batch or the error that ends the stream, and messages to log."""

    content: Batch | DataError
    notes: list[str]


class SkipLog:
    """Counts skipped samples by cause, and keeps the first few messages of each cause."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self.in_a_row = 0
        self._seen: Counter[str] = Counter()
        self._noted: dict[str, set[str]] = defaultdict(set)

    def add(self, error: DataError) -> None:
        """Count one skipped sample.

        Raises:
            DataError: too many in a row.
        """
        self.in_a_row += 1
        self.counts[error.cause] += 1
        self._seen[error.cause] += 1
        noted = self._noted[error.cause]
        if len(noted) < NOTES_PER_CAUSE and str(error) not in noted:
            noted.add(str(error))
            last = "; more of this cause are only counted" if len(noted) == NOTES_PER_CAUSE else ""
            self.notes.append(f"skipped ({error.cause}): {error}{last}")
        if self.in_a_row >= MAX_SKIPS_IN_A_ROW:
            causes = ", ".join(f"{cause}: {count}" for cause, count in self._seen.most_common())
            raise DataError(f"{self.in_a_row} samples in a row could not be used ({causes}); the last one: {error}")

    def take(self) -> tuple[dict[str, int], list[str]]:
        """Return counts and messages since the last call."""
        taken = dict(self.counts), self.notes
        self.counts, self.notes = Counter(), []
        return taken


class StreamDataset(IterableDataset[Delivery]):
    """Reads, encodes and collates; each worker process runs one copy."""

    def __init__(self, mixture: Mixture, encoder: DialogueEncoder, processor: PixelProcessor, plan: StreamPlan) -> None:
        self.mixture = mixture
        self.encoder = encoder
        self.processor = processor
        self.plan = plan

    def __iter__(self) -> Iterator[Delivery]:
        """Yield batches without end; an error that ends the stream is the last delivery."""
        worker = get_worker_info()
        reader = self.plan.reader_of(worker.id if worker else 0)
        skips = SkipLog()
        try:
            for batch in self._batches(reader, skips):
                batch.skipped, notes = skips.take()
                yield Delivery(batch, notes)
        except DataError as error:
            yield Delivery(error, skips.take()[1])

    def _batches(self, reader: int, skips: SkipLog) -> Iterator[Batch]:
        plan = self.plan
        position = plan.positions.get(reader, 0)
        samples: list[Sample] = []
        for item in self.mixture.stream(plan.seed, reader, plan.readers, position):
            position += 1
            sample = _sample(item, self.encoder, self.processor, skips)
            if sample is not None:
                samples.append(sample)
            if len(samples) == plan.batch_size:
                batch = collate(samples, plan.pad_id)
                batch.reader, batch.position = reader, position
                samples = []
                yield batch


class BatchLoader(DataLoader[Delivery]):
    """A DataLoader that yields batches, logs what workers skipped, and raises their errors as they are.

    It already reads this rank's own part: do not hand it to `Accelerator.prepare`.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield batches without end.

        Raises:
            DataError: a reader finds nothing more that can be used.
        """
        for delivery in super().__iter__():
            for note in delivery.notes:
                logger.warning(note)
            if isinstance(delivery.content, DataError):
                raise delivery.content
            yield delivery.content


def build_loader(
    mixture: Mixture, encoder: DialogueEncoder, processor: PixelProcessor, plan: StreamPlan
) -> BatchLoader:
    """Return the loader of a rank's training batches.

    Workers start from a clean process (`forkserver`, or `spawn` where there is none): a fork of a process
    that already runs threads or an accelerator can hang.
    """
    context = None
    if plan.num_workers:
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            parts = (mixture, encoder, processor, *mixture.sources.values())
            modules = {__name__, *(type(part).__module__ for part in parts)} - {"__main__"}
            context.set_forkserver_preload(sorted(modules))  # imported once, for all workers and later loaders
    return BatchLoader(
        StreamDataset(mixture, encoder, processor, plan),
        batch_size=None,
        num_workers=plan.num_workers,
        multiprocessing_context=context,
        persistent_workers=False,  # the stream is read once, and a second pass must start where the plan says
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else its start draws from the generator of dropout, and a resume differs
    )


def fixed_batches(
    sources: Mapping[str, Source],
    encoder: DialogueEncoder,
    processor: PixelProcessor,
    *,
    samples: int,
    batch_size: int,
    pad_id: int,
) -> Iterator[Batch]:
    """Yield the same batches each time: the first `samples` examples, unshuffled, the sources in turn.

    Examples that cannot be used are logged, counted in `Batch.skipped`, and make their batch smaller.

    Raises:
        DataError: not one example can be used.
    """
    skips = SkipLog()
    turns = zip_longest(*(source.in_order() for source in sources.values()))
    items = islice((item for item in chain.from_iterable(turns) if item is not None), samples)
    found = False
    while group := list(islice(items, batch_size)):
        encoded = [sample for item in group if (sample := _sample(item, encoder, processor, skips)) is not None]
        counts, notes = skips.take()
        for note in notes:
            logger.warning(note)
        if encoded:
            found = True
            batch = collate(encoded, pad_id)
            batch.skipped = counts
            yield batch
    if not found:
        raise DataError(f"not one sample of {', '.join(sources) or 'the validation data'} can be used")


def encode_example(example: Example, encoder: DialogueEncoder, processor: PixelProcessor) -> Sample:
    """Return the encoded sample, its images decoded.

    Raises:
        DataError: the dialogue or an image cannot be used; the message has the example's id.
    """
    encoded = encoder.encode(example.dialogue, num_images=len(example.images), sample_id=example.id)
    pixels = [
        processor(image, name=str(image) if isinstance(image, Path) else f"{example.id}, image {number}")
        for number, image in enumerate(example.images, start=1)
    ]
    return Sample(
        id=example.id,
        input_ids=encoded.input_ids,
        labels=encoded.labels,
        image_mask=encoded.image_mask,
        position_ids=encoded.position_ids,
        branch_ids=encoded.branch_ids,
        pixel_values=torch.stack(pixels) if pixels else None,
    )


def _sample(item: Item, encoder: DialogueEncoder, processor: PixelProcessor, skips: SkipLog) -> Sample | None:
    """Return the encoded sample, or None after counting why there is none."""
    try:
        if isinstance(item, DataError):
            raise item
        sample = encode_example(item, encoder, processor)
    except DataError as error:
        skips.add(error)
        return None
    skips.in_a_row = 0
    return sample
