"""Words of captions, as the COCO caption evaluation has them after Stanford's PTB tokenizer, without Java.

Lower case; punctuation marks removed; `n't`, `'s`, `'re` and other endings are words of their own.
"""

from __future__ import annotations

import re
from functools import lru_cache

_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
"""What the COCO evaluation removes. Brackets it names in capitals, so their lower-case tokens stay, as `-lrb-`."""
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_JOINED = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
}
_TOKEN = re.compile(
    r"""
    (?:[^\W\d_]\.){2,}                      # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc)\.
    | \d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?(?![^\W_])
    | [^\W_]+(?:['’&./_-][^\W_]+)*           # don't, t-shirt, at&t, and/or
    | '(?:s|m|d|re|ve|ll)\b
    | \.{2,} | -{2,} | [^\w\s] | _+
    """,
    re.VERBOSE,
)
_ENDING = re.compile(r"(.+?)(n['’]t|['’](?:s|m|d|re|ve|ll))$")


@lru_cache(maxsize=200_000)
def tokenize(caption: str) -> tuple[str, ...]:
    """Return the words of a caption."""
    words: list[str] = []
    for each in _TOKEN.findall(caption.lower()):
        token = each
        endings: list[str] = []
        while found := _ENDING.match(token):
            token, ending = found[1], found[2]
            endings.insert(0, ending.replace("’", "'"))
        if endings:
            words += [token, *endings]
        elif token in _JOINED:
            words += _JOINED[token]
        elif token in _BRACKETS:
            words.append(_BRACKETS[token])
        elif token not in _PUNCTUATION and token not in '"“”‘’…–—':
            words.append("..." if set(token) == {"."} else token)
    return tuple(word for word in words if word not in _PUNCTUATION)
