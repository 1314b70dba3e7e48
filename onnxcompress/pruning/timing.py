"""What channels cost in time: each group's own piece of the graph, cut to a few widths and timed on this machine.

Multiply-accumulates are not time: kernels work on blocks of 8 or 16 channels, so that 33 may cost as much as 48. The
piece of a group runs from the inputs of its producers to the outputs of its readers. Equal pieces are timed once. What
will be quantised is timed as integers (:mod:`onnxcompress.quantization.integer_form`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.base import Progress, SilentProgress
from onnxcompress.errors import OnnxCompressError
from onnxcompress.graph import Graph, nested_graphs, part_info, sort_nodes
from onnxcompress.pruning.coupling import CouplingGroup
from onnxcompress.quantization.integer_form import integer_form
from onnxcompress.session import Session
from onnxcompress.shapes import TensorType
from onnxcompress.targets import Target

__all__ = ["saved_times"]

Floats = NDArray[np.float64]
Cut = Callable[[Mapping[str, Sequence[int]]], Graph]

#: widths of one group that are timed, most
_WIDTHS = 9
#: rounds over all widths, and seconds that one piece may take
_ROUNDS = 15
_SECONDS = 0.4
#: nodes of a piece, most: a residual stream through the whole network is no piece
_MOST_NODES = 24
#: one channel less than all must not take so much longer than all; groups of so few channels are not asked
_SLOWER = 1.05
_SMALL = 8


def saved_times(
    groups: Sequence[CouplingGroup],
    cut: Cut,
    types: Mapping[str, TensorType],
    feeds: Mapping[str, NDArray[Any]],
    *,
    integers: Target | None = None,
    progress: Progress | None = None,
) -> dict[str, Floats]:
    """{group: share of the model's time that is saved by 0, 1, ... removed channels}, ``[channels + 1]``.

    The last value is that of a group that goes as a whole. Groups whose piece is too large or cannot be run on its own
    are left out.

    Args:
        groups: those that may be cut.
        cut: {group: channels that stay} to the cut graph; nothing to cut: the graph itself.
        types: types and shapes of the graph's tensors for ``feeds``.
        feeds: one batch for the whole model.
        integers: time everything quantised for this target; None: as it is.
        progress: where to report to.
    """
    progress = progress if progress is not None else SilentProgress()
    whole = cut({})
    form = whole
    if integers is not None:
        form = integer_form(whole, integers, {name: value.shape for name, value in feeds.items()})
    seconds = _timed({0: Session(form, threads=1).bind(dict(feeds))})[0]
    known: dict[Any, dict[int, float]] = {}
    found = {}
    for group in progress.track(groups, "timing channels", len(groups)):
        piece = _piece(whole, group, types)
        if piece is None:
            continue
        key = _signature(piece, group, types)
        if key not in known:
            with progress.paused():
                known[key] = _widths(group, cut, types, integers)
        if known[key]:
            found[group.name] = _saved(known[key], group.channels, seconds)
    return found


def _piece(graph: Graph, group: CouplingGroup, types: Mapping[str, TensorType]) -> Graph | None:
    """From the data inputs of the producers to the outputs of the readers; None where it is no small piece."""
    by_name = {node.name: node for node in graph.nodes}
    starts = {str(by_name[name].inputs[0].name) for name in group.producers if name in by_name and by_name[name].inputs}
    ends = [by_name[name].outputs[0] for name in group.consumers if name in by_name]
    nodes: dict[int, gs.Node] = {}
    stack = list(ends)
    while stack:
        tensor = stack.pop()
        if isinstance(tensor, gs.Constant) or tensor.name in starts:
            continue
        if not tensor.inputs:
            return None
        node = tensor.inputs[0]
        if id(node) in nodes:
            continue
        if len(nodes) >= _MOST_NODES or any(True for _ in nested_graphs(node)):
            return None
        nodes[id(node)] = node
        stack.extend(node.inputs)
    if not ends or not all(name in {n.name for n in nodes.values()} for name in group.producers):
        return None
    inputs = []
    for name in sorted(starts):
        known = types.get(name)
        if known is None or known.shape is None or known.dtype != np.float32:
            return None
        inputs.append(gs.Variable(name, np.float32, [None] * len(known.shape)))
    made = {id(t) for n in nodes.values() for t in n.outputs}
    piece = gs.Graph(
        nodes=list(nodes.values()),
        inputs=inputs,
        outputs=list({id(t): t for t in ends if id(t) in made}.values()),
        name="piece",
        opset=graph.opset,
        import_domains=graph.import_domains,
        functions=list(graph.functions),
        ir_version=graph.ir_version,
    )
    piece.__dict__["onnxcompress_info"] = part_info(graph)
    sort_nodes(piece)
    return piece


def _signature(piece: Graph, group: CouplingGroup, types: Mapping[str, TensorType]) -> Any:
    nodes = tuple(
        (
            node.op,
            tuple(tuple(t.shape) if isinstance(t, gs.Constant) else () for t in node.inputs),
            repr(sorted((k, str(v)) for k, v in node.attrs.items() if not isinstance(v, gs.Constant))),
        )
        for node in piece.nodes
    )
    return group.channels, nodes, tuple(str(types[t.name].shape) for t in piece.inputs)


def _widths(
    group: CouplingGroup, cut: Cut, types: Mapping[str, TensorType], integers: Target | None
) -> dict[int, float]:
    """Seconds for some numbers of channels that stay; none where a piece cannot be run."""
    channels = group.channels
    step = max(1, channels // 8)
    step = step if step < 8 else -(-step // 8) * 8
    even = sorted({channels, 1, *range(step, channels, step)}, reverse=True)[: _WIDTHS + 1]
    widths = sorted({*even, channels - 1} - {0}, reverse=True)
    generator = np.random.default_rng(0)
    jobs = {}
    for width in widths:
        try:
            piece = _piece(cut({group.name: range(width)}), group, types)
            if piece is None:
                return {}
            data = {}
            for tensor in piece.inputs:
                shape = types[tensor.name].shape
                assert shape is not None
                sizes = [d if isinstance(d, int) else 1 for d in shape]
                data[tensor.name] = generator.standard_normal(sizes).astype(np.float32)
            if integers is not None:
                piece = integer_form(piece, integers, {n: v.shape for n, v in data.items()}, whole=False)
            jobs[width] = Session(piece, threads=1).bind(data)
            jobs[width]()
        except OnnxCompressError:
            return {}
    return _timed(jobs)


def _timed(jobs: Mapping[int, Callable[[], Any]]) -> dict[int, float]:
    """The shortest of some runs of each, in turn."""
    best = dict.fromkeys(jobs, float("inf"))
    for job in jobs.values():
        job()
    start = time.perf_counter()
    for number in range(_ROUNDS):
        for width, job in jobs.items():
            began = time.perf_counter()
            job()
            best[width] = min(best[width], time.perf_counter() - began)
        if number > 1 and time.perf_counter() - start > _SECONDS:
            break
    return best


def _saved(times: Mapping[int, float], channels: int, whole: float) -> Floats:
    """A width between two that were timed costs what the wider one does, and no wider one is faster.

    Not a number where it is not known: where one channel less than all is slower than all, as for depthwise kernels
    that want whole blocks, only the widths that were timed are, and of them those that are no slower than wider ones.
    """
    odd = channels - 1
    fussy = channels > _SMALL and times.get(odd, 0.0) > _SLOWER * times[channels]
    widths = sorted(width for width in times if width != odd or channels <= _SMALL)
    found = np.array([times[w] for w in widths])
    cost = np.minimum.accumulate(found[::-1])[::-1]
    kept = channels - np.arange(channels + 1)
    place = np.searchsorted(widths, np.maximum(kept, 1))
    saved = (cost[-1] - cost[place]) / whole
    if fussy:
        saved[~np.isin(kept, np.array(widths)[found <= _SLOWER * cost])] = np.nan
    saved[-1] = cost[-1] / whole
    return np.asarray(saved, np.float64)
