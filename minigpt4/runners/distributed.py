"""The processes of a run: devices, sums over ranks, DDP, and a frozen language model sharded over the ranks (FSDP).

Input: the run's settings and the model. Output: accelerate's `Accelerator`, and the model as training calls it.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, gather_object, set_seed
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minigpt4.batch import Batch
from minigpt4.config.sections import RunConfig
from minigpt4.devices import choose_device, choose_precision
from minigpt4.errors import ConfigError, MiniGPT4Error, TrainingError
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.runners.compiling import layers_of
from minigpt4.runners.stopping import end_with_launcher

_log = logging.getLogger(__name__)
T = TypeVar("T")


def build_accelerator(run: RunConfig, trackers: Sequence[str], folder: Path) -> Accelerator:
    """Return the accelerator of a run, and seed every random number generator.

    Raises:
        TrainingError: torchrun started more processes than accelerate sees, so that each would train alone; or the
            variables of a launcher are incomplete.
    """
    started = _world_size()
    end_with_launcher()
    device = choose_device(run.device)
    # Accelerate keeps its first settings for the life of the process; a notebook's second run may need others.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=choose_precision(run.precision, device),
        log_with=list(trackers) or None,
        project_dir=str(folder) if trackers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=run.collective_timeout_seconds))],
    )
    if accelerator.num_processes != started:
        raise TrainingError(f"torchrun started {started} processes, but accelerate found {accelerator.num_processes}")
    set_seed(run.seed)
    if not accelerator.is_main_process:
        logging.getLogger("minigpt4").setLevel(logging.WARNING)
    return accelerator


def _world_size() -> int:
    """Return the number of processes that a launcher started, after checking that its other variables are there."""
    text = os.environ.get("WORLD_SIZE", "1")
    number = int(text) if text.isdecimal() else 0
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if number < 1 or (number > 1 and missing):
        lack = f", but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not" if number > 1 else ""
        raise TrainingError(
            f"the environment variable WORLD_SIZE={text} is set{lack}: to train in one process, run `unset WORLD_SIZE "
            "RANK LOCAL_RANK`; to train in several, start them with torchrun"
        )
    return number


def on_main_process(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return on every rank what `work` returns on rank 0; what it raises is raised on every rank."""
    result: T | MiniGPT4Error | None = None
    if accelerator.is_main_process:
        try:
            result = work()
        except MiniGPT4Error as error:
            result = error
    shared = gather_objects(accelerator, result)[0]
    if isinstance(shared, MiniGPT4Error):
        raise shared
    found: T = shared
    return found


@contextmanager
def ranks_end_together(accelerator: Accelerator, step: Callable[[], int]) -> Iterator[None]:
    """Tell the other ranks why this one ends, and turn the loss of another rank into one message.

    Args:
        accelerator: of the run.
        step: returns the number of the step being computed, for the message.

    Raises:
        TrainingError: another rank ended or does not answer.
    """
    try:
        yield
    except BaseException as error:
        if accelerator.num_processes == 1:
            raise
        is_loss = isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
        words: list[str] = []
        # In a thread, since a store on a rank that hangs never answers.
        asking = threading.Thread(target=_roll_call, args=(accelerator, error, is_loss, words), daemon=True)
        asking.start()
        asking.join(2 * ANSWER_WITHIN)
        if not is_loss:
            raise
        what = "; ".join(words) or "rank 0 ended or does not answer"
        raise TrainingError(
            f"step {step()}: rank {accelerator.process_index} lost the connection to another rank: {what}. Continue "
            "from the last checkpoint with --options run.resume=true"
        ) from error


ANSWER_WITHIN = 5.0
"""Seconds that a rank has to say that it is there, once another one has lost the connection."""
_LOST = re.compile("gloo|nccl|connection (closed|reset)|timed out|broken pipe|socket", re.IGNORECASE)


def _roll_call(accelerator: Accelerator, error: BaseException, is_loss: bool, words: list[str]) -> None:
    """Write into the store of the process group why this rank ends; after a loss, add to `words` why others did."""
    own, ranks = accelerator.process_index, range(accelerator.num_processes)
    try:
        store = PrefixStore("ended", distributed_c10d._get_default_store())  # noqa: SLF001
        text = "waits too" if is_loss else (str(error).splitlines() or [type(error).__name__])[0]
        store.set(str(own), text)
        if not is_loss:
            return
        deadline = time.monotonic() + ANSWER_WITHIN
        while (silent := [r for r in ranks if not store.check([str(r)])]) and time.monotonic() < deadline:
            time.sleep(0.1)
        words += [f"rank {rank} ended or does not answer" for rank in silent]
        answers = {rank: store.get(str(rank)).decode() for rank in ranks if rank not in silent}
        words += [f"rank {rank} ended: {answer}" for rank, answer in answers.items() if answer != "waits too"]
        if not words:
            words.append("the connection broke")
    except RuntimeError as lost:  # the store was on a rank that ended
        _log.debug("the ranks cannot be asked: %s", lost)


def gather_objects(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return `value` of every rank, in order of rank."""
    return list(gather_object([value])) if accelerator.num_processes > 1 else [value]


def sum_over_ranks(accelerator: Accelerator, *numbers: float | Tensor) -> Tensor:
    """Return numbers summed over the ranks, float32, on the device: nothing waits for it."""
    device = accelerator.device
    own = [n.reshape(()) if isinstance(n, Tensor) else torch.full((), float(n), device=device) for n in numbers]
    summed: Tensor = accelerator.reduce(torch.stack(own), "sum")
    return summed


class TrainingModel(nn.Module):
    """The model as training calls it: every trained tensor gets a gradient from every batch.

    A batch without an image does not reach the tensors in front of the language model. Other ranks would wait for
    their gradients forever, and on one rank nothing might be left to differentiate. So a zero made of these tensors is
    added to the input of the language model. It is added there and not to the loss, so that the backward pass runs
    through the language model on every rank, and ranks that share a sharded one gather its layers together.
    """

    def __init__(self, model: MiniGPT4) -> None:
        super().__init__()
        self.model = model
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._in_front = [p for name, p in trained if not name.startswith("language_model.")]

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed loss of a batch; see `MiniGPT4.forward`."""
        if batch.pixel_values is not None or batch.query_features is not None:
            return self.model(batch)
        hook = self.model.language_model.register_forward_pre_hook(self._add_zero)
        try:
            return self.model(batch)
        finally:
            hook.remove()

    def _add_zero(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        embeds, *others = inputs
        zeros = [parameter.flatten()[:0].sum() for parameter in self._in_front]
        return (embeds + torch.stack(zeros).sum().to(embeds.dtype) if zeros else embeds, *others)


def wrap(model: MiniGPT4, accelerator: Accelerator) -> nn.Module:
    """Return the model as training calls it, in DDP if there are several ranks.

    `Accelerator.prepare` would do the same, but refuses a model with parameters that are sharded over the ranks.
    """
    wrapped = TrainingModel(model)
    if accelerator.num_processes == 1:
        return wrapped
    sharded = [name for name, parameter in wrapped.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapped, sharded)
    return DistributedDataParallel(
        wrapped,
        device_ids=None if accelerator.device.type == "cpu" else [accelerator.device],
        # Encoders and language models may have tensors that no batch reaches; a projection and adapters have none.
        find_unused_parameters=not set(model.trainable) <= {"llama_proj", "lora"},
    )


def shard_language_model(model: MiniGPT4, accelerator: Accelerator) -> None:
    """Shard the layers of the language model over the ranks, except what this run or an earlier one trained in them.

    Each rank holds its part of every layer; while it computes with a layer it has the whole of it, and the next one is
    being gathered. Embeddings, head and everything that is trained stay whole. From here on every rank must run the
    model as often as every other one, forward and backward, since a layer is gathered from all of them. Accelerate
    shards on GPUs only, and all of a model or nothing, hence torch's own call.

    Raises:
        ConfigError: there is nothing to shard.
    """
    llm, trained = model.language_model, model.trained_names()
    layers = layers_of(llm)
    whole = {parameter for name, parameter in model.named_parameters() if name in trained}
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # A root without weights of its own: it gathers the next layer while one computes.
    fully_shard(llm.model, mesh=mesh, ignored_params={p for p in llm.parameters() if not isinstance(p, DTensor)})
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in llm.parameters())
    every = sum(parameter.numel() for parameter in llm.parameters())
    if held == every:
        raise ConfigError("run.shard_language_model: all layers of the language model were trained; set it to false")
    _log.info(
        "the language model is sharded over %d ranks: this one holds %s of %s parameters",
        accelerator.num_processes,
        f"{held:,}",
        f"{every:,}",
    )
