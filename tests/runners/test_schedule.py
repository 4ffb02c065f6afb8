"""The learning rate: a pure function of the step, with no surprise in it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4.config.sections import RunConfig
from minigpt4.runners.schedule import learning_rate

rates = st.floats(1e-8, 1.0)


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    total = draw(st.integers(2, 400))
    low, floor, peak = sorted([draw(rates), draw(rates), draw(rates)])
    if draw(st.booleans()):
        low, floor = floor, low
    return RunConfig(
        output_dir="run",
        total_steps=total,
        warmup_steps=draw(st.integers(0, total - 2)),
        learning_rate=peak,
        min_learning_rate=floor,
        warmup_start_learning_rate=low,
    )


@given(runs())
def test_warm_up_rises_hands_over_at_the_peak_and_the_rate_ends_at_the_floor(run):
    series = [learning_rate(step, run) for step in range(run.total_steps)]
    rising, falling = series[: run.warmup_steps + 1], series[run.warmup_steps :]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(rising))
    assert all(a >= b * (1 - 1e-9) for a, b in itertools.pairwise(falling))
    assert series[run.warmup_steps] == pytest.approx(run.learning_rate)
    assert series[-1] == pytest.approx(run.min_learning_rate)
    if run.warmup_steps:
        assert series[0] == run.warmup_start_learning_rate


@given(runs())
def test_the_rate_never_jumps(run):
    span = run.learning_rate - min(run.warmup_start_learning_rate, run.min_learning_rate)
    steps_of_cosine = max(run.total_steps - 1 - run.warmup_steps, 1)
    largest = span * max(1 / max(run.warmup_steps, 1) if run.warmup_steps else 0, 1.6 / steps_of_cosine)
    series = [learning_rate(step, run) for step in range(run.total_steps)]
    assert max(abs(a - b) for a, b in itertools.pairwise(series)) <= largest * (1 + 1e-6)


@given(runs())
def test_the_rate_stays_in_its_bounds_even_after_the_last_step(run):
    low = min(run.warmup_start_learning_rate, run.min_learning_rate)
    for step in (0, run.warmup_steps, run.total_steps - 1, run.total_steps + 50):
        assert low * (1 - 1e-9) <= learning_rate(step, run) <= run.learning_rate * (1 + 1e-9)


def test_accumulation_and_batch_size_do_not_enter():
    one, other = (
        RunConfig(output_dir="run", total_steps=9, warmup_steps=3, global_batch_size=size, batch_size_per_rank=1)
        for size in (1, 64)
    )
    assert [learning_rate(n, one) for n in range(9)] == [learning_rate(n, other) for n in range(9)]


def test_a_warm_up_longer_than_the_run_only_rises():
    run = RunConfig(output_dir="run", total_steps=10, warmup_steps=100, learning_rate=1.0)
    series = [learning_rate(step, run) for step in range(10)]
    assert series == sorted(series)
    assert series[-1] < 0.1
