"""The data of a run: its sources, and the batches of training and validation."""

from __future__ import annotations

import logging
import math
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.process import BaseProcess

import torch
from accelerate import Accelerator

from minigpt4.batch import Batch
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.config.sections import RunConfig
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.datasets.loader import ImageReader, StreamPlan, build_loader, fixed_batches
from minigpt4.datasets.mixture import Mixture
from minigpt4.datasets.source import Source
from minigpt4.devices import copies_from_pinned_memory
from minigpt4.errors import DataError
from minigpt4.registry import Component
from minigpt4.runners.state import Speed, TrainingState
from minigpt4.runners.stopping import inherited_block

_log = logging.getLogger(__name__)


class StepBatches:
    """Gives the batches of one optimiser step after another, on one rank.

    `read_ahead` reads those of the next step while the device computes this one, and starts to copy the first.
    """

    def __init__(
        self, batches: Iterable[Batch], number: int, device: torch.device, speed: Speed, patience: float = math.inf
    ) -> None:
        """Read `number` batches for each step; `speed` notes how long that takes.

        Data workers that deliver nothing for `patience` seconds are ended, and with them the run.
        """
        self._batches = iter(batches)
        self._has_workers = getattr(batches, "num_workers", 0) > 0
        self._patience = patience
        self._workers: list[BaseProcess] | None = None
        self._others: set[BaseProcess] = set()
        self._hangs = False
        self._number = number
        self._device = device
        self._speed = speed
        self._ahead: list[Batch] | Exception | None = None

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """Return the batches of the next step, the first of them on the device.

        Raises:
            DataError: nothing more can be read, or a data worker ended or hangs.
        """
        if self._ahead is None:
            self.read_ahead()
        ahead, self._ahead = self._ahead, None
        if isinstance(ahead, Exception):
            raise ahead
        return ahead or []

    def peek(self) -> Batch | None:
        """Return the first batch of the next step, which stays the next one; None if it cannot be read."""
        if self._ahead is None:
            self.read_ahead()
        return self._ahead[0] if isinstance(self._ahead, list) else None

    def read_ahead(self) -> None:
        """Read the batches of the next step. An error is raised by `next`: this step is logged and saved before."""
        started = time.monotonic()
        try:
            batches = [self._read() for _ in range(self._number)]
            self._ahead = [batches[0].to(self._device), *batches[1:]]
        except Exception as error:
            self._ahead = error
        self._speed.waited += time.monotonic() - started

    def close(self) -> None:
        """End the data workers. They ignore SIGTERM, so one that hangs would keep this process from ending."""
        self._kill_workers()
        self._batches = iter(())

    def _read(self) -> Batch:
        if not self._has_workers:
            return next(self._batches)
        timer = threading.Timer(min(self._patience, threading.TIMEOUT_MAX), self._give_up)
        timer.daemon = True
        timer.start()
        try:
            if self._workers is not None:
                return next(self._batches)
            self._others = set(multiprocessing.active_children())
            with inherited_block():
                first = next(self._batches)
            self._workers = self._started()
        except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: ended while it handed over a batch
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            if self._hangs:
                raise DataError(
                    f"the data workers delivered nothing for {self._patience:.0f} s and were ended; check the disk "
                    "of the data, or raise run.collective_timeout_seconds"
                ) from error
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"a data worker ended unexpectedly ({reason}), as it does when memory runs out; "
                "lower run.num_workers, then continue with --options run.resume=true"
            ) from error
        finally:
            timer.cancel()
        return first

    def _started(self) -> list[BaseProcess]:
        return [child for child in multiprocessing.active_children() if child not in self._others]

    def _give_up(self) -> None:
        self._hangs = True
        self._kill_workers()

    def _kill_workers(self) -> None:
        if self._has_workers:
            for worker in self._started() if self._workers is None else self._workers:
                worker.kill()


def build_sources(parts: Mapping[str, Component]) -> dict[str, Source]:
    """Build data sets in the order of their names, which checks that they are there and can be read.

    Raises:
        DataError: a set is missing, empty or damaged.
    """
    return {name: parts[name].build(name=name) for name in sorted(parts)}


def training_batches(
    run: RunConfig,
    number: int,
    loaded: LoadedModel,
    sources: Mapping[str, Source],
    images: ImageReader,
    accelerator: Accelerator,
    state: TrainingState,
) -> StepBatches:
    """Return this rank's part of the training data, `number` batches a step, from where `state` continues."""
    plan = StreamPlan(
        seed=run.seed,
        batch_size=run.batch_size_per_rank,
        pad_id=loaded.conversation.tokenizer.filler_id,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=run.num_workers,
        pin_memory=copies_from_pinned_memory(accelerator.device),
        positions=dict(state.positions),
        given=dict(state.given),
        group=run.group_by_length,
        pack=run.pack,
        few_widths=run.compile,
        consumed=state.progress.batches,
    )
    loader = build_loader(Mixture(sources), loaded.conversation, images, plan)
    # Before the other ranks give up waiting for this one.
    patience = 0.8 * run.collective_timeout_seconds
    return StepBatches(loader, number, accelerator.device, state.speed, patience)


def validation_batches(
    run: RunConfig, loaded: LoadedModel, sources: Mapping[str, Source], images: ImageReader
) -> list[Batch]:
    """Return the batches of every validation, none without a validation set."""
    size = max(2, run.batch_size_per_rank)  # a single sample has no other image to swap with
    found = first_batches(loaded.conversation, images, sources, run.validation_samples, size) if sources else ()
    batches = list(found)
    for what in ("skipped", "altered"):
        counts: Counter[str] = Counter()
        for batch in batches:
            counts.update(batch.skipped if what == "skipped" else batch.altered)
        if counts:
            _log.warning("datasets.validation: samples %s: %s", what, ", ".join(f"{c}: {n}" for c, n in counts.items()))
    return batches


def first_batches(
    conversation: ConversationEncoder, images: ImageReader, sources: Mapping[str, Source], samples: int, size: int
) -> Iterator[Batch]:
    """Yield the first samples of the sources, in order, `size` at a time: the same on every rank."""
    pad_id = conversation.tokenizer.filler_id
    return fixed_batches(sources, conversation, images, samples=samples, batch_size=size, pad_id=pad_id)
