from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxcompress.errors import UsageError
from onnxcompress.quantization.affine import QuantScheme, Range, activation_qparams, fake_quantize
from onnxcompress.quantization.observers import (
    OBSERVERS,
    EntropyObserver,
    Histogram,
    HistogramObserver,
    MinMaxObserver,
    MseObserver,
    Observer,
    PercentileObserver,
    WeightedMseObserver,
    make_observer,
)

Array = NDArray[Any]

UINT8 = QuantScheme("uint8", symmetric=False)


def shapes_of_data(rng: np.random.Generator, size: int = 40_000) -> dict[str, Array]:
    """Values as networks have them: after Relu, around zero, with outliers, far from zero, with few levels."""
    normal = rng.normal(size=size)
    outliers = normal.copy()
    outliers[:3] *= 40
    values = {
        "relu": np.maximum(normal, 0),
        "normal": normal,
        "laplace": rng.laplace(size=size) * 1e-3,
        "outliers": outliers,
        "offset": normal * 0.1 + 5,
        "negative": -np.abs(normal) * 1e4,
        "skewed": np.where(rng.random(size) < 0.97, np.abs(normal), -8 * np.abs(normal)),
        "levels": rng.integers(-3, 9, size).astype(float),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


KINDS = ["relu", "normal", "laplace", "outliers", "offset", "negative", "skewed", "levels"]


def watched(observer: HistogramObserver, values: Array) -> HistogramObserver:
    observer.update(values)
    return observer


def error(values: Array, interval: Range) -> float:
    restored = fake_quantize(values, activation_qparams(interval, UINT8)).astype(np.float64)
    return float(((values - restored) ** 2).sum())


# ---- the histogram


@pytest.mark.parametrize("kind", KINDS)
def test_the_histogram_counts_every_value_in_its_bin(kind: str, rng: np.random.Generator) -> None:
    values = shapes_of_data(rng)[kind]
    histogram = Histogram()
    for part in np.split(values, [1, 7, 500, 20_000]):
        histogram.add(part)
    counts, edges = histogram.occupied()
    assert histogram.total == values.size and histogram.zeros == int((values == 0).sum())
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    others = values[values != 0].astype(np.float64)
    expected = np.histogram(others, np.append(edges, edges[-1] + histogram.width))[0]
    if others.max() == edges[-1] + histogram.width:  # numpy counts the last edge, too
        expected[-1] -= int((others == others.max()).sum())
    np.testing.assert_array_equal(counts, expected)


def test_zero_is_an_edge_and_one_side_alone_has_2048_bins(rng: np.random.Generator) -> None:
    for scale in (1.0, 1.001, 3.999, 1e-6, 1e6):
        histogram = Histogram()
        values = (rng.random(100_000) * scale).astype(np.float32)
        values[0] = scale
        histogram.add(values)
        _, edges = histogram.occupied()
        assert edges[0] == 0.0 or edges[0] % histogram.width == 0
        assert scale / histogram.width >= 2048


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9), min_size=1, max_size=6),
    st.randoms(),
)
def test_the_histogram_does_not_depend_on_the_order_of_batches(batches: list[list[float]], random: Any) -> None:
    one, other, whole = Histogram(), Histogram(), Histogram()
    for batch in batches:
        one.add(np.array(batch, np.float32))
    random.shuffle(batches)
    for batch in batches:
        other.add(np.array(batch, np.float32).reshape(1, -1, 1))
    whole.add(np.array([value for batch in batches for value in batch], np.float32))
    for found in (other, whole):
        assert found.width == one.width and found.zeros == one.zeros
        assert (found.low, found.high) == (one.low, one.high)
        for a, b in zip(found.occupied(), one.occupied(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_histogram_keeps_the_same_memory_for_any_number_of_values(rng: np.random.Generator) -> None:
    histogram = Histogram()
    histogram.add(rng.normal(size=10).astype(np.float32))
    before = {name: getattr(value, "nbytes", None) for name, value in vars(histogram).items()}
    for size in (100_000, 300_000):
        histogram.add((rng.normal(size=size) * size).astype(np.float32))
    assert {name: getattr(value, "nbytes", None) for name, value in vars(histogram).items()} == before


def test_an_empty_batch_changes_nothing() -> None:
    histogram = Histogram()
    histogram.add(np.empty((0, 3), np.float32))
    assert histogram.total == 0 and not histogram.finite


# ---- each observer against all values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [99.99, 99.0, 90.0, 100.0])
def test_percentile_equals_numpy_to_one_bin(kind: str, percentile: float, rng: np.random.Generator) -> None:
    values = shapes_of_data(rng)[kind]
    observer = watched(PercentileObserver(UINT8, percentile), values)
    found = observer.range()
    cut = (100 - percentile) / 2
    # Between two order statistics numpy has a choice of rules; the answer lies between those of the two extreme ones.
    for value, at in ((found.low, cut), (found.high, 100 - cut)):
        lower = np.percentile(values, max(at - 1e-2, 0), method="lower") - observer.histogram.width
        upper = np.percentile(values, min(at + 1e-2, 100), method="higher") + observer.histogram.width
        assert lower <= value <= upper
    assert values.min() <= found.low <= found.high <= values.max()


@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_as_good_as_trying_every_range_on_all_values(kind: str, rng: np.random.Generator) -> None:
    values = shapes_of_data(rng, 10_000)[kind]
    found = error(values, watched(MseObserver(), values).range())
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    shares = np.linspace(0.02, 1, 50)
    tried = [Range(a * low, b * high) for a in (shares if low else [1.0]) for b in (shares if high else [1.0])]
    assert found <= 1.02 * min(error(values, interval) for interval in tried)


@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_never_worse_than_min_max(kind: str, rng: np.random.Generator) -> None:
    values = shapes_of_data(rng)[kind]
    observer = watched(MseObserver(), values)
    assert error(values, observer.range()) <= 1.001 * error(values, observer.min_max())


# ---- weighted mean squared error, with tails


def heavy_samples(rng: np.random.Generator, count: int, size: int = 300) -> Array:
    """Samples [count, size] of different loudness, so that the largest values are far apart from sample to sample."""
    loudness = rng.gamma(6.0, size=(count, 1))
    values: Array = np.maximum(loudness * rng.normal(size=(count, size)), 0).astype(np.float32)
    return values


def weighted_loss(samples: Array, interval: Range, clipping: float, tail: tuple[float, float] | None) -> float:
    """The loss of the observer weighted_mse for values above zero, value by value from its definition."""
    values = samples[samples != 0].astype(np.float64)
    restored = fake_quantize(values, activation_qparams(interval, UINT8)).astype(np.float64)
    inside = values <= interval.high
    rounding = float(((values - restored)[inside] ** 2).sum())
    if tail is None or interval.high <= tail[0]:
        return rounding + clipping * float(((values - restored)[~inside] ** 2).sum())
    start, scale = tail
    energy = float((np.maximum(values - start, 0) ** 2).sum())
    return rounding + clipping * energy * float(np.exp((start - interval.high) / scale))


@pytest.mark.parametrize("count", [8, 60, 256])
@pytest.mark.parametrize("clipping", [1.0, 4.0, 16.0])
def test_weighted_mse_against_every_range_by_its_definition(
    count: int, clipping: float, rng: np.random.Generator
) -> None:
    samples = heavy_samples(rng, count)
    observer = WeightedMseObserver(clipping=clipping)
    watched(observer, samples)
    found = observer.range()
    largest = np.sort(samples.max(axis=1).astype(np.float64))[::-1]
    many = min(max(8, count // 4), count - 1)
    start = float(largest[min(8, many)])
    scale = float(np.maximum(largest - largest[many], 0).sum() / many)
    known = observer.tails()[1]
    assert known is not None
    # "The largest k exceed it" leaves the way to the next value open.
    assert largest[min(8, many)] * 0.999 <= known.start <= largest[min(8, many) - 1] * 1.001
    assert known.scale == pytest.approx(scale, rel=0.3)
    tail = (known.start, known.scale)
    tried = [Range(0.0, observer.widest()[1] * share) for share in np.linspace(0.02, 1, 300)]
    assert observer.widest()[1] > largest[0]
    best = min(weighted_loss(samples, interval, clipping, tail) for interval in tried)
    assert weighted_loss(samples, found, clipping, tail) <= 1.03 * best
    assert found.low == 0.0 and start > 0


@pytest.mark.parametrize("count", [8, 16, 32])
def test_few_samples_get_room_for_the_next(count: int, rng: np.random.Generator) -> None:
    """On samples that were not seen the error is half of that of minimum and maximum at most, on average."""
    extremes = chosen = 0.0
    for _ in range(30):
        samples, unseen = heavy_samples(rng, count), heavy_samples(rng, 200)
        observer = WeightedMseObserver()
        watched(observer, samples)
        extremes += error(unseen, observer.min_max())
        chosen += error(unseen, observer.range())
        assert observer.range().high <= 4 * samples.max()
    assert chosen < 0.5 * extremes


def test_what_is_bounded_gets_no_room(rng: np.random.Generator) -> None:
    for top in (6.0, 0.0):
        samples = np.clip(rng.normal(size=(64, 1000)) * 20, -3, top).astype(np.float32)
        observer = WeightedMseObserver()
        watched(observer, samples)
        assert observer.tails() == (None, None)
        found = observer.range()
        assert found.low >= -3.0 and found.high <= top


def test_one_sample_says_nothing_about_tails(rng: np.random.Generator) -> None:
    values = rng.normal(size=(1, 500)).astype(np.float32)
    observer = WeightedMseObserver()
    watched(observer, values)
    plain = MseObserver(clipping=observer.clipping)
    watched(plain, values)
    assert observer.tails() == (None, None) and observer.range() == plain.range()


def divergence(values: Array, low: float, high: float, width: float) -> float:
    """The loss of the entropy observer, bin by bin from its definition."""
    values = values[values != 0].astype(np.float64)
    bins = np.floor(values / width)
    params = activation_qparams(Range(low, high), UINT8)
    kept = [
        b
        for b in sorted(set(bins.tolist()))
        if ((b + 0.5) * width >= low or low <= values.min()) and ((b + 0.5) * width <= high or high >= values.max())
    ]
    levels = {
        b: int(np.clip(np.rint((b + 0.5) * width / float(params.scale)) + int(params.zero_point), 0, 255)) for b in kept
    }
    counts = {b: int((bins == b).sum()) for b in kept}
    peers: dict[int, list[float]] = {}
    for b in kept:
        peers.setdefault(levels[b], []).append(b)
    p = {b: float(c) for b, c in counts.items()}
    p[kept[0]] += int((bins < kept[0]).sum())
    p[kept[-1]] += int((bins > kept[-1]).sum())
    total = 0.0
    for b in kept:
        same = peers[levels[b]]
        q = sum(counts[x] for x in same) / len(same) / values.size
        total += p[b] / values.size * np.log(p[b] / values.size / q) - p[b] / values.size + q
    return total


@pytest.mark.parametrize("kind", ["relu", "normal", "skewed"])
def test_the_entropy_loss_is_the_divergence_of_its_definition(kind: str, rng: np.random.Generator) -> None:
    values = shapes_of_data(rng, 3000)[kind]
    observer = EntropyObserver()
    watched(observer, values)
    width = observer.histogram.width
    low, high = min(float(values.min()), 0.0), float(values.max())
    for a, b in ((1.0, 1.0), (0.6, 0.7), (0.31, 0.9)):
        found = observer.losses(np.array([a * low]), np.array([b * high]))[0]
        assert found == pytest.approx(divergence(values, a * low, b * high, width), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_finds_a_range_as_good_as_the_best_of_many(kind: str, rng: np.random.Generator) -> None:
    values = shapes_of_data(rng)[kind]
    observer = EntropyObserver()
    watched(observer, values)
    found = observer.range()
    loss = observer.losses(np.array([found.low]), np.array([found.high]))[0]
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    shares = np.linspace(0.02, 1, 50)
    grid = [(a * low, b * high) for a in (shares if low else [1.0]) for b in (shares if high else [1.0])]
    losses = observer.losses(np.array([a for a, _ in grid]), np.array([b for _, b in grid]))
    assert loss <= 1.05 * losses.min() + 1e-9


def test_entropy_does_not_end_at_the_outliers(rng: np.random.Generator) -> None:
    """onnxruntime tries one threshold only, the extreme value."""
    values = np.maximum(rng.normal(size=200_000), 0).astype(np.float32)
    values[:5] = 60
    found = watched(EntropyObserver(), values).range()
    assert found.low == 0 and 2 < found.high < 20


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("kind", ["relu", "normal", "offset"])
def test_no_observer_depends_on_batches(name: str, kind: str, rng: np.random.Generator) -> None:
    values = shapes_of_data(rng)[kind]
    parts = np.split(values, [3, 9_000, 9_001, 30_000])
    found = []
    # Samples lie along the first axis; who keeps something of each of them has to see the same samples.
    whole = values.reshape(-1, 1, 1) if name == "weighted_mse" else values.reshape(4, 100, -1)
    for order in (parts, parts[::-1], [whole]):
        observer = make_observer(name)
        for part in order:
            if observer.reductions:
                observer.update(part.min(), part.max())
            else:
                observer.update(part)
        found.append(observer.range())
    assert found[0] == found[1] == found[2]


# ---- degenerate data


@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "min_max"])
@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-38, 0.0], [-3.0], [7.0, 7.0], [3e38, -3e38], [1e-45, -1e-45]])
def test_degenerate_data_gives_a_range(name: str, values: list[float]) -> None:
    observer = make_observer(name)
    stored = np.array([*values, 0.0], np.float32)
    observer.update(stored[:-1])
    found = observer.range()
    assert np.isfinite([found.low, found.high]).all()
    assert found.low <= found.high
    if name != "weighted_mse":  # that one goes beyond what it saw
        assert stored.min() <= found.low and found.high <= stored.max()
    assert activation_qparams(found, UINT8).scale > 0


@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "min_max"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_not_forgotten(name: str, bad: float) -> None:
    observer = make_observer(name)
    for values in ([1.0, 2.0], [bad, 1.0], [3.0, 0.0]):
        observer.update(np.array(values, np.float32))
    found = observer.range()
    assert not (np.isfinite(found.low) and np.isfinite(found.high))


def test_relu_keeps_zero_at_the_lower_end(rng: np.random.Generator) -> None:
    values = np.maximum(rng.normal(size=10_000), 0).astype(np.float32)
    for name in ("percentile", "entropy", "mse", "weighted_mse"):
        observer = make_observer(name)
        observer.update(values)
        assert observer.range().low == 0.0


def test_make_observer() -> None:
    assert isinstance(make_observer("min_max"), MinMaxObserver)
    assert all(isinstance(make_observer(name), Observer) for name in OBSERVERS)
    with pytest.raises(UsageError, match="unknown observer 'best'"):
        make_observer("best")
    with pytest.raises(UsageError, match="is not possible; expected 50 to 100"):
        make_observer("percentile", percentile=0.5)
