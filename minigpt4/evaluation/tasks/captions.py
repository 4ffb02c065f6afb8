"""Captions of COCO, NoCaps and Flickr30k: one question per image, all of its captions as references."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minigpt4.config.tasks import CaptionsTaskConfig
from minigpt4.datasets.source import read_json
from minigpt4.errors import DataError
from minigpt4.evaluation.question import Question
from minigpt4.evaluation.tasks.task import Task


class CaptionsTask(Task):
    """Images with several captions each."""

    Config = CaptionsTaskConfig
    config: CaptionsTaskConfig
    scorer = "captions"

    def questions(self) -> list[Question]:
        """See `Task.questions`; images without a caption are left out."""
        file, folder = Path(self.config.annotations), self.folder(self.config.image_dir)
        if not file.is_file():
            raise DataError(f"{self.name}: file {str(file)!r} not found; set annotations of this task", cause="missing")
        read = {"karpathy": self._karpathy, "flickr": self._flickr}.get(self.config.layout, self._coco)
        try:
            found = list(read(file))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}: does not have the layout {self.config.layout!r} ({type(error).__name__}: {error})",
                cause="row",
            ) from error
        text = self.ask("")
        return [
            Question(name, name, text, {"captions": known}, kind, folder / name) for name, known, kind in found if known
        ]

    def _coco(self, file: Path) -> Iterator[tuple[str, list[str], str]]:
        """Yield name, captions and kind of each image; NoCaps has the same layout, and a `domain` as kind."""
        content = read_json(file)
        known: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for row in content["annotations"]:
            known[row["image_id"]].append(row["caption"])
        for image in content["images"]:
            yield image["file_name"], known[image["id"]], image.get("domain", "")

    def _karpathy(self, file: Path) -> Iterator[tuple[str, list[str], str]]:
        for image in read_json(file)["images"]:
            if image["split"] == self.config.split:
                name = str(Path(image.get("filepath", "")) / image["filename"])
                yield name, [sentence["raw"] for sentence in image["sentences"]], ""

    def _flickr(self, file: Path) -> Iterator[tuple[str, list[str], str]]:
        """Yield from lines `NAME.jpg#0<tab>caption`."""
        known: dict[str, list[str]] = {}
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            name, tab, caption = line.partition("\t")
            if not tab or "#" not in name:
                raise DataError(f"{file}:{number}: must be `NAME.jpg#0<tab>caption`, found {line[:60]!r}", cause="row")
            known.setdefault(name.rpartition("#")[0], []).append(caption)
        yield from ((name, captions, "") for name, captions in known.items())
