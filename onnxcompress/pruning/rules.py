"""One rule an operator: how labels of the inputs meet, and which labels the outputs carry.

A rule is called in graph order with the walk and the node. It joins labels, reports producers, consumers and passing
nodes, and sets the states of the outputs; an output that it does not set carries no labels. It raises
:class:`~onnxcompress.pruning.walk.Unsupported` where it cannot say what happens, and all labels of the node's inputs
are pinned. There is no default: an operator without a rule pins too.

This module holds arithmetic; :mod:`onnxcompress.pruning.movement` has the rules of what moves data,
:mod:`onnxcompress.pruning.contractions` those of Einsum and Attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.graph import attribute
from onnxcompress.pruning.contractions import CONTRACTIONS, axis_labels, meet
from onnxcompress.pruning.dims import ONE, Dim
from onnxcompress.pruning.labels import Bundle
from onnxcompress.pruning.movement import MOVEMENT, READS_SIZES, normal_axis
from onnxcompress.pruning.walk import Coupler, Rule, Unsupported

__all__ = ["READS_SIZES", "RULES"]

Ints = NDArray[np.int64]


# ---- element by element --------------------------------------------------------------------------------------------


def broadcast(c: Coupler, tensors: Sequence[gs.Tensor]) -> tuple[tuple[Dim, ...], list[Bundle]]:
    """Join what meets when ``tensors`` are broadcast against each other; dimensions and labels of the result."""
    dims = [c.dims(t) for t in tensors]
    rank = max(len(d) for d in dims)
    shifts = [rank - len(d) for d in dims]
    full = [(ONE,) * shift + d for shift, d in zip(shifts, dims, strict=True)]
    while True:
        found = [
            (number, Bundle(tuple(a + shifts[number] for a in b.axes), b.labels), b)
            for number, tensor in enumerate(tensors)
            for b in c.state(tensor).bundles
        ]
        runs = _connected([b.axes for _, b, _ in found])
        clash = [run for run in runs if len({found[i][1].axes for i in run}) > 1 or _repeats(found[i][0] for i in run)]
        split = [found[i] for run in clash for i in run if len(found[i][1].axes) > 1]
        if not split:
            break
        for number, _, own in split:  # heads that meet something that knows only one of their axes
            c.collapse(tensors[number], own, own.axes[0])
    bundles = []
    for run in runs:
        axes, labels = found[run[0]][1].axes, found[run[0]][1].labels
        for i in run[1:]:
            if found[i][1].labels.shape != labels.shape:
                raise Unsupported("lengths that are not known to be equal meet")
            c.labels.join(labels, found[i][1].labels)
        bundles.append(Bundle(axes, labels))
        labelled = {found[i][0] for i in run}
        for number, tensor in enumerate(tensors):
            if number not in labelled and any(full[number][axis] != ONE for axis in axes):
                c.labels.pin(labels, f"it meets {tensor.name!r}, which cannot be cut there")
    result = tuple(_meet([f[axis] for f in full], any(axis in b.axes for b in bundles)) for axis in range(rank))
    return result, bundles


def _connected(axes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Positions in ``axes`` that are connected by shared axes."""
    runs: list[tuple[set[int], list[int]]] = []
    for number, own in enumerate(axes):
        touching = [run for run in runs if run[0] & set(own)]
        merged = (set(own).union(*(r[0] for r in touching)), [i for r in touching for i in r[1]] + [number])
        runs = [run for run in runs if run not in touching] + [merged]
    return [sorted(run[1]) for run in runs]


def _repeats(numbers: object) -> bool:
    listed = list(numbers)  # type: ignore[call-overload]
    return len(set(listed)) < len(listed)


def _meet(dims: Sequence[Dim], labelled: bool) -> Dim:
    """The broadcast of dimensions; those that inference does not know give way."""
    wide = [d for d in dims if d != ONE]
    if not wide:
        return ONE
    return min(wide, key=lambda d: (bool(d.symbols), any(s.startswith("?") for s in d.symbols), -d.size))


def _elementwise(c: Coupler, node: gs.Node) -> None:
    tensors = [t for t in node.inputs if t.name]
    dims, bundles = broadcast(c, tensors)
    _all_outputs(c, node, dims, bundles)


def _all_outputs(c: Coupler, node: gs.Node, dims: Sequence[Dim], bundles: Sequence[Bundle]) -> None:
    for tensor in node.outputs:
        c.set(tensor, dims, bundles)


def _dropout(c: Coupler, node: gs.Node) -> None:
    training = c.value(node, 2) if c.opset >= 12 else None
    if training is not None and bool(training):
        raise Unsupported("it is in training mode")
    _unary(c, node)


def _unary(c: Coupler, node: gs.Node) -> None:
    """Element by element; further inputs are parameters of one element (Clip's bounds, Dropout's ratio)."""
    for tensor in node.inputs[1:]:
        if tensor.name and any(d != ONE for d in c.dims(tensor)):
            raise Unsupported(f"{tensor.name!r} is not a scalar")
    _all_outputs(c, node, c.dims(node.inputs[0]), c.state(node.inputs[0]).bundles)


# ---- layers with weights -------------------------------------------------------------------------------------------


def _vector_parameter(c: Coupler, node: gs.Node, index: int, labels: Ints | None) -> None:
    """An optional parameter with one value for each position of ``labels``."""
    if index < len(node.inputs) and node.inputs[index].name:
        if len(c.dims(node.inputs[index])) != 1:
            raise Unsupported(f"{node.inputs[index].name!r} is not a vector")
        meet(c, node, labels, axis_labels(c, node.inputs[index], 0))


def _pin_from(c: Coupler, node: gs.Node, index: int, axis: int) -> None:
    """Spatial axes are mixed with their neighbours."""
    tensor = node.inputs[index]
    c.pin(tensor, f"{node.op} {node.name!r} runs over it", range(axis, len(c.dims(tensor))))


def _output_dims(c: Coupler, node: gs.Node, batch: Dim, channels: Dim) -> tuple[Dim, ...]:
    declared = c.declared(node.outputs[0])
    rank = len(c.dims(node.inputs[0]))
    if declared is None or len(declared) != rank:
        declared = tuple(Dim(1, (f"?{node.name}.{axis}",)) for axis in range(rank))
    return (batch, channels, *declared[2:])


def _conv(c: Coupler, node: gs.Node) -> None:
    x, weight = node.inputs[0], node.inputs[1]
    dims, shape = c.dims(x), c.dims(weight)
    group = int(attribute(node, "group", 1))
    if len(dims) < 3 or any(not d.known for d in shape) or dims[1] != Dim(shape[1].size * group):
        raise Unsupported("its weight does not fit its input")
    _pin_from(c, node, 0, 2)
    _pin_from(c, node, 1, 2)
    entering, leaving = axis_labels(c, x, 1), axis_labels(c, weight, 0)
    inner = axis_labels(c, weight, 1)
    if group == 1:
        meet(c, node, entering, inner)
        c.consumes(node, 0, 1)
        c.produces(node, 1)
    else:
        _grouped(c, node, entering, leaving, inner, group)
    _vector_parameter(c, node, 2, leaving)
    _channel_output(c, node, dims[0], shape[0].size, leaving)


def _grouped(
    c: Coupler, node: gs.Node, entering: Ints | None, leaving: Ints | None, inner: Ints | None, group: int
) -> None:
    """Depthwise: input and output go together. Else whole groups are cut, or the same positions of every group.

    Whichever leaves more to choose from is taken. Where what is tied together turns out to be pinned, the walk is
    repeated with ``evenly``, so that the other side can still be cut.
    """
    per_in = 1 if entering is None else entering.size // group
    per_out = 1 if leaving is None else leaving.size // group
    blocks = entering is not None and leaving is not None and node.name not in c.evenly
    if blocks and (per_in == 1 or group >= min(per_in, per_out)):
        assert entering is not None
        assert leaving is not None
        rows = np.concatenate([entering.reshape(group, -1), leaving.reshape(group, -1)], axis=1)
        c.labels.join(rows[:, :1], rows)
        c.passes(node, 1)
        if per_in > 1 or per_out > 1:
            c.whole[node.name] = leaving
        if inner is not None:
            c.labels.pin(inner, f"{node.op} {node.name!r} has groups, which are cut as a whole")
        return
    if entering is not None:
        rows = entering.reshape(group, -1)
        c.labels.join(rows[:1], rows)
        if inner is None:  # one channel a group: it must stay
            c.labels.pin(entering, f"{node.op} {node.name!r} reads it in groups of one channel")
        else:
            c.labels.join(rows[0], inner)
    elif inner is not None:
        c.labels.pin(inner, f"{node.op} {node.name!r} reads an axis that cannot be cut")
    if leaving is not None:
        rows = leaving.reshape(group, -1)
        c.labels.join(rows[:1], rows)
        if per_out == 1:
            c.labels.pin(leaving, f"{node.op} {node.name!r} has groups of one channel whose input cannot be cut")
    c.consumes(node, 0, 1)
    c.produces(node, 1)


def _channel_output(c: Coupler, node: gs.Node, batch: Dim, channels: int, labels: Ints | None) -> None:
    bundles = [] if labels is None else [Bundle((1,), labels)]
    batch_bundle = c.state(node.inputs[0]).at(0)
    if batch_bundle is not None:
        bundles.append(c.tie(batch_bundle, 0))
    c.set(node.outputs[0], _output_dims(c, node, batch, Dim(channels)), bundles)


def _conv_transpose(c: Coupler, node: gs.Node) -> None:
    x, weight = node.inputs[0], node.inputs[1]
    dims, shape = c.dims(x), c.dims(weight)
    group = int(attribute(node, "group", 1))
    if len(dims) < 3 or any(not d.known for d in shape) or dims[1] != shape[0] or shape[0].size % group:
        raise Unsupported("its weight does not fit its input")
    _pin_from(c, node, 0, 2)
    _pin_from(c, node, 1, 2)
    entering, rows, inner = axis_labels(c, x, 1), axis_labels(c, weight, 0), axis_labels(c, weight, 1)
    meet(c, node, entering, rows)
    leaving: Ints | None
    if group == 1:
        leaving = inner
        c.consumes(node, 0, 1)
        c.produces(node, 1)
    else:
        channels = shape[1].size * group
        leaving = c.labels.fresh(channels) if channels > 1 else None
        by_group = 1 if rows is None else rows.size // group
        whole = entering is not None and node.name not in c.evenly
        if whole and (by_group == 1 or group >= min(by_group, shape[1].size)):
            _grouped(c, node, entering, leaving, inner, group)
        else:
            if rows is not None:
                c.labels.join(rows.reshape(group, -1)[:1], rows.reshape(group, -1))
                if by_group == 1:
                    c.labels.pin(rows, f"{node.op} {node.name!r} reads it in groups of one channel")
            if leaving is not None and inner is not None:
                c.labels.join(inner, leaving.reshape(group, -1))
            elif leaving is not None:
                c.labels.pin(leaving, f"{node.op} {node.name!r} has groups of one channel whose input cannot be cut")
            c.consumes(node, 0, 1)
            c.produces(node, 1)
    _vector_parameter(c, node, 2, leaving)
    _channel_output(c, node, dims[0], shape[1].size * group, leaving)


def _gemm(c: Coupler, node: gs.Node) -> None:
    a, b = node.inputs[0], node.inputs[1]
    if len(c.dims(a)) != 2 or len(c.dims(b)) != 2:
        raise Unsupported("its inputs are no matrices")
    inner_a, inner_b = (0 if attribute(node, "transA", 0) else 1), (1 if attribute(node, "transB", 0) else 0)
    meet(c, node, axis_labels(c, a, inner_a), axis_labels(c, b, inner_b))
    _contraction(c, node, 0, inner_a)
    _contraction(c, node, 1, inner_b)
    bundles = []
    for tensor, axis, out in ((a, 1 - inner_a, 0), (b, 1 - inner_b, 1)):
        labels = axis_labels(c, tensor, axis)
        if labels is not None:
            bundles.append(Bundle((out,), labels))
            if c.state(tensor).constant:
                c.produces(node, out)
    c.set(node.outputs[0], (c.dims(a)[1 - inner_a], c.dims(b)[1 - inner_b]), bundles)
    if len(node.inputs) > 2 and node.inputs[2].name:
        dims, bundles = broadcast(c, [node.outputs[0], node.inputs[2]])
        c.set(node.outputs[0], dims, bundles)


def _contraction(c: Coupler, node: gs.Node, index: int, axis: int) -> None:
    if not c.state(node.inputs[index]).constant:
        c.consumes(node, index, axis)


def _matmul(c: Coupler, node: gs.Node) -> None:
    a, b = node.inputs[0], node.inputs[1]
    ranks = len(c.dims(a)), len(c.dims(b))
    if min(ranks) < 2:
        raise Unsupported("one of its inputs is a vector")
    rank = max(ranks)
    for tensor in (a, b):  # heads: a bundle that spans a batch axis is cut along it
        for bundle in list(c.state(tensor).bundles):
            if len(bundle.axes) > 1:
                c.collapse(tensor, bundle, bundle.axes[0])
    meet(c, node, axis_labels(c, a, ranks[0] - 1), axis_labels(c, b, ranks[1] - 2))
    _contraction(c, node, 0, ranks[0] - 1)
    _contraction(c, node, 1, ranks[1] - 2)
    dims, bundles = _batch_axes(c, node, a, b, rank)
    for tensor, axis, out in ((a, ranks[0] - 2, rank - 2), (b, ranks[1] - 1, rank - 1)):
        labels = axis_labels(c, tensor, axis)
        dims.append(c.dims(tensor)[axis])
        if labels is not None:
            bundles.append(Bundle((out,), labels))
            if c.state(tensor).constant:
                c.produces(node, out)
    c.set(node.outputs[0], dims, bundles)


def _batch_axes(c: Coupler, node: gs.Node, a: gs.Tensor, b: gs.Tensor, rank: int) -> tuple[list[Dim], list[Bundle]]:
    """Broadcast all axes but the last two."""
    dims: list[Dim] = []
    bundles = []
    both = not (c.state(a).constant or c.state(b).constant)
    for axis in range(rank - 2):
        found: list[tuple[Dim, Ints | None]] = []
        for tensor in (a, b):
            own = axis - (rank - len(c.dims(tensor)))
            if own >= 0 and c.dims(tensor)[own] != ONE:
                found.append((c.dims(tensor)[own], axis_labels(c, tensor, own)))
        dims.append(_meet([d for d, _ in found], False) if found else ONE)
        known = [labels for _, labels in found if labels is not None]
        if not known:
            continue
        if len(found) == 2:
            meet(c, node, found[0][1], found[1][1])
        bundles.append(Bundle((axis,), known[0]))
        if both:
            c.labels.mark_heads(known[0])
    return dims, bundles


# ---- normalisation -------------------------------------------------------------------------------------------------


def _batch_normalization(c: Coupler, node: gs.Node) -> None:
    if any(t.name for t in node.outputs[1:]) or attribute(node, "training_mode", 0):
        raise Unsupported("it is in training mode")
    x = node.inputs[0]
    if len(c.dims(x)) < 2:
        raise Unsupported("its input has no channel axis")
    labels = axis_labels(c, x, 1)
    for index in range(1, 5):
        _vector_parameter(c, node, index, labels)
    c.passes(node, 1)
    _all_outputs(c, node, c.dims(x), c.state(x).bundles)


def _instance_normalization(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    labels = axis_labels(c, x, 1)
    _pin_from(c, node, 0, 2)
    for index in (1, 2):
        _vector_parameter(c, node, index, labels)
    c.passes(node, 1)
    _all_outputs(c, node, c.dims(x), c.state(x).bundles)


def _group_normalization(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    labels = axis_labels(c, x, 1)
    _pin_from(c, node, 0, 2)
    groups = int(node.attrs["num_groups"])
    if labels is not None:
        if labels.size % groups:
            raise Unsupported("its groups do not divide the channels")
        rows = labels.reshape(groups, -1)
        c.labels.join(rows[:, :1], rows)
        labels = labels if c.opset >= 21 else np.ascontiguousarray(rows[:, 0])
    for index in (1, 2):
        _vector_parameter(c, node, index, labels)
    c.passes(node, 1)
    _all_outputs(c, node, c.dims(x), c.state(x).bundles)


def _normalised(axes_of: Callable[[Coupler, gs.Node, int], Sequence[int]]) -> Rule:
    """Operators that divide by a statistic over some axes, which cannot be cut; the others pass."""

    def rule(c: Coupler, node: gs.Node) -> None:
        x = node.inputs[0]
        rank = len(c.dims(x))
        axes = [normal_axis(axis, rank) for axis in axes_of(c, node, rank)]
        reason = f"{node.op} {node.name!r} normalises over it"
        for bundle in list(c.state(x).bundles):
            if set(bundle.axes) & set(axes):
                c.labels.pin(bundle.labels, reason)
        for tensor in node.inputs[1:]:
            if tensor.name:
                c.pin(tensor, reason)
        c.set(node.outputs[0], c.dims(x), c.state(x).bundles)

    return rule


def _from_axis(c: Coupler, node: gs.Node, rank: int) -> Sequence[int]:
    return range(normal_axis(int(attribute(node, "axis", -1)), rank), rank)


def _softmax_axes(c: Coupler, node: gs.Node, rank: int) -> Sequence[int]:
    if c.opset >= 13:
        return [int(attribute(node, "axis", -1))]
    return range(normal_axis(int(attribute(node, "axis", 1)), rank), rank)


def _one_axis(default: int) -> Callable[[Coupler, gs.Node, int], Sequence[int]]:
    return lambda c, node, rank: [int(attribute(node, "axis", default))]


# ---- reductions and pooling ----------------------------------------------------------------------------------------

#: reductions in which a zero adds nothing
_SUMS = frozenset(("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"))


def _reduce(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    rank = len(c.dims(x))
    since = 13 if node.op == "ReduceSum" else 18
    given = c.value(node, 1) if c.opset >= since else attribute(node, "axes")
    axes = None if given is None else [int(a) for a in np.asarray(given).reshape(-1)]
    if not axes:
        if attribute(node, "noop_with_empty_axes", 0) and c.opset >= since:
            _all_outputs(c, node, c.dims(x), c.state(x).bundles)
            return
        axes = list(range(rank))
    reduced = {normal_axis(axis, rank) for axis in axes}
    for bundle in list(c.state(x).bundles):
        shared = [a for a in bundle.axes if a in reduced]
        if not shared:
            continue
        if node.op in _SUMS:
            c.collapse(x, bundle, shared[0])
            c.consumes(node, 0, shared[0])
        else:
            c.labels.pin(bundle.labels, f"{node.op} {node.name!r} reduces over it")
    keep = bool(attribute(node, "keepdims", 1))
    renamed = {a: a if keep else a - sum(r < a for r in reduced) for a in range(rank) if a not in reduced}
    dims = [ONE if a in reduced else d for a, d in enumerate(c.dims(x)) if keep or a not in reduced]
    bundles = [b.moved([renamed[a] for a in b.axes]) for b in c.state(x).bundles if not set(b.axes) & reduced]
    c.set(node.outputs[0], dims, bundles)


def _pool(c: Coupler, node: gs.Node) -> None:
    """Axes 0 and 1 pass; the others are pooled."""
    x = node.inputs[0]
    if len(c.dims(x)) < 3:
        raise Unsupported("its input has no spatial axes")
    for bundle in list(c.state(x).bundles):
        if len(bundle.axes) > 1:
            c.collapse(x, bundle, bundle.axes[0])
    _pin_from(c, node, 0, 2)
    dims = c.dims(x)
    bundles = [b for b in c.state(x).bundles if b.axes[0] < 2]
    for tensor in node.outputs:  # the indices of MaxPool count through the channels
        if tensor is not node.outputs[0] and tensor.name:
            raise Unsupported("its indices are used")
    c.set(node.outputs[0], _output_dims(c, node, dims[0], dims[1]), bundles)


# ---- quantisation --------------------------------------------------------------------------------------------------


def _quantisation(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    dims = c.dims(x)
    if attribute(node, "block_size", 0):
        raise Unsupported("it quantises in blocks")
    axis = int(attribute(node, "axis", 1))
    for tensor in node.inputs[1:]:
        if tensor.name and any(d != ONE for d in c.dims(tensor)):
            axis = normal_axis(axis, len(dims))
            meet(c, node, axis_labels(c, x, axis), axis_labels(c, tensor, 0))
            c.passes(node, axis)
    for tensor in node.outputs:
        c.set(tensor, dims, c.state(x).bundles, constant=c.state(x).constant)


# ---- the table -----------------------------------------------------------------------------------------------------

_UNARY = """
    Abs Neg Sqrt Exp Log Reciprocal Floor Ceil Round Sign Erf Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh
    Tanh Sigmoid Relu LeakyRelu Softplus Softsign Elu Selu Celu ThresholdedRelu HardSigmoid HardSwish Mish Gelu Swish
    Not IsNaN IsInf Clip BitwiseNot Shrink
    """.split()  # noqa: SIM905 - a table of words is easier to read
_NARY = """
    Add Sub Mul Div Pow Mod Max Min Mean Sum And Or Xor Equal Greater Less GreaterOrEqual LessOrEqual Where PRelu
    BitwiseAnd BitwiseOr BitwiseXor BitShift
    """.split()  # noqa: SIM905 - a table of words is easier to read
_REDUCTIONS = """
    ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum ReduceLogSumExp
    """.split()  # noqa: SIM905 - a table of words is easier to read


def _nothing(c: Coupler, node: gs.Node) -> None:
    """No labels in, none out; Constant is read by the walk itself."""


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_UNARY, _unary),
    "Dropout": _dropout,
    **dict.fromkeys(_NARY, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _pool),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantisation),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _normalised(_softmax_axes)),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _normalised(_from_axis)),
    "LpNormalization": _normalised(_one_axis(-1)),
    "LRN": _normalised(lambda c, node, rank: [1]),
    "MeanVarianceNormalization": _normalised(lambda c, node, rank: attribute(node, "axes", [0, 2, 3])),
    "BatchNormalization": _batch_normalization,
    "InstanceNormalization": _instance_normalization,
    "GroupNormalization": _group_normalization,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Constant": _nothing,
    **CONTRACTIONS,
    **MOVEMENT,
}
