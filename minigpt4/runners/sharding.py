"""A frozen language model spread over the ranks (FSDP), for models that fill a GPU.

Input: the model, before it is moved to a device. Output: each rank holds its part of every layer, and has a layer whole
only while it computes with it. What trains is left as it is, for DDP.
"""

from __future__ import annotations

import logging

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minigpt4.errors import ConfigError
from minigpt4.models.language_model import LanguageModel
from minigpt4.models.minigpt4 import MiniGPT4

_log = logging.getLogger(__name__)


def shard_language_model(model: MiniGPT4, accelerator: Accelerator) -> None:
    """Spread the frozen weights of the language model's layers over the ranks; its embeddings stay whole.

    Accelerate shards on GPUs only, and all of a model or nothing, so this is torch's own call. Every rank must run the
    model as often as every other from here on: a layer is gathered from all of them.

    Raises:
        ConfigError: the language model's class does not say what its layers are.
    """
    if accelerator.num_processes == 1:
        _log.warning("run.shard_language_model: there is one rank only, so nothing is spread")
        return
    llm = model.language_model
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    trained = {parameter for parameter in llm.parameters() if parameter.requires_grad}
    for layer in _layers(llm):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    # A root of its own without weights: it lets the next layer be gathered while one computes.
    fully_shard(llm.model, mesh=mesh, ignored_params={p for p in llm.parameters() if not isinstance(p, DTensor)})
    spread = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, spread)
    _log.info(
        "the language model is spread over %d ranks: %s of %s parameters are held here",
        accelerator.num_processes,
        f"{sum(_held(parameter) for parameter in llm.parameters()):,}",
        f"{sum(parameter.numel() for parameter in llm.parameters()):,}",
    )


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
