"""The language model's tokenizer.

Input: pieces of text, each marked as the template's own or as content. Output: token ids. A special token written in
the template becomes its id. Written in content it stays plain text, so that a user cannot end a turn by typing its end
mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from minigpt4.conversation.tokenizer_files import FILES, has_tokenizer
from minigpt4.errors import WeightsError

PLAIN_SENTENCE = "The cat sat on a mat, and it looked at me."
LLAMA_SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A SentencePiece token for one byte."""
TextPiece = tuple[str, bool]
"""Text, and whether it is the template's own (else content)."""
Place = Literal["start", "after a mark", "after a greedy mark", "inside"]
"""Where in a text a part of it is: at its start, behind a special token or an image, or behind other text.

Greedy marks, as Phi-3 has them, take the white space behind them.
"""
LEAD = "\ue000"
"""A private character: no vocabulary has it, so no token joins it with the text behind it."""


class TextTokenizer:
    """A transformers tokenizer with the few methods that conversations need."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        # A valid id for positions whose id does not matter: padding and images.
        self.filler_id: int = next(i for i in (tokenizer.pad_token_id, self.eos_id, 0) if i is not None)
        specials = {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values())}
        # Longest first, so that none matches inside another.
        self.special_tokens: list[str] = sorted((s for s in specials if s), key=lambda s: (-len(s), s))
        self._greedy_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.rstrip}
        self._special_ids = {tokenizer.convert_tokens_to_ids(token) for token in self.special_tokens}
        self._specials = re.compile(f"({'|'.join(map(re.escape, self.special_tokens)) or '(?!)'})")
        self._guard_added_tokens()
        self.own_text_places = self._own_text_places()

    @classmethod
    def from_path(cls, path: str | Path) -> TextTokenizer:
        """Load from a model folder, a GGUF file, or a SentencePiece `tokenizer.model`; never from the network.

        Raises:
            WeightsError: no tokenizer was found, or it cannot be read.
        """
        path = Path(path)
        if path.is_dir() and not has_tokenizer(path):
            raise WeightsError(
                f"no tokenizer in {path}: it has none of {', '.join(FILES)}; copy the tokenizer files of this language "
                "model into it"
            )
        try:
            local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            if path.suffix == ".gguf":
                loaded = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **local)
            elif path.suffix == ".model":
                loaded = LlamaTokenizer.from_pretrained(path.parent, **local)
            else:
                loaded = AutoTokenizer.from_pretrained(path, **local, **_lost_specials(path))
            tokenizer = cls(loaded)
            back = tokenizer.decode(tokenizer.tokenize([(PLAIN_SENTENCE, False)]), keep_special=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError, RecursionError) as error:
            raise WeightsError(f"{path}: no usable tokenizer found: {str(error).splitlines()[0]}") from error
        # Some tokenizers write lower case, or other blanks.
        if "".join(back.lower().split()) != "".join(PLAIN_SENTENCE.lower().split()):
            raise WeightsError(
                f"{path}: the tokenizer does not preserve text: {PLAIN_SENTENCE!r} comes back as {back[:60]!r}; its "
                "files are incomplete or damaged, copy those of this language model"
            )
        return tokenizer

    def fit(self, vocab_size: int) -> None:
        """Check that every id has a row in an embedding of `vocab_size` rows.

        An added padding token without a row, as in old Vicuna folders, is replaced: it is only used as a filler.

        Raises:
            WeightsError: the tokenizer's own vocabulary is larger than the embedding, or less than half of it.
        """
        size = len(self.tokenizer.get_vocab())
        if size < vocab_size / 2:  # rows beyond the tokens, for speed or for later use, are a few percent
            raise WeightsError(
                f"the tokenizer has {size} tokens, but the language model's embedding has {vocab_size} rows: tokenizer "
                "and weights are of different models"
            )
        largest = max((i for t, i in self.tokenizer.get_vocab().items() if t != self.tokenizer.pad_token), default=0)
        if largest >= vocab_size:
            raise WeightsError(
                f"the tokenizer has ids up to {largest}, but the language model's embedding has {vocab_size} rows: "
                "tokenizer and weights are of different models"
            )
        if self.filler_id >= vocab_size:
            self.filler_id = self.eos_id if self.eos_id is not None else 0

    def tokenize(self, pieces: Sequence[TextPiece], place: Place | None = None) -> list[int]:
        """Return the ids of `pieces` tokenised as one text, without the tokenizer's own BOS or EOS.

        The text is split at special tokens inside the template's pieces. Each part is tokenised as a text of its own;
        or, with the `place` of the first one, as it is tokenised within a text that has it there.
        """
        ids: list[int] = []
        pending = ""
        for text, is_trusted in pieces:
            for number, part in enumerate(self._specials.split(text) if is_trusted else [text]):
                if number % 2:  # a special token
                    ids += [*self._part(pending, place), self.tokenizer.convert_tokens_to_ids(part)]  # type: ignore[list-item]
                    pending, place = "", place and self.place_after(ids[-1])
                elif place == "after a greedy mark" and is_trusted and not pending:
                    pending = part.lstrip()
                else:
                    pending += part
        return ids + self._part(pending, place)

    def place_after(self, token: int) -> Place:
        """Return the place behind a token."""
        if token in self._greedy_ids:
            return "after a greedy mark"
        return "after a mark" if token in self._special_ids else "inside"

    def tokenize_after_word(self, piece: TextPiece) -> list[int]:
        """Return the ids of `piece` behind a word; at the start of a text it may be tokenised in another way."""
        word: TextPiece = ("a", False)
        return self.tokenize([word, piece])[len(self.tokenize([word])) :]

    def words(self, rows: int) -> dict[str, int]:
        """Return the ids below `rows` whose tokens are plain ASCII text, by that text; first tokens have a blank.

        SentencePiece and byte-level vocabularies write this blank in different ways; here both are the same.
        """
        found: dict[str, int] = {}
        for token, number in sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1]):
            text = token.replace("\u2581", " ").replace("\u0120", " ")
            plain = text.isascii() and any(c.isalnum() for c in text) and not _BYTE.fullmatch(text)
            if plain and number < rows and number not in self._special_ids:
                found.setdefault(text, number)
        return found

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Return the text of `ids`."""
        text: Any = self.tokenizer.decode(list(ids), skip_special_tokens=not keep_special)
        return str(text)

    def end_mark(self, tail: str) -> str:
        """Return what closes an answer: up to the first special token of `tail`, else `tail` without trailing space."""
        match = self._specials.search(tail)
        return tail[: match.end()] if match else tail.rstrip()

    def _guard_added_tokens(self) -> None:
        """Make added tokens special, so that `split_special_tokens` keeps content from becoming them.

        Some models declare their turn marks as added tokens that are not special. Runs of blanks, which some
        vocabularies add as tokens, stay as they are.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        added = self.tokenizer.added_tokens_decoder.values()
        marks = [token for token in added if not token.special and token.content.strip()]
        if backend is not None and marks:
            backend.add_special_tokens(marks)

    @property
    def parts_are_texts(self) -> bool:
        """Whether every part of a text has the ids that it has as a text of its own."""
        return "inside" in self.own_text_places and not self._greedy_ids

    def _own_text_places(self) -> set[Place]:
        """Return the places where a part has the ids that it has as a text of its own.

        SentencePiece tokenizers put a blank in front of a text; older ones also behind every special token.
        """
        plain, inside = self._plain("a"), self._inside("a")
        if inside == plain or self.decode(inside).strip() != "a":
            return {"start", "after a mark", "after a greedy mark", "inside"}
        mark = next(iter(self.tokenizer.all_special_tokens), "")
        behind = self.tokenizer(f"{mark}a", add_special_tokens=False).input_ids[1:]
        return {"start", "after a mark", "after a greedy mark"} if list(behind) == plain else {"start"}

    def _part(self, text: str, place: Place | None) -> list[int]:
        """Tokenise text without special tokens at a place in a text, or as a text of its own."""
        return self._plain(text) if place is None or place in self.own_text_places else self._inside(text)

    def _inside(self, text: str) -> list[int]:
        """Tokenise text without special tokens as it is tokenised behind other text."""
        lead, ids = self._plain(LEAD), self._plain(LEAD + text)
        return ids[len(lead) :] if ids[: len(lead)] == lead else self._plain(text)

    def _plain(self, text: str) -> list[int]:
        """Tokenise text without special tokens."""
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def _lost_specials(folder: Path) -> dict[str, str]:
    """Return LLaMA's special tokens for a folder that has empty ones, as the first conversions of LLaMA wrote it."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not (folder / "tokenizer.model").is_file() or not isinstance(settings, dict):
        return {}
    return {name: token for name, token in LLAMA_SPECIALS.items() if settings.get(name) == ""}
