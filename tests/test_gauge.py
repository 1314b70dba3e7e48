"""What a variant lost, told by labels, by class scores and by numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, sqrt
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxcompress.data import open_data
from onnxcompress.graph import InputSpec
from onnxcompress.quantization.gauge import Gauge, Goal, Reading

Array = NDArray[Any]
RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((40, 5)).astype(np.float32) * 3


def run(outputs: Callable[[Array], dict[str, Array]]) -> Callable[[dict[str, Array]], dict[str, Array]]:
    return lambda feeds: outputs(feeds["x"])


def gauge(original: Callable[[Array], dict[str, Array]], *, labels: Array | None = None, samples: int = 40) -> Gauge:
    arrays = {"x": SCORES} if labels is None else {"x": SCORES, "labels": labels}
    data = open_data(arrays, [InputSpec("x", np.dtype(np.float32), ("N", 5))], batch=16)
    return Gauge(run(original), data, samples)


def test_an_equal_variant_loses_nothing() -> None:
    reading = gauge(lambda x: {"y": x}).read(run(lambda x: {"y": x}))
    assert reading == Reading(0.0, inf, {"cosine": 0.0, "agreement": 0.0, "expected top-1": 0.0}, 0.0, 40)
    assert reading.decibels == inf


def test_flips_are_counted() -> None:
    def flipped(x: Array) -> dict[str, Array]:
        y = x.copy()
        y[:4] = -y[:4]
        return {"y": y}

    changed = sum((x.argmax(1) != flipped(x)["y"].argmax(1)).sum() for x in (SCORES[:16], SCORES[16:32], SCORES[32:]))
    reading = gauge(lambda x: {"y": x}).read(run(flipped))
    assert reading.drops["agreement"] >= 100 * changed / 40
    assert reading.drops["expected top-1"] > 0


def test_margins_tell_of_flips_that_did_not_happen_yet() -> None:
    """An error that is as large as the margins of other samples costs agreement, though by luck it flipped none."""
    base = np.zeros((40, 5), np.float32)
    base[:, 0] = 1.0
    base[:20, 1] = 0.9  # small margins, with small errors; the other half has large ones
    error = np.zeros_like(base)
    error[20:, 1] = 0.5
    state = {"at": 0}

    def take(source: Array) -> Callable[[dict[str, Array]], dict[str, Array]]:
        def answer(feeds: dict[str, Array]) -> dict[str, Array]:
            start = state["at"] % 40
            state["at"] += len(feeds["x"])
            return {"y": source[start : start + len(feeds["x"])]}

        return answer

    data = open_data({"x": SCORES}, [InputSpec("x", np.dtype(np.float32), ("N", 5))], batch=10)
    reading = Gauge(take(base), data, 40).read(take(base + error))
    assert reading.drops["agreement"] == pytest.approx(25.0)


def test_probabilities_count_as_their_logarithms() -> None:
    def softmax(x: Array) -> Array:
        e = np.exp(x - x.max(1, keepdims=True))
        return np.asarray(e / e.sum(1, keepdims=True))

    noise = RNG.standard_normal(5).astype(np.float32)
    logits = gauge(lambda x: {"y": x}).read(run(lambda x: {"y": x + noise}))
    chances = gauge(lambda x: {"y": softmax(x)}).read(run(lambda x: {"y": softmax(x + noise)}))
    assert chances.drops["agreement"] == pytest.approx(logits.drops["agreement"])
    assert chances.drops["expected top-1"] == pytest.approx(logits.drops["expected top-1"], abs=1e-3)


def test_labels_tell_of_top_1() -> None:
    labels = SCORES.argmax(1).astype(np.int64)
    reading = gauge(lambda x: {"y": x}, labels=labels).read(run(lambda x: {"y": -x}))
    assert reading.drops["top-1"] == pytest.approx(reading.drops["agreement"], abs=20)
    assert reading.drops["top-1"] > 50
    assert reading.sampling_error == pytest.approx(100 / sqrt(40), rel=0.1)


def test_labels_that_are_no_classes_are_not_used() -> None:
    reading = gauge(lambda x: {"y": x}, labels=np.full(40, 99)).read(run(lambda x: {"y": -x}))
    assert "top-1" not in reading.drops


def test_a_cosine_falls_by_half_of_the_squared_error() -> None:
    reading = gauge(lambda x: {"y": x[:, :, None, None].repeat(2, 2)}).read(
        run(lambda x: {"y": x[:, :, None, None].repeat(2, 2) * 1.1})
    )
    assert reading.error == pytest.approx(0.01, rel=1e-4)
    assert reading.drops["cosine"] == pytest.approx(0.5, rel=0.02)


def test_what_is_not_finite_is_worst() -> None:
    reading = gauge(lambda x: {"y": x}).read(run(lambda x: {"y": x * np.float32(np.nan)}))
    assert reading.error == inf
    assert reading.drops["cosine"] == 100.0
    assert not Goal("SQNR", 10.0).met(reading)


def test_few_samples_are_taken() -> None:
    assert gauge(lambda x: {"y": x}, samples=7).samples == 7


@pytest.mark.parametrize(
    ("goal", "met", "tight"),
    [
        (Goal("SQNR", 10.0), True, Goal("SQNR", 13.0)),
        (Goal("SQNR", 21.0), False, Goal("SQNR", 24.0)),
        (Goal("agreement", 2.0), True, Goal("agreement", 1.0)),
        (Goal("agreement", 1.0), False, Goal("agreement", 0.5)),
        (Goal("agreement", 1.0, lenient=True), True, Goal("agreement", 0.5, lenient=True)),
        (Goal("top-1", 0.0), True, Goal("top-1", 0.0)),
    ],
)
def test_goals(goal: Goal, met: bool, tight: Goal) -> None:
    reading = Reading(0.01, 20.0, {"agreement": 1.5}, 1.0, 10)
    assert goal.met(reading) is met
    assert goal.tightened() == tight
    assert goal.describe(reading)
