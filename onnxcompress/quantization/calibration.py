"""Calibration: run the float model over samples and watch the values of chosen tensors.

Everything streams: an observer keeps a few numbers per tensor, whatever the number of samples, the batch size or the
shapes, which may differ from batch to batch. Whole tensors leave the runtime only for observers that need them, and
then never more at a time than a fixed amount: larger batches are split, and where one sample alone is too large the
tensors are watched in groups, one group after another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.errors import DataError, UsageError
from onnxcompress.graph import Graph, Names, copy_graph
from onnxcompress.quantization.affine import QuantScheme, Range
from onnxcompress.quantization.observers import (
    DEFAULT_PERCENTILE,
    PEAK_CLIPPING_WEIGHT,
    UINT8,
    Observer,
    Watcher,
    WeightedMseObserver,
    make_observer,
)
from onnxcompress.session import Session

if TYPE_CHECKING:
    from onnxcompress.base import Progress
    from onnxcompress.data import Dataset

__all__ = ["IN_FLIGHT_BYTES", "calibrate", "observe", "range_of"]

#: whole tensors that leave the runtime at a time hold about this many bytes at most
IN_FLIGHT_BYTES = 1 << 27


def calibrate(
    graph: Graph,
    tensors: Sequence[str],
    data: Dataset,
    observer: str = "min_max",
    *,
    shared: Iterable[Sequence[str]] = (),
    scheme: QuantScheme = UINT8,
    percentile: float = DEFAULT_PERCENTILE,
    peaks: Collection[str] = (),
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, Range]:
    """Ranges of ``tensors`` over ``data``.

    Args:
        graph: the float model.
        tensors: names of float tensors of the outermost graph; graph inputs are allowed.
        data: calibration samples.
        observer: a key of :data:`~onnxcompress.quantization.observers.OBSERVERS`.
        shared: groups of tensors that will share their parameters; the values of each group are seen as one.
        scheme: what the values become.
        percentile: for the observer ``percentile``.
        peaks: tensors of which the largest values alone decide; for the observer ``weighted_mse``.
        threads: intra-op threads of the runtime; 0: its choice.
        progress: shows how far the work is.

    Raises:
        UsageError: unknown observer or tensor.
        DataError: a tensor takes values that are not finite.
    """
    leader = {name: group[0] for group in shared for name in group}
    wanted = list(dict.fromkeys(tensors))
    make_observer(observer, scheme, percentile=percentile)  # a wrong name is an error even where nothing is watched
    made: dict[str, Observer] = {}
    for name in wanted:
        first = leader.get(name, name)
        if first not in made:
            made[first] = make_observer(observer, scheme, percentile=percentile)
        watching = made[first]
        if name in peaks and isinstance(watching, WeightedMseObserver):
            watching.clipping = PEAK_CLIPPING_WEIGHT
    watchers = {name: made[leader.get(name, name)] for name in wanted}
    observe(graph, watchers, data, threads=threads, progress=progress)
    found = {first: made[first].range() for first in made}
    return {name: range_of(name, found[leader.get(name, name)]) for name in wanted}


def range_of(name: str, found: Range) -> Range:
    """``found``, which was observed for tensor ``name``.

    Raises:
        DataError: it is not finite.
    """
    if not (np.isfinite(found.low) and np.isfinite(found.high)):
        raise DataError(
            f"tensor {name!r} takes values that are not finite ({found.low} to {found.high}) on the calibration "
            "data; check the data's preprocessing, or exclude the nodes around it"
        )
    return found


def observe(
    graph: Graph,
    watchers: Mapping[str, Watcher],
    data: Dataset,
    *,
    in_flight: int = IN_FLIGHT_BYTES,
    threads: int = 0,
    progress: Progress | None = None,
) -> None:
    """Show the values that tensors of ``graph`` take over ``data`` to their observers.

    Args:
        graph: the float model.
        watchers: watchers of one kind, by the names of float tensors of the outermost graph; tensors that share
            their parameters may have one observer in common.
        data: calibration samples. Batches are split where they hold too much.
        in_flight: bytes of activations, about, that may leave the runtime at a time.
        threads: intra-op threads of the runtime; 0: its choice.
        progress: shows how far the work is.

    Raises:
        UsageError: unknown tensor.
        DataError: an output of the model is NaN.
    """
    if not watchers:
        return
    known = graph.tensors()
    for name in watchers:
        if name not in known:
            raise UsageError(f"tensor {name!r} is not in the graph; expected the name of a float tensor")
    reductions = type(next(iter(watchers.values()))).reductions
    groups = [list(watchers)]
    if not reductions:
        data, groups = _fitting(graph, list(watchers), data, in_flight, threads)
    for number, group in enumerate(groups):
        instrumented, outputs = _with_outputs(graph, group, reductions)
        # What the arena has handed out as a result cannot serve the next run, so it would grow with fragments.
        session = Session(instrumented, threads=threads, arena=bool(reductions))
        # The runtime's reductions skip NaN, so it is looked for where it ends up.
        results = [t.name for t in graph.outputs] if number == 0 else []
        fetch = list(dict.fromkeys([*(name for names in outputs.values() for name in names), *results]))
        batches: Iterable[Any] = data
        if progress is not None:
            batches = progress.track(data, "calibrating", total=len(data))
        for batch in batches:
            values = session.run(batch.feeds, fetch)
            _refuse_nan({name: values[name] for name in results})
            for name, fetched in outputs.items():
                watchers[name].update(*(values[output] for output in fetched))
        del session  # of a large model there is none open while the next one is made


def _fitting(
    graph: Graph, tensors: list[str], data: Dataset, limit: int, threads: int
) -> tuple[Dataset, list[list[str]]]:
    """``data`` in batches, and ``tensors`` in groups, that hold no more than ``limit`` bytes at a time.

    Sizes are those of the first sample. Batches are preferred: every group costs another pass over the data.
    """
    sized, outputs = _with_outputs(graph, tensors, ("Size",))
    first = data.rebatch(1).first()
    elements = Session(sized, threads=threads).run(first.feeds, [o for names in outputs.values() for o in names])
    sizes = {name: 4 * int(elements[names[0]]) for name, names in outputs.items()}
    fitting = limit * first.samples // max(1, sum(sizes.values()))
    largest = max(batch for batch in (data.batch or 0, data.first().samples))
    if fitting < largest and fitting >= first.samples:
        return data.rebatch(fitting), [tensors]
    if fitting >= largest:
        return data, [tensors]
    groups: list[list[str]] = [[]]
    held = 0
    for name in tensors:
        if groups[-1] and held + sizes[name] > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += sizes[name]
    return data.rebatch(1), groups


def _refuse_nan(outputs: dict[str, NDArray[Any]]) -> None:
    for name, value in outputs.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isnan(value).any():
            raise DataError(
                f"output {name!r} of the float model is NaN on some calibration samples; check the data's "
                "preprocessing and the model itself"
            )


def _with_outputs(graph: Graph, tensors: Sequence[str], operators: Sequence[str]) -> tuple[Graph, dict[str, list[str]]]:
    """A copy of ``graph`` with outputs added: per tensor what ``operators`` make of it or, without any, itself."""
    twin = copy_graph(graph)
    known = twin.tensors()
    names = Names(twin)
    outputs: list[gs.Tensor] = []
    fetched: dict[str, list[str]] = {}
    for name in tensors:
        source = known[name]
        if not operators and source.inputs:
            if source.dtype is None:
                source.dtype = np.dtype(np.float32)
            if not any(source is output for output in (*twin.outputs, *outputs)):
                outputs.append(source)
            fetched[name] = [name]
            continue
        fetched[name] = []
        for op in operators or ("Identity",):  # a graph input cannot be an output as it is
            kind = np.dtype(np.int64 if op == "Size" else np.float32)
            result = gs.Variable(names.free(f"{name}_{op}"), kind, None if op == "Identity" else [])
            attributes = {"keepdims": 0} if op.startswith("Reduce") else {}
            twin.nodes.append(gs.Node(op, result.name, attributes, [source], [result]))
            outputs.append(result)
            fetched[name].append(result.name)
    twin.outputs = [*twin.outputs, *outputs]
    return twin, fetched
