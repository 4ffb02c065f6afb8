"""One answer while it is generated: its ids, the text to show, and why it ended.

Input: one token after another, from the decode loop. Output: text without the end mark, stop texts and incomplete
characters; and the ids of the answer for the next turns of the conversation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from minigpt4.config.sections import ChatConfig
from minigpt4.conversation.encoder import ConversationEncoder

FinishReason = Literal["stop", "length", "cancelled", "error"]
_UNFINISHED = "\ufffd"


class Answer:
    """Text and ids of one row.

    Attributes:
        settings: how its tokens are chosen, and their largest number.
        ids: all tokens, the end-of-sequence token included.
        text: the text to show so far, without white space at both ends; it is only ever extended.
        end_ids: tokens that end it.
        finish_reason: None until it is complete.
        error: the error of an answer with finish reason `error`.
    """

    def __init__(
        self,
        encoder: ConversationEncoder,
        settings: ChatConfig,
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
        self._taken = 0
        self._raw = ""
        # The tokens from `_context` on are decoded together, because the text of a token may depend on the one before
        # it; those from `_unread` on are not part of `_raw` yet.
        self._context = 0
        self._unread = 0
        self._read_to = [0]  # the length of `_raw` before the first token, and after each, before any cut

    def add(self, token: int) -> None:
        """Add the next token, which may end the answer."""
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

    def take(self) -> str:
        """Return the text that was added since the last call."""
        new, self._taken = self.text[self._taken :], len(self.text)
        return new

    def cancel(self) -> None:
        """End the answer with the text shown so far."""
        if self.finish_reason is None:
            self._raw = self._showable()
            self._finish("cancelled")

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self.error = error
        self.finish_reason = "error"

    def is_complete(self, ids: list[int]) -> bool:
        """Return whether the text of these ids has an end mark or a stop text."""
        text = self._decode(ids)
        return any(mark in text for mark in self._marks)

    def kept_ids(self) -> list[int]:
        """Return the ids of the answer without its end mark: the generated ones, as far as they are its text."""
        ended = bool(self.ids) and self.ids[-1] in self.end_ids
        if len(self._raw) == self._read_to[-1]:  # nothing was cut off
            return self.ids[:-1] if ended else self.ids
        kept = max(place for place in self._read_to if place <= len(self._raw))
        ids = self.ids[: self._read_to.index(kept)]
        rest = self._raw[kept:]
        if not rest:
            return ids
        # The last token has more than the last letters of the answer.
        return ids + self._tokenizer.tokenize_after_word((rest, False))

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self.text = self._raw.strip()

    def _read(self, ids: list[int], to_the_end: bool) -> bool:
        """Decode the new tokens; cut the text at the first mark, and return whether there is one."""
        self._read_to.append(len(self._raw))
        before = self._decode(ids[self._context : self._unread])
        whole = self._decode(ids[self._context :])
        if whole.endswith(_UNFINISHED) and not to_the_end:  # an incomplete character
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
        """Return the text without trailing white space, and without a tail that may become a mark."""
        for size in range(min(self._longest - 1, len(self._raw)), 0, -1):
            if any(mark.startswith(self._raw[-size:]) for mark in self._marks):
                return self._raw[:-size].rstrip()
        return self._raw.rstrip()

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, keep_special=True)
