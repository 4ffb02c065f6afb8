"""The `train` runner: both stages, on one CPU or many GPUs.

Input: a `Config`. Output: the run folder with `config.yaml`, `metrics.jsonl`, `log.txt` and `checkpoints/`. The same
for `python train.py`, `torchrun train.py` and a notebook. The loss of a step is the sum over all supervised tokens of
all ranks and accumulated batches, divided by their number.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.utils import tqdm

from minigpt4.batch import Batch
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.config import Config
from minigpt4.errors import RunStoppedError, TrainingError
from minigpt4.models.language_model import LanguageModel
from minigpt4.runners.compiling import compiled_layers
from minigpt4.runners.distributed import (
    build_accelerator,
    gather_objects,
    on_main_process,
    ranks_end_together,
    sum_over_ranks,
)
from minigpt4.runners.folder import log_file, own_folder
from minigpt4.runners.metrics import wanted_trackers
from minigpt4.runners.run import Run, build_run, check_run, expects_images, find_resume_point, set_training_mode
from minigpt4.runners.sample import sample_answer
from minigpt4.runners.schedule import learning_rate
from minigpt4.runners.state import Interval, Progress, TrainingState
from minigpt4.runners.validation import validation_losses

_log = logging.getLogger(__name__)


class TrainRunner:
    """Trains the parts of a model that `model.trainable` names."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def from_config(cls, config: Config) -> TrainRunner:
        """Build the runner of a config, after checking everything that can be checked without loading anything.

        Raises:
            ConfigError: sections, values or files are missing.
        """
        check_run(config)
        return cls(config)

    def run(self) -> LoadedModel:
        """Train to the last step, and return the trained model; if it is sharded, all ranks must call it together.

        Raises:
            MiniGPT4Error: what is wrong, and what to do.
        """
        folder, progress = Path(self.config.run.output_dir), Progress()
        accelerator = build_accelerator(self.config.run, wanted_trackers(self.config.tracking), folder)
        with ExitStack() as stack:

            def open_folder() -> Path | None:
                stack.enter_context(own_folder(folder))
                stack.enter_context(log_file(folder))
                return find_resume_point(self.config)

            checkpoint = on_main_process(accelerator, open_folder)
            stack.enter_context(_one_message(folder))
            stack.enter_context(ranks_end_together(accelerator, lambda: progress.step + 1))
            run = build_run(self.config, accelerator, checkpoint)
            progress = run.state.progress
            stack.callback(run.batches.close)
            if self.config.run.compile:
                stack.enter_context(compiled_layers(run.model.language_model, accelerator.device))
            train(run)
            # Without this barrier, a process that ends while another still communicates is aborted after success.
            accelerator.wait_for_everyone()
            accelerator.end_training()
        run.model.eval()
        return run.loaded


def train(run: Run) -> None:
    """Take all remaining steps of a run.

    Raises:
        RunStoppedError: a signal stopped it, and it is saved.
        MiniGPT4Error: what else ended it.
    """
    try:
        with run.state.stop.watch():
            _train(run)
    finally:
        _share_counts_of_this_rank(run.state)
        _log.info("%s", run.state.progress.summary())


def _train(run: Run) -> None:
    settings, progress, stop = run.config.run, run.state.progress, run.state.stop

    def is_due(every: int) -> bool:
        return progress.step == settings.total_steps or (every > 0 and progress.step % every == 0)

    if progress.step == 0:
        show_answer(run)
    run.state.speed.restart()  # loading does not belong to the first step
    with tqdm(
        initial=progress.step, total=settings.total_steps, desc=Path(settings.output_dir).name, unit="step"
    ) as bar:
        while progress.step < settings.total_steps:
            step(run, next(run.batches))
            bar.update()
            if is_due(settings.log_every_steps) or progress.step == 1:
                bar.set_postfix(loss=f"{log(run):.4f}")
            stops = stop.agreed and progress.step < settings.total_steps
            if stops:  # saved before a validation, for which there may be no time
                save(run)
            if is_due(settings.validate_every_steps):
                validate(run)
                show_answer(run)
            if stops:
                raise RunStoppedError(
                    f"stopped by {signal.Signals(stop.agreed).name} after step {progress.step} of "
                    f"{settings.total_steps}, which is saved in {settings.output_dir}. To continue, start the same "
                    "command with --options run.resume=true",
                    stop.agreed,
                )
            if is_due(settings.save_every_steps):
                save(run)


def step(run: Run, batches: Sequence[Batch]) -> None:
    """Take one optimiser step over this rank's batches.

    The host waits for the device once, after everything is launched and the next step's batches are read.
    """
    settings, state, accelerator = run.config.run, run.state, run.accelerator
    state.count(batches, settings.global_batch_size)
    positions = sum(batch.input_ids.numel() for batch in batches)
    images = sum(int(batch.images_per_row.sum()) for batch in batches)
    counts = sum_over_ranks(accelerator, sum(batch.num_supervised for batch in batches), positions, images)
    loss_sum = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        is_last = number == len(batches)
        with state.speed.measure(batch), nullcontext() if is_last else accelerator.no_sync(run.wrapped):
            with accelerator.autocast():
                loss = run.wrapped(batch.to(accelerator.device))
            # Divided by the tokens of all ranks; DDP averages gradients over the ranks, hence the factor.
            accelerator.backward(loss * (accelerator.num_processes / counts[0]))
        loss_sum += loss.detach()
    norm = accelerator.clip_grad_norm_(run.parameters, settings.max_grad_norm or math.inf)
    sums = sum_over_ranks(accelerator, loss_sum, state.stop.code)
    results = torch.cat([sums, counts, norm.reshape(1)])
    if state.progress.step + 1 < settings.total_steps:
        run.batches.read_ahead()
    total_loss, signals, tokens, all_positions, all_images, grad_norm = results.tolist()  # waits for the device
    state.stop.agree(signals)

    rate = learning_rate(state.progress.step, settings, run.config.compat)
    state.progress.step += 1
    if math.isfinite(total_loss) and math.isfinite(grad_norm):
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        state.interval.nonfinite_in_a_row = 0
    else:
        skip_step(run, batches, total_loss, grad_norm)
    run.optimizer.zero_grad()
    state.progress.tokens += int(tokens)
    state.progress.images += int(all_images)
    state.progress.has_gradient |= grad_norm != 0
    state.speed.positions += int(all_positions)
    state.interval.add(total_loss, tokens, grad_norm, rate)
    if state.progress.step == 1 and accelerator.is_main_process:
        _warn_of_guessing(state.interval.mean_loss, run.model.language_model)
    state.progress.check_learning(settings.total_steps, expects_images=expects_images(run.config))


def skip_step(run: Run, batches: Sequence[Batch], loss: float, norm: float) -> None:
    """Note a step whose loss or gradient is not finite.

    Raises:
        TrainingError: `run.max_nonfinite_steps` of them in a row.
    """
    progress, interval, scaler = run.state.progress, run.state.interval, run.accelerator.scaler
    progress.nonfinite_steps += 1
    ids = gather_objects(run.accelerator, [sample for batch in batches for sample in batch.ids])
    if run.accelerator.is_main_process:
        names = ", ".join(sample for of_rank in ids for sample in of_rank)
        _log.warning("step %d skipped: loss %g, gradient norm %g; samples: %s", progress.step, loss, norm, names)
    if scaler is not None:  # fp16: an overflow lowers its scale, which can take a few steps and is no fault of the run
        scale = scaler.get_scale()
        scaler.update()
        if math.isfinite(loss) and scale > 1:
            return
    interval.nonfinite_in_a_row += 1
    if interval.nonfinite_in_a_row >= run.config.run.max_nonfinite_steps:
        raise TrainingError(
            f"{interval.nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite, up to step "
            f"{progress.step}; the log names their samples. Lower run.learning_rate, or use bf16 or fp32"
        )


def log(run: Run) -> float:
    """Write the numbers since the last line of metrics, and return the mean loss."""
    _share_counts(run)
    progress, interval = run.state.progress, run.state.interval
    values = {
        "loss": interval.mean_loss,
        "lr": interval.rate,
        "grad_norm": interval.norm,
        "samples": progress.samples,
        "tokens": progress.tokens,
        **run.state.speed.metrics(),
        "nonfinite_steps": progress.nonfinite_steps,
        **{f"skipped/{cause}": count for cause, count in progress.skipped.items()},
        **{f"altered/{cause}": count for cause, count in progress.altered.items()},
    }
    run.metrics.write(progress.step, values)
    run.state.interval = Interval(nonfinite_in_a_row=interval.nonfinite_in_a_row)
    run.state.speed.restart()
    return interval.mean_loss


def validate(run: Run) -> None:
    """Compute and log the validation losses, and warn if the model ignores its images."""
    if not run.validation:
        return
    # Compiled layers are for the shapes of training; every other shape would be compiled, too.
    with torch.compiler.set_stance("force_eager") if run.config.run.compile else nullcontext():
        result, at = validation_losses(run.model, run.validation, run.accelerator), run.state.progress.step
    set_training_mode(run.model, run.config.run)
    losses = {"validation_loss": result.loss, "validation_loss_shuffled_images": result.shuffled_loss}
    run.metrics.write(at, losses)
    _log.info("step %d: validation loss %.4f, with the images of other samples %.4f", at, *losses.values())
    if run.accelerator.is_main_process and math.isnan(result.shuffled_loss):
        _log.warning(
            "validation_loss_shuffled_images is null: no validation batch has two images with different texts, so "
            "nothing shows whether the model uses its images"
        )
    if run.accelerator.is_main_process and result.ignores_images:
        _log.warning("the model ignores its images: with the images of other samples its loss is no worse")


def show_answer(run: Run) -> None:
    """Log the answer to `run.sample_question`, if there is an image to ask about; every rank must call this."""
    settings = run.config.run
    answer = sample_answer(run.loaded, settings, run.accelerator)
    set_training_mode(run.model, settings)
    if settings.sample_image:
        _log.info(
            "step %d of %d, %.0f s: %s -> %s",
            run.state.progress.step,
            settings.total_steps,
            time.monotonic() - run.started,
            settings.sample_question or "(no question)",
            answer or "(nothing)",
        )


def save(run: Run) -> None:
    """Write a checkpoint; every rank must call this."""
    _share_counts(run)
    run.snapshots.save(run.state)


def _share_counts(run: Run) -> None:
    """Add up the skipped and altered samples of all ranks, log new causes, and stop if too many are skipped."""
    state, progress = run.state, run.state.progress
    known = progress.skipped.keys() | progress.altered.keys()
    for skipped, altered in gather_objects(run.accelerator, (dict(state.skipped), dict(state.altered))):
        progress.skipped.update(skipped)
        progress.altered.update(altered)
    state.skipped.clear()
    state.altered.clear()
    if (progress.skipped.keys() | progress.altered.keys()) - known:
        _log.info("%s", progress.summary())
    progress.check_skips(run.config.run.max_skipped_fraction)


def _share_counts_of_this_rank(state: TrainingState) -> None:
    """Add what this rank counted since the ranks last shared their counts; other ranks may have ended."""
    state.progress.skipped.update(state.skipped)
    state.progress.altered.update(state.altered)
    state.skipped.clear()
    state.altered.clear()


def _warn_of_guessing(loss: float, llm: LanguageModel) -> None:
    """Warn if the mean loss of the first step, in nats, is that of a uniform guess over the vocabulary.

    A known problem of the published code: a loss that stays at 10.37, ln 32000, whatever the model is trained on.
    """
    chance = math.log(llm.vocab_size)
    if abs(loss - chance) < 0.01 * chance:
        _log.warning(
            "the first loss %.4f is within 1 %% of ln(vocabulary) %.4f: the language model is guessing; "
            "check the weights of %s",
            loss,
            chance,
            llm.source or "the language model",
        )


@contextmanager
def _one_message(folder: Path) -> Iterator[None]:
    """Turn what the system refuses (a full disk, a folder that has vanished) into one message."""
    try:
        yield
    except OSError as error:
        place = error.filename or folder
        raise TrainingError(f"{place}: {error.strerror or error}; the run cannot continue") from error
