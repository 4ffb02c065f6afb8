"""A handler that keeps a log readable when the same error occurs thousands of times."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TextIO

WINDOW_SECONDS = 60.0
_MAX_KINDS = 1000


@dataclass
class _Kind:
    """Records that begin with the same line."""

    since: float
    count: int = 0


class CountingHandler(logging.StreamHandler[TextIO]):
    """Shows, of equal warnings and errors within a minute, the 1st, the 10th, the 100th ... with their number.

    Two are equal if logger, level, first line and type of exception are.
    """

    def __init__(self) -> None:
        """Write to standard error."""
        super().__init__()
        self._kinds: dict[tuple[object, ...], _Kind] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, or only count it."""
        if record.levelno < logging.WARNING:
            super().emit(record)
            return
        line = record.getMessage().partition("\n")[0]
        kind = self._kind((record.name, record.levelno, line, record.exc_info and record.exc_info[0]))
        kind.count += 1
        if kind.count == 1:
            super().emit(record)
        elif str(kind.count).strip("0") == "1":
            counted = logging.makeLogRecord(record.__dict__)
            counted.msg, counted.args = "%s (%d times in %.0f s)", (line, kind.count, time.monotonic() - kind.since)
            counted.exc_info = counted.exc_text = counted.stack_info = None
            super().emit(counted)

    def _kind(self, key: tuple[object, ...]) -> _Kind:
        now = time.monotonic()
        kind = self._kinds.get(key)
        if kind is None or now - kind.since > WINDOW_SECONDS:
            if len(self._kinds) >= _MAX_KINDS:
                self._kinds.clear()
            kind = self._kinds[key] = _Kind(now)
        return kind
