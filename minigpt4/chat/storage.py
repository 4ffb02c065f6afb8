"""A conversation on disk: `session.json`, and its images as PNG files beside it."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.errors import ConversationError
from minigpt4.processors.image import ImageSource, open_image

FILE = "session.json"
FORMAT = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """What a folder holds: a dialogue, its images in order, and how many of them were given at its start."""

    dialogue: Dialogue
    images: list[ImageSource]
    opening: int


def write(folder: Path, saved: Saved, tokenizer: TextTokenizer) -> None:
    """Write a conversation; a folder that holds one already is a whole conversation at any instant.

    Raises:
        ImageError: an image cannot be read any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [_write_image(folder, image, f"image {n}") for n, image in enumerate(saved.images, start=1)]
    content = {
        "format": FORMAT,
        "tokenizer": fingerprint(tokenizer),
        "system": saved.dialogue.system,
        "images": names,
        "opening_images": saved.opening,
        "turns": [
            {"question": turn.question, "answer": turn.answer, "answer_ids": turn.answer_ids}
            for turn in saved.dialogue.turns
        ],
    }
    fresh = folder / f"{FILE}.new"
    fresh.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    fresh.replace(folder / FILE)


def read(folder: Path, tokenizer: TextTokenizer) -> Saved:
    """Read a conversation; with another tokenizer its answers are text alone.

    Raises:
        ConversationError: there is none, or it is damaged.
    """
    path = folder / FILE
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ConversationError(f"{path}: has format {content['format']!r}; this version reads {FORMAT}")
        turns = [_turn(row) for row in content["turns"]]
        images: list[ImageSource] = [folder / Path(name).name for name in content["images"]]
        dialogue = Dialogue(tuple(turns), content["system"])
        opening = int(content["opening_images"])
        same = content["tokenizer"] == fingerprint(tokenizer)
    except FileNotFoundError as error:
        raise ConversationError(f"{path}: there is no such file; give a folder that a session was saved to") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConversationError(f"{path}: is damaged or no saved session ({type(error).__name__}: {error})") from error
    if dialogue.num_image_marks > len(images):
        raise ConversationError(
            f"{path}: the questions mention {dialogue.num_image_marks} image(s), but it lists {len(images)}"
        )
    if not same:
        _log.warning("%s: was written with another tokenizer; its answers are tokenised anew", path)
        dialogue = replace(dialogue, turns=tuple(replace(turn, answer_ids=None) for turn in turns))
    return Saved(dialogue, images, opening)


def fingerprint(tokenizer: TextTokenizer) -> str:
    """Return a digest of a tokenizer's vocabulary: ids mean the same wherever it is the same."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.tokenizer.get_vocab().items()):
        digest.update(f"{number}\t{token}\n".encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()[:16]


def _write_image(folder: Path, image: ImageSource, name: str) -> str:
    """Write an image under the name of its content, so that no file that an older save needs changes."""
    picture = open_image(image, name)
    file = f"image_{hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:16]}.png"
    if not (folder / file).is_file():
        fresh = folder / f"{file}.new"
        picture.save(fresh, format="PNG")
        fresh.replace(folder / file)
    return file


def _turn(row: Any) -> Turn:
    question, answer, ids = row["question"], row["answer"], row["answer_ids"]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise TypeError("questions and answers are texts")
    if ids is not None and not all(isinstance(token, int) for token in ids):
        raise TypeError("answer_ids are whole numbers")
    return Turn(question, answer, None if ids is None else tuple(ids))
