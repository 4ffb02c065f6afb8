"""Texts of others, file names for example, as they are shown on a terminal and in a log: control characters escaped.

A terminal obeys escape sequences, and a line break in a name would begin a line that looks like one of ours.
"""

from __future__ import annotations

import logging
import unicodedata

_CONTROL = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: control and format characters, halves of surrogate pairs, line and paragraph separators."""
_JOINERS = "\u200c\u200d"
"""Format characters that some scripts and emoji need."""


def printable(text: str, keep: str = "") -> str:
    r"""Return a text with its control characters escaped (`\n`, `\x1b`, `\u202e`), except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _CONTROL and character not in keep and character not in _JOINERS
        else character
        for character in text
    )


class PrintableFormatter(logging.Formatter):
    """Formats log records with the control characters of their values escaped.

    Line breaks that are part of our own messages, and those of tracebacks, stay: a message that is a single value
    (`"%s"`) keeps the line breaks of the value.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        if isinstance(record.args, tuple) and record.msg != "%s":
            record = logging.makeLogRecord(record.__dict__)
            record.args = tuple(
                arg if isinstance(arg, (int, float)) else printable(str(arg), keep="\t") for arg in record.args or ()
            )
        return printable(super().format(record), keep="\n\t")
