"""easy-VQA in crossed pairs: two images, the same questions in the same words, opposite answers.

Input: the folder of the data set; see `minigpt4.datasets.easy_vqa`. Output: examples in groups of eight, one image of
each colour. Each image has a partner of another colour and another shape, and both are asked about the colour and the
shape of either. So every wording is answered with yes as often as with no, and so is every image: neither tells the
answer alone, and from the first step on a model is rewarded for comparing the two.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator

from minigpt4.config.parts import CrossedVQAConfig, EasyVQAConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.datasets.easy_vqa import COLOURS, DESCRIPTIONS, EasyVQA, Question, facts_of, subject_of
from minigpt4.datasets.source import Example, Item
from minigpt4.errors import DataError

GROUP = len(COLOURS)
"""Images in a group; a batch of a multiple of it holds whole groups."""


class CrossedVQA(EasyVQA):
    """easy-VQA, one example per image, in groups."""

    Config = CrossedVQAConfig  # type: ignore[assignment]

    def __init__(self, config: CrossedVQAConfig, name: str) -> None:
        plain = EasyVQAConfig(
            path=config.path,
            split=config.split,
            form="conversations",
            image_range=config.image_range,
            prompts=config.prompts,
            ask={"what": 2, "presence": 2, "negated": 2},  # leaves out images of which nothing is known
            text=config.text,
            weight=config.weight,
        )
        super().__init__(plain, name)
        self.settings = config
        self._by_colour: dict[str, list[int]] = defaultdict(list)
        self._shape: dict[int, str] = {}
        for index, (_, group) in enumerate(self._groups):
            colour, shape = facts_of(group)
            if colour and shape:
                self._by_colour[colour].append(index)
                self._shape[index] = shape
        shapes = {colour: {self._shape[index] for index in self._by_colour[colour]} for colour in COLOURS}
        lacking = [colour for colour in COLOURS if len(shapes[colour]) < 2]
        if lacking:
            raise DataError(
                f"{name}: crossed pairs need images of two shapes of every colour; {config.split} has "
                f"{len(shapes[lacking[0]])} of {lacking[0]} in image_range {config.image_range}: widen it",
                cause="missing",
            )

    def stream(self, seed: int, reader: int, readers: int, start: int = 0) -> Iterator[Item]:
        """See `Source.stream`; each reader takes every `readers`-th group of the endless sequence of groups."""
        first, skipped = divmod(start, GROUP)
        for turn in itertools.count(first):
            items = self._items(turn * readers + reader, f"{seed}/{self.name}")
            yield from itertools.islice(items, skipped, None)
            skipped = 0

    def in_order(self) -> Iterator[Item]:
        """See `Source.in_order`: as many groups as there are images for, each image with its description first."""
        for number in range(max(1, len(self) // GROUP)):
            yield from self._items(number, f"{self.name}/in order", described=True)

    def _items(self, number: int, seed: str, *, described: bool = False) -> Iterator[Item]:
        """Yield the examples of group `number`; all its random choices depend on `seed` and `number` only."""
        rng = random.Random(f"{seed}/{number}")
        settings = self.settings
        is_late = number * GROUP >= settings.negated_after
        colours = rng.sample(COLOURS, GROUP)
        for one, other in zip(colours[::2], colours[1::2], strict=True):
            pair = self._pair(one, other, rng)
            negated = is_late and rng.random() < settings.negated
            kind = "negated" if negated else "presence"
            things = sorted({thing for index in pair for thing in facts_of(self._groups[index][1]) if thing})
            asked = [(thing, rng.choice(self._wordings[kind][thing])) for thing in things]
            for index in pair:
                image_id, group = self._groups[index]
                describes = described or rng.random() < settings.described
                turns = self._turns(image_id, group, asked, negated, describes, rng)
                yield self.guarded(lambda i=image_id, t=turns: self._example(i, t), self.place(index))  # type: ignore[misc]

    def _pair(self, one: str, other: str, rng: random.Random) -> tuple[int, int]:
        """Return an image of each colour, of different shapes."""
        first = rng.choice(self._by_colour[one])
        partners = [index for index in self._by_colour[other] if self._shape[index] != self._shape[first]]
        return first, rng.choice(partners)

    def _turns(
        self,
        image_id: int,
        group: list[Question],
        asked: list[tuple[str, str]],
        negated: bool,
        describes: bool,
        rng: random.Random,
    ) -> list[Turn]:
        """Return the description, some of the image's own questions, and those that its pair shares."""
        description = rng.choice(DESCRIPTIONS).format(subject_of(group))
        instruction = rng.choice(self.instructions)
        own = [question for question in group if not question.is_yes_no]
        own = rng.sample(own, min(self.settings.what, len(own)))
        return [
            *([Turn(instruction, description)] if describes else []),
            *(Turn(question.text, question.answer) for question in own),
            *(Turn(text, "yes" if (thing in facts_of(group)) != negated else "no") for thing, text in asked),
        ]

    def _example(self, image_id: int, turns: list[Turn]) -> Example:
        turns = [Turn(turn.question, self.process_text(turn.answer or "")) for turn in turns]
        file = self._images / f"{image_id}.png"
        return Example(f"easy_vqa/{self.settings.split}/{image_id}", (file,), Dialogue(tuple(turns)))
