"""The statistics against brute force, and the interval's coverage and power on simulated timings."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from onnxcompress.statistics import (
    FEWEST_SESSIONS,
    midmean,
    midmean_interval,
    percentile,
    percentile_samples,
    sequential_interval,
    session_log_ratio,
    student_quantile,
    verdict,
)


@pytest.mark.parametrize(("q", "samples"), [(50, 5), (90, 29), (95, 59), (99, 299), (99.9, 2995), (10, 29)])
def test_percentile_samples(q: float, samples: int) -> None:
    assert percentile_samples(q) == samples
    share = max(q, 100 - q) / 100
    assert share**samples <= 0.05 < share ** (samples - 1)


def test_percentile_needs_its_samples() -> None:
    values = np.arange(29.0)
    assert percentile(values, 90) == pytest.approx(25.2)
    assert percentile(values[:28], 90) is None
    assert percentile(values, 95) is None


@pytest.mark.parametrize("degrees", [1, 2, 5, 9, 30, 200])
@pytest.mark.parametrize("probability", [0.025, 0.5, 0.9, 0.975])
def test_student_quantile(degrees: int, probability: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert student_quantile(probability, degrees) == pytest.approx(
        stats.t.ppf(probability, degrees), rel=1e-4, abs=1e-4
    )


def test_student_quantile_from_the_tables() -> None:
    assert student_quantile(0.975, 9) == pytest.approx(2.2622, abs=1e-4)
    assert student_quantile(0.975, 5) == pytest.approx(2.5706, abs=1e-4)


def test_session_log_ratio_cancels_the_position() -> None:
    """Being second costs 10 % here; one median over all pairs would be off by that or nothing, at random."""
    reference_first = np.array([True, False, True, False, True])
    log_ratios = np.where(reference_first, 0.03 - 0.1, 0.03 + 0.1)
    assert session_log_ratio(log_ratios, reference_first) == pytest.approx(0.03)


def test_session_log_ratio_with_one_order_only() -> None:
    assert session_log_ratio(np.array([0.1, 0.2, 0.9]), np.array([True, True, True])) == pytest.approx(0.2)


def test_midmean_ignores_a_wild_quarter() -> None:
    assert midmean(np.array([1.0, 2.0, 3.0, 1e9])) == pytest.approx(2.5)
    assert midmean(np.array([5.0])) == 5.0
    rows = np.array([[4.0, 1.0, 2.0, 3.0], [0.0, 0.0, 8.0, 4.0]])
    np.testing.assert_allclose(midmean(rows), [2.5, 2.0])


def test_interval_is_the_expanded_percentile_of_all_resamples() -> None:
    """Brute force: four values have 4 ** 4 equally likely resamples."""
    values = np.array([0.0, 1.0, 2.0, 4.0])
    stats = pytest.importorskip("scipy.stats")
    every = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    assert len(every) == 256
    tail = stats.norm.cdf(-math.sqrt(4 / 3) * stats.t.ppf(0.9, 3))
    low, high = np.quantile(midmean(values[every]), [tail, 1 - tail])
    estimate, found_low, found_high = midmean_interval(values, confidence=0.8, resamples=40_000)
    assert estimate == 1.5
    assert found_low == pytest.approx(low, abs=0.06)
    assert found_high == pytest.approx(high, abs=0.06)


def test_interval_is_the_same_for_the_same_seed_and_moves_with_the_values() -> None:
    values = np.random.default_rng(0).normal(size=12)
    assert midmean_interval(values, seed=3) == midmean_interval(values, seed=3)
    np.testing.assert_allclose(midmean_interval(values + 1), np.add(midmean_interval(values), 1))


def test_one_value_has_no_interval() -> None:
    assert midmean_interval(np.array([0.5])) == (0.5, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.5, 1.6, "FASTER"),
        (1.001, 1.03, "FASTER"),
        (0.5, 0.6, "SLOWER"),
        (0.97, 0.999, "SLOWER"),
        (0.99, 1.01, "SAME"),
        (1.005, 1.015, "SAME"),
        (0.98, 1.02, "SAME"),
        (0.979, 1.01, "UNDECIDED"),
        (0.99, 1.03, "UNDECIDED"),
        (1.0, 1.03, "UNDECIDED"),
        (0.9, 1.1, "UNDECIDED"),
    ],
)
def test_verdict(low: float, high: float, expected: str) -> None:
    assert verdict(low, high) == expected


def sessions(generator: np.random.Generator, slower: float, noise: float) -> Iterator[float]:
    """Simulated timings of a noisy machine, one log ratio a session.

    Log-normal times with a heavy tail; a speed that drifts by a tenth; whoever runs second is 2 % slower; a session
    effect of its own for either model; and every eighth session is hit by a neighbour, at random for one model more.
    """
    while True:
        pairs = 20
        drift = np.linspace(0, generator.normal(scale=0.1), pairs)
        effect = generator.normal(scale=noise, size=2) * (6 if generator.random() < 1 / 8 else 1)
        reference_first = generator.permutation(np.arange(pairs) % 2 == 0)
        times = []
        for model, second in enumerate((~reference_first, reference_first)):
            jitter = 0.03 * generator.standard_normal(pairs) + generator.exponential(0.03, pairs)
            times.append(drift + jitter + effect[model] + 0.02 * second + slower * model)
        yield session_log_ratio(times[0] - times[1], reference_first)


def simulate(trials: int, slower: float, noise: float, most: int) -> list[tuple[float, float, float, int]]:
    """(ratio, low, high, sessions) of each trial."""
    results = []
    for trial in range(trials):
        source = sessions(np.random.default_rng([trial, most]), slower, noise)
        estimate, low, high, used = sequential_interval(source, 10, lambda count: count >= most, seed=trial)
        results.append((math.exp(estimate), math.exp(low), math.exp(high), len(used)))
    return results


@pytest.mark.parametrize(("noise", "most", "stops"), [(0.003, 25, True), (0.006, 60, True), (0.015, 25, False)])
def test_coverage_of_equal_models(noise: float, most: int, stops: bool) -> None:
    """500 A/A trials: the interval holds 1, also where sessions are added until it looks narrow."""
    results = simulate(500, 0.0, noise, most)
    assert np.mean([low <= 1 <= high for _, low, high, _ in results]) >= 0.925
    assert np.mean([verdict(low, high) in ("FASTER", "SLOWER") for _, low, high, _ in results]) <= 0.075
    assert (len({count for *_, count in results}) > 1) == stops


def test_coverage_where_pairs_depend_on_those_before_them() -> None:
    """Runs of slow pairs within a session make pairs worth less than their number; the unit is the session."""
    pairs, trials = 20, 300
    weights = 0.9 ** np.abs(np.subtract.outer(np.arange(pairs), np.arange(pairs)))
    factor = np.linalg.cholesky(weights)
    held = []
    for trial in range(trials):
        generator = np.random.default_rng([trial, 7])
        order = generator.permutation(np.arange(pairs) % 2 == 0)
        jitter = 0.02 * factor @ generator.standard_normal((pairs, 30))
        ratios = [session_log_ratio(jitter[:, i] + generator.normal(scale=0.005), order) for i in range(30)]
        _, low, high, _ = sequential_interval(iter(ratios), 10, lambda count: count >= 30, seed=trial)
        held.append(low <= 0 <= high)
    assert np.mean(held) >= 0.92


def test_power_for_five_percent() -> None:
    """200 trials with a candidate 5 % slower on the noisier machine, as many sessions as thirty seconds hold."""
    results = simulate(200, math.log(1.05), 0.015, 100)
    assert np.mean([verdict(low, high) == "SLOWER" for _, low, high, _ in results]) >= 0.98
    assert np.mean([low <= 1 / 1.05 <= high for _, low, high, _ in results]) >= 0.90
    assert np.median([ratio for ratio, *_ in results]) == pytest.approx(1 / 1.05, abs=0.003)


def test_small_samples_cover_too() -> None:
    """As few sessions as are allowed: 95 % was asked for, 92 % is demanded of 1,000 trials."""
    generator = np.random.default_rng(0)
    held = []
    for seed in range(1000):
        _, low, high = midmean_interval(generator.normal(size=FEWEST_SESSIONS), resamples=500, seed=seed)
        held.append(low <= 0 <= high)
    assert np.mean(held) >= 0.92


def test_sessions_stop_when_time_is_out() -> None:
    wide = iter([-0.5, 0.5] * 20)
    *_, used = sequential_interval(wide, 10, lambda count: count >= 7)
    assert len(used) == 7


def test_sessions_stop_when_the_interval_is_narrow_but_not_before_the_fewest() -> None:
    estimate, low, high, used = sequential_interval(iter([0.1] * 50), 8, lambda count: False)
    assert (estimate, low, high) == pytest.approx((0.1, 0.1, 0.1))
    assert len(used) == 8


def test_sessions_stop_early_for_a_large_difference_only() -> None:
    """The same spread, too wide to be called narrow: enough for a ratio of 2.7, not for a ratio of 1."""
    spread = np.tile([-0.015, -0.005, 0.005, 0.015], 10)
    *_, far = sequential_interval(iter(1.0 + spread), 10, lambda count: count >= 11)
    *_, near = sequential_interval(iter(spread), 10, lambda count: count >= 11)
    assert (len(far), len(near)) == (10, 11)


def test_sessions_that_end_are_an_error() -> None:
    with pytest.raises(ValueError, match="endless"):
        sequential_interval(iter([0.0, 1.0]), 10, lambda count: False)
