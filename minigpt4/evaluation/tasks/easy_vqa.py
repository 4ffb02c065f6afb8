"""easy-VQA's test split as a task: answers, choices by likelihood, or captions."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

from minigpt4.assets import resolve
from minigpt4.config.tasks import EasyVqaTaskConfig
from minigpt4.datasets.easy_vqa import COLOURS, DESCRIPTIONS, SHAPES, facts_of, questions, subject_of
from minigpt4.datasets.easy_vqa import Question as Known
from minigpt4.evaluation.question import Question
from minigpt4.evaluation.tasks.task import Task

SPLIT: Literal["test"] = "test"
DESCRIBE = "Describe this image in detail."


class EasyVqaTask(Task):
    """Coloured shapes; a shuffled image has another colour and another shape."""

    Config = EasyVqaTaskConfig
    config: EasyVqaTaskConfig

    @property
    def scorer(self) -> str:  # type: ignore[override]
        """See `Task.scorer`."""
        return {"questions": "exact"}.get(self.config.form, self.config.form)

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        folder = resolve(self.config.path) / SPLIT / "images"
        every = questions(self.config.path, SPLIT)
        by_image: dict[int, list[Known]] = defaultdict(list)
        for known in every:
            by_image[known.image_id].append(known)
        found = []
        for number, known in enumerate(every):
            group, name = by_image[known.image_id], f"{known.image_id}.png"
            facts = facts_of(group)
            if self.config.form == "captions":
                if known is group[0]:
                    text = DESCRIBE if self.config.prompt == "{question}" else self.config.prompt
                    truth: dict[str, Any] = {"captions": [each.format(subject_of(group)) for each in DESCRIPTIONS]}
                    found.append(Question(name, name, text, truth, "", folder / name, facts=facts))
                continue
            truth = {"answer": known.answer}
            if self.config.form == "choices":
                if known.is_yes_no:
                    continue
                truth["choices"] = list(SHAPES if known.answer in SHAPES else COLOURS)
            text = self.ask(known.text)
            found.append(Question(str(number), name, text, truth, known.kind, folder / name, facts=facts))
        return found
