"""easy-VQA: coloured shapes, one to an image, and questions about them (MIT, github.com/vzhou842/easy-VQA).

Input: the folder of the set, `{train,test}/questions.json` and `{train,test}/images/{id}.png`. Output:
examples in three forms, all built from the set's own questions and answers, and `questions` for the
evaluation.
"""

from __future__ import annotations

import json
import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Literal, NamedTuple

from minigpt4.assets import resolve
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn
from minigpt4.conversation.prompts import read_prompts
from minigpt4.datasets.source import Example, IndexedSource, SourceConfig, examples_of, file_digest, require_folder
from minigpt4.errors import DataError
from minigpt4.registry import path_field

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
CAPTIONS = (
    "{}",
    "{} on a light background",
    "an image of {}",
    "a picture of {}",
    "a simple drawing of {}",
)
DESCRIPTIONS = (
    "The image shows {}.",
    "The image shows {} on a light background.",
    "This is an image of {}.",
    "There is {} in the image.",
)
_log = logging.getLogger(__name__)
_ASKED = ("what", "presence", "negated")
Kind = Literal["shape", "colour", "yes/no", "yes/no negated"]


class Question(NamedTuple):
    """One question of the set, in its own words."""

    text: str
    answer: str
    image_id: int


class EasyVQA(IndexedSource):
    """One example per image."""

    @dataclass(frozen=True, kw_only=True)
    class Config(SourceConfig):
        """Which images, and what is made of their questions."""

        path: str = path_field()
        """The folder that holds `train/` and `test/`, or `asset:NAME`."""
        split: Literal["train", "test"] = "train"
        """The part of the set."""
        form: Literal["captions", "questions", "conversations"]
        """`captions`: a short caption, no question. `questions`: turns that each stand alone.
        `conversations`: the questions and a description of the image, in any order."""
        questions_per_image: int = 0
        """Questions drawn per sample; 0 takes all of the image's."""
        image_range: tuple[int, int] = (0, 0)
        """Images with a number from the first up to, not including, the second; (0, 0) takes all."""
        ask: dict[str, int] = field(default_factory=dict)
        """In place of `questions_per_image`: questions of each kind per image. `what`: at most so many of its own.
        `presence` and `negated` ("is there not a red shape?"), even numbers: half about what is there, half about what
        is not. In the set itself five of six ask for what is not there, and a model can do well without looking."""
        prompts: str = "alignment"
        """Instructions answered by a description (`conversations` only): a shipped file in `prompts/`, or a
        path."""

        def __post_init__(self) -> None:
            super().__post_init__()
            first, end = self.image_range
            if self.image_range != (0, 0) and not 0 <= first < end:
                raise ValueError(f"image_range must be (first, end) with 0 <= first < end, found {self.image_range}")
            if self.questions_per_image < 0:
                raise ValueError(f"questions_per_image must be 0 or more, found {self.questions_per_image}")
            if self.ask and (self.questions_per_image or self.form == "captions"):
                raise ValueError("ask excludes questions_per_image, and form: captions")
            wrong = [kind for kind in self.ask if kind not in _ASKED]
            if wrong:
                raise ValueError(f"ask: unknown kind {wrong[0]!r}; the kinds are {', '.join(_ASKED)}")
            if self.ask and sum(self.ask.values()) < 1:
                raise ValueError("ask: asks nothing")
            for kind, number in self.ask.items():
                if number < 0 or (kind != "what" and number % 2):
                    raise ValueError(f"ask.{kind} must be 0 or more{'' if kind == 'what' else ', and even'}: {number}")

    def __init__(self, config: Config, name: str) -> None:
        super().__init__(config, name)
        self.config = config
        self._images = require_folder(config.path, name) / config.split / "images"
        groups: dict[int, list[Question]] = defaultdict(list)
        first, end = config.image_range
        every = questions(config.path, config.split)
        self._wordings = {"presence": _wordings(every, negated=False), "negated": _wordings(every, negated=True)}
        for kind, wordings in self._wordings.items():
            never = [thing for thing in (*COLOURS, *SHAPES) if thing not in wordings]
            if config.ask.get(kind) and never:
                raise DataError(f"{name}: ask.{kind}: no question of {config.split} asks for {never[0]}", cause="row")
        for question in every:
            if not end or first <= question.image_id < end:
                groups[question.image_id].append(question)
        if not groups:
            raise DataError(f"{name}: {config.split} has no image in image_range {config.image_range}", cause="missing")
        if config.ask:
            groups = self._askable(groups)
        self._groups = sorted(groups.items())
        _check_images(self._images, list(groups))
        self.instructions = [""]
        if config.form == "conversations":
            self.instructions = [p.replace(IMAGE_MARK, "").strip() for p in read_prompts(config.prompts)]

    def digest(self) -> str:
        """See `Source.digest`: the questions."""
        return file_digest(self._images.parent / "questions.json")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._groups)

    def example(self, index: int, draw: random.Random) -> Example:
        """See `IndexedSource.example`."""
        image_id, asked = self._groups[index]
        if self.config.form == "captions":
            subject = subject_of(asked)
            turns = [Turn("", draw.choice(CAPTIONS).format(subject))]
        else:
            chosen = self._by_kind(asked, draw) if self.config.ask else self._drawn(asked, draw)
            turns = [Turn(question.text, question.answer) for question in chosen]
            if self.config.form == "conversations":
                description = draw.choice(DESCRIPTIONS).format(subject_of(asked))
                turns.insert(draw.randint(0, len(turns)), Turn(draw.choice(self.instructions), description))
        turns = [Turn(turn.question, self.process_text(turn.answer or "")) for turn in turns]
        file = self._images / f"{image_id}.png"
        return Example(f"easy_vqa/{self.config.split}/{image_id}", (file,), Dialogue(tuple(turns)))

    def _drawn(self, asked: list[Question], draw: random.Random) -> list[Question]:
        """Return questions of an image as the set has them, in random order."""
        return draw.sample(asked, min(self.config.questions_per_image or len(asked), len(asked)))

    def _askable(self, groups: dict[int, list[Question]]) -> dict[int, list[Question]]:
        """Return the images of which there is something to ask; the questions of a few tell neither colour nor shape.

        Raises:
            DataError: of none there is.
        """
        askable = {number: asked for number, asked in groups.items() if self._by_kind(asked, random.Random(0))}
        if not askable:
            raise DataError(f"{self.name}: of no image can be asked what `ask` wants: {self.config.ask}", cause="row")
        if len(askable) < len(groups):
            _log.info("%s: %d images tell too little to be asked about", self.name, len(groups) - len(askable))
        return askable

    def _by_kind(self, asked: list[Question], draw: random.Random) -> list[Question]:
        """Return questions of each kind as `ask` says, yes/no ones in wordings drawn from the whole set."""
        what = [question for question in asked if question.answer not in ("yes", "no")]
        chosen = draw.sample(what, min(self.config.ask.get("what", 0), len(what)))
        known = [word for word in facts_of(asked) if word]
        for kind in ("presence", "negated"):
            draw.shuffle(known)
            for word in islice(cycle(known), self.config.ask.get(kind, 0) // 2):
                other = draw.choice([thing for thing in (COLOURS if word in COLOURS else SHAPES) if thing != word])
                for thing in (word, other):
                    answer = "yes" if (thing == word) != (kind == "negated") else "no"
                    chosen.append(Question(draw.choice(self._wordings[kind][thing]), answer, asked[0].image_id))
        draw.shuffle(chosen)
        return chosen


def questions(path: str | Path, split: Literal["train", "test"]) -> list[Question]:
    """Return every question of a split, in the set's order.

    Raises:
        DataError: the file is missing or is not easy-VQA's.
    """
    file = resolve(str(path)) / split / "questions.json"
    if not file.is_file():
        raise DataError(
            f"{file} is missing: {str(path)!r} is not the easy-VQA folder; "
            "that holds train/ and test/, each with questions.json and images/",
            cause="missing",
        )
    try:
        return [
            Question(str(text), str(answer), int(image_id)) for text, answer, image_id in json.loads(file.read_bytes())
        ]
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}: must be a list of [question, answer, image number]: {error}", cause="row") from error


def kind_of(question: str, answer: str) -> Kind:
    """Return the kind of question that scores are reported by."""
    if answer in SHAPES:
        return "shape"
    if answer in COLOURS:
        return "colour"
    return "yes/no negated" if _is_negated(question) else "yes/no"


def facts_of(asked: Sequence[Question]) -> tuple[str | None, str | None]:
    """Return the colour and the shape that an image's questions tell, None for what they leave open."""
    colours: set[str] = set()
    shapes: set[str] = set()
    for question in asked:
        words = set(question.text.rstrip("?").split())
        if question.answer in ("yes", "no") and (question.answer == "yes") == _is_negated(question.text):
            continue
        colours |= {question.answer} & set(COLOURS) or words & set(COLOURS)
        shapes |= {question.answer} & set(SHAPES) or words & set(SHAPES)
    return min(colours, default=None), min(shapes, default=None)


def subject_of(asked: Sequence[Question]) -> str:
    """Return what the questions tell of their image: "a red triangle", "a red shape", "a triangle"."""
    colour, shape = facts_of(asked)
    return " ".join(["a", *([colour] if colour else []), shape or "shape"])


def _wordings(every: Sequence[Question], *, negated: bool) -> dict[str, list[str]]:
    """Return, by colour or shape, every wording in which the set asks whether it is there."""
    found: dict[str, set[str]] = defaultdict(set)
    for question in every:
        if question.answer in ("yes", "no") and _is_negated(question.text) == negated:
            for word in set(question.text.rstrip("?").split()) & {*COLOURS, *SHAPES}:
                found[word].add(question.text)
    return {word: sorted(texts) for word, texts in found.items()}


def _is_negated(question: str) -> bool:
    return bool({"not", "no"} & set(question.split()))


def _check_images(folder: Path, image_ids: list[int]) -> None:
    present = {file.name for file in folder.glob("*.png")} if folder.is_dir() else set()
    missing = [f"{image_id}.png" for image_id in sorted(image_ids) if f"{image_id}.png" not in present]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(image_ids)} images are missing ({examples_of(missing)}); "
            "fetch easy-VQA again",
            cause="missing",
        )
