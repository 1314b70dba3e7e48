"""Magnitude and power of each channel of chosen tensors over calibration data, streaming."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.errors import DataError
from onnxcompress.graph import Graph, Names, copy_graph
from onnxcompress.session import Session

if TYPE_CHECKING:
    from onnxcompress.base import Progress
    from onnxcompress.data import Dataset

__all__ = ["ChannelStatistics", "channel_statistics"]


@dataclass(frozen=True)
class ChannelStatistics:
    """Per channel, float64 [channels]: the largest absolute value and the mean of squares."""

    magnitude: NDArray[np.float64]
    mean_square: NDArray[np.float64]


def channel_statistics(
    graph: Graph,
    axes: Mapping[str, tuple[int, int]],
    data: Dataset,
    *,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, ChannelStatistics]:
    """Statistics of float tensors of the outermost graph, by name.

    The runtime reduces each tensor to its channels, so that activations are not copied out of it.

    Args:
        graph: the float model.
        axes: (channel axis, rank) of each tensor that is watched.
        data: calibration samples.
        threads: intra-op threads of the runtime; 0: its choice.
        progress: shows how far the work is.

    Raises:
        DataError: there is no sample, or a tensor takes values that are not finite.
    """
    instrumented, fetched = _instrumented(graph, axes)
    session = Session(instrumented, threads=threads)
    names = [output for outputs in fetched.values() for output in outputs]
    magnitude: dict[str, NDArray[np.float64]] = {}
    squares: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    batches: Iterable[Any] = data
    if progress is not None:
        batches = progress.track(data, "measuring channels", total=len(data))
    for batch in batches:
        values = session.run(batch.feeds, names)
        for name, (low, high, square, size) in fetched.items():
            largest = np.maximum(np.abs(values[low]), np.abs(values[high])).astype(np.float64)
            magnitude[name] = np.maximum(magnitude.get(name, 0.0), largest)
            squares[name] = squares.get(name, 0.0) + values[square].astype(np.float64)
            counts[name] = counts.get(name, 0) + int(values[size]) // largest.size
    if not counts and axes:
        raise DataError("the calibration data is empty; at least one sample is needed to measure channels")
    for name, found in magnitude.items():
        if not np.isfinite(found).all():
            raise DataError(
                f"tensor {name!r} takes values that are not finite on the calibration data; "
                "check the data's preprocessing and the model itself"
            )
    return {name: ChannelStatistics(magnitude[name], squares[name] / max(counts[name], 1)) for name in axes}


def _instrumented(graph: Graph, axes: Mapping[str, tuple[int, int]]) -> tuple[Graph, dict[str, tuple[str, ...]]]:
    """A copy of ``graph`` that answers with (minima, maxima, sums of squares, size) per tensor instead."""
    twin = copy_graph(graph)
    known = twin.tensors()
    free = Names(twin)
    fetched: dict[str, tuple[str, ...]] = {}
    outputs: list[gs.Tensor] = []
    for name, (axis, rank) in axes.items():
        made = []
        others = [i for i in range(rank) if i != axis]
        for op in ("ReduceMin", "ReduceMax", "ReduceSumSquare"):
            result = gs.Variable(free.free(f"{name}_{op}"), np.dtype(np.float32), None)
            inputs: list[gs.Tensor] = [known[name]]
            attrs: dict[str, Any] = {"keepdims": 0}
            if twin.opset >= 18:
                inputs.append(gs.Constant(free.free(f"{result.name}_axes"), np.array(others, np.int64)))
            else:
                attrs["axes"] = others
            twin.nodes.append(gs.Node(op, free.free(f"{result.name}_node"), attrs, inputs, [result]))
            made.append(result)
        size = gs.Variable(free.free(f"{name}_Size"), np.dtype(np.int64), [])
        twin.nodes.append(gs.Node("Size", free.free(f"{size.name}_node"), {}, [known[name]], [size]))
        made.append(size)
        outputs.extend(made)
        fetched[name] = tuple(t.name for t in made)
    twin.outputs = outputs
    return twin, fetched
