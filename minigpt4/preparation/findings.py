"""What `data validate` finds: problems counted by cause, the first of each kept, all of them written to a file."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

from minigpt4.errors import DataError

Level = Literal["error", "warning"]
KEPT = 100
"""Problems of one cause that a report lists; more of them are counted."""


@dataclass
class Findings:
    """The problems of one data set.

    Attributes:
        errors: number by cause: training skips or refuses these.
        warnings: number by cause: training uses these as they are.
        first: the messages of the first problems of each level and cause.
        listing: a file that gets every problem as a line of JSON.
        name: of the data set, for the listing.
    """

    name: str = ""
    listing: BinaryIO | None = None
    errors: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    first: dict[tuple[Level, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    def error(self, error: DataError) -> None:
        """Count what training cannot use."""
        self.add("error", error.cause, str(error))

    def warning(self, cause: str, message: str, count: int = 1) -> None:
        """Count `count` samples that are likely not what the user means; one message stands for all of them."""
        self.add("warning", cause, message, count)

    def add(self, level: Level, cause: str, message: str, count: int = 1) -> None:
        """Count a problem, and keep its message if it is one of the first."""
        (self.errors if level == "error" else self.warnings)[cause] += count
        kept = self.first[level, cause]
        if len(kept) < KEPT:
            kept.append(message)
        if self.listing is not None:
            line = {"set": self.name, "level": level, "cause": cause, "message": message}
            self.listing.write(json.dumps(line).encode() + b"\n")
