"""What every reading process does first: one thread, and an end with its run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import torch


def start_worker(worker: int) -> None:
    """Start a worker that ends with its run; one of a run killed by force would wait for it forever.

    torch's workers watch the process they were forked from, and that is the fork server, which lives as long as they.
    """
    if hasattr(signal, "pthread_sigmask"):  # signals to the process group are for the run, which ends its workers
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
