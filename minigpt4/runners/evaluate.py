"""The `evaluate` runner: score a model on easy-VQA's test split."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from accelerate.utils import tqdm

from minigpt4.assets import resolve
from minigpt4.chat.engine import Engine, Prompt
from minigpt4.checkpoints.assemble import LoadedModel, check_files, load_configured
from minigpt4.config import Config
from minigpt4.config.sections import EvaluationConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.datasets.easy_vqa import Question, facts_of, questions
from minigpt4.evaluation.vqa import VqaQuestion, VqaScore, draw, score, with_other_images

_log = logging.getLogger(__name__)
SPLIT: Literal["test"] = "test"


class EvaluateRunner:
    """Asks every question in its own dialogue, decodes greedily, and compares answers by exact match."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.settings: EvaluationConfig = config.evaluation

    @classmethod
    def from_config(cls, config: Config) -> EvaluateRunner:
        """Build the runner of a config."""
        check_files(config, "model", "evaluation")
        return cls(config)

    def run(self) -> VqaScore:
        """Load the model and evaluate it."""
        return self.evaluate(load_configured(self.config, self.settings.device))

    def evaluate(self, loaded: LoadedModel) -> VqaScore:
        """Evaluate a loaded model; the result is logged, and written to `evaluation.output` if that is set.

        With `evaluation.control` the same questions are asked about other images, too.
        """
        engine = Engine(loaded)
        result = self._score(engine, shuffled=self.settings.shuffle_images)
        if self.settings.control and not self.settings.shuffle_images:
            result = replace(result, control=self._score(engine, shuffled=True))
        return result

    def _score(self, engine: Engine, *, shuffled: bool) -> VqaScore:
        """Ask the questions, about other images if `shuffled`."""
        asked = self._asked(shuffled=shuffled)
        started = time.monotonic()
        decoding = replace(self.config.chat, max_new_tokens=self.settings.max_new_tokens, temperature=0.0)
        answers: list[str] = []
        size = self.settings.batch_size
        for start in tqdm(range(0, len(asked), size), desc="evaluating", unit="batch"):
            answers += engine.answer(_prompts(engine, asked[start : start + size]), decoding)
        result = score(asked, answers)
        what = "images of other questions" if shuffled else "their own images"
        seconds = time.monotonic() - started
        _log.info(
            "%d questions about %s: %.1f %% correct, %.0f s", len(asked), what, 100 * result.overall.value, seconds
        )
        if self.settings.output:
            file = Path(self.settings.output)
            is_control = shuffled and not self.settings.shuffle_images
            self._write(file.with_stem(f"{file.stem}_control") if is_control else file, asked, result, shuffled)
        return result

    def _asked(self, *, shuffled: bool) -> list[VqaQuestion]:
        """Return the fixed sample of questions, with other images if `shuffled`."""
        folder = resolve(self.settings.path)
        by_image: dict[Path, list[Question]] = defaultdict(list)
        every = []
        for q in questions(folder, SPLIT):
            image = folder / SPLIT / "images" / f"{q.image_id}.png"
            by_image[image].append(q)
            every.append(VqaQuestion(q.text, q.answer, q.kind, image))
        asked = draw(every, self.settings.samples, self.settings.seed)
        if not shuffled:
            return asked
        facts = {image: facts_of(group) for image, group in by_image.items()}
        return with_other_images(asked, facts, self.settings.seed)

    def _write(self, file: Path, asked: list[VqaQuestion], result: VqaScore, shuffled: bool) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        low, high = result.overall.interval
        head = {
            "accuracy": result.overall.value,
            "interval95": [low, high],
            "questions": result.overall.total,
            "shuffled_images": shuffled,
            "by_kind": {kind: rate.value for kind, rate in sorted(result.by_kind.items())},
        }
        rows = [
            {"image": q.image.name, "question": q.text, "right": q.answer, "answer": answer}
            for q, answer in zip(asked, result.answers, strict=True)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)), encoding="utf-8")


def _prompts(engine: Engine, questions: Sequence[VqaQuestion]) -> list[Prompt]:
    """Return the prompts of a batch; an image of several questions is encoded once."""
    images = list(dict.fromkeys(question.image for question in questions))
    features = engine.query_features(images)
    of = {} if features is None else {image: features[n : n + 1] for n, image in enumerate(images)}
    return [Prompt(Dialogue((Turn(question.text),)), of[question.image]) for question in questions]
