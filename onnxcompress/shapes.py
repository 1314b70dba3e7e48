"""Shapes, multiply-accumulates and sizes of a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcompress.errors import ModelError
from onnxcompress.graph import Graph, attribute, copy_graph, element_type, normal_domain, walk_graphs
from onnxcompress.proto import spell_default_domain, to_proto

__all__ = [
    "DerivedTypes",
    "GraphStats",
    "TensorType",
    "derive_types",
    "graph_stats",
    "infer_shapes",
    "node_macs",
]

Shape = tuple[int | str | None, ...]


@dataclass(frozen=True)
class TensorType:
    """numpy dtype (None where ONNX Inference does not know it) and shape (None: unknown rank) of a tensor."""

    dtype: np.dtype[Any] | None
    shape: Shape | None


@dataclass(frozen=True)
class GraphStats:
    """Size of a graph: nodes (nested graphs included), weights in elements and bytes, operators by type.

    Bytes count each weight once, as it is stored, without the graph's structure.
    """

    nodes: int
    parameters: int
    weight_bytes: int
    operators: dict[str, int]


def graph_stats(graph: Graph) -> GraphStats:
    """Count nodes, weights and operators; no shape inference, so cheap enough to run around every pass."""
    operators: Counter[str] = Counter()
    seen: set[int] = set()
    parameters = stored = 0
    for part in walk_graphs(graph):
        for node in part.nodes:
            operators[f"{normal_domain(node)}.{node.op}".lstrip(".")] += 1
            constants = [t for t in node.inputs if isinstance(t, gs.Constant)]
            constants += [v for v in node.attrs.values() if isinstance(v, gs.Constant)]
            for constant in constants:
                if id(constant) in seen:
                    continue
                seen.add(id(constant))
                size = prod(constant.shape)
                if _is_weight(constant):
                    parameters += size
                stored += size * _itemsize(constant.dtype)
    return GraphStats(sum(operators.values()), parameters, stored, dict(sorted(operators.items())))


def _is_weight(constant: gs.Constant) -> bool:
    """int64 constants are shapes and indices, not parameters."""
    return bool(constant.dtype != np.int64)


def _itemsize(dtype: Any) -> int:
    if isinstance(dtype, int):
        dtype = element_type(dtype)
    return int(np.dtype(dtype).itemsize)


def infer_shapes(graph: Graph, input_shapes: Mapping[str, Shape] | None = None) -> dict[str, TensorType]:
    """Types and shapes of the tensors of the outermost graph by ONNX shape inference.

    ``input_shapes`` replaces the declared shapes of graph inputs, for example by those of a real batch. Where it is
    given, be it empty, the shapes that the file declares for all other tensors are not believed. Weights are
    not copied. Tensors that inference says nothing about are left out.

    Raises:
        ModelError: ONNX Inference fails.
    """
    if input_shapes is not None:
        graph = copy_graph(graph)
        for tensor in graph.inputs:
            if tensor.name in input_shapes:
                tensor.shape = list(input_shapes[tensor.name])
        for node in graph.nodes:  # declared shapes of inner tensors may contradict the new ones
            for tensor in node.outputs:
                if isinstance(tensor, gs.Variable):
                    tensor.shape = None
        given = {id(tensor) for tensor in graph.inputs}
        for tensor in graph.outputs:
            if isinstance(tensor, gs.Variable) and id(tensor) not in given:
                tensor.shape = None
    model = to_proto(graph, weights="omit")
    for node in model.graph.node:
        if node.op_type == "QuickGelu" and node.domain == "com.microsoft":  # as insert_qdq writes SiLU
            node.op_type, node.domain = "Identity", ""
            del node.attribute[:]
    _forget_negative_sizes(model.graph)
    spell_default_domain(model)
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError) as error:
        raise ModelError(f"shape inference fails: {' '.join(str(error).split())[:200]}") from error
    types: dict[str, TensorType] = {}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        if not value.type.HasField("tensor_type"):
            continue
        tensor_type = value.type.tensor_type
        dtype = None
        if tensor_type.elem_type:
            dtype = element_type(tensor_type.elem_type)
        shape: Shape | None = None
        if tensor_type.HasField("shape"):
            shape = tuple(_dimension(d) for d in tensor_type.shape.dim)
        types[value.name] = TensorType(dtype, shape)
    for initializer in model.graph.initializer:
        dtype = element_type(initializer.data_type)
        types[initializer.name] = TensorType(dtype, tuple(initializer.dims))
    return types


def _forget_negative_sizes(graph: onnx.GraphProto) -> None:
    """Some exporters write -1 for a size that is not known; onnx 1.23 aborts where a Slice goes backwards along it."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
            if dim.dim_value < 0:
                dim.ClearField("dim_value")
    for node in graph.node:
        for item in node.attribute:
            for nested in (*item.graphs, *((item.g,) if item.HasField("g") else ())):
                _forget_negative_sizes(nested)


class DerivedTypes:
    """Types and shapes by tensor, not by name: a nested graph may use a name for something else.

    The tensors are kept alive, since Python gives the id of one that is gone to the next.
    """

    def __init__(self, known: Iterable[tuple[gs.Tensor, TensorType]] = ()) -> None:
        self._known = {id(tensor): (tensor, tensor_type) for tensor, tensor_type in known}

    def of(self, tensor: gs.Tensor) -> TensorType | None:
        """What is known of ``tensor``; None for nothing."""
        found = self._known.get(id(tensor))
        return found[1] if found is not None else None


def derive_types(graph: Graph) -> DerivedTypes:
    """Types and shapes of the outermost graph's tensors that follow from the graph inputs alone.

    What the file states for other tensors is not believed: exporters write outputs with the batch of their example,
    and a rewrite that relies on it would be wrong for every other batch.

    Raises:
        ModelError: ONNX Inference fails.
    """
    declared = {t.name: tuple(t.shape) for t in graph.inputs if t.shape is not None}
    types = infer_shapes(graph, declared)
    tensors = [*graph.inputs, *(t for node in graph.nodes for t in node.outputs)]
    return DerivedTypes((t, types[t.name]) for t in tensors if t.name in types)


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return dim.dim_param or None


def node_macs(graph: Graph, types: Mapping[str, TensorType]) -> dict[str, int]:
    """Multiply-accumulates by node name for Conv, ConvTranspose, Gemm and MatMul of the outermost graph.

    ONNX's integer forms of them (ConvInteger, QLinearConv, MatMulInteger, QLinearMatMul) count alike.

    Symbolic dimensions (the batch, as a rule) count as one, so the figure is per sample where only the batch is
    symbolic. Nodes whose shapes are unknown are left out.
    """
    macs: dict[str, int] = {}
    for node in graph.nodes:
        if normal_domain(node) != "":
            continue
        count = _MACS[node.op](node, types) if node.op in _MACS else None
        if count is not None:
            macs[node.name] = count
    return macs


def _sizes(tensor: gs.Tensor, types: Mapping[str, TensorType]) -> list[int] | None:
    shape = tensor.shape if isinstance(tensor, gs.Constant) else None
    if shape is None:
        known = types.get(tensor.name)
        shape = known.shape if known is not None else None
    if shape is None:
        return None
    return [d if isinstance(d, int) else 1 for d in shape]


def _conv_macs(node: gs.Node, types: Mapping[str, TensorType], weight_index: int = 1) -> int | None:
    out, weight = _sizes(node.outputs[0], types), _sizes(node.inputs[weight_index], types)
    return None if out is None or weight is None else prod(out) * prod(weight[1:])


def _conv_transpose_macs(node: gs.Node, types: Mapping[str, TensorType]) -> int | None:
    data, weight = _sizes(node.inputs[0], types), _sizes(node.inputs[1], types)
    return None if data is None or weight is None else prod(data) * prod(weight[1:])


def _gemm_macs(node: gs.Node, types: Mapping[str, TensorType]) -> int | None:
    out, a, b = (_sizes(t, types) for t in (node.outputs[0], *node.inputs[:2]))
    if out is None or a is None or b is None or len(a) != 2 or len(b) != 2:
        return None
    # A reshape may leave the inner size symbolic on one side, where it counts as one; the weight knows it.
    return prod(out) * max(a[0 if attribute(node, "transA", 0) else 1], b[1 if attribute(node, "transB", 0) else 0])


def _matmul_macs(node: gs.Node, types: Mapping[str, TensorType], right_index: int = 1) -> int | None:
    out, a, b = (_sizes(t, types) for t in (node.outputs[0], node.inputs[0], node.inputs[right_index]))
    return None if out is None or not a or not b else prod(out) * max(a[-1], b[-2 if len(b) > 1 else -1])


_MACS: dict[str, Callable[[gs.Node, Mapping[str, TensorType]], int | None]] = {
    "Conv": _conv_macs,
    "ConvInteger": _conv_macs,
    "ConvTranspose": _conv_transpose_macs,
    "Gemm": _gemm_macs,
    "MatMul": _matmul_macs,
    "MatMulInteger": _matmul_macs,
    "QLinearConv": partial(_conv_macs, weight_index=3),
    "QLinearMatMul": partial(_matmul_macs, right_index=3),
}
