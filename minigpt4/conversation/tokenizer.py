"""The language model's tokenizer, as segment-by-segment tokenising needs it.

Input: runs of text, each marked as the template's own or as somebody's content. Output: token ids. Special tokens
spelt out in the template become their ids; spelt out in content they stay plain text, so that nobody can end a turn
by typing its end mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from minigpt4.conversation.templates import OWN, Template
from minigpt4.errors import ConversationError, WeightsError

LLAMA_SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
Run = tuple[str, bool]
"""Text, and whether it is the template's own."""


class TextTokenizer:
    """A transformers tokenizer behind the few calls that conversations need."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        # A valid id for positions whose id does not matter: padding, and images.
        self.filler_id: int = next(i for i in (tokenizer.pad_token_id, self.eos_id, 0) if i is not None)
        specials = {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values())}
        # Longest first, so that none is found inside another.
        self.special_tokens: list[str] = sorted((s for s in specials if s), key=lambda s: (-len(s), s))
        self._specials = re.compile("|".join(map(re.escape, self.special_tokens)) or r"(?!)")
        self._guard_added_tokens()

    @classmethod
    def from_path(cls, path: str | Path) -> TextTokenizer:
        """Load from a model folder, a GGUF file, or a bare SentencePiece `tokenizer.model`; never from the network.

        Raises:
            WeightsError: there is no tokenizer.
        """
        path = Path(path)
        try:
            if path.suffix == ".gguf":
                return cls(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True))
            if path.suffix == ".model":
                return cls(LlamaTokenizer.from_pretrained(path.parent, local_files_only=True))
            return cls(AutoTokenizer.from_pretrained(path, local_files_only=True, **_lost_specials(path)))
        except (OSError, ValueError, KeyError, TypeError, ImportError, RecursionError) as error:
            raise WeightsError(f"{path}: no usable tokenizer there: {str(error).splitlines()[0]}") from error

    def fit(self, vocab_size: int) -> None:
        """Make sure that every id has a row in an embedding of `vocab_size` rows.

        An added padding token without a row, as old Vicuna folders have, is not used; it is a filler only.

        Raises:
            WeightsError: the tokenizer's own vocabulary is larger than the embedding.
        """
        largest = max((i for t, i in self.tokenizer.get_vocab().items() if t != self.tokenizer.pad_token), default=0)
        if largest >= vocab_size:
            raise WeightsError(
                f"the tokenizer has ids up to {largest}, but the language model's embedding has {vocab_size} rows: "
                "they do not belong together"
            )
        if self.filler_id >= vocab_size:
            self.filler_id = self.eos_id if self.eos_id is not None else 0

    def encode(self, runs: Sequence[Run]) -> list[int]:
        """Return the ids of `runs` tokenised as one text, without BOS or EOS of the tokenizer's own.

        The text is split at special tokens that lie inside a template run; each piece is tokenised alone.
        """
        text = "".join(part for part, _ in runs)
        ids: list[int] = []
        done = 0
        for start, end in self._special_spans(runs):
            ids += self._plain(text[done:start])
            ids.append(self.tokenizer.convert_tokens_to_ids(text[start:end]))  # type: ignore[arg-type]
            done = end
        return ids + self._plain(text[done:])

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Return the text of `ids`."""
        text: Any = self.tokenizer.decode(list(ids), skip_special_tokens=not keep_special)
        return str(text)

    def own_template(self) -> Template:
        """Return the tokenizer's own chat template as a `Template`.

        The template is rendered once around unique sentinels, and the text between them is read off.

        Raises:
            ConversationError: there is none, or it alters or drops what it is given.
        """
        if not self.tokenizer.chat_template:
            raise ConversationError("the tokenizer has no chat template; set conversation.template to a built-in one")
        question, answer, later, reply, system = (f"Sentinel{n}x{n}" for n in range(1, 6))
        turns = [("user", question), ("assistant", answer), ("user", later), ("assistant", reply)]
        opening, after, between, suffix, tail = self._between(turns, (question, answer, later, reply))
        prompt = self._between(turns[:1], (question,), open_answer=True)[1]
        if prompt != after:
            raise ConversationError(
                f"the tokenizer's chat template writes {prompt!r} before an answer to come and {after!r} before a "
                "given one; a model trained on one would not know the other. Set conversation.template to a built-in "
                "one"
            )
        end = self._end_mark(tail)
        if not between.startswith(end):
            raise ConversationError(f"the tokenizer's chat template ends answers with {tail!r} or {between!r} by place")
        wrap = None
        try:
            front, middle, _ = self._between([("system", system), *turns[:1]], (system, question))
            wrap = (front, middle)
        except ConversationError:
            pass  # formats without a system role are common; Template.system None says so
        return Template(
            name=OWN,
            question=("", after),
            next_question=(between[len(end) :], suffix),
            end=end,
            opening=opening,
            system=wrap,
            starts_with_bos=False,
        )

    def _guard_added_tokens(self) -> None:
        """Let content spell added tokens, too, without becoming them.

        Some models declare their turn marks as added tokens that are not special; `split_special_tokens` alone would
        let a user type them. Runs of blanks, which some vocabularies add as tokens, stay what they are.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        added = self.tokenizer.added_tokens_decoder.values()
        marks = [token for token in added if not token.special and token.content.strip()]
        if backend is not None and marks:
            backend.add_special_tokens(marks)

    def _end_mark(self, tail: str) -> str:
        """Return what closes an answer: up to the first special token of `tail`, else `tail` without trailing space."""
        match = self._specials.search(tail)
        return tail[: match.end()] if match else tail.rstrip()

    def _between(
        self, turns: Sequence[tuple[str, str]], sentinels: Sequence[str], *, open_answer: bool = False
    ) -> list[str]:
        """Render `turns` and return the text before, between and after the sentinels.

        Raises:
            ConversationError: a sentinel does not come back exactly once, in order.
        """
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)
        except Exception as error:  # a template is a program of its own and may raise anything
            raise ConversationError(f"the tokenizer's chat template fails: {error}") from error
        if any(text.count(s) != 1 for s in sentinels):
            raise ConversationError("the tokenizer's chat template alters, repeats or drops what it is given")
        return re.split("|".join(map(re.escape, sentinels)), text)

    def _special_spans(self, runs: Sequence[Run]) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        start = 0
        for part, trusted in runs:
            if trusted:
                spans += [(start + m.start(), start + m.end()) for m in self._specials.finditer(part)]
            start += len(part)
        return spans

    def _plain(self, text: str) -> list[int]:
        """Tokenise text in which nothing is special."""
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def _lost_specials(folder: Path) -> dict[str, str]:
    """Return LLaMA's special tokens for a folder whose own are empty, as the first conversions of LLaMA wrote them."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not (folder / "tokenizer.model").is_file() or not isinstance(settings, dict):
        return {}
    return {name: token for name, token in LLAMA_SPECIALS.items() if settings.get(name) == ""}
