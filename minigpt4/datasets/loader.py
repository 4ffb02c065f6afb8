"""From a mixture to batches, with or without worker processes, resumable at any batch.

Input: a mixture, the conversation encoder, the image processor or a cache of its images' features, and a `StreamPlan`.
Output: an endless stream of `Batch`es, each with the position of its reader, which is all that a run has to save.

Readers. Every worker of every rank is one reader: reader = rank * workers + worker. Batch i of a rank comes from worker
i mod workers. A new loader starts with worker 0 again, so after a resume the workers take the roles of the readers
shifted by the batches already consumed, and the batches continue as if nothing had happened.
"""

from __future__ import annotations

import logging
import multiprocessing
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice, zip_longest
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from minigpt4.batch import Batch, Sample
from minigpt4.conversation.encoder import ANSWER_CUT, END_MARK_IN_ANSWER, ConversationEncoder
from minigpt4.datasets.collate import collate, pack
from minigpt4.datasets.mixture import Mixture
from minigpt4.datasets.source import Example, Item, Source, sample_error
from minigpt4.datasets.workers import start_worker
from minigpt4.errors import DataError, FeatureCacheError
from minigpt4.feature_cache.reader import FeatureCache
from minigpt4.processors.image import ImageProcessor

logger = logging.getLogger(__name__)

ImageReader = ImageProcessor | FeatureCache
"""What an image goes through: it becomes `pixel_values`, or the `query_features` that were computed from it before."""
NOTES_PER_CAUSE = 3
"""Skipped samples of one cause whose message is logged, per reader; more of them are only counted."""
MAX_SKIPS_IN_A_ROW = 1000
"""Samples skipped in a row before a reader gives up: without a batch, the run would not notice."""
_ADVICE = {
    END_MARK_IN_ANSWER: " holds {!r}, and chat ends an answer there; replace it in the data, or use another template",
    ANSWER_CUT: " is longer; its tail is not trained on: raise conversation.max_answer_tokens to keep it",
}


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
        pin_memory: whether batches are put into page-locked memory, from which a GPU copies while it computes.
        positions: items each reader has consumed, from the `reader` and `position` of the batches seen; empty at start.
        given: batches of its current group that each reader has given, from `given` of the batches seen.
        group: batches whose samples are sorted by length and divided among them; 1 keeps the order of the stream.
        pack: length of a row that holds several samples, in tokens; 0 gives each sample a row.
        few_widths: whether rows are padded to one of a few widths.
        consumed: batches this rank has consumed.
    """

    seed: int
    batch_size: int
    pad_id: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    pin_memory: bool = False
    positions: Mapping[int, int] = field(default_factory=dict)
    given: Mapping[int, int] = field(default_factory=dict)
    group: int = 1
    pack: int = 0
    few_widths: bool = False
    consumed: int = 0

    def reader_of(self, worker: int) -> int:
        """Return the number of the reader whose role a worker has."""
        workers = max(1, self.num_workers)
        return self.rank * workers + (self.consumed + worker) % workers

    @property
    def readers(self) -> int:
        """Number of readers over all ranks."""
        return self.world_size * max(1, self.num_workers)


@dataclass
class Delivery:
    """What a worker sends: a batch or the error that ends the stream, and messages to log."""

    content: Batch | DataError | FeatureCacheError
    notes: list[str]

    def pin_memory(self) -> Delivery:
        """Return the delivery with its batch in page-locked memory; a DataLoader calls it."""
        return replace(self, content=self.content.pin_memory()) if isinstance(self.content, Batch) else self


class SkipLog:
    """Counts skipped samples by cause and altered ones by kind, and keeps the first few messages of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.altered: Counter[str] = Counter()
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
            self.notes.append(printable(f"skipped ({error.cause}): {error}{last}"))
        if self.in_a_row >= MAX_SKIPS_IN_A_ROW:
            causes = ", ".join(f"{cause}: {count}" for cause, count in self._seen.most_common())
            raise DataError(
                f"{self.in_a_row} samples in a row could not be used ({causes}); the last one: {printable(str(error))}"
            )

    def note_altered(self, sample: Sample, end_mark: str) -> None:
        """Count what was altered in one sample; the first of each kind is named."""
        for kind, count in sample.altered.items():
            self.altered[kind] += count
            if kind not in self._noted:
                self._noted[kind] = {sample.id}
                advice = _ADVICE.get(kind, "").format(end_mark)
                self.notes.append(printable(f"{kind}: {sample.id}{advice}; more of this kind are only counted"))

    def deliver(self, batch: Batch) -> list[str]:
        """Move the counts since the last call into `batch`, and return the messages."""
        batch.skipped, batch.altered = dict(self.counts), dict(self.altered)
        notes = self.notes
        self.forget()
        return notes

    def forget(self) -> None:
        """Drop the counts and messages since the last call."""
        self.counts, self.altered, self.notes = Counter(), Counter(), []


class StreamDataset(IterableDataset[Delivery]):
    """Reads, encodes and collates; each worker process runs one copy."""

    def __init__(
        self, mixture: Mixture, encoder: ConversationEncoder, processor: ImageReader, plan: StreamPlan
    ) -> None:
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
                yield Delivery(batch, skips.deliver(batch))
        except (DataError, FeatureCacheError) as error:
            yield Delivery(error, skips.notes)

    def _batches(self, reader: int, skips: SkipLog) -> Iterator[Batch]:
        plan = self.plan
        start = position = plan.positions.get(reader, 0)
        given = plan.given.get(reader, 0)
        samples: list[Sample] = []
        for item in self.mixture.stream(plan.seed, reader, plan.readers, position):
            position += 1
            sample = _sample(item, self.encoder, self.processor, skips, plan.pack)
            if sample is not None:
                samples.append(sample)
            if len(samples) < plan.batch_size * plan.group:
                continue
            if given:  # counted when the group was read for the first time
                skips.forget()
            for number, members in enumerate(self._divided(samples, start), start=1):
                if number > given:
                    batch = self._joined(members)
                    is_last = number == plan.group
                    batch.reader, batch.given = reader, 0 if is_last else number
                    batch.position = position if is_last else start
                    yield batch
            start, given, samples = position, 0, []

    def _divided(self, samples: list[Sample], start: int) -> list[list[Sample]]:
        """Divide a group into batches of like length, in an order that depends on the seed and where the group began.

        Readers that skipped equally many samples have the same order, so that ranks have long batches together.
        """
        plan = self.plan
        if plan.group > 1:
            samples = sorted(samples, key=_length)
        batches = [samples[first : first + plan.batch_size] for first in range(0, len(samples), plan.batch_size)]
        random.Random(f"{plan.seed}/group/{start}").shuffle(batches)
        return batches

    def _joined(self, samples: list[Sample]) -> Batch:
        plan = self.plan
        if plan.pack:
            longest_first = sorted(samples, key=_length, reverse=True)
            return pack(longest_first, plan.pad_id, plan.pack, few_widths=plan.few_widths)
        return collate(samples, plan.pad_id, few_widths=plan.few_widths)


class BatchLoader(DataLoader[Delivery]):
    """A DataLoader that yields batches, logs what workers skipped, and raises their errors as they are.

    It already reads this rank's own part: do not pass it to `Accelerator.prepare`.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield batches without end.

        Raises:
            DataError: a reader finds no more usable samples.
            FeatureCacheError: the cache does not have an image.
        """
        for delivery in super().__iter__():
            for note in delivery.notes:
                logger.warning(note)
            if not isinstance(delivery.content, Batch):
                raise delivery.content
            yield delivery.content


def build_loader(
    mixture: Mixture, encoder: ConversationEncoder, processor: ImageReader, plan: StreamPlan
) -> BatchLoader:
    """Return the loader of a rank's training batches.

    Workers start from a clean process (`forkserver`, or `spawn` where that is not available): a fork of a process that
    already runs threads or an accelerator can hang.
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
        pin_memory=plan.pin_memory,
        multiprocessing_context=context,
        persistent_workers=False,  # the stream is read once, and a second pass must start where the plan says
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else starting it draws from the generator of dropout, and a resumed run differs
    )


def fixed_batches(
    sources: Mapping[str, Source],
    encoder: ConversationEncoder,
    processor: ImageReader,
    *,
    samples: int,
    batch_size: int,
    pad_id: int,
) -> Iterator[Batch]:
    """Yield the same batches each time: the first `samples` examples, unshuffled, the sources in turn.

    Examples that cannot be used are logged, counted in `Batch.skipped`, and make their batch smaller.

    Raises:
        DataError: none of the examples can be used.
    """
    skips = SkipLog()
    turns = zip_longest(*(source.in_order() for source in sources.values()))
    items = islice((item for item in chain.from_iterable(turns) if item is not None), samples)
    last: Batch | None = None  # held back: it also counts what is skipped behind it
    while group := list(islice(items, batch_size)):
        encoded = [sample for item in group if (sample := _sample(item, encoder, processor, skips)) is not None]
        notes, skips.notes = skips.notes, []
        for note in notes:
            logger.warning(note)
        if encoded:
            if last is not None:
                yield last
            last = collate(encoded, pad_id)
            skips.deliver(last)
    if last is None:
        raise DataError(f"not one sample of {', '.join(sources) or 'the validation data'} can be used")
    last.skipped = dict(Counter(last.skipped) + skips.counts)
    yield last


def encode_example(example: Example, encoder: ConversationEncoder, processor: ImageReader) -> Sample:
    """Return the encoded sample with its images decoded, or with their cached features.

    Raises:
        DataError: the dialogue or an image cannot be used; the message names the example.
        FeatureCacheError: the cache does not have an image.
    """
    encoded = encoder.encode_dialogue(example.dialogue, num_images=len(example.images), sample_id=example.id)
    images = [processor(image, name=image_name(example, number)) for number, image in enumerate(example.images)]
    stacked = None if not images else torch.stack(images) if len(images) > 1 else images[0].unsqueeze(0)
    is_cached = isinstance(processor, FeatureCache)
    return Sample(
        id=example.id,
        input_ids=encoded.input_ids,
        labels=encoded.labels,
        image_mask=encoded.image_mask,
        position_ids=encoded.position_ids,
        branch_ids=encoded.branch_ids,
        pixel_values=None if is_cached else stacked,
        query_features=stacked if is_cached else None,
        altered={**example.altered, **encoded.altered},
    )


def image_name(example: Example, number: int) -> str:
    """Return what messages call an image of an example, counted from 0."""
    image = example.images[number]
    return str(image) if isinstance(image, Path) else f"{example.id}, image {number + 1}"


def _length(sample: Sample) -> int:
    return len(sample.input_ids)


def _sample(
    item: Item, encoder: ConversationEncoder, processor: ImageReader, skips: SkipLog, longest: int = 0
) -> Sample | None:
    """Return the encoded sample, or None after counting why it is skipped; `longest` is in tokens, 0 for any."""
    try:
        if isinstance(item, DataError):
            raise item
        sample = encode_example(item, encoder, processor)
        if 0 < longest < _length(sample):
            raise DataError(
                f"{sample.id}: {_length(sample)} tokens do not fit into a row of run.pack {longest}", cause="too long"
            )
    except Exception as error:
        skips.add(sample_error(error, item.id if isinstance(item, Example) else "a sample"))
        return None
    skips.in_a_row = 0
    skips.note_altered(sample, encoder.training_template.end)
    return sample


def printable(text: str) -> str:
    """Return text for a log or a terminal, with every character escaped that is not to be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
