from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from samantics.metrics.intervals import Interval, bootstrap_mean, bootstrap_statistic


def test_mean_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=400)
    ours = bootstrap_mean(values, samples=4000)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_mean_interval_covers_the_truth_in_about_95_of_100_cases() -> None:
    rng = np.random.default_rng(1)
    intervals = [bootstrap_mean(rng.random(200) < 0.3, seed=case, samples=300) for case in range(300)]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert 0.91 <= covered <= 0.98


def test_identical_seeds_tell_no_more_than_one() -> None:
    values = np.random.default_rng(2).random(500)
    one, three = bootstrap_mean(values, samples=3000), bootstrap_mean(np.stack([values] * 3), samples=3000)
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.1)


def test_seeds_that_differ_widen_the_interval() -> None:
    values = np.random.default_rng(3).random(500)
    apart = np.stack([values - 0.2, values, values + 0.2])
    narrow, wide = bootstrap_mean(values), bootstrap_mean(apart)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_values_that_have_no_mean_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(values)


def test_statistic_interval_agrees_with_scipy_for_the_median() -> None:
    values = np.random.default_rng(4).normal(size=301)
    ours = bootstrap_statistic(lambda rows: float(np.median(values[rows])), len(values), samples=2000)
    theirs = scipy.stats.bootstrap(
        (values,), np.median, n_resamples=2000, method="percentile", rng=1
    ).confidence_interval
    assert ours.value == np.median(values)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05)


def test_interval_prints_its_bounds() -> None:
    interval = Interval(0.7391, 0.721, 0.7562).times(100)
    assert str(interval) == f"{interval}" == "73.9 [72.1, 75.6]"
    assert f"{interval:.2f}" == "73.91 [72.10, 75.62]"
