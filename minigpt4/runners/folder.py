"""The run folder: owned by one process, tried for writing before a model is loaded, with the log of the run."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from minigpt4.errors import ConfigError
from minigpt4.printable import PrintableFormatter

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

LOCK = "run.lock"


@contextmanager
def own_folder(folder: Path, option: str = "run.output_dir") -> Iterator[None]:
    """Create the run folder and own it while the block runs. The lock ends with the process, however that ends.

    Args:
        folder: created if it is missing.
        option: the key that names it, for messages.

    Raises:
        ConfigError: the folder cannot be written, or another process owns it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error, option) from error
    try:
        _lock(lock.fileno(), folder, option)
        try:
            lock.truncate(0)
            owner = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            }
            lock.write(json.dumps(owner) + "\n")
            lock.flush()
            _try_to_write(folder / ".probe")
        except OSError as error:
            raise _unwritable(folder, error, option) from error
        yield
    finally:
        try:
            lock.close()
        except OSError:  # a full disk; the lock is released all the same
            _log.debug("%s: cannot be closed", folder / LOCK)


def _lock(descriptor: int, folder: Path, option: str) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"{option}: {folder} is in use by another run ({_owner(folder / LOCK)}); wait until it has ended, or "
            f"pass --options {option}=FOLDER"
        ) from error
    except OSError as error:
        _log.warning(
            "%s: this file system has no locks (%s); do not start two runs in one folder", folder, error.strerror
        )


def _owner(lock: Path) -> str:
    try:
        owner = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"see {lock}"


def _try_to_write(file: Path) -> None:
    """Write a new file and remove it: an existing one may have room on a full disk."""
    try:
        with file.open("wb") as out:
            out.write(bytes(65_536))
            out.flush()
            os.fsync(out.fileno())
    finally:
        file.unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError, option: str = "run.output_dir") -> ConfigError:
    return ConfigError(f"{option}: {folder} cannot be written: {error.strerror or error}")


class _LogFile(logging.FileHandler):
    """A log file that does not end the run, nor fill the terminal with tracebacks, when the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop the line: what the run must write reports the disk."""

    def close(self) -> None:
        """Close the file."""
        try:
            super().close()
        except OSError as error:
            _log.debug("%s: cannot be closed: %s", self.baseFilename, error)


@contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Write the package's log also to `log.txt` in the run folder while the block runs, and the error that ends it.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        handler = _LogFile(folder / "log.txt", encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("minigpt4")
    level = package.level
    package.addHandler(handler)
    package.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    except BaseException as error:  # the command line prints it on standard error
        text = str(error) or type(error).__name__
        handler.handle(logging.LogRecord(_log.name, logging.ERROR, __file__, 0, text, None, None))
        raise
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()
