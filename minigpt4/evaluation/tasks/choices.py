"""Multiple choice in the layouts of A-OKVQA, ScienceQA and IconQA; choices are ranked by likelihood."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt4.config.tasks import ChoicesTaskConfig
from minigpt4.datasets.source import read_json
from minigpt4.errors import DataError
from minigpt4.evaluation.question import Question
from minigpt4.evaluation.tasks.task import Task

Found = tuple[str, str, str, list[str], int, str]
"""Id, image, question, choices, number of the right one, kind."""


class ChoicesTask(Task):
    """Questions with a list of choices, one of them right."""

    Config = ChoicesTaskConfig
    config: ChoicesTaskConfig
    scorer = "choices"

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        file, folder = Path(self.config.questions), self.folder(self.config.image_dir)
        if not file.is_file():
            raise DataError(f"{self.name}: file {str(file)!r} not found; set questions of this task", cause="missing")
        read = {"aokvqa": self._aokvqa, "scienceqa": self._scienceqa, "iconqa": self._iconqa}[self.config.layout]
        found = []
        try:
            for name, image, text, choices, right, kind in read(read_json(file)):
                truth = {"choices": choices, "answer": choices[right]}
                found.append(Question(name, image, self.ask(text), truth, kind, folder / image))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(
                f"{file}: does not have the layout {self.config.layout!r} ({type(error).__name__}: {error})",
                cause="row",
            ) from error
        return found

    def _aokvqa(self, content: Any) -> Iterator[Found]:
        for row in content:
            image = self.config.image_name.format(int(row["image_id"]))
            yield row["question_id"], image, row["question"], row["choices"], row["correct_choice_idx"], ""

    def _scienceqa(self, content: Any) -> Iterator[Found]:
        """Yield the questions with an image; a hint stands in front of its question."""
        for name, row in content.items():
            if row["split"] == self.config.split and row.get("image"):
                text = f"{row.get('hint') or ''} {row['question']}".strip()
                image = f"{self.config.split}/{name}/{row['image']}"
                yield name, image, text, row["choices"], row["answer"], row.get("subject", "")

    def _iconqa(self, content: Any) -> Iterator[Found]:
        for name, row in content.items():
            yield name, f"{name}/image.png", row["question"], row["choices"], row["answer"], ""
