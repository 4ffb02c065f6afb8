"""easy-VQA: images of one coloured shape and questions about them (MIT, github.com/vzhou842/easy-VQA).

Input: the folder of the data set, `{train,test}/questions.json` and `{train,test}/images/{id}.png`. Output: examples in
three forms, made from its questions and answers; and `questions` for the evaluation.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Literal, NamedTuple

from minigpt4.assets import resolve
from minigpt4.config.parts import EasyVQAConfig
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn, read_prompts
from minigpt4.datasets.source import Example, IndexedSource, read_json, require, shortened
from minigpt4.errors import DataError

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
Kind = Literal["shape", "colour", "yes/no", "yes/no negated"]


class Question(NamedTuple):
    """One question of the data set."""

    text: str
    answer: str
    image_id: int

    @property
    def is_yes_no(self) -> bool:
        """Whether the answer is yes or no."""
        return self.answer in ("yes", "no")

    @property
    def is_negated(self) -> bool:
        """Whether the question has a `not` or a `no`."""
        return bool({"not", "no"} & set(self.text.split()))

    @property
    def things(self) -> set[str]:
        """The colours and shapes in the question."""
        return set(self.text.rstrip("?").split()) & {*COLOURS, *SHAPES}

    @property
    def kind(self) -> Kind:
        """The kind of question that scores are reported by."""
        if self.is_yes_no:
            return "yes/no negated" if self.is_negated else "yes/no"
        return "shape" if self.answer in SHAPES else "colour"


class EasyVQA(IndexedSource):
    """easy-VQA, one example per image."""

    Config = EasyVQAConfig

    def __init__(self, config: EasyVQAConfig, name: str) -> None:
        super().__init__(config, name)
        self.config = config
        folder = require(config.path, "folder", name) / config.split
        self._images = folder / "images"
        self.annotations = folder / "questions.json"
        every = questions(config.path, config.split)
        self._wordings = {"presence": _wordings(every, negated=False), "negated": _wordings(every, negated=True)}
        for kind, wordings in self._wordings.items():
            never = [thing for thing in (*COLOURS, *SHAPES) if thing not in wordings]
            if config.ask.get(kind) and never:
                raise DataError(
                    f"{name}: ask.{kind}: {config.split} has no such question about {never[0]}", cause="row"
                )
        groups: dict[int, list[Question]] = defaultdict(list)
        first, end = config.image_range
        for question in every:
            if not end or first <= question.image_id < end:
                groups[question.image_id].append(question)
        if not groups:
            raise DataError(f"{name}: {config.split} has no image in image_range {config.image_range}", cause="missing")
        if config.ask:
            groups = self._with_questions(groups)
        self._groups = sorted(groups.items())
        present = {file.name for file in self._images.glob("*.png")} if self._images.is_dir() else set()
        missing = [f"{image_id}.png" for image_id, _ in self._groups if f"{image_id}.png" not in present]
        if missing:
            raise DataError(
                f"{self._images}: {len(missing)} of {len(groups)} images are missing ({shortened(missing)}); "
                "download easy-VQA again",
                cause="missing",
            )
        self.instructions = [""]
        if config.form == "conversations":
            self.instructions = [p.replace(IMAGE_MARK, "").strip() for p in read_prompts(config.prompts)]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._groups)

    def example(self, index: int, rng: random.Random) -> Example:
        """See `IndexedSource.example`."""
        image_id, group = self._groups[index]
        if self.config.form == "captions":
            turns = [Turn("", rng.choice(CAPTIONS).format(subject_of(group)))]
        else:
            if self.config.ask:
                chosen = self._by_kind(group, rng)
            else:
                chosen = rng.sample(group, min(self.config.questions_per_image or len(group), len(group)))
            turns = [Turn(question.text, question.answer) for question in chosen]
            if self.config.form == "conversations":
                description = rng.choice(DESCRIPTIONS).format(subject_of(group))
                turns.insert(rng.randint(0, len(turns)), Turn(rng.choice(self.instructions), description))
        turns = [Turn(turn.question, self.process_text(turn.answer or "")) for turn in turns]
        file = self._images / f"{image_id}.png"
        return Example(f"easy_vqa/{self.config.split}/{image_id}", (file,), Dialogue(tuple(turns)))

    def _with_questions(self, groups: dict[int, list[Question]]) -> dict[int, list[Question]]:
        """Return the images for which `ask` gives a question; of a few, neither colour nor shape is known.

        Raises:
            DataError: there is no such image.
        """
        kept = {image_id: group for image_id, group in groups.items() if self._by_kind(group, random.Random(0))}
        if not kept:
            raise DataError(f"{self.name}: ask {self.config.ask} gives no question for any image", cause="row")
        if len(kept) < len(groups):
            _log.info("%s: %d images are left out: ask gives no question for them", self.name, len(groups) - len(kept))
        return kept

    def _by_kind(self, group: list[Question], rng: random.Random) -> list[Question]:
        """Return questions of each kind as in `ask`; the wording of yes/no questions is drawn from the whole set."""
        what = [question for question in group if not question.is_yes_no]
        chosen = rng.sample(what, min(self.config.ask.get("what", 0), len(what)))
        known = [thing for thing in facts_of(group) if thing]
        for kind in ("presence", "negated"):
            rng.shuffle(known)
            for thing in islice(cycle(known), self.config.ask.get(kind, 0) // 2):
                other = rng.choice([each for each in (COLOURS if thing in COLOURS else SHAPES) if each != thing])
                for asked in (thing, other):
                    answer = "yes" if (asked == thing) != (kind == "negated") else "no"
                    chosen.append(Question(rng.choice(self._wordings[kind][asked]), answer, group[0].image_id))
        rng.shuffle(chosen)
        return chosen


def questions(path: str | Path, split: Literal["train", "test"]) -> list[Question]:
    """Return every question of a split, in the order of the file.

    Raises:
        DataError: the file is missing or does not have the layout of easy-VQA.
    """
    file = resolve(str(path)) / split / "questions.json"
    if not file.is_file():
        raise DataError(
            f"{file} not found: {str(path)!r} is not the easy-VQA folder, which has train/ and test/, each with "
            "questions.json and images/",
            cause="missing",
        )
    try:
        return [Question(str(text), str(answer), int(image_id)) for text, answer, image_id in read_json(file)]
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}: must be a list of [question, answer, image number]: {error}", cause="row") from error


def facts_of(group: Sequence[Question]) -> tuple[str | None, str | None]:
    """Return the colour and the shape of an image according to its questions, None if they do not say."""
    things: set[str] = set()
    for question in group:
        if question.is_yes_no:
            things |= question.things if (question.answer == "yes") != question.is_negated else set()
        else:
            things |= question.things | {question.answer}
    return min(things & set(COLOURS), default=None), min(things & set(SHAPES), default=None)


def subject_of(group: Sequence[Question]) -> str:
    """Return what an image shows according to its questions: "a red triangle", "a red shape", "a triangle"."""
    colour, shape = facts_of(group)
    return " ".join(["a", *([colour] if colour else []), shape or "shape"])


def _wordings(every: Sequence[Question], *, negated: bool) -> dict[str, list[str]]:
    """Return, for each colour and shape, all wordings of the yes/no questions about it."""
    found: dict[str, set[str]] = defaultdict(set)
    for question in every:
        if question.is_yes_no and question.is_negated == negated:
            for thing in question.things:
                found[thing].add(question.text)
    return {thing: sorted(texts) for thing, texts in found.items()}
