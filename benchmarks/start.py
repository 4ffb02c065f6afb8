"""Where `llama_proj` starts: loss against samples seen. `python benchmarks/start.py`, one JSON line per run.

Trains the projection of a config (the mini pair by default) from random weights and from the closed-form start of
`model.start.ridge`, each with several learning rates and seeds. The random start is judged at its own best rate; the
summary says after how many samples the closed-form start has reached the same validation loss. The samples of the
closed-form start count as seen. Features of the frozen parts are computed once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from minigpt4.batch import Batch, Sample
from minigpt4.checkpoints.assemble import LoadedModel, assemble
from minigpt4.config import load_config
from minigpt4.datasets.collate import collate
from minigpt4.datasets.loader import encode_example
from minigpt4.datasets.source import Example
from minigpt4.models.closed_form import start_in_closed_form
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.runners.batches import build_sources
from minigpt4.runners.calibration import CALIBRATION_SAMPLES

WARM_UP = 3
"""Steps of linear warm-up; the rate then falls along a cosine to a tenth."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cfg-path", default="mini_stage1", help="a training config whose data sets have one image each"
    )
    parser.add_argument("--options", nargs="*", default=[])
    parser.add_argument("--ridge", type=int, default=512, help="samples of the closed-form start")
    parser.add_argument("--pool", type=int, default=1024, help="training samples that are drawn from")
    parser.add_argument("--validation", type=int, default=64, help="validation samples")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between two validations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--random-rates", type=float, nargs="+", default=[5e-3, 2e-2, 8e-2, 0.3])
    parser.add_argument("--ridge-rates", type=float, nargs="+", default=[2e-3, 5e-3, 2e-2])
    arguments = parser.parse_args(argv)
    loaded = assemble(load_config(arguments.cfg_path, arguments.options))
    torch.manual_seed(0)
    train, validation = read(loaded, "train", arguments.pool), read(loaded, "validation", arguments.validation)
    with_features(loaded.model, [*train, *validation], calibrate_on=train[:CALIBRATION_SAMPLES])
    fixed = [as_batch(loaded, validation[n : n + 32]) for n in range(0, len(validation), 32)]
    curves: dict[tuple[str, float], list[list[float]]] = {}
    for start, rates in (("random", arguments.random_rates), ("ridge", arguments.ridge_rates)):
        for rate in rates:
            for seed in range(arguments.seeds):
                began = time.monotonic()
                set_start(loaded.model, start, train[: arguments.ridge], seed)
                curve = run(loaded, train, fixed, rate, seed, arguments)
                curves.setdefault((start, rate), []).append(curve)
                line = {"start": start, "rate": rate, "seed": seed, "validation": [round(v, 4) for v in curve]}
                print(json.dumps(line | {"seconds": round(time.monotonic() - began, 1)}), flush=True)
    print(json.dumps(summarise(curves, arguments.every * arguments.batch, arguments.ridge)))


def read(loaded: LoadedModel, part: str, number: int) -> list[Sample]:
    """Return the first samples of the config's training or validation data, encoded."""
    (source,) = build_sources(getattr(loaded.config.datasets, part)).values()
    items = islice((item for item in source.in_order() if isinstance(item, Example)), number)
    return [encode_example(item, loaded.conversation, loaded.image_processor) for item in items]


@torch.no_grad()
def with_features(model: MiniGPT4, samples: Sequence[Sample], calibrate_on: Sequence[Sample]) -> None:
    """Calibrate the resampler, and replace the pixels of every sample with its query features."""
    model.calibrate(torch.cat([sample.pixel_values for sample in calibrate_on if sample.pixel_values is not None]))
    for sample in samples:
        sample.query_features, sample.pixel_values = model.query_features(sample.pixel_values), None


def as_batch(loaded: LoadedModel, samples: Sequence[Sample]) -> Batch:
    """Return samples as one batch."""
    return collate(samples, loaded.conversation.tokenizer.filler_id)


def set_start(model: MiniGPT4, start: str, samples: Sequence[Sample], seed: int) -> None:
    """Set `llama_proj` to a new random start, or to the closed-form one."""
    torch.manual_seed(seed)
    model.llama_proj.reset_parameters()
    if start == "ridge":
        texts = [[token for token in sample.labels.tolist() if token >= 0] for sample in samples]
        found = start_in_closed_form(model, [s.query_features[0] for s in samples], texts)
        if not found.words:
            raise SystemExit("no word of the texts can be predicted from the image features: raise --ridge")


def run(
    loaded: LoadedModel, train: Sequence[Sample], fixed: Sequence[Batch], rate: float, seed: int, arguments: Any
) -> list[float]:
    """Train, and return the validation loss at the start and after every few steps."""
    model, draw = loaded.model, random.Random(seed)
    optimizer = torch.optim.AdamW(model.llama_proj.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    curve = [validation_loss(model, fixed)]
    for step in range(arguments.steps):
        batch = as_batch(loaded, [dataclasses.replace(each) for each in draw.sample(list(train), arguments.batch)])
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / arguments.steps)
        optimizer.param_groups[0]["lr"] = rate * cosine * min(1.0, (step + 1) / WARM_UP)
        (model(batch) / batch.num_supervised).backward()
        torch.nn.utils.clip_grad_norm_(model.llama_proj.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % arguments.every == 0:
            curve.append(validation_loss(model, fixed))
    return curve


def validation_loss(model: MiniGPT4, fixed: Sequence[Batch]) -> float:
    """Return the mean loss of the validation samples, in nats per supervised token."""
    sums = [tuple(float(each.sum()) for each in model.losses_per_sample(batch)) for batch in fixed]
    return sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums)


def summarise(curves: dict[tuple[str, float], list[list[float]]], per_point: int, ridge: int) -> dict[str, Any]:
    """Return samples to the same loss: the last one of the random start at its best rate, means over the seeds.

    Args:
        curves: validation losses of each seed, by start and rate.
        per_point: training samples between two of them.
        ridge: samples of the closed-form start.
    """
    means = {key: [statistics.mean(point) for point in zip(*of_seeds, strict=True)] for key, of_seeds in curves.items()}
    best = {kind: min((k for k in means if k[0] == kind), key=lambda k: means[k][-1]) for kind in ("random", "ridge")}
    plain, closed = means[best["random"]], means[best["ridge"]]
    target = min(plain)
    needed = plain.index(target) * per_point
    reached = next((n * per_point for n, value in enumerate(closed) if value <= target), None)
    return {
        "best_rate": {kind: key[1] for kind, key in best.items()},
        "loss_at_start": {"random": round(plain[0], 4), "ridge": round(closed[0], 4)},
        "loss_at_end": {"random": round(plain[-1], 4), "ridge": round(closed[-1], 4)},
        "target_loss": round(target, 4),
        "samples_random": needed,
        "samples_ridge_steps": reached,
        "ridge_samples": ridge,
        "fewer_in_steps": None if not reached else round(needed / reached, 2),
    }


if __name__ == "__main__":
    main()
