"""From rows to scores with intervals: for each task, each set of images, each kind of question.

Input: the head and the rows of an answer file. Output: `Report`, as text, JSON, Markdown and LaTeX.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.errors import DataError
from minigpt4.evaluation.answers import Row, read_answers
from minigpt4.evaluation.question import BLANK, NONE, OWN, SHUFFLED
from minigpt4.evaluation.statistics import DETECTABLE, Statistic, clusters, intervals
from minigpt4.registry import SCORERS

SETS = {OWN: "own images", SHUFFLED: "images of other questions", BLANK: "a blank image", NONE: "no image"}
ALL = "all"


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        task: name of the task.
        images: what was shown; see `minigpt4.evaluation.question.with_images`.
        kind: kind of question, or `all`.
        name: of the score.
        unit: `%` if `value` is a fraction, shown times 100.
        value: the score.
        low: lower limit of its 95 % interval: bootstrap, clustered by image.
        high: upper limit.
        questions: number of questions.
        num_images: number of their images.
        detectable: the difference to another model, on other questions, that is found in 80 % of all cases.
    """

    task: str
    images: str
    kind: str
    name: str
    unit: str
    value: float
    low: float
    high: float
    questions: int
    num_images: int
    detectable: float

    def shown(self, what: str = "value") -> str:
        """Return one of its numbers as text."""
        return shown_number(getattr(self, what), self.unit)


def shown_number(number: float, unit: str) -> str:
    """Return a score as text: percent with one decimal, others with three digits; `-` if it is undefined."""
    if math.isnan(number):
        return "-"
    return f"{100 * number:.1f}" if unit == "%" else f"{number:.3f}" if abs(number) < 10 else f"{number:.1f}"


@dataclass
class Report:
    """All scores of one answer file.

    Attributes:
        head: the first line of the file: what made the answers.
        scores: in the order of tasks, sets of images and kinds; `all` first.
        left_out: by task and set of images, the number of questions whose image cannot be read.
    """

    head: Row
    scores: list[Score] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def value(self, task: str, name: str, images: str = OWN, kind: str = ALL) -> float:
        """Return one score; KeyError if there is none."""
        for score in self.scores:
            if (score.task, score.images, score.kind, score.name) == (task, images, kind, name):
                return score.value
        raise KeyError((task, images, kind, name))

    def groups(self) -> Iterator[tuple[str, str, list[Score]]]:
        """Yield (task, set of images, scores)."""
        for task, images in dict.fromkeys((score.task, score.images) for score in self.scores):
            yield task, images, [s for s in self.scores if (s.task, s.images) == (task, images)]

    def table(self) -> str:
        """Return the scores as lines of text."""
        lines = []
        for task, images, scores in self.groups():
            lines.append(f"{task}, {SETS[images]}: {scores[0].questions} questions, {scores[0].num_images} images")
            if number := self.left_out.get(f"{task}/{images}"):
                lines.append(f"  {number} questions are left out: their images cannot be read")
            for score in scores:
                label = score.name if score.kind == ALL else f"  {score.kind}: {score.name}"
                unit = f" {score.unit}" if score.unit else ""
                interval = f"95 % interval {score.shown('low')} to {score.shown('high')}"
                lines.append(f"  {label:<30}{score.shown():>7}{unit:<3} {interval}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return head and scores as JSON; an undefined number is null."""
        scores = [
            {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in asdict(score).items()}
            for score in self.scores
        ]
        return json.dumps({"made_by": self.head, "scores": scores, "left_out": self.left_out}, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Return one table for each task and set of images."""
        parts = []
        for task, images, scores in self.groups():
            first = scores[0]
            rows = [[s.kind, s.name, *map(s.shown, ("value", "low", "high")), str(s.questions)] for s in scores]
            parts.append(f"### {task}, {SETS[images]} ({first.questions} questions, {first.num_images} images)\n\n")
            parts.append(markdown(["questions", "score", "value", "95 % low", "high", "number"], rows) + "\n")
        return "".join(parts) + self._foot() + "\n"

    def to_latex(self) -> str:
        """Return one table, in booktabs style, of the scores over all kinds."""
        rows = [
            [s.task, SETS[s.images], s.name, s.shown(), f"[{s.shown('low')}, {s.shown('high')}]"]
            for s in self.scores
            if s.kind == ALL
        ]
        return latex(["task", "images", "score", "value", "95 \\% interval"], rows)

    def _foot(self) -> str:
        own = [s for s in self.scores if s.kind == ALL and not math.isnan(s.detectable)]
        found = "; ".join(f"{s.task}, {SETS[s.images]}, {s.name}: {s.shown('detectable')}" for s in own)
        return (
            "Intervals: bootstrap over images. Smallest difference to another model on other questions that is found "
            f"in 80 % of all cases (5 %, two-sided): {found or 'unknown'}."
        )

    def write(self, file: Path) -> list[Path]:
        """Write `.json`, `.md` and `.tex` next to an answer file, and return their paths."""
        made = {".json": self.to_json(), ".md": self.to_markdown(), ".tex": self.to_latex()}
        paths = []
        for suffix, text in made.items():
            path = file.with_suffix(suffix)
            new = path.with_name(path.name + ".new")
            new.write_text(text, encoding="utf-8")
            new.replace(path)
            paths.append(path)
        return paths


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a LaTeX tabular with booktabs rules; cells are escaped, the head is not."""
    body = "".join(" & ".join(map(_escaped, row)) + " \\\\\n" for row in rows)
    columns = "l" * len(head)
    top = f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n" + " & ".join(head) + " \\\\\n\\midrule\n"
    return top + body + "\\bottomrule\n\\end{tabular}\n"


def _escaped(cell: str) -> str:
    return "".join(f"\\{c}" if c in "%_&#$" else c for c in cell)


def scorer_of(head: Mapping[str, Any], task: str) -> str:
    """Return the name of a task's scorer, from the head of an answer file."""
    return str(head["tasks"][task]["scorer"])


def statistics_of(scorer: str, rows: Sequence[Row], task: str) -> list[Statistic]:
    """Return the statistics of the rows of a task.

    Raises:
        DataError: a row lacks what the scorer reads.
    """
    try:
        found: list[Statistic] = SCORERS.get(scorer)(rows)
    except KeyError as error:
        raise DataError(f"task {task!r}: the scorer {scorer!r} reads {error}, which a row does not have") from error
    return found


def report_of(head: Row, rows: Sequence[Row], seed: int = 0) -> Report:
    """Score the rows of an answer file.

    Raises:
        DataError: a row lacks what its scorer reads.
    """
    report = Report(head)
    for task, images in dict.fromkeys((row["task"], row["images"]) for row in rows):
        group = [row for row in rows if (row["task"], row["images"]) == (task, images)]
        read = [row for row in group if "error" not in row]
        if len(read) < len(group):
            report.left_out[f"{task}/{images}"] = len(group) - len(read)
        if not read:
            continue
        whole = statistics_of(scorer_of(head, task), read, task)
        kinds = sorted({row.get("kind", "") for row in read} - {""})
        cluster = clusters([row["image"] for row in read])
        for kind in [ALL, *(kinds if len(kinds) > 1 else [])]:
            chosen = np.array([kind in (ALL, row.get("kind")) for row in read])
            some = [statistic.of(chosen) for statistic in whole]
            own = np.unique(cluster[chosen], return_inverse=True)[1].astype(np.int64)
            for statistic, (low, high) in zip(some, intervals(some, own, seed), strict=True):
                report.scores.append(
                    Score(
                        task=task,
                        images=images,
                        kind=kind,
                        name=statistic.name,
                        unit=statistic.unit,
                        value=statistic.value(),
                        low=low,
                        high=high,
                        questions=int(chosen.sum()),
                        num_images=int(own.max()) + 1,
                        # the interval is 3.92 standard errors wide; two models on different questions differ more
                        detectable=DETECTABLE * math.sqrt(2) * (high - low) / (2 * 1.959964),
                    )
                )
    return report


def rescore(file: Path) -> Report:
    """Score an answer file again, without model and data.

    Raises:
        DataError: it cannot be read, or was made by another version.
    """
    head, rows = read_answers(file)
    return report_of(head, rows, int(head.get("seed", 0)))
