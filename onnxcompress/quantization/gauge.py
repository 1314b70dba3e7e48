"""How far a variant of a model is from the original, on a few samples that are kept in memory.

A search asks this of many variants, so the original runs once. What an accuracy budget is about depends on what there
is: labels, class scores, or just numbers.

- ``agreement``: points of the samples whose class is another one.
- ``top-1``: labels, in points of top-1.
- ``expected top-1``: class scores without labels. Where the original and the variant choose different classes, the
  original's own probabilities say how often which of them is right; so this is the loss of top-1 that the original
  itself would expect.
  These three are counted on the samples, for ``top-1`` less the sampling error, and estimated from margins and errors;
  the larger counts. A few samples would otherwise vouch for more than they can.
- ``cosine``: 100 points times one minus the cosine between the outputs and the original's: half of the relative
  squared error r, since cos = 1 / sqrt(1 + r) where the error has no part along the output. A correlation with any
  third quantity falls by about as much.
- ``SQNR``: the dB that the first floating-point output keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log10, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxcompress.data import Batch, Dataset
from onnxcompress.errors import DataError
from onnxcompress.verify import agreement, compare

__all__ = ["Basis", "Gauge", "Goal", "Reading"]

Array = NDArray[Any]
Run = Callable[[dict[str, Array]], Mapping[str, Any]]
Basis = Literal["top-1", "expected top-1", "agreement", "cosine", "SQNR"]

#: sums of a score and an error that pairing may take
_PRODUCTS = 200_000_000
#: bytes of samples and of the original's outputs that are kept
_MEMORY = 1 << 28


@dataclass(frozen=True)
class Reading:
    """What a variant lost on the gauge's samples.

    Attributes:
        error: mean over the floating-point outputs of ``||a - b||^2 / ||a||^2``; infinite where one is not finite.
        sqnr_db: of the first floating-point output; None where there is none.
        drops: points lost, by what can be told; see the module.
        sampling_error: of the drop in top-1, in points, by McNemar's test.
        samples: how many there were.
    """

    error: float
    sqnr_db: float | None
    drops: Mapping[str, float]
    sampling_error: float
    samples: int

    @property
    def decibels(self) -> float:
        """:attr:`error` as a signal-to-noise ratio in dB; infinite where there is no error."""
        return inf if self.error <= 0 else -10 * log10(self.error)


@dataclass(frozen=True)
class Goal:
    """What a variant has to keep to: at most ``limit`` points lost or, for ``SQNR``, at least ``limit`` dB kept."""

    basis: Basis
    limit: float
    #: a drop may be larger by its sampling error
    lenient: bool = False

    def found(self, reading: Reading) -> float | None:
        """What ``reading`` says about it; None where it says nothing."""
        return reading.sqnr_db if self.basis == "SQNR" else reading.drops.get(self.basis)

    def met(self, reading: Reading) -> bool:
        """True where the goal is kept, or cannot be told."""
        found = self.found(reading)
        if found is None:
            return True
        if self.basis == "SQNR":
            return found >= self.limit
        return found <= self.limit + (reading.sampling_error if self.lenient else 0.0) + 1e-9

    def tightened(self) -> Goal:
        """What a search aims at, so that other samples keep the goal as well: half of the drop, or 3 dB more."""
        if self.basis == "SQNR":
            return replace(self, limit=self.limit + 3.0)
        return replace(self, limit=self.limit / 2)

    def describe(self, reading: Reading) -> str:
        """One phrase for the report."""
        found = self.found(reading)
        if found is None:
            return f"{self.basis} is not known"
        if self.basis == "SQNR":
            return f"{found:.1f} dB SQNR, {self.limit:g} asked for"
        return f"{found:.2f} points of {self.basis}, {self.limit:g} allowed"


class Gauge:
    """The original's outputs on the first samples of ``data``, and how far others are from them.

    Args:
        original: runs the original.
        data: samples; labels are used where it has them.
        samples: at most this many; fewer where they and the original's outputs would fill more than 256 MiB.

    Raises:
        DataError: there are no samples.
        ModelError: the original cannot run them.
    """

    def __init__(self, original: Run, data: Dataset, samples: int) -> None:
        self._batches: list[Batch] = []
        self._expected: list[Mapping[str, Any]] = []
        held = 0
        for batch in data.take(max(samples, data.fixed_batch or 1)):
            outputs = original(batch.feeds)
            arrays = (*batch.feeds.values(), *outputs.values())
            held += sum(value.nbytes for value in arrays if isinstance(value, np.ndarray))
            if self._batches and held > _MEMORY:
                break
            self._batches.append(batch)
            self._expected.append(outputs)
        if not self._batches:
            raise DataError("there are no samples to judge variants of the model by; give more data")
        self.samples = sum(batch.samples for batch in self._batches)

    def read(self, run: Run) -> Reading:
        """Run a variant on all samples."""
        recorded: list[Mapping[str, Any]] = []

        def record(feeds: dict[str, Array]) -> Mapping[str, Any]:
            recorded.append(run(feeds))
            return recorded[-1]

        outputs = compare(_replay(self._expected), record, self._batches)
        floats = [o for o in outputs if o.equal_elements is None]
        errors = [inf if o.relative_l2 != o.relative_l2 else o.relative_l2**2 for o in floats]
        error = float(np.mean(errors)) if errors else 0.0
        drops = {"cosine": 100.0 * (1.0 - 1.0 / sqrt(1.0 + error))} if floats else {}
        same = agreement(outputs)
        if same is not None:
            drops["agreement"] = 100.0 * (1.0 - same)
        scores = next((o.name for o in outputs if o.score_rows and o.same_argmax is not None), None)
        sampling = self._score(scores, recorded, drops) if scores is not None else 0.0
        return Reading(error, floats[0].sqnr_db if floats else None, drops, sampling, self.samples)

    def _score(self, name: str, recorded: Sequence[Mapping[str, Any]], drops: dict[str, float]) -> float:
        """Put into ``drops`` what output ``name``, which may hold class scores, says; the sampling error of top-1."""
        before, after = (_log_scores([part[name] for part in parts]) for parts in (self._expected, recorded))
        if not (np.isfinite(before).all() and np.isfinite(after).all()):
            return 0.0
        labels = self._labels(name)
        chosen, now = before.argmax(axis=1), after.argmax(axis=1)
        changed = chosen != now if labels is None else (chosen == labels) != (now == labels)
        sampling = 100.0 * sqrt(int(changed.sum())) / len(before)
        counted = _drops(before, now, labels)
        counted["top-1"] = counted.get("top-1", 0.0) - sampling
        for basis, points in _paired_drops(before, after - before, labels).items():
            drops[basis] = max(points, counted[basis])
        return sampling

    def _labels(self, name: str) -> NDArray[np.int64] | None:
        """``[samples]``, where there are any and all of them are classes of output ``name``."""
        parts = [batch.labels for batch in self._batches if batch.labels is not None]
        if len(parts) < len(self._batches):
            return None
        labels = np.concatenate(parts)
        classes = self._expected[0][name].shape[1]
        return labels if ((labels >= 0) & (labels < classes)).all() else None


def _replay(outputs: Sequence[Mapping[str, Any]]) -> Run:
    """A run that answers batch after batch what was computed before."""
    answers = iter(outputs)
    return lambda feeds: next(answers)


def _log_scores(values: Sequence[Array]) -> NDArray[np.float64]:
    """``[samples, classes]``; probabilities become logarithms, in which rounding is as large for every sample."""
    rows = [np.asarray(value, np.float64) for value in values]
    scores = np.concatenate([value.reshape(value.shape[0], -1) for value in rows])
    if scores.min() >= 0 and np.allclose(scores.sum(axis=1), 1.0, atol=1e-3):
        scores = np.log(np.maximum(scores, 1e-30))
    return scores


def _drops(before: NDArray[np.float64], now: NDArray[np.int64], labels: NDArray[np.int64] | None) -> dict[str, float]:
    """Points lost where class ``now`` of each sample is chosen instead of the one with the largest score."""
    shifted = np.exp(before - before.max(axis=1, keepdims=True))
    rows, chosen = np.arange(len(before)), before.argmax(axis=1)
    lost = {
        "agreement": (now != chosen).mean(),
        "expected top-1": ((shifted[rows, chosen] - shifted[rows, now]) / shifted.sum(axis=1)).mean(),
    }
    if labels is not None:
        lost["top-1"] = (chosen == labels).mean() - (now == labels).mean()
    return {basis: 100.0 * float(value) for basis, value in lost.items()}


def _paired_drops(
    before: NDArray[np.float64], errors: NDArray[np.float64], labels: NDArray[np.int64] | None
) -> dict[str, float]:
    """Points lost where the error of every sample is tried on all samples.

    What flips a class is a small margin that meets a large error in the right direction. Rounding errors depend little
    on the sample, so n samples make n * n pairs of a margin and an error, and a rate of less than 1 / n can be told.
    Small margins come with errors that are a little larger than others, so the rate is if anything too low.
    """
    count = max(1, min(len(errors), _PRODUCTS // before.size))
    chosen = errors[np.linspace(0, len(errors) - 1, count).astype(int)]
    found = [_drops(before, (before + error).argmax(axis=1), labels) for error in chosen]
    return {basis: sum(drops[basis] for drops in found) / count for basis in found[0]}
