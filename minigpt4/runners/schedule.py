"""The learning rate as a pure function of the optimiser step: linear warm-up, then cosine."""

from __future__ import annotations

import math

from minigpt4.config.sections import RunConfig


def learning_rate(step: int, run: RunConfig, compat: str = "ours") -> float:
    """Return the learning rate of optimiser step `step`, counted from 0.

    It rises from `warmup_start_learning_rate` at step 0 to `learning_rate` at step `warmup_steps`, then falls on
    a cosine to `min_learning_rate` at the last step, without a jump.

    Original (`compat: published`): the cosine runs over all steps, so the rate drops at the end of the warm-up, and the
    warm-up counts steps within an epoch, so it restarts where it is longer than one (`optims.py`).
    """
    low, peak, floor = run.warmup_start_learning_rate, run.learning_rate, run.min_learning_rate
    if compat == "published":
        epoch = run.steps_per_epoch or run.total_steps
        if step < run.warmup_steps:
            return min(peak, low + (peak - low) * (step % epoch) / max(run.warmup_steps, 1))
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * step / run.total_steps))
    if step < run.warmup_steps:
        return low + (peak - low) * step / run.warmup_steps
    done = (step - run.warmup_steps) / max(run.total_steps - 1 - run.warmup_steps, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
