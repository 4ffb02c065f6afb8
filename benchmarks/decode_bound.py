"""What bounds one token of one stream on a CPU, memory or kernels: one JSON line for each precision.

    python benchmarks/decode_bound.py [--threads 1] [--repeats 30]

Takes the linear layers of the mini model's language model (`python -m minigpt4 assets mini`). `read_ms` is the time to
read their weights once at the memory bandwidth measured here, by summing 256 MB; `products_ms` is the time of their
products with one row, and nothing else. Each is the best of the repeats, so that other work matters less.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))
from minigpt4.assets import resolve
from minigpt4.models.language_model import load_causal_lm


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    block = torch.ones(64 * 1024**2)
    bandwidth = block.nbytes / best(block.sum, arguments.repeats)
    for name in ("float32", "bfloat16"):
        model = load_causal_lm(resolve("asset:smollm2-135m-instruct"), name)
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        rows = [torch.randn(1, module.in_features, dtype=module.weight.dtype) for module in linear]

        @torch.inference_mode()
        def products(linear: list[nn.Linear] = linear, rows: list[torch.Tensor] = rows) -> None:
            for module, row in zip(linear, rows, strict=True):
                module(row)

        weights = sum(module.weight.nbytes for module in linear)
        found = {
            "precision": name,
            "threads": arguments.threads,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "gb_per_second": round(bandwidth / 1e9, 1),
            "weights_mb": round(weights / 1e6, 1),
            "read_ms": round(1000 * weights / bandwidth, 2),
            "products_ms": round(1000 * best(products, arguments.repeats), 2),
        }
        print(json.dumps(found), flush=True)


def best(work: Callable[[], object], repeats: int) -> float:
    """Return the least seconds of some runs."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
