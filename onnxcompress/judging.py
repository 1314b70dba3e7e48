"""What a result is held against: the task metric, the agreement with the original, its SQNR, its time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from onnxcompress.benchmark import BenchmarkResult
from onnxcompress.errors import SlowerError
from onnxcompress.evaluate import LabelRanks
from onnxcompress.quantization.gauge import Goal
from onnxcompress.verify import LEAST_SQNR, OutputComparison, agreement

__all__ = [
    "DEFAULT_DROP",
    "LEAST_SQNR",
    "Budget",
    "Metric",
    "Verification",
    "interval",
    "points",
    "sampling_error",
    "search_goals",
    "slower_error",
]

#: points that the task metric may lose where nobody says
DEFAULT_DROP = 0.5


@dataclass(frozen=True)
class Metric:
    """A task metric of the original and of the result, higher is better."""

    name: str
    original: float
    result: float

    @property
    def drop(self) -> float:
        """How far the result is below the original, in points.

        Where the original's value lies in -1 .. 1 the metric is taken as a fraction and a point is 0.01 of it;
        otherwise (percent, dB) a point is 1.
        """
        scale = 100.0 if abs(self.original) <= 1.0 else 1.0
        return (self.original - self.result) * scale


@dataclass(frozen=True)
class Verification:
    """All outputs of the result against the original's, over ``samples`` samples from ``source``."""

    #: "eval-data", "data", "held-out", "random" or "synthetic"
    source: str
    samples: int
    fingerprint: str
    outputs: tuple[OutputComparison, ...]

    @property
    def agreement(self) -> float | None:
        """Share with the same argmax, of the first output that has classes; None where none has.

        An output that may hold one row of scores a sample goes first.
        """
        return agreement(self.outputs)


@dataclass(frozen=True)
class Budget:
    """What the result was held against, and what was found."""

    #: the metric's name, "agreement" or "SQNR"
    basis: str
    #: points that it may lose; for "SQNR" the dB that it must keep
    limit: float
    #: points that it has lost; for "SQNR" the dB that it has kept
    found: float

    @property
    def met(self) -> bool:
        """False also where what was found is not a number."""
        if self.basis == "SQNR":
            return self.found >= self.limit
        return self.found <= self.limit + 1e-9


def sampling_error(original: LabelRanks, result: LabelRanks) -> float:
    """Standard error in points of the difference of both models' top-1, which see the same samples.

    Only samples that one of both has right and the other wrong move the difference; each moves it by one sample, up or
    down. Source: McNemar's test, without its continuity correction.
    """
    differing = int((original.top(1) != result.top(1)).sum())
    return 100.0 * math.sqrt(differing) / len(original.ranks)


def slower_error(timing: BenchmarkResult, limit: float) -> SlowerError | None:
    """The error where the whole interval of the ratio lies below ``limit``; an undecided ratio is none."""
    if timing.high >= limit:
        return None
    return SlowerError(f"the speed is {interval(timing)}; {limit:g}x or more is asked for")


def interval(timing: BenchmarkResult) -> str:
    """The ratio of times with its interval, for messages."""
    return f"{timing.ratio:.2f}x the original's, 95 % interval {timing.low:.2f} to {timing.high:.2f}"


def search_goals(
    max_drop: float | Literal["auto"] | None, labels: bool, eval_labels: bool, *, evaluates: bool
) -> list[Goal]:
    """What a search of layers is held to: as near to the budget of the end as calibration samples can tell.

    Args:
        max_drop: see :func:`onnxcompress.compress.compress`; a budget that nobody asked for lets layers return only
            where the result is far from it.
        labels: the calibration data has labels.
        eval_labels: the evaluation data has.
        evaluates: there is an evaluator. It brings the data that judges, so a search never asks it.
    """
    if max_drop is None:
        return []
    if max_drop == "auto":
        if evaluates or not eval_labels:
            return [Goal("SQNR", LEAST_SQNR)]
        return [Goal("top-1" if labels else "expected top-1", DEFAULT_DROP, lenient=True)]
    if not (evaluates or eval_labels):
        return [Goal("agreement", max_drop)]
    if labels:
        return [Goal("top-1", max_drop)]
    return [Goal("cosine" if evaluates else "expected top-1", max_drop)]


def points(value: float) -> str:
    """A number of points, for messages."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
