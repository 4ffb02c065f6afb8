"""Two models on the same questions: a paired test of every score.

Input: two answer files of the same tasks and data. Output: `Comparison`, as text, JSON, Markdown and LaTeX.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minigpt4.errors import DataError
from minigpt4.evaluation.answers import Row, key_of, read_answers
from minigpt4.evaluation.question import SHUFFLED
from minigpt4.evaluation.report import SETS, latex, markdown, scorer_of, shown_number, statistics_of
from minigpt4.evaluation.statistics import Difference, clusters, compare

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """One score of both models, of one task and one set of images."""

    task: str
    images: str
    difference: Difference

    def cells(self) -> list[str]:
        """Return the line as the cells of a table."""
        found = self.difference
        a, b, low, high, detectable = (
            shown_number(number, found.unit)
            for number in (found.first, found.second, found.low, found.high, found.detectable)
        )
        name = f"{found.name} {found.unit}".strip()
        return [self.task, SETS[self.images], name, a, b, f"{low} to {high}", f"{found.p_value:.4f}", detectable]


HEAD = ["task", "images", "score", "A", "B", "B - A, 95 % interval", "p", "detectable"]


@dataclass
class Comparison:
    """All scores of two answer files.

    Attributes:
        heads: the first lines of both files.
        lines: one per task, set of images and score.
        left_out: rows that only one file has, or whose image could not be read.
    """

    heads: tuple[Row, Row]
    lines: list[Line] = field(default_factory=list)
    left_out: int = 0

    def table(self) -> str:
        """Return the comparison as aligned lines of text."""
        rows = [HEAD, *(line.cells() for line in self.lines)]
        widths = [max(len(row[n]) for row in rows) for n in range(len(HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self._notes()])

    def to_json(self) -> str:
        """Return heads and lines as JSON; an undefined number is null."""
        lines = [{"task": line.task, "images": line.images, **asdict(line.difference)} for line in self.lines]
        known = [
            {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in line.items()} for line in lines
        ]
        return json.dumps(
            {"a": self.heads[0], "b": self.heads[1], "scores": known, "left_out": self.left_out}, indent=1
        )

    def to_markdown(self) -> str:
        """Return one table, and what its columns mean."""
        return markdown(HEAD, [line.cells() for line in self.lines]) + "\n" + "\n".join(self._notes()) + "\n"

    def to_latex(self) -> str:
        """Return one table in booktabs style."""
        return latex([name.replace("%", "\\%") for name in HEAD], [line.cells() for line in self.lines])

    def write(self, stem: Path) -> list[Path]:
        """Write `.json`, `.md` and `.tex`, and return their paths."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        made = {".json": self.to_json() + "\n", ".md": self.to_markdown(), ".tex": self.to_latex()}
        paths = []
        for suffix, text in made.items():
            path = stem.with_name(stem.name + suffix)
            path.write_text(text, encoding="utf-8")
            paths.append(path)
        return paths

    def _notes(self) -> list[str]:
        notes = [
            "p: two-sided permutation test; the answers of A and B are swapped at random, image by image. detectable: "
            "the difference that this number of questions finds in 80 % of all cases (5 %, two-sided)."
        ]
        if self.left_out:
            notes.append(
                f"{self.left_out} answers are left out: only one model has them, or their image is unreadable."
            )
        return notes


def compare_files(first: Path, second: Path) -> Comparison:
    """Compare two answer files.

    Raises:
        DataError: one cannot be read, or they answer other questions.
    """
    (head_a, rows_a), (head_b, rows_b) = read_answers(first), read_answers(second)
    tasks = [task for task in head_a["tasks"] if task in head_b["tasks"]]
    if not tasks:
        raise DataError(
            f"{first} and {second} have no task in common: {list(head_a['tasks'])}, {list(head_b['tasks'])}"
        )
    for task in tasks:
        if head_a["data"][task] != head_b["data"][task] or scorer_of(head_a, task) != scorer_of(head_b, task):
            raise DataError(f"{second}: task {task!r} has other questions, images or another scorer than in {first}")
    found = Comparison((head_a, head_b))
    read_b = {key_of(row): row for row in rows_b if "error" not in row and row["task"] in tasks}
    pairs = [
        (row, read_b[key])
        for row in rows_a
        if "error" not in row and row["task"] in tasks and (key := key_of(row)) in read_b
    ]
    for a, b in pairs:
        if a["images"] == SHUFFLED and a.get("shown") != b.get("shown"):
            raise DataError(f"{second}: the shuffled images are others than in {first}; use one evaluation.seed")
    found.left_out = len(rows_a) + len(rows_b) - 2 * len(pairs)
    for task, images in dict.fromkeys((a["task"], a["images"]) for a, _ in pairs):
        group = [(a, b) for a, b in pairs if (a["task"], a["images"]) == (task, images)]
        cluster = clusters([a["image"] for a, _ in group])
        ours = statistics_of(scorer_of(head_a, task), [a for a, _ in group], task)
        theirs = statistics_of(scorer_of(head_b, task), [b for _, b in group], task)
        for one, other in zip(ours, theirs, strict=True):
            difference = compare(one, other, cluster, int(head_a.get("seed", 0)))
            found.lines.append(Line(task, images, difference))
    return found
