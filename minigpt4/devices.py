"""Devices, precisions and memory: the only module that names an accelerator."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from pathlib import Path

import torch

from minigpt4.errors import ConfigError

PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100 NVL": 8.35e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "A40": 1.5e14,
    "L40S": 3.62e14,
    "L4": 1.21e14,
    "4090": 1.65e14,
    "3090": 7.1e13,
}
"""Operations per second of dense bf16 matrix products, by words of the device's name, from the vendor's data sheets."""

DEVICE_MEMORY_GIB = {
    "B200": 180,
    "H200": 140,
    "H100 PCIe": 79,
    "H100 NVL": 93,
    "H100": 79,
    "A100 40GB": 39,
    "A100": 79,
    "A40": 44,
    "L40S": 44,
    "L4": 22,
    "4090": 23,
    "3090": 23,
}
"""Memory that programs see, in GiB, by words of the device's name; the larger one of two sizes with one name."""

_M_MMAP_THRESHOLD = -3
"""glibc's malloc.h: the size from which a block is mapped on its own; setting it also stops glibc from raising it."""


def choose_device(wanted: str = "auto") -> torch.device:
    """Return the device meant by `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        ConfigError: this machine does not have that device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    names = [name for name, is_available in available.items() if is_available]
    if wanted != "auto" and wanted not in names:
        raise ConfigError(f"device {wanted!r} is not available on this machine; available: {', '.join(names)}")
    return torch.device(names[0] if wanted == "auto" else wanted)


def choose_precision(wanted: str, device: torch.device) -> str:
    """Return the autocast precision for `auto`, `fp32`, `bf16` or `fp16`: accelerate's `no`, `bf16` or `fp16`.

    Raises:
        ConfigError: fp16 on a CPU, which would silently compute in float32.
    """
    if wanted == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if wanted == "fp16" and device.type == "cpu":
        raise ConfigError("run.precision: fp16 needs an accelerator; on a CPU use bf16 or fp32")
    return "no" if wanted == "fp32" else wanted


def fast_dtype() -> torch.dtype:
    """Return the precision in which frozen weights are best held here: bfloat16 where it is fast, else float32.

    CPUs without AVX-512 compute bfloat16 many times slower than float32; NVIDIA GPUs before Ampere emulate it.
    """
    device = choose_device().type
    if device == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = device != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.bfloat16 if is_fast else torch.float32


def dtype_named(name: str) -> torch.dtype:
    """Return the precision of a `dtype` setting: `auto`, `float32`, `bfloat16` or `float16`."""
    return fast_dtype() if name == "auto" else getattr(torch, name)


def copies_from_pinned_memory(device: torch.device) -> bool:
    """Whether the device can copy from page-locked memory while it computes."""
    return device.type == "cuda"


def peak_flops(device: torch.device | str) -> float | None:
    """Return the operations per second that a device, or one of this name, can reach; None where it is not known."""
    if isinstance(device, torch.device):
        device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    words = set(re.split(r"[ -]", device))
    return next((peak for name, peak in PEAK_FLOPS.items() if words.issuperset(name.split())), None)


def peak_memory_gb(device: torch.device) -> float | None:
    """Return the most memory that tensors on a GPU have taken so far, in 10^9 bytes; None for other devices."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def resident_memory_gb() -> float | None:
    """Return the most memory that this process has held so far, in 10^9 bytes; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def resident_memory_now() -> int:
    """Return the bytes that this process holds at this moment; its maximum so far where the system only knows that."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return round((resident_memory_gb() or 0.0) * 1e9)


def matmul_flops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """Return the operations per second that this machine's CPU reaches in matrix products of `size` x `size`."""
    left, right = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    best, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end or not best:
        started = time.perf_counter()
        torch.mm(left, right)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def return_freed_memory() -> None:
    """Make every large block that this process frees go back to the system at once; does nothing without glibc.

    For processes that run for long. By default, glibc soon takes blocks of up to 32 MB, such as decoded images, from
    heaps of 64 MB, and a single small object keeps such a heap in memory: a service grew by 13 % over 1,000 requests.
    In training it would cost more time than it is worth: the system clears every block again.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, 2**20)
