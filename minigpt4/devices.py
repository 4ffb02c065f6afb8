"""Which device and which precision: the only module that names an accelerator."""

from __future__ import annotations

import torch

from minigpt4.errors import ConfigError


def choose_device(wanted: str = "auto") -> torch.device:
    """Return the device meant by `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        ConfigError: that device is not on this machine.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available.get(wanted, False):
        raise ConfigError(f"device {wanted!r} is not on this machine; there is: {', '.join(_there(available))}")
    return torch.device(wanted)


def choose_precision(wanted: str, device: torch.device) -> str:
    """Return the autocast precision for `auto`, `fp32`, `bf16` or `fp16`: accelerate's `no`, `bf16` or `fp16`.

    Raises:
        ConfigError: fp16 without an accelerator, where it would silently be float32.
    """
    if wanted == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if wanted == "fp16" and device.type == "cpu":
        raise ConfigError("run.precision: fp16 needs an accelerator; on a CPU use bf16 or fp32")
    return "no" if wanted == "fp32" else wanted


def fast_dtype() -> torch.dtype:
    """Return the precision in which frozen weights are best held here: bfloat16 where it is fast, else float32.

    CPUs without AVX-512 compute bfloat16 many times slower than float32.
    """
    if choose_device().type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return torch.bfloat16
    return torch.float32


def _there(available: dict[str, bool]) -> list[str]:
    return [name for name, there in available.items() if there]
