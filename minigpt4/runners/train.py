"""The `train` runner: both stages, on one CPU or many GPUs.

Input: a `Config`. Output: the run folder with `config.yaml`, `metrics.jsonl`, `log.txt` and `checkpoints/`. The same for
`python train.py`, `torchrun train.py` and a notebook. The loss of a step is the sum over all supervised tokens of all ranks
and accumulated batches, divided by their number.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import tqdm
from torch import Tensor

from minigpt4 import __version__
from minigpt4.batch import Batch
from minigpt4.checkpoints.assemble import LoadedModel, assemble
from minigpt4.checkpoints.manifest import FORMAT, Manifest, PartIdentity, identify
from minigpt4.checkpoints.store import CheckpointStore, read_state, read_trained
from minigpt4.config import Config, missing_files
from minigpt4.config.sections import RunSection
from minigpt4.datasets.loader import BatchLoader, StreamPlan, build_loader, fixed_batches
from minigpt4.datasets.mixture import Mixture
from minigpt4.errors import CheckpointError, ConfigError, TrainingError
from minigpt4.runners.launch import build_accelerator, gather_objects, log_file, random_state, restore_random_state
from minigpt4.runners.metrics import MetricsLog, wanted_trackers
from minigpt4.runners.progress import Progress, accumulation_steps, start_block
from minigpt4.runners.schedule import learning_rate
from minigpt4.runners.validation import Validation, validate

_log = logging.getLogger(__name__)


class TrainRunner:
    """Trains the declared parts of a model."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run_section: RunSection = config.run
        self.folder = Path(self.run_section.output_dir)
        self.store = CheckpointStore(self.folder / "checkpoints", self.run_section.keep_last)
        self.progress = Progress()

    @classmethod
    def from_config(cls, config: Config) -> TrainRunner:
        """Build the runner of a config, after checking all that can be checked without loading anything.

        Raises:
            ConfigError: sections, values or files are missing.
        """
        config.require("model", "conversation", "datasets", "run")
        problems = missing_files(config)
        if config.run.total_steps < 1:
            problems.append("run.total_steps: must be at least 1: pass --options run.total_steps=N")
        if not config.datasets.train:
            problems.append("datasets.train: names no data set to train on")
        if problems:
            raise ConfigError(problems)
        return cls(config)

    def run(self) -> LoadedModel:
        """Train to the last step, and return the trained model.

        Raises:
            MiniGPT4Error: anything that a user can mend.
        """
        resumed = self._resume_point()
        self._start()
        with log_file(self.folder / "log.txt") if self.accelerator.is_main_process else nullcontext():
            self._set_up(resumed)
            self._train()
            self._finish()
        return self.loaded

    def _train(self) -> None:
        """All steps that are left."""
        run = self.run_section
        bar = tqdm(initial=self.progress.step, total=run.total_steps, desc=self.folder.name, unit="step")
        batches = iter(self.loader)
        while self.progress.step < run.total_steps:
            self._step(batches)
            bar.update()
            if self._due(run.log_every_steps) or self.progress.step in (1, run.total_steps):
                bar.set_postfix(loss=f"{self._log_step():.4f}")
            if self._due(run.validate_every_steps):
                self._validate()
            if self._due(run.save_every_steps):
                self._save()
        bar.close()

    def _start(self) -> None:
        """Processes, devices, and the run folder."""
        run = self.run_section
        self.accelerator = build_accelerator(run, wanted_trackers(self.config.tracking), self.folder)
        self.accumulation = accumulation_steps(run, self.accelerator.num_processes)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")

    def _set_up(self, resumed: Path | None) -> None:
        """Parts, data, optimiser, and where a resumed run left off."""
        run = self.run_section
        self.loaded = assemble(self.config)
        self.model = self.loaded.model.to(self.accelerator.device).train()
        self.identities = identify(self.model)
        if run.gradient_checkpointing:
            self.model.language_model.model.gradient_checkpointing_enable()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(_groups(self.model, run.weight_decay), betas=run.adam_betas, eps=run.adam_eps)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.metrics = MetricsLog(self.accelerator, self.folder)
        self.positions: dict[int, int] = {}
        self._skipped: Counter[str] = Counter()
        if resumed is not None:
            self._restore(resumed)
        self.loader = self._loader()
        self.validation = self._validation_batches()
        self.metrics.start(self.config.tracking, self.folder.name, self.config.values)
        self._window = Window()
        if self.accelerator.is_main_process:
            if run.warmup_steps > run.total_steps:
                _log.warning("run.warmup_steps %d is longer than the run of %d", run.warmup_steps, run.total_steps)
            precision = self.accelerator.mixed_precision
            _log.info(
                "%s", start_block(self.model, run, self.accelerator.num_processes, self.accumulation, precision)
            )

    def _resume_point(self) -> Path | None:
        """Return the checkpoint to go on from, None to start anew.

        Raises:
            ConfigError: the run folder holds a run already and `run.resume` is off.
        """
        latest = self.store.latest()
        if latest is not None and not self.run_section.resume:
            raise ConfigError(
                f"run.output_dir: {self.folder} already holds a run, up to {latest.name}: pass --options "
                "run.resume=true to go on with it, or run.output_dir=FOLDER for another place"
            )
        return latest

    def _loader(self) -> BatchLoader:
        run, accelerator = self.run_section, self.accelerator
        sources = {name: part.build(name=name) for name, part in self.config.datasets.train.items()}
        plan = StreamPlan(
            seed=run.seed,
            batch_size=run.batch_size_per_rank,
            pad_id=self.loaded.encoder.tokenizer.filler_id,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=run.num_workers,
            positions=self.positions,
            consumed=self.progress.step * self.accumulation,
        )
        return build_loader(Mixture(sources), self.loaded.encoder, self.loaded.image_processor, plan)

    def _validation_batches(self) -> list[Batch]:
        parts = self.config.datasets.validation
        if not parts:
            return []
        return list(
            fixed_batches(
                {name: part.build(name=name) for name, part in parts.items()},
                self.loaded.encoder,
                self.loaded.image_processor,
                samples=self.run_section.validation_samples,
                batch_size=self.run_section.batch_size_per_rank,
                pad_id=self.loaded.encoder.tokenizer.filler_id,
            )
        )

    def _step(self, batches: Iterator[Batch]) -> None:
        """One optimiser step over `accumulation` batches per rank."""
        group = [next(batches) for _ in range(self.accumulation)]
        self._count(group)
        tokens = self._total(torch.tensor([float(sum(b.num_supervised for b in group))]))[0]
        loss_sum = torch.zeros(1)
        for n, batch in enumerate(group):
            last = n == len(group) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    loss = self.wrapped(batch.to(self.accelerator.device))
                # DDP averages gradients over ranks, hence the factor.
                self.accelerator.backward(loss * (self.accelerator.num_processes / tokens))
            loss_sum += loss.detach().float().cpu()
        loss_total = self._total(loss_sum)[0]
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.run_section.max_grad_norm or math.inf)
        rate = learning_rate(self.progress.step, self.run_section, self.config.compat)
        if math.isfinite(loss_total) and math.isfinite(float(norm)):
            for parameter_group in self.optimizer.param_groups:
                parameter_group["lr"] = rate
            self.optimizer.step()
            self._window.nonfinite_in_a_row = 0
        else:
            self._leave_out(group, loss_total, float(norm))
        self.optimizer.zero_grad()
        self.progress.step += 1
        self.progress.tokens += int(tokens)
        self._window.add(loss_total, tokens, float(norm), rate)
        if self.progress.step == 1:
            self._check_first_loss(loss_total / tokens)

    def _count(self, group: list[Batch]) -> None:
        """Note what this rank's batches tell of samples, skips and reader positions."""
        self.progress.samples += self.run_section.global_batch_size
        for batch in group:
            self._skipped.update(batch.skipped)
            self.positions[batch.reader] = batch.position

    def _share_skips(self) -> None:
        """Add up the skips of all ranks, and stop if there are too many."""
        for counts in gather_objects(self.accelerator, dict(self._skipped)):
            self.progress.skipped.update(counts)
        self._skipped.clear()
        self.progress.check_skips(self.run_section.max_skipped_fraction)

    def _leave_out(self, group: list[Batch], loss: float, norm: float) -> None:
        """Note a step whose loss or gradient is not finite; too many in a row end the run."""
        self.progress.nonfinite_steps += 1
        self._window.nonfinite_in_a_row += 1
        ids = ", ".join(i for batch in group for i in batch.ids)
        _log.warning(
            "step %d left out: loss %g, gradient norm %g; samples: %s", self.progress.step + 1, loss, norm, ids
        )
        if self._window.nonfinite_in_a_row >= self.run_section.max_nonfinite_steps:
            raise TrainingError(
                f"{self._window.nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite; the log "
                "names their samples. Lower run.learning_rate, or use bf16 or fp32"
            )

    def _check_first_loss(self, loss: float) -> None:
        chance = math.log(self.model.language_model.vocab_size)
        if abs(loss - chance) < 0.01 * chance:
            _log.warning(
                "the first loss %.4f is ln(vocabulary) %.4f: the language model is guessing; are its weights loaded?",
                loss,
                chance,
            )

    def _log_step(self) -> float:
        """Write the numbers since the last line, and return the mean loss."""
        self._share_skips()
        window, self._window = self._window, Window(nonfinite_in_a_row=self._window.nonfinite_in_a_row)
        values = {
            "loss": window.loss / max(window.tokens, 1.0),
            "lr": window.rate,
            "grad_norm": window.norm,
            "samples": self.progress.samples,
            "tokens": self.progress.tokens,
            "seconds": round(time.monotonic() - window.started, 3),
            "nonfinite_steps": self.progress.nonfinite_steps,
            **{f"skipped/{cause}": count for cause, count in self.progress.skipped.items()},
        }
        self.metrics.write(self.progress.step, values)
        return float(values["loss"])

    def _validate(self) -> Validation | None:
        """Take the validation losses, log them, and say so if the model ignores its images."""
        if not self.validation:
            return None
        result = validate(self.model, self.validation, self.accelerator)
        self.metrics.write(
            self.progress.step,
            {"validation_loss": result.loss, "validation_loss_shuffled_images": result.shuffled_loss},
        )
        if self.accelerator.is_main_process:
            _log.info(
                "step %d: validation loss %.4f, with the images of other samples %.4f",
                self.progress.step,
                result.loss,
                result.shuffled_loss,
            )
            if result.ignores_images:
                _log.warning("the model ignores its images: with the images of other samples its loss is no worse")
        return result

    def _save(self) -> None:
        """Write a checkpoint; every rank takes part."""
        self._share_skips()
        positions = {k: v for part in gather_objects(self.accelerator, self.positions) for k, v in part.items()}
        random_states = gather_objects(self.accelerator, random_state())
        if self.accelerator.is_main_process:
            trained = self.model.trained_state()
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                "progress": self.progress.state(),
                "positions": positions,
                "random_states": random_states,
                "readers": [self.accelerator.num_processes, self.run_section.num_workers],
            }
            manifest = _manifest(self.config, self.progress, trained, self.identities)
            path = self.store.save(self.progress.step, trained, manifest, self.config.to_yaml(), state)
            _log.info("saved %s", path)
        self.accelerator.wait_for_everyone()

    def _restore(self, folder: Path) -> None:
        """Take up the state of a checkpoint of this run.

        Raises:
            CheckpointError: it does not fit this run.
        """
        state, manifest = read_state(folder), Manifest.read(folder)
        readers = [self.accelerator.num_processes, self.run_section.num_workers]
        if state["readers"] != readers:
            raise CheckpointError(
                f"{folder}: was read by {state['readers'][0]} rank(s) with {state['readers'][1]} worker(s) each, this run "
                f"has {readers[0]} with {readers[1]}; the order of the data would change. Resume with the same numbers, or "
                "start a new run with model.init_from"
            )
        for name, tensor in read_trained(folder, manifest).items():
            self.model.get_parameter(name).data.copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress.from_state(state["progress"])
        self.positions = dict(state["positions"])
        restore_random_state(state["random_states"][self.accelerator.process_index])
        self.metrics.forget_after(self.progress.step)
        _log.info("resumed from %s", folder)

    def _finish(self) -> None:
        if not self._due(self.run_section.validate_every_steps):
            self._validate()
        if not self._due(self.run_section.save_every_steps):
            self._save()
        # Without this barrier, ending while another rank still talks aborts the process after success.
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        self.model.eval()

    def _due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def _total(self, numbers: Tensor) -> list[float]:
        """Return numbers summed over the ranks."""
        summed: Tensor = self.accelerator.reduce(numbers.to(self.accelerator.device), "sum")
        return [float(number) for number in summed.cpu()]


class Window:
    """What happened since the last line of metrics."""

    def __init__(self, nonfinite_in_a_row: int = 0) -> None:
        self.started = time.monotonic()
        self.loss = 0.0
        self.tokens = 0.0
        self.norm = 0.0
        self.rate = 0.0
        self.nonfinite_in_a_row = nonfinite_in_a_row

    def add(self, loss: float, tokens: float, norm: float, rate: float) -> None:
        """Add a step; a loss that is not finite does not count."""
        if math.isfinite(loss):
            self.loss += loss
            self.tokens += tokens
        self.norm, self.rate = norm, rate


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices decay, vectors (biases, norms) do not."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]


def _manifest(
    config: Config, progress: Progress, trained: dict[str, Tensor], parts: dict[str, PartIdentity]
) -> Manifest:
    return Manifest(
        format=FORMAT,
        version=__version__,
        step=progress.step,
        total_steps=config.run.total_steps,
        template=config.conversation.template,
        trained={name: list(tensor.shape) for name, tensor in trained.items()},
        parts=parts,
        samples=progress.samples,
        tokens=progress.tokens,
    )
