"""What `data` does: one function for each of its words, given its parsed arguments."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from minigpt4.errors import DataError
from minigpt4.printable import printable

if TYPE_CHECKING:
    from minigpt4.config import Config
    from minigpt4.preparation.data_sets import DataSet


def pack(arguments: argparse.Namespace) -> None:
    """`data pack`: write pairs of images and captions as shards, and print what is in them."""
    from minigpt4.preparation.pack import PackSettings
    from minigpt4.preparation.pack import pack as write
    from minigpt4.preparation.pairs import Keys

    settings = PackSettings(
        Keys(arguments.image_key, arguments.caption_key), arguments.samples_per_shard, not arguments.unchecked
    )
    image_dir = Path(arguments.image_dir) if arguments.image_dir else None
    out = Path(arguments.out)
    index = write(Path(arguments.source), out, settings, image_dir=image_dir, max_rejected=arguments.max_rejected)
    print(f"{out}: {index.samples:,} pairs in {len(index.shards)} shards")
    if index.rejected:
        causes = ", ".join(f"{cause}: {count}" for cause, count in index.rejected.items())
        print(f"left out: {sum(index.rejected.values()):,} rows ({causes}); see {out / 'rejected.jsonl'}")


def validate(arguments: argparse.Namespace) -> None:
    """`data validate`: check data sets, write the report, and end with an error if training could not use a row."""
    config, sets = _sets(arguments)
    from minigpt4.preparation.token_checks import try_token_checks
    from minigpt4.preparation.validate import Limits
    from minigpt4.preparation.validate import validate as check
    from minigpt4.preparation.validation_page import summary, validation_page
    from minigpt4.processors.image import MAX_PIXELS

    tokens, note = try_token_checks(config)
    limits = Limits(_image_limit(arguments.images), config.processors.image.config.max_pixels if config else MAX_PIXELS)
    with ExitStack() as stack:
        listing = stack.enter_context(_opened(Path(arguments.problems))) if arguments.problems else None
        reports = check(sets, limits, tokens, listing)
    for report in reports:
        print("\n".join(printable(line) for line in summary(report)))
    file = Path(arguments.report)
    validation_page(reports, f"Data of {arguments.target}", note).write(file)
    print(f"report: {file}")
    errors = sum(report.num_errors for report in reports)
    if errors:
        raise DataError(f"{errors:,} errors in the data; {file} lists them")


def preview(arguments: argparse.Namespace) -> None:
    """`data preview`: write a page of images drawn from data sets."""
    _, sets = _sets(arguments)
    from minigpt4.preparation.data_sets import DataSet
    from minigpt4.preparation.validate import drawn_images
    from minigpt4.preparation.validation_page import preview_page

    if arguments.count < 1:
        raise DataError(f"--count must be at least 1, found {arguments.count}")
    shown = []
    for data in sets:
        if not isinstance(data, DataSet):
            raise data[2]
        shown.append((data.name, drawn_images(data, arguments.count)))
    file = Path(arguments.out)
    preview_page(shown, f"Images of {arguments.target}").write(file)
    print(f"{file}: {sum(len(samples) for _, samples in shown):,} images")


def _sets(
    arguments: argparse.Namespace,
) -> tuple[Config | None, list[DataSet | tuple[str, str, DataError]]]:
    """Return the config that is used, if any, and the data sets of the target: of a config, or at a path."""
    from minigpt4.config import load_config
    from minigpt4.preparation.data_sets import set_of_path, sets_of_config

    target = Path(arguments.target)
    is_config = target.suffix in (".yaml", ".yml") or not target.exists()
    if is_config and not target.suffix.lower().startswith((".json", ".tar", ".csv", ".tsv", ".parquet")):
        config = load_config(arguments.target, arguments.options)
        return config, list(sets_of_config(config))
    named = load_config(arguments.cfg_path, arguments.options) if arguments.cfg_path else None
    return named, [set_of_path(target, Path(arguments.image_dir) if arguments.image_dir else None)]


def _image_limit(given: str) -> int | None:
    """Return how many images are opened; None for `all`."""
    if given == "all":
        return None
    if not given.isdigit():
        raise DataError(f"--images must be a number or all, found {given!r}")
    return int(given)


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("wb")
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error}; choose another file") from error
