"""The parent of all tasks: a data layout, a prompt, a scorer.

Input: the settings of a task. Output: its questions. To add one, write a class with `questions` and a `scorer`, and
register it: `@TASKS.register("mine")`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from minigpt4.assets import resolve
from minigpt4.config.tasks import TaskConfig
from minigpt4.errors import DataError
from minigpt4.evaluation.question import Question, check_ids, draw


class Task(ABC):
    """Questions with known answers, and the rule by which answers are scored."""

    Config: ClassVar[type[Any]] = TaskConfig
    scorer: str = "exact"
    """Name in `SCORERS`."""

    def __init__(self, config: Any, name: str) -> None:
        self.config = config
        self.name = name

    @classmethod
    def from_config(cls, config: Any, *, name: str) -> Self:
        """Build the task; `name` is its key in the config, used in messages."""
        return cls(config, name)

    @abstractmethod
    def questions(self) -> list[Question]:
        """Return all questions, in the order of the data.

        Raises:
            DataError: the data is missing or does not have the expected layout.
        """

    def drawn(self, samples: int, seed: int) -> list[Question]:
        """Return the questions that are asked: `samples` of them, or the task's own number, or all for 0.

        Raises:
            DataError: see `questions`; two questions have the same id.
        """
        every = self.questions()
        check_ids(every, self.name)
        return draw(every, self.config.samples or samples, seed)

    def ask(self, question: str) -> str:
        """Return the prompt for a question of the data."""
        return str(self.config.prompt).replace("{question}", question)

    def folder(self, path: str) -> Path:
        """Return a folder of images.

        Raises:
            DataError: it is missing.
        """
        found = resolve(path)
        if not found.is_dir():
            raise DataError(f"{self.name}: folder {path!r} not found; set image_dir of this task", cause="missing")
        return found
