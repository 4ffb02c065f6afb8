"""The terminal: the line shown while a model is loaded, and the conversation of `chat` without `--question`."""

from __future__ import annotations

import secrets
import shlex
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from logging import WARNING, getLogger
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, cast

from minigpt4.errors import ConversationError, MiniGPT4Error, UnknownNameError
from minigpt4.printable import printable
from minigpt4.registry import did_you_mean

if TYPE_CHECKING:
    from PIL import Image

    from minigpt4.chat.session import Session

HELP = """\
/image FILE   add an image to the next question; several files, or several times
/regenerate   answer the last question again
/reset        forget the conversation and all images except those given with --image
/help         show this help
Ctrl-C stops an answer, Ctrl-D ends the conversation."""
PROMPT = "> "


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Show one line on standard error while a model is loaded: `loading mini ... 2.1 s`.

    On a terminal it is updated in place. The package's log is held back until the line is complete; only its warnings
    are shown then.
    """
    line, in_place = f"loading {printable(name)} ...", sys.stderr.isatty()
    started, done = time.monotonic(), threading.Event()

    def count_seconds() -> None:
        while in_place and not done.wait(0.5):
            print(f"\r{line} {time.monotonic() - started:.0f} s", end="", file=sys.stderr, flush=True)

    clock = threading.Thread(target=count_seconds, daemon=True)
    package = getLogger("minigpt4")
    handlers = package.handlers[:]
    held = MemoryHandler(1000, target=handlers[0] if handlers else None)
    held.setLevel(WARNING)
    package.handlers[:] = [held]
    print(line, end="", file=sys.stderr, flush=True)
    clock.start()
    again, end = f"\r{line}" if in_place else "", ""
    try:
        yield
        end = f"{again} {time.monotonic() - started:.1f} s"
    finally:
        done.set()
        clock.join()
        print(end, file=sys.stderr, flush=True)
        package.handlers[:] = handlers
        held.close()  # writes what it holds


def print_answer(pieces: Iterator[str]) -> None:
    """Print an answer as it grows; on a terminal without control characters, which it would obey."""
    shown = partial(printable, keep="\n\t") if sys.stdout.isatty() else str
    with closing(cast("Generator[str, None, None]", pieces)):
        for piece in pieces:
            print(shown(piece), end="", flush=True)
    print()


class Conversation:
    """Questions from standard input, answers on standard output.

    On a terminal it shows a prompt, and an error or Ctrl-C ends only the answer. From a pipe each line is a question,
    the output holds nothing but answers, and the first error ends it.
    """

    def __init__(self, session: Session, name: str) -> None:
        """Continue `session` with the model called `name`."""
        self._session = session
        self._name = name
        self._on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._images: list[Image.Image] = []  # for the next question
        self._question: str | None = None
        self._answered = False

    def run(self) -> None:
        """Answer until the input ends.

        Raises:
            MiniGPT4Error: a line from a pipe cannot be answered.
        """
        for line in self._lines_of_terminal() if self._on_terminal else _lines_of_pipe():
            try:
                if line:
                    self._take(line)
            except KeyboardInterrupt:
                if not self._on_terminal:
                    raise
                print("\n(stopped)")
            except MiniGPT4Error as error:
                if not self._on_terminal:
                    raise
                print("error:", printable(str(error), keep="\n"), file=sys.stderr)

    def _lines_of_terminal(self) -> Iterator[str]:
        with suppress(ImportError):
            import readline  # noqa: F401  # `input` then edits lines and remembers them
        print(f"{printable(self._name)}: ask a question. /help shows the commands, Ctrl-D ends.")
        while True:
            try:
                line = input(PROMPT)
            except KeyboardInterrupt:
                print("\n(Ctrl-D ends the conversation)")
                continue
            except EOFError:
                print()
                return
            except UnicodeDecodeError as error:
                print(f"error: {_not_utf8(error)}", file=sys.stderr)
                continue
            yield line.strip()

    def _take(self, line: str) -> None:
        """Do what one line asks for."""
        command, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self._ask(line)
        elif command == "/image" and rest.strip():
            self._add_images(rest.strip())
        elif command == "/regenerate":
            self._regenerate()
        elif command == "/reset":
            self._session.reset()
            self._images, self._question, self._answered = [], None, False
            self._remark("the conversation starts again")
        elif command in ("/help", "/image"):
            print(HELP)
        else:
            hint = did_you_mean(command, ("/image", "/regenerate", "/reset", "/help"))
            raise UnknownNameError(f"unknown command {command!r}.{hint} /help shows all commands")

    def _ask(self, question: str, **settings: object) -> None:
        """Print the answer; one that was stopped stays in the conversation as far as it was shown."""
        turns, self._question = len(self._session.turns), question
        try:
            print_answer(self._session.stream(question, self._images, **settings))
        finally:
            self._answered = len(self._session.turns) > turns
            if self._answered:
                self._images = []

    def _regenerate(self) -> None:
        if self._question is None:
            raise ConversationError("there is no question to answer again")
        if self._session.settings.temperature == 0:
            self._remark("without sampling the answer is the same; --options chat.temperature=0.7 samples")
        question = self._session.undo() if self._answered else self._question
        self._ask(question, seed=secrets.randbits(31))

    def _add_images(self, given: str) -> None:
        """Open one file, or several in the syntax of a shell."""
        from minigpt4.processors.image import open_image

        files = [given]
        if not Path(given).exists():
            with suppress(ValueError):  # a quotation mark without its partner is part of the name
                files = shlex.split(given)
        max_pixels = self._session.engine.loaded.image_processor.config.max_pixels
        opened = [open_image(Path(file).expanduser(), max_pixels=max_pixels) for file in files]
        self._images += opened
        self._remark(f"{len(self._images)} image{'s' * (len(self._images) > 1)} for the next question")

    def _remark(self, text: str) -> None:
        if self._on_terminal:
            print(f"({text})")


def _lines_of_pipe() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.strip()
    except UnicodeDecodeError as error:
        raise ConversationError(f"the questions on standard input are {_not_utf8(error)}") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not {error.encoding.upper()}: {error}"
