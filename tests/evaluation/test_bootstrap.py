"""Intervals cover, are seeded, and treat what belongs together as one."""

from __future__ import annotations

import numpy as np
import pytest

from xpatch.evaluation.bootstrap import estimate, merge, tally


def test_tally_counts_per_cluster():
    made = tally(["a", "b", "a"], np.array([True, False, False]))
    assert made.clusters == ("a", "b")
    assert made.right.tolist() == [1, 0] and made.count.tolist() == [2, 1]


def test_estimate_is_the_share_and_is_seeded():
    made = tally([str(i) for i in range(200)], np.arange(200) % 4 > 0)
    first, again, other = (estimate([made], seed=s) for s in (1, 1, 2))
    assert first == again and first.value == other.value == 0.75
    assert (first.low, first.high) != (other.low, other.high)
    assert first.n == first.clusters == 200


def test_interval_agrees_with_the_normal_approximation():
    made = tally([str(i) for i in range(1000)], np.arange(1000) % 5 > 0)
    found = estimate([made], rounds=4000)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert found.low == pytest.approx(0.8 - half, abs=0.004) and found.high == pytest.approx(0.8 + half, abs=0.004)


def test_interval_covers_the_truth_about_nineteen_times_in_twenty():
    generator = np.random.default_rng(0)
    names = [str(i) for i in range(150)]
    covered = 0
    for round_ in range(200):
        found = estimate([tally(names, generator.random(150) < 0.7)], seed=round_)
        covered += found.low <= 0.7 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_repeated_texts_of_one_cluster_do_not_narrow_the_interval():
    right = np.arange(100) % 2 == 0
    once = estimate([tally([str(i) for i in range(100)], right)])
    often = estimate([tally([str(i % 100) for i in range(1000)], np.tile(right, 10))])
    assert often.high - often.low == pytest.approx(once.high - once.low)
    assert often.n == 1000 and often.clusters == 100


def test_mean_over_languages_resamples_a_cluster_for_all_at_once():
    right = np.arange(100) % 2 == 0
    one = tally([str(i) for i in range(100)], right)
    assert estimate([one, one, one]).high == pytest.approx(estimate([one]).high)


def test_mean_over_languages_is_the_mean_of_shares_not_of_texts():
    few, many = tally(["a"], np.array([True])), tally([f"b{i}" for i in range(99)], np.zeros(99, dtype=bool))
    assert estimate([few, many]).value == 0.5


def test_unanimous_texts_get_the_exact_binomial_bound():
    names = [str(i) for i in range(100)]
    right, wrong = (estimate([tally(names, np.full(100, x))]) for x in (True, False))
    assert (right.value, right.high) == (1, 1) and right.low == pytest.approx(0.025**0.01)
    assert (wrong.value, wrong.low) == (0, 0) and wrong.high == pytest.approx(1 - 0.025**0.01)


def test_merge_keeps_a_shared_cluster_one():
    made = merge([tally(["a", "b"], np.array([True, True])), tally(["b", "c"], np.array([False, True]))])
    assert made.clusters == ("a", "b", "c") and made.right.tolist() == [1, 1, 1] and made.count.tolist() == [1, 2, 1]
    with pytest.raises(ValueError):
        estimate([])
