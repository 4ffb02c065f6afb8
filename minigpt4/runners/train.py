"""The `train` runner: both stages, on one CPU or many GPUs.

Input: a `Config`. Output: the run folder with `config.yaml`, `metrics.jsonl`, `log.txt` and `checkpoints/`. The same
for `python train.py`, `torchrun train.py` and a notebook. The loss of a step is the sum over all supervised tokens of
all ranks and accumulated batches, divided by their number.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import tqdm
from torch import Tensor

from minigpt4.batch import Batch
from minigpt4.checkpoints.assemble import LoadedModel, assemble
from minigpt4.checkpoints.manifest import identify, stage_after
from minigpt4.checkpoints.store import CheckpointStore
from minigpt4.config import Config
from minigpt4.config.sections import RunSection
from minigpt4.datasets.source import data_hash
from minigpt4.errors import ConfigError, TrainingError
from minigpt4.runners.launch import build_accelerator, gather_objects, log_file, make_folder, recompute_activations
from minigpt4.runners.metrics import MetricsLog, wanted_trackers
from minigpt4.runners.prepare import (
    build_sources,
    calibrate,
    check_run,
    parameter_groups,
    training_batches,
    validation_batches,
)
from minigpt4.runners.progress import Progress, Window, accumulation_steps, start_block, warn_of_guess
from minigpt4.runners.schedule import learning_rate
from minigpt4.runners.sharding import is_sharded, shard_language_model, wrap_sharded
from minigpt4.runners.snapshot import Origin, RunState, Snapshots
from minigpt4.runners.validation import Validation, validate

_log = logging.getLogger(__name__)


class TrainRunner:
    """Trains the declared parts of a model."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run_section: RunSection = config.run
        self.folder = Path(self.run_section.output_dir)
        self.store = CheckpointStore(self.folder / "checkpoints", self.run_section.keep_last)
        self.state = RunState()
        self._skipped: Counter[str] = Counter()

    @property
    def progress(self) -> Progress:
        """Counters of the run."""
        return self.state.progress

    @classmethod
    def from_config(cls, config: Config) -> TrainRunner:
        """Build the runner of a config, after checking all that can be checked without loading anything.

        Raises:
            ConfigError: sections, values or files are missing.
        """
        check_run(config)
        return cls(config)

    def run(self) -> LoadedModel:
        """Train to the last step, and return the trained model; all ranks must use a spread one together.

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
        batches = iter(self.loader)
        self.state.window.started = time.monotonic()  # loading is no part of a step
        with tqdm(initial=self.progress.step, total=run.total_steps, desc=self.folder.name, unit="step") as bar:
            while self.progress.step < run.total_steps:
                self._step(batches)
                bar.update()
                if self._due(run.log_every_steps) or self.progress.step == 1:
                    bar.set_postfix(loss=f"{self._log_step():.4f}")
                if self._due(run.validate_every_steps):
                    self._validate()
                if self._due(run.save_every_steps):
                    self._save()

    def _start(self) -> None:
        """Processes, devices, and the run folder."""
        run = self.run_section
        self.accelerator = build_accelerator(run, wanted_trackers(self.config.tracking), self.folder)
        self.accumulation = accumulation_steps(run, self.accelerator.num_processes)
        if self.accelerator.is_main_process:
            make_folder(self.folder)

    def _set_up(self, resumed: Path | None) -> None:
        """Parts, data, optimiser, and where a resumed run left off."""
        run = self.run_section
        sources = build_sources(self.config.datasets.train)
        controls = build_sources(self.config.datasets.validation)
        self.loaded = assemble(self.config)
        self.model = self.loaded.model
        identities = identify(self.model, self.model.learnt_names())
        sharded = is_sharded(run, self.accelerator)
        if sharded:
            shard_language_model(self.model, self.accelerator)
        self.model.to(self.accelerator.device)
        if resumed is None and self.loaded.manifest is None:
            calibrate(self.loaded, sources)
        self._training_mode()
        groups = parameter_groups(self.model, run.weight_decay)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, betas=run.adam_betas, eps=run.adam_eps)
        wrapped = wrap_sharded(self.model, self.accelerator) if sharded else self.accelerator.prepare(self.model)
        self.wrapped, self.optimizer = wrapped, self.accelerator.prepare(optimizer)
        self.metrics = MetricsLog(self.accelerator, self.folder)
        origin = Origin(identities, stage_after(self.loaded.manifest), data_hash(sources))
        self.snapshots = Snapshots(self.config, self.store, self.accelerator, self.model, self.optimizer, origin)
        if resumed is not None:
            self.state = self.snapshots.restore(resumed)
        if self.accelerator.is_main_process:
            (self.folder / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
        self.metrics.forget_after(self.progress.step)
        self.loader = training_batches(run, self.loaded, sources, self.accelerator, self.state)
        self.validation = validation_batches(run, self.loaded, controls)
        self.metrics.start(self.config.tracking, self.folder.name, self.config.values, self.progress.step)
        if self.accelerator.is_main_process:
            if run.warmup_steps > run.total_steps:
                _log.warning("run.warmup_steps %d is longer than the run of %d", run.warmup_steps, run.total_steps)
            if not controls:
                _log.warning("datasets.validation is empty: nothing will tell whether the model looks at its images")
            precision = self.accelerator.mixed_precision
            _log.info("%s", start_block(self.model, run, self.accelerator.num_processes, self.accumulation, precision))

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
        self.progress.step += 1
        if math.isfinite(loss_total) and math.isfinite(float(norm)):
            for parameter_group in self.optimizer.param_groups:
                parameter_group["lr"] = rate
            self.optimizer.step()
            self.state.window.nonfinite_in_a_row = 0
        else:
            self._leave_out(group, loss_total, float(norm))
        self.optimizer.zero_grad()
        self.progress.tokens += int(tokens)
        self.state.window.add(loss_total, tokens, float(norm), rate)
        if self.progress.step == 1 and self.accelerator.is_main_process:
            warn_of_guess(loss_total / tokens, self.model.language_model)

    def _count(self, group: list[Batch]) -> None:
        """Note what this rank's batches tell of samples, skips and reader positions."""
        self.progress.samples += self.run_section.global_batch_size
        self.progress.batches += len(group)
        for batch in group:
            self._skipped.update(batch.skipped)
            self.state.positions[batch.reader] = batch.position

    def _share_skips(self) -> None:
        """Add up the skips of all ranks, and stop if there are too many."""
        for counts in gather_objects(self.accelerator, dict(self._skipped)):
            self.progress.skipped.update(counts)
        self._skipped.clear()
        self.progress.check_skips(self.run_section.max_skipped_fraction)

    def _leave_out(self, group: list[Batch], loss: float, norm: float) -> None:
        """Note a step whose loss or gradient is not finite; too many in a row end the run."""
        window, scaler = self.state.window, self.accelerator.scaler
        self.progress.nonfinite_steps += 1
        ids = gather_objects(self.accelerator, [i for batch in group for i in batch.ids])
        if self.accelerator.is_main_process:
            shown = ", ".join(i for part in ids for i in part)
            _log.warning(
                "step %d left out: loss %g, gradient norm %g; samples: %s", self.progress.step, loss, norm, shown
            )
        scale = 0.0
        if scaler is not None:  # fp16: it must learn of the overflow to lower its scale, which takes a few steps
            scale = scaler.get_scale()
            scaler.update()
        if math.isfinite(loss) and scale > 1:
            return
        window.nonfinite_in_a_row += 1
        if window.nonfinite_in_a_row >= self.run_section.max_nonfinite_steps:
            raise TrainingError(
                f"{window.nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite, up to step "
                f"{self.progress.step}; the log names their samples. Lower run.learning_rate, or use bf16 or fp32"
            )

    def _log_step(self) -> float:
        """Write the numbers since the last line, and return the mean loss."""
        self._share_skips()
        window = self.state.window
        self.state.window = Window(nonfinite_in_a_row=window.nonfinite_in_a_row)
        values = {
            "loss": window.mean_loss,
            "lr": window.rate,
            "grad_norm": window.norm,
            "samples": self.progress.samples,
            "tokens": self.progress.tokens,
            "seconds": round(time.monotonic() - window.started, 3),
            "nonfinite_steps": self.progress.nonfinite_steps,
            **{f"skipped/{cause}": count for cause, count in self.progress.skipped.items()},
        }
        self.metrics.write(self.progress.step, values)
        return window.mean_loss

    def _validate(self) -> Validation | None:
        """Take the validation losses, log them, and say so if the model ignores its images."""
        if not self.validation:
            return None
        result = validate(self.model, self.validation, self.accelerator)
        self._training_mode()
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
        self.snapshots.save(self.state)

    def _finish(self) -> None:
        # Without this barrier, ending while another rank still talks aborts the process after success.
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        self.model.eval()

    def _training_mode(self) -> None:
        self.model.train()
        if self.run_section.gradient_checkpointing:
            recompute_activations(self.model.language_model.model)

    def _due(self, every: int) -> bool:
        """Whether what is done every so many steps is done now; the last step does everything."""
        step = self.progress.step
        return step == self.run_section.total_steps or (every > 0 and step % every == 0)

    def _total(self, numbers: Tensor) -> list[float]:
        """Return numbers summed over the ranks."""
        summed: Tensor = self.accelerator.reduce(numbers.to(self.accelerator.device), "sum")
        return [float(number) for number in summed.cpu()]
