"""How many cores of this machine are free, so that a short job does not wait for those that others use.

Two samples of the system's counters are compared: one from the start of the process, one from when threads are chosen.
With more threads than free cores, the threads of a matrix product wait for one another, and it takes several times as
long as with one.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

MIN_SECONDS = 0.2
"""A shorter time says too little."""


@dataclass(frozen=True)
class CpuTimes:
    """Counters of the machine and of this process.

    Attributes:
        idle: seconds that cores have been idle, all cores together.
        own: seconds of computing of this process.
        at: seconds of the monotonic clock.
    """

    idle: float
    own: float
    at: float


def cpu_times(stat: Path = Path("/proc/stat")) -> CpuTimes | None:
    """Return the counters at this moment; None where the system does not have them."""
    try:
        fields = stat.read_text(encoding="ascii").split("\n", 1)[0].split()
        idle = (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    own = os.times()
    return CpuTimes(idle, own.user + own.system, time.monotonic())


def usable_cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_cores(before: CpuTimes | None, after: CpuTimes | None, usable: int) -> int | None:
    """Return how many of `usable` cores were free between two samples: idle, or used by this process; at least 1.

    None if that is not known.
    """
    if before is None or after is None or after.at - before.at < MIN_SECONDS:
        return None
    free = (after.idle - before.idle + after.own - before.own) / (after.at - before.at)
    return max(1, min(usable, round(free)))
