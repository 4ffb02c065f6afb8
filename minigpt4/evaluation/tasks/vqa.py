"""Visual question answering in the layouts of VQAv2 (OK-VQA), VizWiz, GQA and A-OKVQA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt4.config.tasks import VqaTaskConfig
from minigpt4.datasets.source import read_json
from minigpt4.errors import DataError
from minigpt4.evaluation.question import Question
from minigpt4.evaluation.tasks.task import Task

IMAGE_NAMES = {"vqav2": "COCO_val2014_{:012d}.jpg", "aokvqa": "{:012d}.jpg"}
"""File names for an image number in the val splits."""
Found = tuple[str, str, str, dict[str, Any], str]
"""Id, image, question, truth, kind."""


class VqaTask(Task):
    """Questions with short answers; each layout has the rule of its data set."""

    Config = VqaTaskConfig
    config: VqaTaskConfig

    @property
    def scorer(self) -> str:  # type: ignore[override]
        """See `Task.scorer`."""
        return {"vqav2": "vqa", "gqa": "exact"}.get(self.config.layout, "vizwiz")

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        folder, layout = self.folder(self.config.image_dir), self.config.layout
        read = {"vqav2": self._vqav2, "vizwiz": self._vizwiz, "gqa": self._gqa, "aokvqa": self._aokvqa}[layout]
        try:
            return [
                Question(id_, image, self.ask(text), truth, kind, folder / image)
                for id_, image, text, truth, kind in read(self._read("questions"))
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.config.questions}: does not have the layout {layout!r} ({type(error).__name__}: {error})",
                cause="row",
            ) from error

    def _read(self, key: str) -> Any:
        file = Path(getattr(self.config, key))
        if not getattr(self.config, key) or not file.is_file():
            raise DataError(f"{self.name}: file {str(file)!r} not found; set {key} of this task", cause="missing")
        return read_json(file)

    def _image(self, number: int) -> str:
        return (self.config.image_name or IMAGE_NAMES[self.config.layout]).format(int(number))

    def _vqav2(self, content: Any) -> Iterator[Found]:
        known = {row["question_id"]: row for row in self._read("annotations")["annotations"]}
        for row in content["questions"]:
            answers = known[row["question_id"]]
            truth = {"answers": [each["answer"] for each in answers["answers"]]}
            image = self._image(row["image_id"])
            yield str(row["question_id"]), image, row["question"], truth, answers.get("answer_type", "")

    def _vizwiz(self, content: Any) -> Iterator[Found]:
        for number, row in enumerate(content):
            truth = {"answers": [each["answer"] for each in row["answers"]]}
            yield str(number), row["image"], row["question"], truth, row.get("answer_type", "")

    def _gqa(self, content: Any) -> Iterator[Found]:
        for name, row in content.items():
            kind = (row.get("types") or {}).get("structural", "")
            yield name, f"{row['imageId']}.jpg", row["question"], {"answer": row["answer"]}, kind

    def _aokvqa(self, content: Any) -> Iterator[Found]:
        for row in content:
            if not row.get("difficult_direct_answer"):
                truth = {"answers": row["direct_answers"]}
                yield row["question_id"], self._image(row["image_id"]), row["question"], truth, ""
