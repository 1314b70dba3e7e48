"""Evaluate one node whose inputs are all known, without a runtime.

Shape arithmetic and plain arithmetic have numpy kernels of their own: they are what folding meets most, they need no
set-up per node, and the kernels that only move data also run on object arrays, which carry partly known shapes.
Every other operator on the list goes to ``onnx.reference`` as a model of one node. The reference has defects
(DequantizeLinear at opsets 13 and 17, grouped ConvTranspose), so the list names what the backend tests of onnx confirm,
and each result is held against the type and shape that ONNX Inference states. onnxruntime is not asked, though it
would be faster: the same model must give the same bytes on a machine without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnxcompress.graph import attribute, constant_value, element_type, nested_graphs, normal_domain

__all__ = ["DATA_MOVEMENT", "EVALUATED", "NotEvaluable", "evaluate_node", "move_data", "shape_range", "slice_window"]

Array = NDArray[Any]
Inputs = Sequence[Array | None]


class NotEvaluable(Exception):
    """The node cannot be evaluated; the message is the reason, one line."""


#: operators of the reference implementation that are trusted
_REFERENCE = frozenset(
    """
    Abs Neg Sqrt Exp Log Reciprocal Floor Ceil Round Sign Erf Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh
    Tanh Sigmoid Relu LeakyRelu Softplus Softsign Elu Selu HardSigmoid HardSwish Gelu Softmax LogSoftmax
    Not IsNaN IsInf Clip Pow Mod And Or Xor Equal Greater Less GreaterOrEqual LessOrEqual
    BitShift BitwiseAnd BitwiseOr BitwiseXor BitwiseNot Max Min Sum Mean PRelu Where
    Tile Pad Split GatherElements GatherND ScatterElements ScatterND DepthToSpace SpaceToDepth OneHot Trilu EyeLike
    Compress NonZero CumSum ArgMax ArgMin TopK Range MatMul Gemm Einsum
    ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum ReduceLogSumExp
    """.split()  # noqa: SIM905 - a table of words is easier to read
)
#: first opset from which the reference computes an operator as onnxruntime does; 7 for the others
_REFERENCE_SINCE = {"Softmax": 13, "LogSoftmax": 13}  # until opset 12 these flatten to two dimensions

_NEVER = {
    **dict.fromkeys(
        ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"), "it carries quantisation parameters"
    ),
    **dict.fromkeys(
        (
            "Bernoulli",
            "Multinomial",
            "RandomNormal",
            "RandomNormalLike",
            "RandomUniform",
            "RandomUniformLike",
        ),
        "it is random",
    ),
    **dict.fromkeys(("If", "Loop", "Scan", "SequenceMap"), "it is control flow"),
}

#: exporters write this as the end of a slice for "to the last element"
WITHOUT_END = 2**31 - 1

#: operators whose output may be smaller or larger than inference can state, but not larger than rank x input
_DATA_DEPENDENT = ("NonZero", "Compress")


def evaluate_node(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    """The outputs of ``node`` for ``inputs`` (None for an omitted one), none of them above ``limit`` bytes.

    Raises:
        NotEvaluable: the operator, its type or its attributes are not on the list, or the result is too large.
    """
    if normal_domain(node) != "":
        raise NotEvaluable(f"operators of the domain {node.domain!r} are not evaluated")
    if node.op in _NEVER:
        raise NotEvaluable(_NEVER[node.op])
    if any(True for _ in nested_graphs(node)):
        raise NotEvaluable("it is control flow")
    try:
        with np.errstate(all="ignore"):
            if node.op in DATA_MOVEMENT:
                return [np.asarray(x) for x in move_data(node, inputs, opset, limit)]
            if node.op in _KERNELS:
                return [_KERNELS[node.op](node, inputs, opset, limit)]
    except (IndexError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise NotEvaluable(f"its inputs do not fit: {_one_line(error)}") from error
    if node.op not in _REFERENCE:
        raise NotEvaluable(f"{node.op} is not among the operators that are evaluated")
    if opset < _REFERENCE_SINCE.get(node.op, 7):
        raise NotEvaluable(f"{node.op} of opset {opset} is not among the operators that are evaluated")
    return _by_reference(node, inputs, opset, limit)


def check_size(shape: Sequence[int], itemsize: int, limit: int) -> None:
    """Raise :class:`NotEvaluable` before an array of more than ``limit`` bytes is made."""
    size = prod(int(d) for d in shape) * itemsize
    if size > limit:
        raise NotEvaluable(f"the result of {size} bytes is above the limit of {limit} bytes and what it replaces")


# ---- data movement: any element type, objects too --------------------------------------------------------------


def move_data(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    """Outputs of an operator of :data:`DATA_MOVEMENT`; its data may be an object array, its parameters may not."""
    return DATA_MOVEMENT[node.op](node, inputs, opset, limit)


def _need(inputs: Inputs, index: int) -> Array:
    value = inputs[index] if index < len(inputs) else None
    if value is None:
        raise ValueError(f"input {index} is missing")
    return value


def _ints(values: Array) -> list[int]:
    if values.dtype.kind not in "iu":
        raise TypeError(f"integers expected, found {values.dtype}")
    return [int(v) for v in values.reshape(-1)]


def _axes(node: gs.Node, inputs: Inputs, index: int, since: int, opset: int) -> list[int] | None:
    """Axes, which are an attribute until opset ``since`` makes them an input."""
    if opset >= since:
        value = inputs[index] if index < len(inputs) else None
        return None if value is None else _ints(value)
    axes = attribute(node, "axes")
    return None if axes is None else [int(a) for a in axes]


def _identity(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    return [_need(inputs, 0)]


def _reshape(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    data = _need(inputs, 0)
    target = _ints(_need(inputs, 1)) if opset >= 5 else [int(d) for d in node.attrs["shape"]]
    if not attribute(node, "allowzero", 0):
        target = [data.shape[i] if d == 0 else d for i, d in enumerate(target)]
    return [data.reshape(target)]


def _flatten(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    data = _need(inputs, 0)
    axis = int(attribute(node, "axis", 1))
    axis += data.ndim if axis < 0 else 0
    return [data.reshape(prod(data.shape[:axis]), prod(data.shape[axis:]))]


def _transpose(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    return [np.transpose(_need(inputs, 0), attribute(node, "perm")).copy()]


def _squeeze(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    axes = _axes(node, inputs, 1, 13, opset)
    return [np.squeeze(_need(inputs, 0), None if axes is None else tuple(axes))]


def _unsqueeze(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    axes = _axes(node, inputs, 1, 13, opset)
    if axes is None:
        raise ValueError("axes are missing")
    return [np.expand_dims(_need(inputs, 0), tuple(axes))]


def _concat(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    arrays = [_need(inputs, i) for i in range(len(inputs))]
    return [np.concatenate(arrays, int(node.attrs["axis"]))]


def _gather(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    data, indices = _need(inputs, 0), _need(inputs, 1)
    axis = int(attribute(node, "axis", 0))
    if not -data.ndim <= axis < data.ndim:
        raise ValueError(f"axis {axis} of rank {data.ndim}")
    if indices.dtype.kind not in "iu":
        raise TypeError(f"indices of type {indices.dtype}")
    axis %= data.ndim
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    check_size(shape, data.dtype.itemsize, limit)
    return [np.take(data, indices.reshape(-1), axis).reshape(shape)]


def _slice(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    data = _need(inputs, 0)
    axes: list[int] | None
    if opset < 10:
        starts, ends, axes = list(node.attrs["starts"]), list(node.attrs["ends"]), attribute(node, "axes")
        steps = [1] * len(starts)
    else:
        starts, ends = _ints(_need(inputs, 1)), _ints(_need(inputs, 2))
        given = [None if i >= len(inputs) or (x := inputs[i]) is None else _ints(x) for i in (3, 4)]
        axes, steps = given[0], given[1] or [1] * len(starts)
    window = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes or range(len(starts)), steps, strict=True):
        window[axis] = slice_window(int(start), int(end), int(step), data.shape[axis])
    return [data[tuple(window)].copy()]


def slice_window(start: int, end: int, step: int, size: int) -> slice:
    """What Slice takes of an axis; unlike numpy, a backward slice starts at the first element at least."""
    if step < 0 and end >= WITHOUT_END:
        raise ValueError("runtimes disagree about a backward slice that ends at the largest number")
    start += size if start < 0 else 0
    end += size if end < 0 else 0
    if step > 0:
        return slice(min(max(start, 0), size), min(max(end, 0), size), step)
    if size == 0:
        return slice(0, 0)
    last = min(max(end, -1), size - 1)
    return slice(min(max(start, 0), size - 1), None if last < 0 else last, step)


def _expand(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    data = _need(inputs, 0)
    shape = np.broadcast_shapes(data.shape, tuple(_ints(_need(inputs, 1))))
    check_size(shape, data.dtype.itemsize, limit)
    return [np.broadcast_to(data, shape).copy()]


#: operators that only move data
DATA_MOVEMENT: dict[str, Callable[[gs.Node, Inputs, int, int], list[Array]]] = {
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": _identity,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


# ---- arithmetic ------------------------------------------------------------------------------------------------


def _divide(a: Array, b: Array) -> Any:
    """Division as ONNX defines it: integers round towards zero."""
    if a.dtype.kind not in "iu":
        return a / b
    if not b.all():
        raise ValueError("division by zero")
    quotient = a // b
    return quotient + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


_ARITHMETIC: dict[str, Callable[[Array, Array], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _divide,
}


def _arithmetic(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> Array:
    a, b = _need(inputs, 0), _need(inputs, 1)
    if opset < 7:
        raise ValueError(f"broadcasting of opset {opset} is an attribute")
    if a.dtype != b.dtype or a.dtype.kind == "b":
        raise TypeError(f"types {a.dtype} and {b.dtype}")
    check_size(np.broadcast_shapes(a.shape, b.shape), a.dtype.itemsize, limit)
    return np.asarray(_ARITHMETIC[node.op](a, b), a.dtype)


def _cast(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> Array:
    data = _need(inputs, 0)
    to = node.attrs["to"]
    target = element_type(to) if isinstance(to, int) else np.dtype(to)
    for dtype in (data.dtype, target):
        if dtype.kind not in "biuf" and dtype.name != "bfloat16":
            raise TypeError(f"no cast of type {dtype}")
    if target.kind in "iu" and (data.dtype.kind == "f" or data.dtype.name == "bfloat16") and data.size:
        bounds = np.iinfo(target)
        wide = data.astype(np.float64)
        if not (np.isfinite(wide).all() and wide.min() > bounds.min - 1.0 and wide.max() < bounds.max + 1.0):
            raise ValueError(f"values outside of {target}")
    check_size(data.shape, target.itemsize, limit)
    return data.astype(target)


def _shape(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> Array:
    dims = _need(inputs, 0).shape
    start, end = shape_range(node, len(dims))
    return np.array(dims[start:end], np.int64)


def shape_range(node: gs.Node, rank: int) -> tuple[int, int]:
    """Start and end (exclusive) of what the Shape operator ``node`` takes from ``rank`` dimensions."""
    start, end, _ = slice(attribute(node, "start", 0), attribute(node, "end")).indices(rank)
    return start, max(start, end)


def _size(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> Array:
    return np.array(_need(inputs, 0).size, np.int64)


def _constant_of_shape(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> Array:
    shape = _ints(_need(inputs, 0))
    value = node.attrs.get("value")
    fill = np.zeros(1, np.float32) if value is None else constant_value(value)
    if fill is None:
        raise TypeError("its value is no dense number")
    check_size(shape, fill.dtype.itemsize, limit)
    return np.full(shape, fill.reshape(-1)[0], fill.dtype)


_KERNELS: dict[str, Callable[[gs.Node, Inputs, int, int], Array]] = {
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
    "Cast": _cast,
    "ConstantOfShape": _constant_of_shape,
    "Shape": _shape,
    "Size": _size,
}


#: every operator that :func:`evaluate_node` takes
EVALUATED: frozenset[str] = _REFERENCE | DATA_MOVEMENT.keys() | _KERNELS.keys()


# ---- everything else -------------------------------------------------------------------------------------------


def _by_reference(node: gs.Node, inputs: Inputs, opset: int, limit: int) -> list[Array]:
    feeds = {t.name: x for t, x in zip(node.inputs, inputs, strict=True) if x is not None}
    try:
        model = _single_node_model(node, feeds, opset)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise NotEvaluable(f"its inputs do not fit: {_one_line(error)}") from error
    expected = {v.name: v.type.tensor_type for v in (*inferred.graph.output, *inferred.graph.value_info)}
    for output in node.outputs:
        if output.name:
            _check_expected(node, expected.get(output.name), limit)
    del model.graph.initializer[:]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            results = ReferenceEvaluator(model).run(None, feeds)
    except Exception as error:  # the reference raises whatever its Python code meets
        raise NotEvaluable(f"the reference implementation fails: {_one_line(error)}") from error
    named = [t.name for t in node.outputs if t.name]
    by_name = {name: np.asarray(x) for name, x in zip(named, results, strict=True)}
    for name, value in by_name.items():
        _check_result(value, expected[name])
    return [by_name.get(t.name, np.empty(0)) for t in node.outputs]


def _single_node_model(node: gs.Node, feeds: dict[str, Array], opset: int) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(
        [OnnxExporter.export_node(node)],
        "node",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in feeds.items()
        ],
        [onnx.helper.make_empty_tensor_value_info(t.name) for t in node.outputs if t.name],
        # inference needs the values of shapes and axes only
        [onnx.numpy_helper.from_array(x, name) for name, x in feeds.items() if x.nbytes <= 1024],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


def _check_expected(node: gs.Node, expected: onnx.TypeProto.Tensor | None, limit: int) -> None:
    if expected is None or not expected.elem_type:
        raise NotEvaluable("the type of its result is not a tensor or not known")
    dtype = element_type(expected.elem_type)
    if dtype.kind not in "biuf" and dtype.name != "bfloat16":
        raise NotEvaluable(f"results of type {dtype} are not evaluated")
    if node.op in _DATA_DEPENDENT:
        return
    if not expected.HasField("shape") or any(not d.HasField("dim_value") for d in expected.shape.dim):
        raise NotEvaluable("the size of its result is not known beforehand")
    check_size([d.dim_value for d in expected.shape.dim], dtype.itemsize, limit)


def _check_result(value: Array, expected: onnx.TypeProto.Tensor) -> None:
    dtype = element_type(expected.elem_type)
    if value.dtype != dtype:
        raise NotEvaluable(f"the reference implementation answers with {value.dtype} instead of {dtype}")
    dims = [d.dim_value if d.HasField("dim_value") else None for d in expected.shape.dim]
    if len(dims) != value.ndim or any(d not in (None, size) for d, size in zip(dims, value.shape, strict=True)):
        raise NotEvaluable(f"the reference implementation answers with shape {list(value.shape)} instead of {dims}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
