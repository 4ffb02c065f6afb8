"""SIGTERM (SLURM, preemption) and Ctrl-C while a run trains: the step is finished and saved, then the run ends.

Input: signals. Output: a number that the ranks add up at the end of each step, so that all stop at the same one.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

_log = logging.getLogger(__name__)

_CODES = {signal.SIGINT: 1.0, signal.SIGTERM: 4096.0}
"""What a rank adds to the sum over the ranks: one SIGTERM outweighs 4,095 times Ctrl-C; exact in float32."""
REPEATED_WITHIN = 1.0
"""Seconds in which a second signal counts as the first: torchrun passes on what the whole process group received."""

LAUNCHER_EVERY = 1.0
"""Seconds between two looks at whether the launcher is still there."""


class StopRequest:
    """The signal that asks a run to stop, on this rank (`signal`) and agreed on by all ranks (`agreed`)."""

    def __init__(self) -> None:
        self.signal = 0
        self.agreed = 0

    @property
    def code(self) -> float:
        """This rank's part of the sum that `agree` reads."""
        return _CODES.get(signal.Signals(self.signal), 0.0) if self.signal else 0.0

    def agree(self, total: float) -> None:
        """Take the sum of `code` over the ranks, which is the same on each of them."""
        self.agreed = next((s for s in (signal.SIGTERM, signal.SIGINT) if total >= _CODES[s]), 0)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note SIGTERM and SIGINT while the block runs; a second signal ends the process at once.

        A thread reads the signals from a pipe, since Python runs no signal handler while the main thread waits for
        another rank. Outside the main thread, where Python allows no handlers, nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, _do_nothing) for number in _CODES}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(writing)  # ends the thread

    def _read(self, pipe: int) -> None:
        first = 0.0
        while content := os.read(pipe, 1):
            number = content[0]
            if number not in _CODES:
                continue
            if not self.signal:
                self.signal, first = number, time.monotonic()
                name = signal.Signals(number).name
                _log.info("%s: the run stops after this step and saves it; a second signal ends it at once", name)
            elif time.monotonic() - first > REPEATED_WITHIN:
                os._exit(128 + number)
        os.close(pipe)


def end_with_launcher() -> None:
    """Send this process SIGTERM when torchrun, which started it, has ended; do nothing if something else started it.

    A launcher that was killed (SIGKILL, out of memory) cannot end its ranks: they would train on and hold the output
    folder and the GPUs.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform != "win32":
        threading.Thread(target=_watch_launcher, args=(os.getppid(),), daemon=True).start()


def _watch_launcher(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(LAUNCHER_EVERY)
    _log.warning("the launcher (process %d) has ended: this rank ends too", launcher)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def inherited_block() -> Iterator[None]:
    """Block SIGTERM and SIGINT in this thread; processes started in the block keep them blocked.

    Data workers are started here: a signal to the whole process group must not end them before the step is finished.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it unblocks these signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _CODES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _do_nothing(number: int, frame: object) -> None:
    """Handle a signal that the thread reads from the pipe."""
