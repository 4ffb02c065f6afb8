"""Your own questions: JSON lines, or a TSV file with base64 images as VLMEvalKit writes it."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import string
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minigpt4.config.tasks import RowsTaskConfig
from minigpt4.datasets.source import parse_json
from minigpt4.errors import DataError
from minigpt4.evaluation.question import Question
from minigpt4.evaluation.tasks.task import Task

NEEDED = {"exact": "answer", "yes_no": "answer", "choices": "choices", "vqa": "answers", "vizwiz": "answers"}
"""What a row must have for each scorer, besides `captions` for the scorer of that name."""
_TRUTH = ("answer", "answers", "captions", "choices", "objects")


class RowsTask(Task):
    """Rows with `question`, `image` (a path) and the known answer; optional: `id`, `kind`."""

    Config = RowsTaskConfig
    config: RowsTaskConfig

    @property
    def scorer(self) -> str:  # type: ignore[override]
        """See `Task.scorer`."""
        return self.config.scorer

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        file = Path(self.config.path)
        if not file.is_file():
            raise DataError(f"{self.name}: file {str(file)!r} not found; set path of this task", cause="missing")
        if file.suffix == ".tsv":
            return list(self._from_tsv(file))
        return list(self._from_lines(file))

    def _from_lines(self, file: Path) -> Iterator[Question]:
        folder = Path(self.config.image_dir) if self.config.image_dir else file.parent
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            row = parse_json(line, file, number)
            if not isinstance(row, dict) or not isinstance(row.get("question", ""), str):
                raise DataError(f"{place}: must be an object with a text `question`", cause="row")
            image = row.get("image")
            if image is not None and not isinstance(image, str):
                raise DataError(f"{place}: `image` must be a path, found {image!r}", cause="row")
            truth = self._truth(row, place)
            name = image or f"no image, line {number}"
            source = folder / image if image else None
            kind = str(row.get("kind", ""))
            text = self.ask(row.get("question", ""))
            yield Question(str(row.get("id", number)), name, text, truth, kind, source)

    def _from_tsv(self, file: Path) -> Iterator[Question]:
        """Yield the rows of a TSV file; a short `image` is the index of the row whose image it shares."""
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: is not UTF-8 text: {error}", cause="row") from error
        rows = list(csv.DictReader(io.StringIO(text), delimiter="\t"))
        if not rows or not {"index", "question"} <= rows[0].keys() or not {"image", "image_path"} & rows[0].keys():
            found = ", ".join(map(str, rows[0])) if rows else "nothing"
            raise DataError(
                f"{file}:1: needs the columns index, question, and image or image_path; found {found}", cause="row"
            )
        images: dict[str, tuple[str, bytes]] = {}
        for number, row in enumerate(rows, start=2):
            place = f"{file}:{number}"
            name, source = self._image(row, images, file, place)
            images[row["index"]] = (name, source) if isinstance(source, bytes) else (name, b"")
            letters = [letter for letter in string.ascii_uppercase if (row.get(letter) or "").strip()]
            values: dict[str, Any] = {"answer": row.get("answer") or ""}
            if letters:
                values["choices"] = [row[letter].strip() for letter in letters]
                if values["answer"] in letters:
                    values["answer"] = row[values["answer"]].strip()
            elif (many := values["answer"]).startswith("["):
                try:
                    values["answers"] = [str(each) for each in json.loads(many.replace("'", '"'))]
                except ValueError as error:
                    raise DataError(
                        f"{place}: `answer` is not a list of answers: {many[:60]!r}", cause="row"
                    ) from error
            hint = (row.get("hint") or "").strip()
            asked = self.ask(f"{hint} {row['question']}".strip() if hint.lower() != "nan" else row["question"])
            kind = row.get("category") or ""
            yield Question(row["index"], name, asked, self._truth(values, place), kind, source)

    def _image(
        self, row: Mapping[str, str], images: Mapping[str, tuple[str, bytes]], file: Path, place: str
    ) -> tuple[str, Path | bytes]:
        """Return name and content of a row's image."""
        given = (row.get("image") or "").strip()
        if not given and row.get("image_path"):
            folder = Path(self.config.image_dir) if self.config.image_dir else file.parent
            return row["image_path"], folder / row["image_path"]
        if given in images and len(given) < 64:
            return images[given]
        try:
            return f"image of {row['index']}", base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(
                f"{place}: `image` is neither base64 nor the index of an earlier row: {given[:40]!r}", cause="row"
            ) from error

    def _truth(self, row: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Return what the scorer compares with, after checking that it is there."""
        truth = {name: row[name] for name in _TRUTH if name in row}
        needed = NEEDED.get(self.config.scorer, self.config.scorer)
        if self.config.scorer != "failures" and not truth.get(needed):
            raise DataError(f"{place}: the scorer {self.config.scorer!r} needs {needed!r}", cause="row")
        for name in ("answers", "captions", "choices"):
            if name in truth and not (isinstance(truth[name], list) and all(isinstance(t, str) for t in truth[name])):
                raise DataError(f"{place}: {name!r} must be a list of texts", cause="row")
        if "answer" in truth and not isinstance(truth["answer"], str):
            raise DataError(f"{place}: 'answer' must be text, found {truth['answer']!r}", cause="row")
        if self.config.scorer == "choices" and truth.get("answer") not in truth["choices"]:
            raise DataError(f"{place}: the answer {truth.get('answer')!r} is not one of the choices", cause="row")
        if self.config.scorer != "choices":
            truth.pop("choices", None)
        return truth
