"""How far a variant of a model is from the original, on a few samples that are kept in memory.

A search asks this of many variants, so the original runs once. What an accuracy budget is about depends on what there
is: labels, class scores, or just numbers.

- ``top-1``: labels, in points of top-1.
- ``expected top-1``: class scores without labels. Where the original and the variant choose different classes, the
  original's own probabilities say how often which of them is right; so this is the loss of top-1 that the original
  itself would expect.
- ``agreement``: points of the samples whose class is another one.
- ``cosine``: 100 points times one minus the cosine between the outputs and the original's: half of the relative
  squared error r, since cos = 1 / sqrt(1 + r) where the error has no part along the output. A correlation with any
  third quantity falls by about as much.
- ``SQNR``: the dB that the first floating-point output keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log10, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxcompress.data import Batch, Dataset
from onnxcompress.errors import DataError
from onnxcompress.evaluate import label_ranks
from onnxcompress.verify import agreement, compare

__all__ = ["Basis", "Gauge", "Goal", "Reading"]

Array = NDArray[Any]
Run = Callable[[dict[str, Array]], Mapping[str, Any]]
Basis = Literal["top-1", "expected top-1", "agreement", "cosine", "SQNR"]

#: bytes of the original's outputs that are kept
_MEMORY = 1 << 27


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
        samples: at most this many; fewer where the original's outputs would fill more than 128 MiB.

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
            held += sum(value.nbytes for value in outputs.values() if isinstance(value, np.ndarray))
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
        scores = next((o.name for o in outputs if o.score_rows), None)
        sampling = self._score(scores, recorded, drops) if scores is not None else 0.0
        return Reading(error, floats[0].sqnr_db if floats else None, drops, sampling, self.samples)

    def _score(self, name: str, recorded: Sequence[Mapping[str, Any]], drops: dict[str, float]) -> float:
        """Add what output ``name``, which may hold class scores, says about top-1; the sampling error in points."""
        before, after = (_rows(part, name) for part in (self._expected, recorded))
        if not np.isfinite(before).all():
            return 0.0
        drops["expected top-1"], sampling = _expected_drop(before, after)
        if self._batches[0].labels is None:
            return sampling
        try:
            hits, hits_now = (label_ranks(_replay(p), self._batches).top(1) for p in (self._expected, recorded))
        except DataError:  # the labels number no classes of this output
            return sampling
        drops["top-1"] = 100.0 * float(hits.mean() - hits_now.mean())
        return 100.0 * sqrt(int((hits != hits_now).sum())) / len(hits)


def _replay(outputs: Sequence[Mapping[str, Any]]) -> Run:
    """A run that answers batch after batch what was computed before."""
    answers = iter(outputs)
    return lambda feeds: next(answers)


def _rows(outputs: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    values = [np.asarray(part[name], np.float64) for part in outputs]
    return np.concatenate([value.reshape(value.shape[0], -1) for value in values])


def _expected_drop(before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[float, float]:
    """(points of top-1 that the original expects to lose, their sampling error)."""
    rows = np.arange(len(before))
    chosen, now = before.argmax(axis=1), after.argmax(axis=1)
    if before.min() < 0 or not np.allclose(before.sum(axis=1), 1.0, atol=1e-3):
        shifted = np.exp(before - before.max(axis=1, keepdims=True))
        before = shifted / shifted.sum(axis=1, keepdims=True)
    drop = 100.0 * float((before[rows, chosen] - before[rows, now]).mean())
    return drop, 100.0 * sqrt(int((chosen != now).sum())) / len(before)
