"""The `evaluate` runner: every task's questions through a model, into one file of answers; then their scores.

Under torchrun, each rank takes every n-th batch. Batches are the same for any number of ranks and after any
interruption, so the file is, too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm

from minigpt4.chat.engine import Engine
from minigpt4.checkpoints.assemble import LoadedModel, check_files, load_configured
from minigpt4.checkpoints.manifest import identify
from minigpt4.config import Config
from minigpt4.config.sections import EvaluationConfig
from minigpt4.config.tasks import EasyVqaTaskConfig
from minigpt4.errors import DataError
from minigpt4.evaluation.answers import FORMAT, AnswerFile, Row
from minigpt4.evaluation.asking import ask
from minigpt4.evaluation.question import OWN, SHUFFLED, Question, data_hash, with_images
from minigpt4.evaluation.report import Report, report_of
from minigpt4.evaluation.tasks.task import Task
from minigpt4.registry import TASKS, Component
from minigpt4.runners.distributed import build_accelerator, gather_objects, on_main_process

_log = logging.getLogger(__name__)
DEFAULT_TASK = "easy_vqa"


@dataclass(frozen=True)
class Part:
    """A batch: some questions of one task about one set of images."""

    task: str
    images: str
    questions: Sequence[Question]
    max_new_tokens: int


class EvaluateRunner:
    """Asks every question in its own dialogue, decodes greedily, keeps every answer, and scores them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.settings: EvaluationConfig = config.evaluation
        self.tasks: dict[str, Task] = {name: part.build(name=name) for name, part in tasks_of(config).items()}
        self.output = Path(self.settings.output) if self.settings.output else None
        if self.output is not None and self.output.suffix in (".json", ".md", ".tex"):
            raise DataError(f"evaluation.output: {self.output}: the scores take this name; end it in .jsonl")
        started = int(os.environ.get("WORLD_SIZE", "1") or 1)
        run = replace(config.run, device=self.settings.device)
        self._accelerator: Accelerator | None = build_accelerator(run, (), Path()) if started > 1 else None

    @classmethod
    def from_config(cls, config: Config) -> EvaluateRunner:
        """Build the runner of a config.

        Raises:
            ConfigError: a file or asset that it names does not exist.
        """
        if config.evaluation.tasks:  # then `path` is not read
            config = replace(config, evaluation=replace(config.evaluation, path=""))
        check_files(config, "model", "evaluation")
        return cls(config)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints the result."""
        return self._accelerator is None or self._accelerator.is_main_process

    def run(self) -> Report:
        """Load the model and evaluate it."""
        return self.evaluate(load_configured(self.config, self.settings.device))

    def evaluate(self, loaded: LoadedModel) -> Report:
        """Evaluate a loaded model; answers and scores are written if `evaluation.output` is set.

        Raises:
            DataError: a task's data cannot be used, or the output cannot be written.
        """
        started = time.monotonic()
        parts, head = self._plan(loaded)
        keys = [[(part.task, part.images, q.id) for q in part.questions] for part in parts]
        accelerator = self._accelerator
        rank = 0 if accelerator is None else accelerator.process_index
        file = AnswerFile(self.output, head, keys, rank)
        try:
            self._once(file.recover)
            file.open()
            self._ask(Engine(loaded), file, parts)
        except OSError as error:
            raise DataError(f"evaluation.output: {self.output}: cannot be written: {error}") from error
        file.close()
        others = [] if accelerator is None else gather_objects(accelerator, list(file.in_order()))

        def finish() -> Report:
            report = report_of(head, file.finish(others), self.settings.seed)
            if self.output is not None:
                report.write(self.output)
            return report

        report: Report = self._once(finish)
        _log.info("%d answers, %.0f s", sum(map(len, keys)), time.monotonic() - started)
        if accelerator is not None:
            accelerator.wait_for_everyone()
            accelerator.end_training()
        return report

    def _once(self, work: Any) -> Any:
        return work() if self._accelerator is None else on_main_process(self._accelerator, work)

    def _ask(self, engine: Engine, file: AnswerFile, parts: Sequence[Part]) -> None:
        """Answer the batches of this rank that the file does not have yet."""
        waiting = file.waiting()
        ranks, rank = 1, 0
        if self._accelerator is not None:
            ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        for number in tqdm(waiting[rank::ranks], desc="evaluating", unit="batch", main_process_only=True):
            part = parts[number]
            decoding = replace(self.config.chat, max_new_tokens=part.max_new_tokens, temperature=0.0)
            found = ask(engine, part.questions, decoding)
            file.add([_row(part, q, result) for q, result in zip(part.questions, found, strict=True)])

    def _plan(self, loaded: LoadedModel) -> tuple[list[Part], Row]:
        """Return all batches, and the first line of the file."""
        settings, parts, data, described = self.settings, [], {}, {}
        for name, task in self.tasks.items():
            questions = task.drawn(settings.samples, settings.seed)
            tokens = task.config.max_new_tokens or settings.max_new_tokens
            data[name] = data_hash(questions)
            described[name] = {"scorer": task.scorer, "questions": len(questions), "max_new_tokens": tokens}
            own = [SHUFFLED] if settings.shuffle_images else [OWN, *dict.fromkeys(settings.controls)]
            for images in own:
                asked = with_images(questions, images, settings.seed)
                if len(asked) < len(questions):
                    _log.info("%s: %d questions have no other image", name, len(questions) - len(asked))
                for start in range(0, len(asked), settings.batch_size):
                    parts.append(Part(name, images, asked[start : start + settings.batch_size], tokens))
        head = {
            "answers_format": FORMAT,
            "config": config_hash(self.config),
            "weights": weights_hash(loaded),
            "data": data,
            "tasks": described,
            "decoding": "greedy" if self.config.chat.num_beams == 1 else f"{self.config.chat.num_beams} beams",
            "device": loaded.model.device.type,
            "torch": torch.__version__,
            "seed": settings.seed,
        }
        return parts, head


def tasks_of(config: Config) -> dict[str, Component]:
    """Return the tasks of a config by name; easy-VQA's questions if it names none."""
    settings = config.evaluation
    return settings.tasks or {
        DEFAULT_TASK: Component(TASKS, "easy_vqa", EasyVqaTaskConfig(path=settings.path)),
    }


def _row(part: Part, question: Question, result: dict[str, Any]) -> Row:
    row: Row = {"task": part.task, "images": part.images, "id": question.id, "image": question.image}
    if question.shown:
        row["shown"] = question.shown
    if question.kind:
        row["kind"] = question.kind
    return {**row, "question": question.text, "truth": dict(question.truth), **result}


def config_hash(config: Config) -> str:
    """Return a short hash of what decides answers besides weights and data; output, device and checkpoint are left out.

    The checkpoint counts by its weights.
    """
    parts: dict[str, Any] = {
        name: dict(config.values[name]) for name in ("model", "processors", "conversation", "chat")
    }
    parts["evaluation"] = {k: v for k, v in config.values["evaluation"].items() if k not in ("output", "device")}
    parts["model"].pop("init_from")
    parts["compat"] = config.compat
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def weights_hash(loaded: LoadedModel) -> str:
    """Return a short hash of a model: every value of what was trained, and the fingerprints of the frozen parts."""
    digest = hashlib.sha256()
    trained = loaded.model.trained_names()
    for name, tensor in sorted(loaded.model.state_dict().items()):
        if name in trained:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for name, identity in sorted(identify(loaded.model, trained).items()):
        digest.update(f"{name} {identity.fingerprint}".encode())
    return digest.hexdigest()[:16]
