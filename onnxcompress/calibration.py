"""Calibration: run the float model over samples and watch the values of chosen tensors.

Everything streams: an observer keeps a few numbers per tensor, whatever the number of samples, the batch size or the
shapes, which may differ from batch to batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.errors import DataError, UsageError
from onnxcompress.graph import Graph, Names, copy_graph
from onnxcompress.quantization import Range
from onnxcompress.session import Session

if TYPE_CHECKING:
    from onnxcompress.base import Progress
    from onnxcompress.data import Dataset

__all__ = ["OBSERVERS", "MinMaxObserver", "Observer", "calibrate"]


class Observer(ABC):
    """Watches one tensor over all batches and answers with its range."""

    #: Operators without attributes that the runtime applies to the tensor before it hands over the values. Empty: the
    #: observer gets the whole tensor. Reducing inside the runtime saves copying every activation out of it.
    reductions: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def update(self, *values: NDArray[Any]) -> None:
        """Take in one batch: the tensor, or one scalar per entry of ``reductions``."""

    @abstractmethod
    def range(self) -> Range:
        """The range after all batches."""


class MinMaxObserver(Observer):
    """The smallest and the largest value seen."""

    reductions = ("ReduceMin", "ReduceMax")

    def __init__(self) -> None:
        self._low = np.inf
        self._high = -np.inf

    def update(self, *values: NDArray[Any]) -> None:
        """Take in the minimum and the maximum of one batch."""
        low, high = values
        self._low = min(self._low, float(low))
        self._high = max(self._high, float(high))

    def range(self) -> Range:
        """[minimum, maximum]."""
        return Range(self._low, self._high)


OBSERVERS: dict[str, Callable[[], Observer]] = {"min_max": MinMaxObserver}


def calibrate(
    graph: Graph,
    tensors: Sequence[str],
    data: Dataset,
    observer: str = "min_max",
    *,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, Range]:
    """Ranges of ``tensors`` over ``data``.

    Args:
        graph: the float model.
        tensors: names of float tensors of the outermost graph; graph inputs are allowed.
        data: calibration samples.
        observer: a key of :data:`OBSERVERS`.
        threads: intra-op threads of the runtime; 0: its choice.
        progress: shows how far the work is.

    Raises:
        UsageError: unknown observer or tensor.
        DataError: there is no sample, or a tensor takes values that are not finite.
    """
    if observer not in OBSERVERS:
        raise UsageError(f"unknown observer {observer!r}; expected one of {', '.join(OBSERVERS)}")
    wanted = list(dict.fromkeys(tensors))
    if not wanted:
        return {}
    observers = {name: OBSERVERS[observer]() for name in wanted}
    instrumented, outputs = _with_outputs(graph, wanted, type(next(iter(observers.values()))).reductions)
    session = Session(instrumented, threads=threads)
    # The runtime's reductions skip NaN, so it is looked for where it ends up.
    results = [t.name for t in graph.outputs]
    fetch = list(dict.fromkeys([*(name for names in outputs.values() for name in names), *results]))
    batches: Iterable[Any] = data
    if progress is not None:
        batches = progress.track(data, "calibrating", total=_length(data))
    empty = True
    for batch in batches:
        empty = False
        values = session.run(batch.feeds, fetch)
        _refuse_nan({name: values[name] for name in results})
        for name, watching in observers.items():
            watching.update(*(values[output] for output in outputs[name]))
    if empty:
        raise DataError("the calibration data is empty; at least one sample is needed to find the ranges")
    ranges = {name: watching.range() for name, watching in observers.items()}
    for name, found in ranges.items():
        if not (np.isfinite(found.low) and np.isfinite(found.high)):
            raise DataError(
                f"tensor {name!r} takes values that are not finite ({found.low} to {found.high}) on the calibration "
                "data; check the data's preprocessing, or exclude the nodes around it"
            )
    return ranges


def _refuse_nan(outputs: dict[str, NDArray[Any]]) -> None:
    for name, value in outputs.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isnan(value).any():
            raise DataError(
                f"output {name!r} of the float model is NaN on some calibration samples; check the data's "
                "preprocessing and the model itself"
            )


def _length(data: Dataset) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _with_outputs(
    graph: Graph, tensors: Sequence[str], reductions: Sequence[str]
) -> tuple[Graph, dict[str, list[str]]]:
    """A copy of ``graph`` with outputs added: per tensor its reductions or, without any, the tensor itself."""
    twin = copy_graph(graph)
    known = twin.tensors()
    names = Names(twin)
    outputs: list[gs.Tensor] = []
    fetched: dict[str, list[str]] = {}
    for name in tensors:
        if name not in known:
            raise UsageError(f"tensor {name!r} is not in the graph; expected the name of a float tensor")
        source = known[name]
        if not reductions:
            if source.dtype is None:
                source.dtype = np.dtype(np.float32)
            if not any(source is output for output in twin.outputs):
                outputs.append(source)
            fetched[name] = [name]
            continue
        fetched[name] = []
        for op in reductions:
            result = gs.Variable(names.free(f"{name}_{op}"), np.dtype(np.float32), [])
            twin.nodes.append(gs.Node(op, result.name, {"keepdims": 0}, [source], [result]))
            outputs.append(result)
            fetched[name].append(result.name)
    twin.outputs = [*twin.outputs, *outputs]
    return twin, fetched
