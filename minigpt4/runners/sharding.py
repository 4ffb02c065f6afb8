"""A frozen language model spread over the ranks (FSDP), for models that fill a GPU.

Input: the model, before it is moved to a device. Output: each rank holds its part of every layer; while it computes
with a layer it has that one whole, and the next one on its way. Embeddings, head and all that is trained stay whole.
"""

from __future__ import annotations

import logging

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minigpt4.config.sections import RunSection
from minigpt4.errors import ConfigError
from minigpt4.models.language_model import LanguageModel
from minigpt4.models.minigpt4 import MiniGPT4

_log = logging.getLogger(__name__)


def is_sharded(run: RunSection, accelerator: Accelerator) -> bool:
    """Whether a run spreads its language model: it is asked to, and there is somewhere to spread it to."""
    several = accelerator.num_processes > 1
    if run.shard_language_model and not several:
        _log.warning("run.shard_language_model: there is one rank only, so nothing is spread")
    return run.shard_language_model and several


def shard_language_model(model: MiniGPT4, accelerator: Accelerator) -> None:
    """Spread the layers of the language model over the ranks, but for what this run or an earlier one trained in them.

    Accelerate shards on GPUs only, and all of a model or nothing, so this is torch's own call. Every rank must run the
    model as often as every other from here on, forward and backward: a layer is gathered from all of them.

    Raises:
        ConfigError: there is nothing to spread.
    """
    llm, learnt = model.language_model, model.learnt_names()
    whole = {parameter for name, parameter in model.named_parameters() if name in learnt}
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in _layers(llm):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # A root of its own without weights: it lets the next layer be gathered while one computes.
    fully_shard(llm.model, mesh=mesh, ignored_params={p for p in llm.parameters() if not isinstance(p, DTensor)})
    held = sum(_held(parameter) for parameter in llm.parameters())
    every = sum(parameter.numel() for parameter in llm.parameters())
    if held == every:
        raise ConfigError("run.shard_language_model: all layers of the language model were trained; set it to false")
    _log.info(
        "the language model is spread over %d ranks: %s of %s parameters are held here",
        accelerator.num_processes,
        f"{held:,}",
        f"{every:,}",
    )


def wrap_sharded(model: MiniGPT4, accelerator: Accelerator) -> DistributedDataParallel:
    """Return the model as `Accelerator.prepare` would, which refuses any with parameters spread over ranks."""
    spread = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, spread)
    on_cpu = accelerator.device.type == "cpu"
    return DistributedDataParallel(model, device_ids=None if on_cpu else [accelerator.device])


def _layers(llm: LanguageModel) -> list[nn.Module]:
    """Return the layers of a language model: what transformers says must not be split."""
    names = set(llm.model._no_split_modules or ())
    found = [module for module in llm.model.modules() if type(module).__name__ in names]
    if not found:
        raise ConfigError(
            f"run.shard_language_model: {type(llm.model).__name__} does not say what its layers are; set it to false"
        )
    return found


def _held(parameter: nn.Parameter) -> int:
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
