"""The command line: `python -m minigpt4 VERB`, and the `minigpt4` command.

Input: arguments. Output: an exit status, 0 only when the work is done. An error that the user can correct
(`MiniGPT4Error`) is one message on standard error and status 1; a bug keeps its traceback. When the reader of a pipe
has gone, as after `| head`, the process ends quietly.
"""

from __future__ import annotations

import argparse
import codecs
import io
import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence

from minigpt4.cli.parser import build_parser
from minigpt4.cli.repeats import CountingHandler
from minigpt4.errors import ConfigError, MiniGPT4Error, RunStoppedError
from minigpt4.printable import PrintableFormatter, printable

INTERRUPTED = 130
"""The exit status after Ctrl-C: 128 + SIGINT, as in shells."""
NO_READER = 141
"""The exit status when the reader of standard output or error has gone: 128 + SIGPIPE, as in shells."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit status: 0 done, 1 an error the message explains, 130 interrupted by Ctrl-C, 143 training stopped by
        SIGTERM. Wrong usage exits with 2.
    """
    _print_anything()
    try:
        try:
            return _run(argv)
        finally:
            for stream in _streams():
                stream.flush()
    except BrokenPipeError:
        closed = [stream for stream in _streams() if _is_closed(stream)]
        if not closed:  # another pipe
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in closed:  # Python flushes them again when it ends
            os.dup2(nowhere, stream.fileno())
        return NO_READER


def _run(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    set_up_logging()
    try:
        _decode_text(arguments)
        arguments.verb(arguments)
    except MiniGPT4Error as error:
        report(error, debug=getattr(arguments, "debug", False))
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _decode_text(arguments: argparse.Namespace) -> None:
    """Read arguments that are text as UTF-8, also where the locale has another encoding.

    Names of files stay as they are: they may be any bytes.

    Raises:
        ConfigError: one is not UTF-8.
    """
    for name in ("question", "prompt", "options"):
        given = getattr(arguments, name, None) or ""
        try:
            decoded = [_utf8(text) for text in ([given] if isinstance(given, str) else given)]
        except UnicodeError as error:
            raise ConfigError(f"--{name} {given!a}: is not UTF-8; type it again, in UTF-8") from error
        if given:
            setattr(arguments, name, decoded[0] if isinstance(given, str) else decoded)


def _utf8(argument: str) -> str:
    return argument.encode("utf-8", errors="surrogateescape").decode()


def _streams() -> list[io.TextIOWrapper]:
    """Return standard output and error, without those that are closed or replaced."""
    return [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]


def _is_closed(stream: io.TextIOWrapper) -> bool:
    """Whether the reader has gone."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))


def _print_anything() -> None:
    """Let any text be printed in any encoding: names of files as their bytes, other characters escaped."""

    def escape(error: UnicodeError) -> tuple[str | bytes, int]:
        try:
            return codecs.lookup_error("surrogateescape")(error)
        except UnicodeError:
            return codecs.lookup_error("backslashreplace")(error)

    codecs.register_error("minigpt4.escape", escape)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="minigpt4.escape")


def set_up_logging() -> None:
    """Show the package's log on standard error, and of the libraries only errors."""
    handler = CountingHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    package = logging.getLogger("minigpt4")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def report(error: MiniGPT4Error, *, debug: bool) -> None:
    """Print an error; one that is the same on every rank (a wrong config) is printed by rank 0 alone."""
    rank = int(os.environ.get("RANK", "0"))
    text = printable(str(error), keep="\n\t")
    if debug:
        traceback.print_exception(error)
    elif rank == 0:
        print(text if isinstance(error, RunStoppedError) else f"error: {text}", file=sys.stderr)
    elif not isinstance(error, (ConfigError, RunStoppedError)):
        print(f"error on rank {rank}: {text}", file=sys.stderr)
