"""A model on the meta device, and what a training step on it costs.

Input: the model section and a batch. Output: operations and bytes. The step runs as in training, with shapes only:
operations are counted as they are dispatched, and memory by the tensors that are alive.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from minigpt4.batch import Batch
from minigpt4.config.sections import ModelConfig
from minigpt4.models.image_side import ImageSide
from minigpt4.models.language_model import LanguageModel
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.models.recompute import recompute_activations
from minigpt4.registry import Component
from minigpt4.weights import RANDOM


def model_without_weights(config: ModelConfig) -> MiniGPT4:
    """Return the model of a config on the meta device; no weight file is opened.

    Raises:
        MiniGPT4Error: the parts do not go together, or the language model has no `config.json`.
    """
    with torch.device("meta"):
        vision_encoder = _random(config.vision_encoder).build()
        resampler = _random(config.resampler).build(vision_encoder=vision_encoder)
        language_model = LanguageModel.without_weights(config.language_model.config)
        model = MiniGPT4.from_config(config, ImageSide(vision_encoder, resampler), language_model)
    return model.train()


def _random(part: Component) -> Component:
    """Return a part that has random weights, if it has any."""
    values = {"weights": RANDOM, "ln_vision_weights": ""}
    present = {spec.name for spec in dataclasses.fields(part.config)} & values.keys()
    return dataclasses.replace(part, config=dataclasses.replace(part.config, **{key: values[key] for key in present}))


def step_flops(model: MiniGPT4, batch: Batch, *, recompute: bool = False) -> int:
    """Return the floating-point operations of a forward and a backward pass.

    Args:
        model: from `model_without_weights`.
        batch: on any device; its images may be on the meta device.
        recompute: recompute the activations of the language model, as `run.gradient_checkpointing` does.
    """
    with FlopCounterMode(display=False) as counter:
        _step(model, batch.to("meta"), recompute, nullcontext())
    return counter.get_total_flops()


def step_bytes(model: MiniGPT4, batch: Batch, *, recompute: bool = False) -> int:
    """Return the most bytes that a step holds at once besides the model and its batch: activations and gradients.

    The arguments are those of `step_flops`, which is called apart: counting operations keeps tensors alive.
    """
    batch = batch.to("meta")
    held = [tensor for tensor in vars(batch).values() if isinstance(tensor, Tensor)]
    live = _LiveBytes([*model.parameters(), *model.buffers(), *held])
    _step(model, batch, recompute, live)
    return live.peak


def _step(model: MiniGPT4, batch: Batch, recompute: bool, mode: AbstractContextManager[Any]) -> None:
    model.train()
    if recompute:
        recompute_activations(model.language_model.model)
    with mode, _Regular(), _fused_attention():
        model(batch).backward()
    model.zero_grad(set_to_none=True)


def parameter_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers; a tensor under two names counts once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they are alive.

    Attributes:
        peak: most bytes at once.
    """

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        """Count everything but the storages of `ignored`."""
        super().__init__()
        self.peak = self.now = 0
        self._ignored = [tensor.untyped_storage() for tensor in ignored]  # kept, so that no other one gets their number
        self._sizes: dict[int, int] = {storage._cdata: 0 for storage in self._ignored}  # noqa: SLF001

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._track(leaf)
        return found

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number = storage._cdata  # noqa: SLF001
        if number in self._sizes:
            return
        self._sizes[number] = storage.nbytes()
        self.now += self._sizes[number]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, number)

    def _free(self, number: int) -> None:
        self.now -= self._sizes.pop(number, 0)


class _Regular(TorchDispatchMode):
    """Answers yes where code asks whether all values are regular: transformers asks whether rows are unpacked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:  # noqa: SLF001
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Let `scaled_dot_product_attention` take a fused kernel, as on real devices; the meta device chooses none.

    The function is replaced, not intercepted by a mode: recomputed layers run inside the backward pass, without modes.
    """
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    aten = torch.ops.aten
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(times, dim=1) for each in (key, value))
    options = {"scale": scale}
    if attn_mask is None:
        found = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, **options)  # noqa: SLF001
    else:
        bias = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        found = aten._scaled_dot_product_efficient_attention(  # noqa: SLF001
            query, key, value, bias, True, dropout_p, is_causal, **options
        )
    attended: Tensor = found[0]
    return attended
