"""A conversation on disk: `session.json`, and its images as PNG files next to it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.errors import ConversationError
from minigpt4.processors.image import ImageSource, open_image

FILE = "session.json"
FORMAT = 1
_log = logging.getLogger(__name__)


def write(
    folder: Path, dialogue: Dialogue, images: Sequence[ImageSource], opening: int, tokenizer: TextTokenizer
) -> None:
    """Write a conversation; a folder that already has one is complete at any time.

    Args:
        folder: created if it is missing.
        dialogue: the conversation.
        images: its images, in order.
        opening: how many of them were given at its start.
        tokenizer: of the answers' ids.

    Raises:
        ImageError: an image cannot be read any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [_write_image(folder, image, f"image {n}") for n, image in enumerate(images, start=1)]
    content = {
        "format": FORMAT,
        "tokenizer": fingerprint(tokenizer),
        "system": dialogue.system,
        "images": names,
        "opening_images": opening,
        "turns": [
            {"question": turn.question, "answer": turn.answer, "answer_ids": turn.answer_ids} for turn in dialogue.turns
        ],
    }
    partial = folder / f"{FILE}.new"
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / FILE)


def read(folder: Path, tokenizer: TextTokenizer) -> tuple[Dialogue, list[ImageSource], int]:
    """Read a conversation; with another tokenizer, the ids of its answers are left out.

    Returns:
        The dialogue, its images in order, and how many of them were given at its start.

    Raises:
        ConversationError: the folder has no conversation, or it is damaged.
    """
    path = folder / FILE
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ConversationError(f"{path}: has format {content['format']!r}; this version reads {FORMAT}")
        dialogue = Dialogue(tuple(map(_turn, content["turns"])), content["system"])
        images: list[ImageSource] = [folder / Path(name).name for name in content["images"]]
        opening = int(content["opening_images"])
        same = content["tokenizer"] == fingerprint(tokenizer)
    except FileNotFoundError as error:
        raise ConversationError(f"{path} not found; expected a folder that a session was saved to") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConversationError(f"{path}: damaged or not a session ({type(error).__name__}: {error})") from error
    if dialogue.num_image_marks > len(images):
        raise ConversationError(
            f"{path}: the questions mention {dialogue.num_image_marks} image(s), but it lists {len(images)}"
        )
    if not same:
        _log.warning("%s: was written with another tokenizer; its answers are tokenised again", path)
        dialogue = replace(dialogue, turns=tuple(replace(turn, answer_ids=None) for turn in dialogue.turns))
    return dialogue, images, opening


def fingerprint(tokenizer: TextTokenizer) -> str:
    """Return a hash of a tokenizer's vocabulary; equal hashes mean equal ids."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.tokenizer.get_vocab().items()):
        digest.update(f"{number}\t{token}\n".encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()[:16]


def _write_image(folder: Path, image: ImageSource, name: str) -> str:
    """Write an image under a hash of its content, so that files of an earlier save never change."""
    picture = open_image(image, name)
    file = f"image_{hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:16]}.png"
    if not (folder / file).is_file():
        partial = folder / f"{file}.new"
        picture.save(partial, format="PNG")
        partial.replace(folder / file)
    return file


def _turn(row: Any) -> Turn:
    question, answer, ids = row["question"], row["answer"], row["answer_ids"]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise TypeError("question and answer must be texts")
    if ids is not None and not all(isinstance(token, int) for token in ids):
        raise TypeError("answer_ids must be whole numbers")
    return Turn(question, answer, None if ids is None else tuple(ids))
