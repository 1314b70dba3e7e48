"""Rewrites into an equal form that the integer rules of a target know; exact but for the order of additions.

- ``MatMul(x, W) + b`` with a matrix ``x`` becomes ``Gemm(x, W, b)``: the integer Gemm takes the bias, and the runtime
  would make the same rewrite itself, after which an integer MatMul no longer matches.
- ``ReduceMean`` over all spatial axes becomes ``GlobalAveragePool``, which has an integer kernel. Those of a
  LayerNormalization that the exporter wrote out stay, or the runtime would not recognise it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    constant_value,
    graph_output_ids,
    normal_domain,
    remove_node,
    sort_nodes,
)
from onnxcompress.opset import raise_opset
from onnxcompress.shapes import Shape, TensorType, infer_shapes
from onnxcompress.targets import Target

__all__ = ["canonicalize", "to_canonical_form"]


def canonicalize(graph: Graph, target: Target, input_shapes: Mapping[str, Shape] | None = None) -> None:
    """Give ``graph`` the opset that ``target`` needs and the canonical form, in place and sorted."""
    if graph.opset < target.minimum_opset:
        raise_opset(graph, target.minimum_opset)
    for _ in to_canonical_form(graph, infer_shapes(graph, input_shapes)):
        pass
    sort_nodes(graph)


def to_canonical_form(graph: Graph, types: Mapping[str, TensorType]) -> Iterator[tuple[gs.Node, str]]:
    """Rewrite the outermost graph in place; yields each rewritten node with what was done."""
    outputs = graph_output_ids(graph)
    names = Names(graph)
    for node in list(graph.nodes):
        if normal_domain(node) != "":
            continue
        if node.op == "MatMul" and _matmul_with_bias(node, types, outputs):
            yield node, "MatMul and Add became Gemm"
        elif node.op == "ReduceMean" and _spatial_mean(graph, node, types, names):
            yield node, "ReduceMean over the spatial axes became GlobalAveragePool"


def _rank(tensor: gs.Tensor, types: Mapping[str, TensorType]) -> int | None:
    known = types.get(tensor.name)
    return None if known is None or known.shape is None else len(known.shape)


def _matmul_with_bias(node: gs.Node, types: Mapping[str, TensorType], outputs: set[int]) -> bool:
    product = node.outputs[0]
    weight = constant_value(node.inputs[1])
    if weight is None or weight.ndim != 2 or _rank(node.inputs[0], types) != 2:
        return False
    if id(product) in outputs or len(product.outputs) != 1:
        return False
    add = product.outputs[0]
    if add.op != "Add" or normal_domain(add) != "" or len(add.inputs) != 2:
        return False
    operand = add.inputs[1] if add.inputs[0] is product else add.inputs[0]
    bias = constant_value(operand)
    if bias is None or bias.shape != (weight.shape[1],) or bias.dtype != weight.dtype:
        return False
    result = add.outputs[0]
    remove_node(add)
    node.op, node.attrs = "Gemm", {}
    node.inputs = [node.inputs[0], node.inputs[1], operand]
    node.outputs = [result]
    return True


def _squares(node: gs.Node) -> bool:
    return bool(node.op == "Pow" or node.inputs[0] is node.inputs[1])


def _spatial_mean(graph: Graph, node: gs.Node, types: Mapping[str, TensorType], names: Names) -> bool:
    rank = _rank(node.inputs[0], types)
    if rank is None or rank < 3:
        return False
    axes = attribute(node, "axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1].name:
        value = constant_value(node.inputs[1])
        axes = None if value is None else value.tolist()
    if axes is None or sorted(axis % rank for axis in axes) != list(range(2, rank)):
        return False
    source, result = node.inputs[0], node.outputs[0]
    if any(reader.op == "Sub" and reader.inputs[1] is result for reader in result.outputs):
        return False  # the mean of a LayerNormalization
    if any(maker.op in ("Pow", "Mul") and _squares(maker) for maker in source.inputs):
        return False  # its variance
    keep = attribute(node, "keepdims", 1)
    node.op, node.attrs = "GlobalAveragePool", {}
    node.inputs = [source]
    if not keep:
        pooled = gs.Variable(names.free(f"{result.name}_pooled"), np.dtype(np.float32))
        node.outputs = [pooled]
        graph.nodes.append(gs.Node("Flatten", names.free(f"{node.name}_flatten"), {"axis": 1}, [pooled], [result]))
    return True
