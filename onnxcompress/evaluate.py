"""Task metrics: the user's own function, or top-1 and top-5 where the data has labels. Higher is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcompress.base import Progress, SilentProgress
from onnxcompress.data import Batch, Dataset
from onnxcompress.errors import DataError, ModelError, UsageError
from onnxcompress.user_code import load_function

__all__ = ["Evaluator", "LabelRanks", "Run", "checked_metric", "evaluate_labels", "label_ranks", "load_evaluator"]

#: feeds in, {output name: array} out
Run = Callable[[dict[str, NDArray[Any]]], Mapping[str, Any]]
#: given a callable that runs the model, a number; higher is better
Evaluator = Callable[[Run], float]


def load_evaluator(reference: str) -> Evaluator:
    """The function of ``file.py:function``: given ``run`` (feeds -> {output: array}), it returns a number.

    What it returns is checked when it is called: anything but a finite number is a DataError, and so is an exception
    in the user's code, with its file and line.

    Raises:
        UsageError: no such file or function.
        DataError: the file raises while it is imported.
    """
    function = load_function(reference)

    def evaluate(run: Run) -> float:
        return checked_metric(function(run), reference)

    return evaluate


def checked_metric(value: Any, origin: str) -> float:
    """``value`` as a float.

    Raises:
        DataError: it is not one finite number.
    """
    array = (
        np.asarray(value) if not hasattr(value, "item") else np.asarray(value.item() if _size(value) == 1 else value)
    )
    if array.size != 1 or array.dtype.kind not in "iufb":
        what = f"{type(value).__name__} {value!r}" if array.size == 1 else type(value).__name__
        raise DataError(f"{origin} returned {' '.join(what.split())[:100]}; expected one number, higher is better")
    number = float(array.reshape(()))
    if not math.isfinite(number):
        raise DataError(f"{origin} returned {number}; expected a finite number, higher is better")
    return number


def _size(value: Any) -> int:
    shape = getattr(value, "shape", ())
    return math.prod(int(d) for d in shape)


@dataclass(frozen=True)
class LabelRanks:
    """Where each sample's label stands among the classes."""

    #: ``[samples]``: how many classes score higher than the label
    ranks: NDArray[np.int64]
    classes: int

    def top(self, k: int) -> NDArray[np.bool_]:
        """``[samples]``: True where the label is among the ``k`` highest scores."""
        return self.ranks < k

    def metrics(self, top: tuple[int, ...] = (1, 5)) -> dict[str, float]:
        """``{"top-1": 0.91, "top-5": 0.99}``; a ``k`` that is not below the number of classes is left out."""
        return {f"top-{k}": float(self.top(k).mean()) for k in top if k == 1 or k < self.classes}


def evaluate_labels(
    run: Run,
    data: Dataset | Iterable[Batch],
    *,
    output: str | None = None,
    top: tuple[int, ...] = (1, 5),
    progress: Progress | None = None,
) -> dict[str, float]:
    """Fraction of samples whose label is among the ``k`` highest scores, as ``{"top-1": 0.91, "top-5": 0.99}``.

    Equal scores count as argmax has it: the lower class goes first. A ``k`` that is not below the number of classes
    says nothing and is left out.

    Args:
        run: runs the model.
        data: batches with labels; read once.
        output: the output with the scores, ``[N, classes]`` (further axes of size 1 are allowed); default: the first
            output of that kind.
        top: which ``k``.
        progress: where to report to.

    Raises:
        DataError: no labels, a label that is no class of the model, or no data.
        ModelError: no output has one row of scores a sample.
        UsageError: the model has no output of the name ``output``.
    """
    return label_ranks(run, data, output=output, progress=progress).metrics(top)


def label_ranks(
    run: Run,
    data: Dataset | Iterable[Batch],
    *,
    output: str | None = None,
    progress: Progress | None = None,
) -> LabelRanks:
    """The rank of every sample's label, from which the metrics are made and with which two models can be paired.

    Arguments and errors are those of :func:`evaluate_labels`.
    """
    progress = progress if progress is not None else SilentProgress()
    ranks: list[NDArray[np.int64]] = []
    samples = classes = 0
    total = len(data) if isinstance(data, Dataset) else None
    for batch in progress.track(data, "evaluating", total):
        if batch.labels is None:
            raise DataError("the data has no labels; add an array named 'labels' with one class index a sample")
        outputs = run(batch.feeds)
        if output is None:
            output = _score_output(outputs, len(batch.labels))
        scores = _scores(outputs, output, len(batch.labels))
        classes = scores.shape[1]
        wrong = (batch.labels < 0) | (batch.labels >= classes)
        if wrong.any():
            raise DataError(
                f"sample {samples + int(np.flatnonzero(wrong)[0])} has label {int(batch.labels[wrong][0])} but output "
                f"{output!r} has {classes} classes; expected 0 to {classes - 1}"
            )
        ranks.append(_ranks(scores, batch.labels))
        samples += len(batch.labels)
    if not samples:
        raise DataError("there is no data to evaluate on; expected at least one batch")
    return LabelRanks(np.concatenate(ranks), classes)


def _score_output(outputs: Mapping[str, Any], samples: int) -> str:
    for name, value in outputs.items():
        if isinstance(value, np.ndarray) and _is_scores(value, samples):
            return name
    shapes = ", ".join(
        f"{name!r} {list(np.shape(v)) if isinstance(v, np.ndarray) else ''}" for name, v in outputs.items()
    )
    raise ModelError(
        f"no output has one row of scores a sample: {shapes} for {samples} samples; use --evaluate file.py:function"
    )


def _is_scores(value: NDArray[Any], samples: int) -> bool:
    return (
        value.dtype.kind in "fV"
        and value.ndim >= 2
        and value.shape[0] == samples
        and value.shape[1] > 1
        and all(d == 1 for d in value.shape[2:])
    )


def _scores(outputs: Mapping[str, Any], name: str, samples: int) -> NDArray[Any]:
    if name not in outputs:
        raise UsageError(f"the model has no output {name!r}; it has {', '.join(map(repr, outputs))}")
    value = outputs[name]
    if not isinstance(value, np.ndarray) or not _is_scores(value, samples):
        shape = list(value.shape) if isinstance(value, np.ndarray) else type(value).__name__
        raise ModelError(f"output {name!r} is {shape} for {samples} samples; expected scores [{samples}, classes]")
    return value.reshape(samples, -1).astype(np.float32 if value.dtype.kind == "V" else value.dtype, copy=False)


def _ranks(scores: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many classes go before each sample's label; NaN is no hit."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    ranks: NDArray[np.int64] = np.count_nonzero((scores > own) | ((scores == own) & before), axis=1).astype(np.int64)
    ranks[np.isnan(own[:, 0])] = scores.shape[1]
    return ranks
