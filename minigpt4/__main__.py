"""`python -m minigpt4 VERB`: see `cli`."""

import os
import sys
from typing import NoReturn

from minigpt4.cli import main

LEAVE_AT_ONCE = ("caption", "chat", "evaluate", "export", "inspect", "plan")
"""Verbs that have closed and flushed all they wrote when they return."""


def run() -> NoReturn:
    """Run the command line of this process, and end the process with its status.

    After a verb that leaves nothing behind, the process ends without the clean-up of Python, which takes a second once
    torch is loaded.
    """
    status = main()
    if sys.argv[1:2] and sys.argv[1] in LEAVE_AT_ONCE:
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
