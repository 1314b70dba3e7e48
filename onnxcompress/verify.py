"""Compare the outputs of two models on the same data, in one pass and in memory that does not grow with it.

Sums are kept in float64 over all the data, so that SQNR and relative L2 are those of the whole set and not the mean of
batches. For a reference output ``a`` and a candidate ``b``:

- max abs: the largest ``|a - b|``
- relative L2: ``||a - b|| / ||a||``
- SQNR in dB: ``10 log10(||a||^2 / ||a - b||^2)``, infinite where the outputs are equal
- same argmax: the fraction of positions at which the largest class is the same. Classes lie on axis 1 of ``[N, C]`` and
  of images ``[N, C, H, W]`` (and deeper), on the last axis of ``[N, L, C]``
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.base import Progress, SilentProgress
from onnxcompress.data import Batch, Dataset
from onnxcompress.errors import DataError, ModelError, OnnxCompressError, UsageError
from onnxcompress.graph import Graph
from onnxcompress.io import model_bytes
from onnxcompress.recorded import NotRecordableError, Recorded
from onnxcompress.session import Optimization, Session
from onnxcompress.shapes import graph_stats

__all__ = ["LEAST_SQNR", "OutputComparison", "Run", "agreement", "check_equivalent", "compare"]

#: feeds in, {output name: array} out
Run = Callable[[dict[str, NDArray[Any]]], Mapping[str, Any]]
Model = Graph | str | os.PathLike[str] | Run

#: SQNR in dB below which a result computes something else, whatever the task: its error is a third of the signal
LEAST_SQNR = 10.0
#: models with more bytes of weights between them are run one after the other
TOGETHER_BYTES = 1 << 30
#: elements that are converted to float64 at a time
_CHUNK = 1 << 20


@dataclass(frozen=True)
class OutputComparison:
    """How one output of the candidate differs from the reference's, over all the data."""

    name: str
    #: largest absolute difference; infinite where NaN or infinities are not at the same places, and for unequal text
    max_abs: float
    #: ||a - b|| / ||a||; infinite as above, and where only the reference is all zero
    relative_l2: float
    #: 10 log10(||a||^2 / ||a - b||^2); infinite where the outputs are equal
    sqnr_db: float
    #: fraction with the same argmax; None for outputs that are not floating point or have fewer than two classes
    same_argmax: float | None
    #: fraction of equal elements of an integer, bool or text output; None for floating point
    equal_elements: float | None = None
    #: places where one model answers NaN or an infinity and the other does not answer the same
    nonfinite_mismatches: int = 0
    #: True where the output may hold class scores, one row a sample: [N, C] with C > 1, further axes of size 1 allowed.
    #: For other outputs the argmax is a figure, but no prediction
    score_rows: bool = False


def compare(
    reference: Model,
    candidate: Model,
    data: Dataset | Iterable[Batch],
    *,
    optimization: tuple[Optimization, Optimization] = ("disabled", "disabled"),
    threads: int = 0,
    progress: Progress | None = None,
) -> list[OutputComparison]:
    """Run both models on all of ``data`` and compare every output.

    Args:
        reference: a graph, a file, or a callable {input: array} -> {output: array}.
        candidate: the same. Its outputs are matched by name; where no name is the same, by position.
        data: batches; read once.
        optimization: the runtime's level for each of the two. ``disabled`` compares the graphs as they are written;
            at ``all`` the runtime itself folds and reorders.
        threads: intra-op threads; 0 lets the runtime choose.
        progress: where to report to.

    Raises:
        ModelError: the models do not have the same outputs, or one of them cannot be run on this data.
        DataError: there is no data.
        RuntimeUnavailableError: onnxruntime is not installed and a model is not a callable.
    """
    progress = progress if progress is not None else SilentProgress()
    accumulators: dict[str, _Accumulator] | None = None
    pairs: dict[str, str] = {}
    for expected, actual in _outputs(reference, candidate, data, optimization, threads, progress):
        if accumulators is None:
            pairs = _pairs(list(expected), list(actual))
            accumulators = {name: _Accumulator(name) for name in pairs}
        for name, accumulator in accumulators.items():
            accumulator.update(expected[name], actual[pairs[name]])
    if accumulators is None:
        raise DataError("there is no data to compare the models on; expected at least one batch")
    return [accumulator.result() for accumulator in accumulators.values()]


def check_equivalent(
    reference: Model,
    candidate: Model,
    data: Dataset | Iterable[Batch],
    *,
    tolerance: float = 1e-5,
    threads: int = 0,
    progress: Progress | None = None,
) -> list[OutputComparison]:
    """Compare both models as they are written (no runtime optimisation) and demand that they are equivalent.

    ``tolerance`` bounds the relative L2 of each floating-point output, and the fraction of unequal elements of each
    other output.

    Raises:
        OnnxCompressError: they are not; the line names the worst output.
        ModelError, DataError, RuntimeUnavailableError: as :func:`compare`.
    """
    results = compare(reference, candidate, data, threads=threads, progress=progress)
    worst = max(results, key=_error, default=None)
    if worst is not None and not _error(worst) <= tolerance:
        detail = f"relative L2 {worst.relative_l2:.3g}, max abs {worst.max_abs:.3g}"
        if worst.nonfinite_mismatches:
            detail = f"NaN or infinity in one of the models at {worst.nonfinite_mismatches} places"
        elif worst.equal_elements is not None:
            detail = f"{100 * (1 - worst.equal_elements):.3g} % of the elements differ"
        raise OnnxCompressError(
            f"the outputs are not equivalent: {worst.name!r} differs ({detail}), allowed is {tolerance:g}; "
            "a guarantee was broken, please report it with the model"
        )
    return results


def agreement(outputs: Iterable[OutputComparison]) -> float | None:
    """Share with the same argmax, of the first output that has classes; None where none has.

    An output that may hold one row of scores a sample goes first.
    """
    known = sorted((o for o in outputs if o.same_argmax is not None), key=lambda o: not o.score_rows)
    return known[0].same_argmax if known else None


def _error(result: OutputComparison) -> float:
    if result.equal_elements is not None:
        return 1.0 - result.equal_elements
    return math.inf if math.isnan(result.relative_l2) else result.relative_l2


def _outputs(
    reference: Model,
    candidate: Model,
    data: Dataset | Iterable[Batch],
    optimization: tuple[Optimization, Optimization],
    threads: int,
    progress: Progress,
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Outputs of both models, a batch at a time."""
    if isinstance(data, Dataset) and _bytes(reference) + _bytes(candidate) > TOGETHER_BYTES:
        with suppress(NotRecordableError):
            yield from _one_at_a_time(reference, candidate, data, optimization, threads, progress)
            return
    run_reference = _runner(reference, optimization[0], threads)
    run_candidate = _runner(candidate, optimization[1], threads)
    _check_inputs(_inputs(run_reference), run_candidate)
    total = len(data) if isinstance(data, Dataset) else None
    for batch in progress.track(data, "comparing outputs", total):
        yield run_reference(batch.feeds), run_candidate(batch.feeds)


def _one_at_a_time(
    reference: Model,
    candidate: Model,
    data: Dataset,
    optimization: tuple[Optimization, Optimization],
    threads: int,
    progress: Progress,
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """As :func:`_outputs`, with the reference's outputs on disk: only one of two large models is open."""
    run = _runner(reference, optimization[0], threads)
    inputs = _inputs(run)
    with Recorded(run, progress.track(data, "running the reference", len(data))) as recorded:
        del run
        run = _runner(candidate, optimization[1], threads)
        _check_inputs(inputs, run)
        batches = progress.track(data, "comparing outputs", len(data))
        for batch, expected in zip(batches, recorded, strict=True):
            yield expected, run(batch.feeds)


def _bytes(model: Model) -> int:
    """What a model's weights take, about; 0 for a callable, which is open already."""
    if isinstance(model, str | os.PathLike):
        return model_bytes(model)
    return graph_stats(model).weight_bytes if isinstance(model, gs.Graph) else 0


def _inputs(run: Run) -> tuple[list[str], list[str]] | None:
    """Required and optional inputs of a session; None for any other callable."""
    return (run.input_names, run.optional_names) if isinstance(run, Session) else None


def _check_inputs(reference: tuple[list[str], list[str]] | None, candidate: Run) -> None:
    """Two sessions must be able to run on the same data; a candidate may have lost inputs that nothing reads."""
    if reference is None or not isinstance(candidate, Session):
        return
    required, optional = reference
    missing = [n for n in candidate.input_names if n not in (*required, *optional)]
    if missing:
        raise UsageError(
            f"the models have different inputs: the second takes {', '.join(map(repr, missing))}, the first "
            f"{', '.join(map(repr, required))}; give two models that take the same data"
        )


def _runner(model: Model, optimization: Optimization, threads: int) -> Run:
    if isinstance(model, Graph | str | os.PathLike):
        return Session(model, optimization=optimization, threads=threads)
    if callable(model):
        return model
    raise ModelError(f"{type(model).__name__} cannot be run; expected a graph, a file or a callable")


def _pairs(reference: Sequence[str], candidate: Sequence[str]) -> dict[str, str]:
    """{name in the reference: name in the candidate}."""
    if set(reference) == set(candidate):
        return {name: name for name in reference}
    if len(reference) == len(candidate) and not set(reference) & set(candidate):
        return dict(zip(reference, candidate, strict=True))
    only = [f"only the reference has {', '.join(map(repr, sorted(set(reference) - set(candidate))))}"]
    only += [f"only the candidate has {', '.join(map(repr, sorted(set(candidate) - set(reference))))}"]
    texts = [text for text in only if not text.endswith("has ")]
    raise ModelError(f"the models have different outputs: {'; '.join(texts)}; compare models with the same outputs")


class _Accumulator:
    """Sums over the batches of one output."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._max_abs = self._reference = self._difference = 0.0
        self._elements = self._unequal = self._nonfinite = 0
        self._positions = self._same = 0
        self._floating = self._numeric = True
        self._score_rows = False

    def update(self, a: Any, b: Any) -> None:
        """Add one batch: an array, or what the runtime makes of sequences, maps and optionals (list, dict, None)."""
        if a is None or b is None:
            if (a is None) != (b is None):
                raise self._mismatch(*("an empty optional" if value is None else "a value" for value in (a, b)))
        elif isinstance(a, Mapping) and isinstance(b, Mapping):
            if set(a) != set(b):
                raise self._mismatch(f"a map with {len(a)} keys", f"one with {len(b)} keys or other ones")
            for key in a:
                self.update(np.asarray(a[key]), np.asarray(b[key]))
        elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
            if len(a) != len(b):
                raise self._mismatch(f"a sequence of {len(a)}", f"one of {len(b)}")
            for item, other in zip(a, b, strict=True):
                self.update(item, other)
        else:
            self._update_arrays(np.asarray(a), np.asarray(b))

    def _mismatch(self, reference: str, candidate: str) -> ModelError:
        return ModelError(
            f"output {self._name!r}: the reference answers {reference}, the candidate {candidate}; "
            "compare models with the same outputs"
        )

    def _update_arrays(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        if a.shape != b.shape:
            raise self._mismatch(f"shape {list(a.shape)}", f"shape {list(b.shape)}")
        kinds = _kind(a), _kind(b)
        if ("text" in kinds) and kinds[0] != kinds[1]:
            raise self._mismatch(f"{a.dtype}", f"{b.dtype}")
        self._floating = kinds[0] == "float"
        self._numeric = kinds[0] != "text"
        self._elements += a.size
        if not self._numeric:
            self._unequal += int(np.count_nonzero(a.astype(np.str_) != b.astype(np.str_)))
            return
        flat_a, flat_b = a.reshape(-1), b.reshape(-1)
        for start in range(0, a.size, _CHUNK):
            self._add(flat_a[start : start + _CHUNK], flat_b[start : start + _CHUNK])
        if self._floating:
            self._count_argmax(a, b)

    def _add(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        if not self._floating:
            self._unequal += int(np.count_nonzero(a != b))
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            agree = (a == b) | (np.isnan(a) & np.isnan(b))
            self._nonfinite += int(np.count_nonzero(~finite & ~agree))
            a, b = a[finite], b[finite]
        self._reference += float(np.dot(a, a))
        a -= b
        self._difference += float(np.dot(a, a))
        if a.size:
            np.abs(a, out=a)
            self._max_abs = max(self._max_abs, float(a.max()))

    def _count_argmax(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        if a.ndim < 2 or a.size == 0:
            return
        axis = 2 if a.ndim == 3 else 1
        if a.shape[axis] < 2:
            return
        if _kind(a) == "float" and a.dtype.kind != "f":  # bfloat16 and float8 have no argmax of their own
            a, b = a.astype(np.float32), b.astype(np.float32)
        self._score_rows = all(d == 1 for d in a.shape[2:])
        same = a.argmax(axis) == b.argmax(axis)
        self._positions += same.size
        self._same += int(np.count_nonzero(same))

    def result(self) -> OutputComparison:
        """The figures over everything that was added."""
        equal = None if self._floating or not self._elements else 1.0 - self._unequal / self._elements
        if self._nonfinite or (not self._numeric and self._unequal):
            figures = (math.inf, math.inf, -math.inf)
        elif self._difference == 0.0:
            figures = (self._max_abs, 0.0, math.inf)
        elif self._reference == 0.0:
            figures = (self._max_abs, math.inf, -math.inf)
        else:
            ratio = self._difference / self._reference
            figures = (self._max_abs, math.sqrt(ratio), -10.0 * math.log10(ratio))
        return OutputComparison(
            self._name,
            *figures,
            same_argmax=self._same / self._positions if self._positions else None,
            equal_elements=equal,
            nonfinite_mismatches=self._nonfinite,
            score_rows=self._score_rows,
        )


def _kind(array: NDArray[Any]) -> str:
    if array.dtype.kind in "OUS":
        return "text"
    if array.dtype.kind == "f" or (array.dtype.kind == "V" and "float" in array.dtype.name):
        return "float"
    return "whole"
