"""POPE: `Is there a dog in the image?`, in a random, a popular and an adversarial split."""

from __future__ import annotations

from pathlib import Path

from minigpt4.config.tasks import PopeTaskConfig
from minigpt4.datasets.source import parse_json
from minigpt4.errors import DataError
from minigpt4.evaluation.question import Question
from minigpt4.evaluation.tasks.task import Task


class PopeTask(Task):
    """Yes/no questions; the split is the kind."""

    Config = PopeTaskConfig
    config: PopeTaskConfig
    scorer = "yes_no"

    def questions(self) -> list[Question]:
        """See `Task.questions`; a split is named by the last word of its file, `coco_pope_random.json`."""
        folder, found = self.folder(self.config.image_dir), []
        for path in map(Path, self.config.files):
            if not path.is_file():
                raise DataError(f"{self.name}: file {str(path)!r} not found; set files of this task", cause="missing")
            split = path.stem.rpartition("_")[2]
            for number, line in enumerate(path.read_bytes().splitlines(), start=1):
                if not line.strip():
                    continue
                row = parse_json(line, path, number)
                try:
                    image, text, label = row["image"], row["text"], row["label"]
                except (KeyError, TypeError) as error:
                    raise DataError(f"{path}:{number}: needs image, text and label: {error}", cause="row") from error
                if label not in ("yes", "no"):
                    raise DataError(f"{path}:{number}: label must be yes or no, found {label!r}", cause="row")
                name = f"{split}/{row.get('question_id', number)}"
                found.append(Question(name, image, self.ask(text), {"answer": label}, split, folder / image))
        return found
