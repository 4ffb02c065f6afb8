"""The command line: `python -m minigpt4 VERB`, and the `minigpt4` command.

Input: arguments. Output: an exit status, 0 only when the work is done. What a user can mend (`MiniGPT4Error`)
is one message on standard error and status 1; a defect keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from minigpt4.cli.parser import build_parser
from minigpt4.errors import ConfigError, MiniGPT4Error

INTERRUPTED = 130
"""The exit status of Ctrl-C: 128 + SIGINT, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit status: 0 done, 1 an error the message explains, 130 interrupted. Wrong usage exits with 2.
    """
    arguments = build_parser().parse_args(argv)
    set_up_logging()
    try:
        arguments.verb(arguments)
    except MiniGPT4Error as error:
        report(error, debug=getattr(arguments, "debug", False))
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def set_up_logging() -> None:
    """Show the package's log on standard error, without the libraries' chatter."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("minigpt4")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def report(error: MiniGPT4Error, *, debug: bool) -> None:
    """Print an error; what every rank finds alike (a config) is printed by rank 0 alone."""
    rank = int(os.environ.get("RANK", "0"))
    if debug:
        traceback.print_exception(error)
    elif rank == 0:
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, ConfigError):
        print(f"error on rank {rank}: {error}", file=sys.stderr)
