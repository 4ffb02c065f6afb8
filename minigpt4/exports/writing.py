"""Exports are complete or absent: they are written under another name first."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from minigpt4.errors import ExportError


@contextmanager
def write_complete(out: Path) -> Iterator[Path]:
    """Yield the path to write a file or folder to; it is renamed to `out` at the end, and removed after an error.

    Raises:
        ExportError: `out` exists already, or cannot be written.
    """
    if out.exists():
        raise ExportError(f"{out}: exists already; choose another name")
    partial = out.with_name(f".{out.name}.partial")
    try:
        _remove(partial)
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(out)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch raises a RuntimeError if the disk is full
        raise ExportError(f"{out}: cannot be written: {error}") from error
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
