"""Intervals and tests: against formulas, hand-worked cases and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4.evaluation.statistics import clusters, compare, intervals, mean, share


def test_one_question_per_image_gives_the_interval_of_the_binomial_formula():
    right = np.repeat([1.0, 0.0], [300, 100])
    (low, high) = intervals([mean("accuracy", right, "%")], np.arange(400))[0]
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)


def test_questions_about_one_image_count_as_one_where_they_agree():
    """Four questions per image, all right or all wrong: the interval is twice as wide as for independent ones."""
    right = np.repeat(np.repeat([1.0, 0.0], [75, 25]), 4)
    cluster = np.repeat(np.arange(100), 4)
    statistic = [mean("accuracy", right, "%")]
    (low, high), (alone_low, alone_high) = intervals(statistic, cluster)[0], intervals(statistic, np.arange(400))[0]
    assert (high - low) / (alone_high - alone_low) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(("rate", "limits"), [(1.0, (0.7225, 1.0)), (0.0, (0.0, 0.2775))])
def test_where_all_are_right_or_wrong_the_interval_is_wilsons(rate, limits):
    assert intervals([mean("accuracy", [rate] * 10, "%")], np.arange(10))[0] == pytest.approx(limits, abs=1e-4)


def test_one_image_has_no_interval_and_no_test():
    assert all(map(math.isnan, intervals([mean("accuracy", [1, 0])], np.array([0, 0]))[0]))


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), min_size=2, max_size=30), st.randoms())
def test_the_order_of_questions_changes_no_value(rows, random):
    mixed = rows[:]
    random.shuffle(mixed)
    first, second = (mean("accuracy", [right for _, right in each]).value() for each in (rows, mixed))
    assert first == pytest.approx(second)
    assert 0 <= first <= 1


def test_a_ratio_of_sums_is_not_a_mean_of_ratios():
    assert share("precision", [1, 0], [1, 3]).value() == 0.25
    assert math.isnan(share("precision", [0], [0]).value())


def pair(first: list[float], second: list[float], images: list[str]):
    return compare(mean("accuracy", first, "%"), mean("accuracy", second, "%"), clusters(images))


def test_equal_models_do_not_differ():
    found = pair([1, 0, 1, 1], [1, 0, 1, 1], list("abcd"))
    assert (found.first, found.second, found.p_value, found.low, found.high) == (0.75, 0.75, 1.0, 0.0, 0.0)


def test_the_paired_test_equals_the_sign_test():
    """20 images where B alone is right and 5 where A alone is: the exact two-sided sign test gives 0.0041."""
    first, second = [1.0] * 5 + [0.0] * 20 + [1.0] * 75, [0.0] * 5 + [1.0] * 20 + [1.0] * 75
    found = pair(first, second, [str(n) for n in range(100)])
    exact = 2 * sum(math.comb(25, k) for k in range(6)) / 2**25
    assert exact == pytest.approx(0.0041, abs=1e-4)
    assert found.p_value == pytest.approx(exact, abs=0.004)
    assert found.low < found.second - found.first < found.high
    assert found.detectable == pytest.approx(2.80 * math.sqrt((0.25 - 0.15**2) / 100), rel=0.08)


def test_many_questions_about_few_images_prove_little():
    first, second = [0.0] * 300, [1.0] * 100 + [0.0] * 200
    assert pair(first, second, ["a"] * 100 + ["b"] * 100 + ["c"] * 100).p_value > 0.3
    assert pair(first, second, [str(n) for n in range(300)]).p_value < 0.001


@pytest.mark.slow
def test_95_of_100_intervals_hold_the_truth():
    generator = np.random.default_rng(0)
    cluster = np.repeat(np.arange(60), 3)
    inside = 0
    for trial in range(100):
        rate = np.repeat(generator.beta(2, 1, 60), 3)
        right = generator.random(180) < rate
        low, high = intervals([mean("accuracy", right.astype(float), "%")], cluster, trial)[0]
        inside += low <= 2 / 3 <= high
    assert inside >= 88
