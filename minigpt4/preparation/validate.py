"""`data validate`: read a data set as training does, and say what is in it and what is wrong with it.

Input: data sets, and the config whose tokenizer and template are used. Output: a `SetReport` for each. Rows are
streamed; what is kept of them is bounded, except for the names and hashes of images that are opened.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from typing import BinaryIO, Generic, TypeVar

from tqdm import tqdm

from minigpt4.conversation.dialogue import Dialogue
from minigpt4.conversation.encoder import require_text
from minigpt4.datasets.conversations import Conversations
from minigpt4.datasets.source import Example, sample_error
from minigpt4.errors import DataError
from minigpt4.preparation.data_sets import DataSet, Entry, PlainRow
from minigpt4.preparation.duplicates import Repeats
from minigpt4.preparation.findings import Findings
from minigpt4.preparation.picture_checks import PictureChecks
from minigpt4.preparation.text_checks import language, repeated_sentence
from minigpt4.preparation.token_checks import Part, TokenChecks
from minigpt4.processors.image import MAX_PIXELS, open_image
from minigpt4.reports.pictures import thumbnail

Kept = TypeVar("Kept")
SAMPLED = 2000
"""Rows whose text is encoded and looked at closely, drawn from all rows."""
SHOWN_IMAGES = 60
SHOWN_SAMPLES = 6
COMMON_ANSWER = 0.02
"""Share of the rows above which an answer that several rows give is reported."""
MIN_COMMON = 5
BIN = 8
"""Step of the lengths that are counted, in characters."""


@dataclass(frozen=True)
class ShownSample:
    """A sample as the page shows it: where it stands, its image element, its text, and its parts if encoded."""

    place: str
    image: str
    text: str
    parts: tuple[Part, ...] = ()


@dataclass
class SetReport:
    """What was found in one data set.

    Attributes:
        name, kind, place, note: see `DataSet`.
        findings: the problems.
        rows: number of rows that were read.
        usable: rows that training can use.
        lengths: rows by the number of characters of their answers, in steps of 8.
        turns: rows by their number of turns.
        images_per_row: rows by their number of images.
        pictures: what the images are like.
        tokens: what the sampled rows are in tokens, None without a tokenizer.
        languages: sampled rows by the likely language of their answers.
        sampled: number of sampled rows.
        shown: samples for the page.
        fatal: why training would not start with this set, empty otherwise.
    """

    name: str
    kind: str
    place: str
    note: str
    findings: Findings
    rows: int = 0
    usable: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    images_per_row: Counter[int] = field(default_factory=Counter)
    pictures: PictureChecks | None = None
    tokens: TokenChecks | None = None
    languages: Counter[str] = field(default_factory=Counter)
    sampled: int = 0
    shown: list[ShownSample] = field(default_factory=list)
    fatal: str = ""

    @property
    def num_errors(self) -> int:
        """Number of errors."""
        return sum(self.findings.errors.values())


@dataclass(frozen=True)
class Limits:
    """How closely a set is looked at.

    Attributes:
        max_images: most images that are opened; None opens all.
        max_pixels: pixels above which an image is refused, as in training.
        sampled: rows that are encoded.
    """

    max_images: int | None = None
    max_pixels: int = MAX_PIXELS
    sampled: int = SAMPLED


class Validation:
    """Reads one data set."""

    def __init__(
        self, data: DataSet, limits: Limits, tokens: TokenChecks | None = None, listing: BinaryIO | None = None
    ) -> None:
        """Check `data`, with the tokenizer of `tokens`; every problem is also written to `listing`."""
        findings = Findings(data.name, listing)
        pictures = PictureChecks(findings, limits.max_images, limits.max_pixels)
        self.data = data
        self.limits = limits
        self.report = SetReport(data.name, data.kind, data.place, data.note, findings, pictures=pictures, tokens=tokens)
        self._pictures = pictures
        self._tokens = tokens
        self._rows = Repeats()
        self._answers = Repeats()
        self._annotations_only = limits.max_images == 0
        self._short = 1_000_000 if tokens is None else tokens.always_fit
        self._texts = _Reservoir[Example | PlainRow](limits.sampled)
        self._images = _Reservoir[tuple[int, Example]](SHOWN_IMAGES)

    def run(self) -> SetReport:
        """Read every row once, and return the report."""
        report, findings = self.report, self.report.findings
        entries = self.data.entries()
        with tqdm(desc=self.data.name, unit="row", disable=None) as bar:
            try:
                for number, entry in entries:
                    report.rows += 1
                    self._check(number, entry)
                    if not report.rows % 1000:
                        bar.update(1000)
                for fault in self.data.faults():
                    findings.error(fault)
            except DataError as error:
                findings.error(error)
                report.fatal = str(error)
            bar.update(report.rows - bar.n)
        self._pictures.finish()
        self._repetition()
        self._look_closely()
        if isinstance(self.data.source, Conversations):
            for line in self.data.source.unread:
                findings.warning("unread key", line)
        self._rows.close()
        self._answers.close()
        return report

    def _check(self, number: int, entry: Entry) -> None:
        """Count one row; what is wrong with it is one error."""
        report = self.report
        if type(entry) is PlainRow:
            if self._annotations_only and len(entry.caption) < self._short:  # nothing else can be wrong with it
                caption = entry.caption
                report.usable += 1
                report.lengths[len(caption) // BIN] += 1
                report.turns[1] += 1
                report.images_per_row[1] += 1
                self._rows.add(number, (entry.image, caption))
                self._answers.add(number, caption)
                self._texts.offer(entry)
                return
            entry = self.data.example(entry)
        try:
            if isinstance(entry, DataError):
                raise entry
            self._check_example(number, entry)  # type: ignore[arg-type]
        except Exception as error:
            place = entry.id if isinstance(entry, Example) else self.data.name
            found = sample_error(error, place)
            named = found if place in str(found) else DataError(f"{place}: {found}", cause=found.cause)
            report.findings.error(found if isinstance(entry, DataError) else named)

    def _check_example(self, number: int, example: Example) -> None:
        report, dialogue, num_images = self.report, example.dialogue, len(example.images)
        for image_number, image in enumerate(example.images, start=1):
            self._pictures.check(image, f"{example.id}, image {image_number}")
        if self._tokens is None:
            require_text(dialogue, example.id)
        else:
            if not self._annotations_only:
                self._tokens.add(dialogue, num_images, example.id)
            elif len(dialogue.turns) > 1 or self._tokens.may_be_too_long(dialogue, num_images):
                self._tokens.encoder.encode_dialogue(dialogue, num_images=num_images, sample_id=example.id)
        answers = "\n".join(turn.answer or "" for turn in dialogue.turns)
        report.usable += 1
        report.lengths[len(answers) // BIN] += 1
        report.turns[len(dialogue.turns)] += 1
        report.images_per_row[num_images] += 1
        self._rows.add(number, (example.images, answers))
        self._answers.add(number, answers)
        self._texts.offer(_without_contents(example))
        if example.images:
            self._images.offer((number, example))
        for kind, count in example.altered.items():
            report.findings.warning(kind, example.id, count)

    def _repetition(self) -> None:
        findings, unit = self.report.findings, "line" if self.data.place.endswith(".jsonl") else "row"
        for group in self._rows.groups():
            findings.warning("repeated row", f"{self.data.place}: {unit}s {_numbers(group)} are equal", len(group) - 1)
        for group in self._answers.groups():
            if len(group) >= max(MIN_COMMON, COMMON_ANSWER * self.report.usable):
                findings.warning(
                    "common answer",
                    f"{self.data.place}: {len(group):,} rows have one answer: {unit}s {_numbers(group)}",
                    1,
                )

    def _look_closely(self) -> None:
        """Encode the sampled rows, guess their language, and prepare those that are shown."""
        report, findings = self.report, self.report.findings
        texts = [self._whole(entry) for entry in self._texts.kept]
        for example in texts:
            answers = "\n".join(turn.answer or "" for turn in example.dialogue.turns)
            report.languages[language(answers)] += 1
            sentence = next(filter(None, (repeated_sentence(turn.answer or "") for turn in example.dialogue.turns)), "")
            if sentence:
                findings.warning("repetition", f"{example.id}: the answer repeats {sentence[:80]!r}")
            if self._tokens is not None and self._annotations_only:
                with suppress(DataError):  # it was found when the row was read
                    self._tokens.add(example.dialogue, len(example.images), example.id)
        report.sampled = len(texts)
        shown = [example for _, example in sorted(self._images.kept, key=itemgetter(0))] or texts[:SHOWN_SAMPLES]
        for number, example in enumerate(shown):
            report.shown.append(self._shown(example, with_parts=number < SHOWN_SAMPLES))

    def _shown(self, example: Example, with_parts: bool) -> ShownSample:
        image = ""
        if example.images:
            try:
                image = thumbnail(open_image(example.images[0], example.id, self.limits.max_pixels), example.id)
            except DataError:
                image = ""
        parts: tuple[Part, ...] = ()
        if with_parts and self._tokens is not None:
            try:
                parts = tuple(self._tokens.parts(example.dialogue, len(example.images), example.id))
            except DataError:
                parts = ()
        text = " / ".join(turn.answer or "" for turn in example.dialogue.turns)
        return ShownSample(example.id, image, text, parts)

    def _whole(self, entry: Example | PlainRow) -> Example:
        return self.data.example(entry) if isinstance(entry, PlainRow) else entry


class _Reservoir(Generic[Kept]):
    """Keeps `size` of any number of things, each with equal probability; the same ones each time."""

    def __init__(self, size: int) -> None:
        self.kept: list[Kept] = []
        self._size = size
        self._offered = 0
        self._random = random.Random(0).random

    def offer(self, thing: Kept) -> None:
        self._offered += 1
        if len(self.kept) < self._size:
            self.kept.append(thing)
            return
        place = int(self._random() * self._offered)
        if place < self._size:
            self.kept[place] = thing


def validate(
    sets: Iterable[DataSet | tuple[str, str, DataError]],
    limits: Limits,
    tokens: TokenChecks | None = None,
    listing: BinaryIO | None = None,
) -> list[SetReport]:
    """Return the report of each data set.

    Args:
        sets: data sets; or the name and kind of one that cannot be built, and why.
        limits: how closely they are looked at.
        tokens: encodes samples as training does; None if there is no tokenizer.
        listing: gets every problem as a line of JSON.
    """
    reports = []
    for data in sets:
        if isinstance(data, DataSet):
            reports.append(Validation(data, limits, tokens.anew() if tokens else None, listing).run())
        else:
            name, kind, error = data
            report = SetReport(name, kind, "", "", Findings(name, listing), fatal=str(error))
            report.findings.error(error)
            reports.append(report)
    return reports


def drawn_images(data: DataSet, count: int) -> list[ShownSample]:
    """Return `count` rows with an image, drawn from all usable rows, in their order.

    Raises:
        DataError: the set cannot be read.
    """
    drawn = _Reservoir[tuple[int, Example | PlainRow]](count)
    with tqdm(data.entries(), desc=data.name, unit="row", disable=None) as entries:
        for number, entry in entries:
            if isinstance(entry, PlainRow) or (isinstance(entry, Example) and entry.images):
                drawn.offer((number, entry))
    shown = []
    for _, entry in sorted(drawn.kept, key=itemgetter(0)):
        example = data.example(entry) if isinstance(entry, PlainRow) else entry
        text = " / ".join(turn.answer or "" for turn in example.dialogue.turns)
        for image in example.images:
            try:
                picture = thumbnail(open_image(image, example.id), example.id)
            except DataError as error:
                picture, text = "", f"{text} ({error})"
            shown.append(ShownSample(example.id, picture, text))
    return shown


def _without_contents(example: Example) -> Example:
    """Return an example without the contents of image files: many are kept."""
    images = tuple(b"" if isinstance(image, bytes) else image for image in example.images)
    return Example(example.id, images, Dialogue(example.dialogue.turns, example.dialogue.system), example.altered)


def _numbers(group: Sequence[int]) -> str:
    return ", ".join(map(str, group[:5])) + (f" and {len(group) - 5:,} more" if len(group) > 5 else "")
