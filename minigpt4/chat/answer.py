"""One answer as it grows: its ids, the text that may be shown, and why it ended.

Input: one token after another, from the decode loop. Output: text in which neither the end mark nor a stop text ever
shows, nor half a character; and the ids that stand for the answer when the conversation goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from minigpt4.chat.section import ChatSection
from minigpt4.conversation.encoder import ConversationEncoder

FinishReason = Literal["stop", "length", "cancelled", "error"]
_UNFINISHED = "\ufffd"


class Answer:
    """Text and ids of one row.

    Attributes:
        settings: how its tokens are chosen, and how many at most.
        ids: all tokens chosen, the end-of-sequence token included.
        text: what may be shown so far; without white space at both ends.
        end_ids: tokens that end it.
        finish_reason: None while it grows.
        error: why it failed, with finish reason `error`.
    """

    def __init__(
        self,
        encoder: ConversationEncoder,
        settings: ChatSection,
        end_ids: Collection[int],
        stop: Sequence[str] = (),
    ) -> None:
        """End at a token of `end_ids`, at the template's end mark, or at any text of `stop`."""
        self.settings = settings
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self._tokenizer = encoder.tokenizer
        self.end_ids = end_ids
        self._marks = tuple(mark for mark in (encoder.training_template.end, *stop) if mark)
        self._longest = max(map(len, self._marks), default=0)
        self._raw = ""
        # The tokens from `_context` on are decoded together, so that what a tokenizer makes of a token's left side is
        # right; those from `_unread` on are not part of `_raw` yet.
        self._context = 0
        self._unread = 0
        self._read_to = [0]  # the length of `_raw` before the first token, and after each, before any cut

    def add(self, token: int) -> None:
        """Take the next token; may end the answer."""
        self.ids.append(token)
        ended = token in self.end_ids
        full = len(self.ids) >= self.settings.max_new_tokens
        marked = self._read(self.ids[:-1] if ended else self.ids, to_the_end=ended or full)
        if ended or marked:
            self._finish("stop")
        elif full:
            self._finish("length")
        else:
            self.text = self._showable().strip()

    def cancel(self) -> None:
        """End here: the answer is what could be shown so far."""
        if self.finish_reason is None:
            self._raw = self._showable()
            self._finish("cancelled")

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self.error = error
        self.finish_reason = "error"

    def is_complete(self, ids: list[int]) -> bool:
        """Return whether an answer of these ids would have ended by its text."""
        text = self._decode(ids)
        return any(mark in text for mark in self._marks)

    def kept_ids(self) -> list[int]:
        """Return the ids of the answer without its end: those that were chosen, as far as they spell its text."""
        ended = bool(self.ids) and self.ids[-1] in self.end_ids
        if len(self._raw) == self._read_to[-1]:  # nothing was cut off
            return self.ids[:-1] if ended else self.ids
        kept = max(place for place in self._read_to if place <= len(self._raw))
        ids = self.ids[: self._read_to.index(kept)]
        rest = self._raw[kept:]
        if not rest:
            return ids
        # The last token held more than the answer's last letters.
        glued = self._tokenizer.encode([("a", False), (rest, False)])
        return ids + glued[len(self._tokenizer.encode([("a", False)])) :]

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self.text = self._raw.strip()

    def _read(self, ids: list[int], to_the_end: bool) -> bool:
        """Decode what is new; cut at the first mark and say whether there is one."""
        self._read_to.append(len(self._raw))
        before = self._decode(ids[self._context : self._unread])
        whole = self._decode(ids[self._context :])
        if whole.endswith(_UNFINISHED) and not to_the_end:  # the bytes of a character still to come
            return False
        searched = max(0, len(self._raw) - self._longest + 1)
        self._raw += whole[len(before) :]
        self._read_to[-1] = len(self._raw)
        self._context, self._unread = self._unread, len(ids)
        places = [place for mark in self._marks if (place := self._raw.find(mark, searched)) >= 0]
        if places:
            self._raw = self._raw[: min(places)]
        return bool(places)

    def _showable(self) -> str:
        """Return the text without a tail that may become a mark, or that is white space so far."""
        for size in range(min(self._longest - 1, len(self._raw)), 0, -1):
            if any(mark.startswith(self._raw[-size:]) for mark in self._marks):
                return self._raw[:-size].rstrip()
        return self._raw.rstrip()

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, keep_special=True)
