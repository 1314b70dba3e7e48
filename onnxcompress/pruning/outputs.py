"""How far a pruned model's outputs are from the original's, where that tells most.

Where a Softmax makes an output, its probabilities hardly move while the model is sure, and the squared error of its
logits counts classes that nobody asks about as much as the ones that compete. There the divergence of the
probabilities tells (Kullback & Leibler, "On Information and Sufficiency", 1951), relative to what the probabilities
say at all: the mean divergence from their own mean, the mutual information of sample and answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxcompress.graph import Graph, attribute
from onnxcompress.lockstep import Advance

if TYPE_CHECKING:
    from onnxcompress.data import Dataset

__all__ = ["OutputError", "OutputJudge", "judged_outputs"]

Array = NDArray[Any]
Floats = NDArray[np.float64]

#: since this version of the operator set Softmax runs along one axis; before, along that axis and all behind it
_ONE_AXIS = 13
#: probability that counts as none
_NONE = 1e-30


def judged_outputs(graph: Graph) -> dict[str, tuple[int, int] | None]:
    """Outputs of ``graph``, or what goes into the Softmax or Sigmoid that makes one.

    The value says along which axes, from the first to the one behind the last, a Softmax makes probabilities of it;
    None: nothing does. A negative end counts from the last axis, 0 being behind it.
    """
    found: dict[str, tuple[int, int] | None] = {}
    for tensor in graph.outputs:
        maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if maker is None or maker.op not in ("Softmax", "LogSoftmax", "Sigmoid"):
            found[str(tensor.name)] = None
        elif maker.op == "Sigmoid":
            found[str(maker.inputs[0].name)] = None
        elif graph.opset >= _ONE_AXIS:
            axis = int(attribute(maker, "axis", -1))
            found[str(maker.inputs[0].name)] = axis, axis + 1
        else:
            found[str(maker.inputs[0].name)] = int(attribute(maker, "axis", 1)), 0
    return found


@dataclass
class _Sums:
    """What is known of one output so far: error and signal, and for probabilities their sum."""

    error: float = 0.0
    signal: float = 0.0
    rows: int = 0
    mean: Floats | None = None


@dataclass
class OutputError:
    """Error over signal of the outputs ``judged``, as :func:`judged_outputs` names them, taken in batch by batch.

    Squared error over squared signal, or relative divergence where a Softmax follows.
    """

    judged: Mapping[str, tuple[int, int] | None]
    _sums: dict[str, _Sums] = field(default_factory=dict)

    def add(self, expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        """Take in one batch; outputs that are not floating point do not count."""
        for name, value in expected.items():
            if value.dtype.kind != "f":
                continue
            sums = self._sums.setdefault(name, _Sums())
            axes = self.judged.get(name)
            if axes is None:
                away = np.nan_to_num(found[name].astype(np.float64) - value, nan=1e150, posinf=1e150, neginf=-1e150)
                sums.error += float(np.square(away).sum())
                sums.signal += float(np.square(value, dtype=np.float64).sum())
            else:
                _diverged(sums, _rows(value, axes), _rows(found[name], axes))

    def relative(self) -> float:
        """Mean over the outputs that say anything."""
        shares = []
        for sums in self._sums.values():
            signal = sums.signal
            if sums.mean is not None:
                mean = sums.mean / sums.rows
                signal -= sums.rows * float(mean @ np.log(np.maximum(mean, _NONE)))
            if signal > 0:
                shares.append(sums.error / signal)
        return float(np.mean(shares)) if shares else 0.0


class OutputJudge:
    """The error of a student's outputs against the teacher's, over the same samples every time."""

    def __init__(self, teacher: Graph, data: Dataset, threads: int = 0) -> None:
        self._judged = judged_outputs(teacher)
        self._feeds = [dict(batch.feeds) for batch in data]
        self._threads = threads
        self._expected = list(self._run(teacher))

    def error(self, student: Graph) -> float:
        """See :class:`OutputError`."""
        errors = OutputError(self._judged)
        for expected, found in zip(self._expected, self._run(student), strict=True):
            errors.add(expected, found)
        return errors.relative()

    def _run(self, graph: Graph) -> Iterable[dict[str, Array]]:
        return Advance(graph, self._feeds, [list(self._judged)], threads=self._threads).step()


def _rows(logits: Array, axes: tuple[int, int]) -> Floats:
    """[rows, classes]."""
    first = axes[0] % logits.ndim
    last = axes[1] if axes[1] > 0 else logits.ndim + axes[1]
    moved = np.moveaxis(logits, list(range(first, last)), list(range(first - last, 0)))
    return moved.reshape(-1, prod(logits.shape[first:last])).astype(np.float64)


def _log_softmax(rows: Floats) -> Floats:
    away = rows - rows.max(axis=1, keepdims=True)
    return np.asarray(away - np.log(np.exp(away).sum(axis=1, keepdims=True)), np.float64)


def _diverged(sums: _Sums, expected: Floats, found: Floats) -> None:
    logs = _log_softmax(expected)
    chances = np.exp(logs)
    with np.errstate(invalid="ignore"):
        others = np.nan_to_num(_log_softmax(found), nan=-1e150, neginf=-1e150)
    sums.error += float((chances * (logs - others)).sum())
    sums.signal += float((chances * logs).sum())
    sums.rows += len(logs)
    total = chances.sum(axis=0)
    sums.mean = total if sums.mean is None else sums.mean + total
