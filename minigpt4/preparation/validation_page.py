"""The pages of `data validate` and `data preview`, and the summary on the terminal.

Input: reports of data sets. Output: one self-contained HTML page, or lines of text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from minigpt4.conversation.encoder import ANSWER_CUT
from minigpt4.preparation.findings import KEPT, Findings, Level
from minigpt4.preparation.token_checks import Part, TokenChecks
from minigpt4.preparation.validate import BIN, SetReport, ShownSample
from minigpt4.reports.page import Page, details, escape, paragraph, subheading, table, tiles
from minigpt4.reports.pictures import contact_sheet
from minigpt4.reports.plots import bars, histogram

MEANING = {
    "blank image": "images of one colour",
    "blurred image": "images with hardly any edges",
    "common answer": "answers that many rows share",
    "copied image": "files that are equal to another one",
    "dark image": "images that are nearly black",
    "near copy": "images that look like another one",
    "repeated row": "rows that are equal to an earlier one",
    "repetition": "answers that repeat a sentence",
    "thin image": "images whose sides differ by more than five to one",
    "tiny image": "images smaller than 32 pixels",
    "unread key": "keys of the rows that training does not read",
}
SHOWN_LINES = 5
"""Messages of one cause that are printed."""


def validation_page(reports: Sequence[SetReport], title: str, token_note: str = "") -> Page:
    """Return the page about data sets.

    Args:
        reports: one for each data set.
        title: of the page.
        token_note: why nothing is said about tokens, empty if something is.
    """
    errors = sum(report.num_errors for report in reports)
    verdict = "Training can use every row." if not errors else f"{errors:,} errors: training skips or refuses these."
    page = Page(title, verdict)
    if token_note:
        page.add(paragraph(token_note))
    for report in reports:
        page.add(*_set_parts(report), heading=f"{report.name} ({report.kind})")
    return page


def preview_page(samples: Sequence[tuple[str, Sequence[ShownSample]]], title: str) -> Page:
    """Return a page with nothing but the images of data sets and their texts."""
    page = Page(title, f"{sum(len(shown) for _, shown in samples)} images, drawn from all rows.")
    for name, shown in samples:
        page.add(_sheet(shown), heading=name)
    return page


def summary(report: SetReport) -> list[str]:
    """Return the lines that the terminal shows about a data set."""
    lines = [f"{report.name} ({report.kind}): {report.rows:,} rows, {report.usable:,} usable"]
    for level, counts in (("error", report.findings.errors), ("warning", report.findings.warnings)):
        for cause, count in counts.most_common():
            lines.append(f"  {level}: {cause}: {count:,}")
            first = report.findings.first[level, cause]  # type: ignore[index]
            lines += [f"    {message}" for message in first[: SHOWN_LINES if level == "error" else 1]]
    tokens = report.tokens
    if tokens is not None and tokens.count:
        lines.append(
            f"  tokens: {_range(tokens.rows)} per row, {_range(tokens.answers)} supervised; answers cut in "
            f"{_share(tokens)} of {tokens.count:,} rows"
        )
    pictures = report.pictures
    if pictures is not None and pictures.not_opened:
        lines.append(f"  images: {pictures.opened:,} opened, {pictures.not_opened:,} not")
    return [*lines, f"  note: {report.note}"] if report.note else lines


def _set_parts(report: SetReport) -> Iterator[str]:
    findings, pictures, tokens = report.findings, report.pictures, report.tokens
    warnings = sum(findings.warnings.values())
    figures: list[tuple[str, object, str]] = [
        ("rows", report.rows, ""),
        ("usable", report.usable, "good" if report.usable == report.rows else ""),
        ("errors", report.num_errors, "bad" if report.num_errors else "good"),
        ("warnings", warnings, "warn" if warnings else ""),
    ]
    if pictures is not None:
        figures.append(("images opened", pictures.opened, ""))
    if tokens is not None and tokens.count:
        figures.append(("rows with a cut answer", _share(tokens), "warn" if tokens.altered[ANSWER_CUT] else ""))
    yield f'<p class="soft">{escape(report.place)}</p>' if report.place else ""
    yield paragraph(report.note) if report.note else ""
    yield paragraph(f"Training would not start with this data set: {report.fatal}") if report.fatal else ""
    yield tiles(figures)
    yield from _problems(findings, "error")
    yield from _problems(findings, "warning")
    yield f'<div class="plots">{"".join(_plots(report))}</div>' if report.usable else ""
    if pictures is not None and pictures.not_opened:
        yield paragraph(f"{pictures.not_opened:,} images were not opened; --images says how many are.")
    if tokens is not None and tokens.is_assumed:
        yield paragraph(
            f"The settings do not say how many tokens an image becomes: {tokens.tokens_per_image} were assumed."
        )
    encoded = [sample for sample in report.shown if sample.parts]
    if encoded:
        yield subheading("Samples as the model is given them")
        yield '<p class="soft">The marked part is trained on; nothing else is.</p>'
        yield from map(_sample, encoded)
    if any(sample.image for sample in report.shown):
        yield subheading(f"{len(report.shown)} images, drawn from all rows")
        yield _sheet(report.shown)


def _problems(findings: Findings, level: Level) -> Iterator[str]:
    counts = findings.errors if level == "error" else findings.warnings
    for cause, count in counts.most_common():
        messages = findings.first[level, cause]
        more = f"the first {len(messages)} of" if len(messages) == KEPT and count > KEPT else ""
        meaning = MEANING.get(cause, cause)
        head = f"{level}: {meaning}: {more} {count:,}".replace("  ", " ")
        yield details(
            head,
            table(["place and reason"], [[message] for message in messages]),
            colour="bad" if level == "error" else "warn",
            is_open=level == "error",
        )


def _plots(report: SetReport) -> Iterator[str]:
    yield histogram(
        "Characters of the answers of a row",
        Counter({step * BIN: count for step, count in report.lengths.items()}),
        unit="characters",
    )
    tokens = report.tokens
    if tokens is not None and tokens.count:
        settings = tokens.encoder.settings
        yield histogram(f"Tokens of a row, image included ({tokens.count:,} rows)", tokens.rows, unit="tokens")
        yield histogram(
            "Supervised tokens of a row",
            tokens.answers,
            unit="tokens",
            marks=[(settings.max_answer_tokens, f"max_answer_tokens {settings.max_answer_tokens}")],
        )
    if len(report.turns) > 1:
        yield bars("Turns of a row", ((str(turns), count) for turns, count in sorted(report.turns.items())))
    if set(report.images_per_row) - {1}:
        yield bars("Images of a row", ((str(n), count) for n, count in sorted(report.images_per_row.items())))
    if report.languages:
        yield bars(f"Language of the answers, guessed ({report.sampled:,} rows)", report.languages.most_common(8))
    pictures = report.pictures
    if pictures is not None and pictures.widths:
        yield histogram("Width of the images", pictures.widths, unit="pixels")
        yield histogram("Height of the images", pictures.heights, unit="pixels")
        kinds = Counter({f"{kind} file": count for kind, count in pictures.formats.items()})
        kinds.update({f"mode {mode}": count for mode, count in pictures.modes.items()})
        yield bars("Formats and colour modes", kinds.most_common(10))


def _sample(sample: ShownSample) -> str:
    shown = "".join(map(_part, sample.parts))
    return (
        f'<div class="sample"><div>{sample.image}<p class="soft">{escape(sample.place)}</p></div>'
        f'<div class="prompt">{shown}</div></div>'
    )


def _part(part: Part) -> str:
    if part.kind == "image":
        return f"<i>[image: {part.tokens} tokens]</i>"
    text = escape(part.text).replace("\n", "<i>⏎</i>\n")
    return f'<mark title="trained on: {part.tokens} tokens">{text}</mark>' if part.kind == "trained" else text


def _sheet(samples: Sequence[ShownSample]) -> str:
    return contact_sheet((sample.image, f"{sample.place}: {_cut(sample.text)}") for sample in samples if sample.image)


def _cut(text: str) -> str:
    return text if len(text) <= 240 else f"{text[:239]}…"


def _range(counts: Counter[int]) -> str:
    return f"{min(counts):,} to {max(counts):,}"


def _share(tokens: TokenChecks) -> str:
    return f"{100 * tokens.altered[ANSWER_CUT] / tokens.count:.1f} %"
