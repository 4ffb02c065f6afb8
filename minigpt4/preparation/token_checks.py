"""How samples look to the language model: token counts, what is cut, and prompts with the supervised part marked.

Input: a config and dialogues. Output: counts, and parts of a text that say whether they are trained on. The tokenizer
is loaded, the model is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

from minigpt4.assets import resolve
from minigpt4.batch import IGNORE
from minigpt4.config import Config
from minigpt4.conversation.dialogue import Dialogue
from minigpt4.conversation.encoder import ANSWER_CUT, ConversationEncoder, Encoded
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.errors import MiniGPT4Error, WeightsError

ASSUMED_TOKENS = 32
"""Tokens per image where the settings do not say it."""


MARGIN = 512
"""Tokens of a template's own text and of a drawn instruction, at most."""


class Part(NamedTuple):
    """A part of an encoded sample: text that is trained on or not, or an image of so many tokens."""

    kind: Literal["prompt", "trained", "image"]
    text: str
    tokens: int


class TokenChecks:
    """Encodes samples as training does.

    Attributes:
        encoder: of the config.
        tokens_per_image: as the config says, or `ASSUMED_TOKENS`.
        is_assumed: whether it was assumed.
        rows: samples by their number of tokens.
        answers: samples by their number of supervised tokens.
        altered: samples by what was altered in them (`"answer cut ..."`).
    """

    def __init__(self, encoder: ConversationEncoder, is_assumed: bool = False) -> None:
        """Count what `encoder` makes of samples; `is_assumed` says that its tokens per image are a guess."""
        self.encoder = encoder
        self.tokens_per_image = encoder.tokens_per_image
        self.is_assumed = is_assumed
        self.rows: Counter[int] = Counter()
        self.answers: Counter[int] = Counter()
        self.altered: Counter[str] = Counter()

    @classmethod
    def from_config(cls, config: Config) -> TokenChecks:
        """Load the tokenizer that `config` names.

        Raises:
            WeightsError, AssetError: it is not there, or cannot be used.
        """
        path = resolve(config.model.language_model.config.path)
        if not path.exists():
            raise WeightsError(f"{path}: not found; set model.language_model.path")
        found = tokens_per_image(config)
        tokenizer = TextTokenizer.from_path(path)
        encoder = ConversationEncoder(tokenizer, found or ASSUMED_TOKENS, config.conversation, config.compat)
        return cls(encoder, found is None)

    def anew(self) -> TokenChecks:
        """Return the checks with the same encoder and no counts, for another data set."""
        return TokenChecks(self.encoder, self.is_assumed)

    @property
    def cut(self) -> int:
        """Number of samples with an answer that was cut."""
        return self.altered[ANSWER_CUT]

    @property
    def count(self) -> int:
        """Number of samples that were encoded."""
        return sum(self.rows.values())

    def add(self, dialogue: Dialogue, num_images: int, place: str) -> None:
        """Encode a sample and count its tokens.

        Raises:
            DataError: training would skip it.
        """
        encoded = self.encoder.encode_dialogue(dialogue, num_images=num_images, sample_id=place)
        self.rows[len(encoded.input_ids)] += 1
        self.answers[int((encoded.labels != IGNORE).sum())] += 1
        self.altered.update(dict.fromkeys(encoded.altered, 1))

    @property
    def always_fit(self) -> int:
        """Characters that a caption with one image may have to fit into a row for certain."""
        return (self.encoder.settings.max_tokens - self.tokens_per_image - MARGIN) // 4

    def may_be_too_long(self, dialogue: Dialogue, num_images: int) -> bool:
        """Whether a dialogue has enough text that it may not fit into a row; a token has at least one byte."""
        room = self.encoder.settings.max_tokens - num_images * self.tokens_per_image - MARGIN * len(dialogue.turns)
        texts = (text for turn in dialogue.turns for text in (turn.question, turn.answer or ""))
        return 4 * (len(dialogue.system or "") + sum(map(len, texts))) > room

    def parts(self, dialogue: Dialogue, num_images: int, place: str) -> list[Part]:
        """Return a sample as the model is given it, in order.

        Raises:
            DataError: training would skip it.
        """
        encoded = self.encoder.encode_dialogue(dialogue, num_images=num_images, sample_id=place)
        return list(_parts(encoded, self.encoder.tokenizer, self.tokens_per_image))


def tokens_per_image(config: Config) -> int | None:
    """Return how many tokens an image becomes, from the settings alone; None if they do not say it."""
    resampler, encoder = config.model.resampler.config, config.model.vision_encoder.config
    for name, power in (("num_query_tokens", 1), ("grid", 2)):
        value = getattr(resampler, name, None)
        if isinstance(value, int):
            return int(value**power)
    sizes = [getattr(part, name, None) for part, name in ((encoder, "image_size"), (encoder, "patch_size"))]
    neighbours = getattr(resampler, "neighbours", None)
    if all(isinstance(size, int) and size > 0 for size in (*sizes, neighbours)):
        image, patch = sizes
        return int((image // patch) ** 2 // neighbours)  # type: ignore[operator]
    return None


def try_token_checks(config: Config | None) -> tuple[TokenChecks | None, str]:
    """Return the checks of a config, or None and the reason why there are none.

    A set of data can be looked at before the weights of the language model are there.
    """
    if config is None:
        return None, "no config was given, so that nothing is said about tokens"
    try:
        return TokenChecks.from_config(config), ""
    except MiniGPT4Error as error:
        return None, f"the tokenizer cannot be loaded, so that nothing is said about tokens: {error}"


def _parts(encoded: Encoded, tokenizer: TextTokenizer, tokens: int) -> Iterator[Part]:
    """Cut a sample where it begins or ends to be an image or to be trained on."""
    ids, images = encoded.input_ids.tolist(), encoded.image_mask.tolist()
    trained = (encoded.labels != IGNORE).tolist()
    kinds = [
        "image" if image else "trained" if train else "prompt" for image, train in zip(images, trained, strict=True)
    ]
    start = 0
    text_start = 0  # of the run of text since the last image: a tokenizer drops the blank in front of a text
    for end in range(1, len(ids) + 1):
        if end < len(ids) and kinds[end] == kinds[start]:
            continue
        if kinds[start] == "image":
            for _ in range((end - start) // tokens):
                yield Part("image", "", tokens)
            text_start = end
        else:
            before = tokenizer.decode(ids[text_start:start], keep_special=True)
            whole = tokenizer.decode(ids[text_start:end], keep_special=True)
            text = (
                whole[len(before) :]
                if whole.startswith(before)
                else tokenizer.decode(ids[start:end], keep_special=True)
            )
            yield Part(kinds[start], text, end - start)  # type: ignore[arg-type]
        start = end
