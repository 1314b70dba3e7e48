"""What a quantised graph has to compute, by numpy: the oracle for insert_qdq.

The float graph is run node by node. Every tensor that the placement makes integer is replaced by its fake-quantised
value, computed by :mod:`onnxcompress.quantization.affine`; weights likewise. Float operators are run by onnxruntime
one at a time, so that the only thing under test is where and how values are rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.graph import attribute, constant_value
from onnxcompress.quantization.affine import Range, activation_qparams, fake_quantize, weight_qparams
from onnxcompress.quantization.placement import Placement
from onnxcompress.quantization.qdq import class_qparams
from onnxcompress.session import Session

Array = NDArray[Any]


def run_node(node: gs.Node, inputs: list[Array | None], opset: int) -> list[Array]:
    """One operator on onnxruntime, unoptimised."""
    names = ["" if value is None else f"i{k}" for k, value in enumerate(inputs)]
    outputs = [f"o{k}" if t.name else "" for k, t in enumerate(node.outputs)]
    proto = onnx.helper.make_node(node.op, names, outputs)
    for key, value in node.attrs.items():
        if isinstance(value, gs.Constant):
            value = onnx.numpy_helper.from_array(value.values)
        proto.attribute.append(onnx.helper.make_attribute(key, value))
    declared = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), list(v.shape))
        for n, v in zip(names, inputs, strict=True)
        if v is not None
    ]
    results = [onnx.helper.make_empty_tensor_value_info(n) for n in outputs if n]
    graph = onnx.helper.make_graph([proto], "node", declared, results)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9)
    session = Session(model, optimization="disabled", threads=1)
    answer = session.run({n: v for n, v in zip(names, inputs, strict=True) if v is not None})
    return [answer[n] for n in outputs if n]


def simulate(
    graph: gs.Graph, placement: Placement, ranges: dict[str, Range], feeds: dict[str, Array]
) -> dict[str, Array]:
    """Values of all tensors of the float ``graph`` under the quantisation that ``placement`` and ``ranges`` ask for."""
    params = class_qparams(placement, ranges)
    target = placement.target
    values: dict[str, Array] = dict(feeds)
    rounded: dict[str, Array] = {}

    def settle(name: str) -> None:
        if name in placement.quantized:
            rounded[name] = fake_quantize(values[name], params[placement.classes[name]])

    for tensor in graph.inputs:
        settle(tensor.name)
    units = {id(u.node): u for u in placement.units}
    folded = {id(u.activation): u for u in placement.units if u.activation is not None}
    for node in graph.nodes:
        if node.op == "Constant":
            continue
        unit = units.get(id(node)) or folded[id(node)]
        inputs: list[Array | None] = []
        for index, tensor in enumerate(node.inputs):
            constant = constant_value(tensor)
            if not tensor.name:
                inputs.append(None)
            elif constant is not None:
                inputs.append(_constant(unit, node, index, constant, params, placement, target))
            else:
                as_value = unit.integer and node is unit.node and any(t is tensor for t in unit.inputs)
                replaced = tensor.name in rounded and not placement.writes_float(tensor.name)
                inputs.append(rounded[tensor.name] if as_value or replaced else values[tensor.name])
        outputs = run_node(node, inputs, graph.opset)
        for tensor, value in zip([t for t in node.outputs if t.name], outputs, strict=True):
            values[tensor.name] = value
            settle(tensor.name)
    return {
        t.name: values[t.name] if placement.writes_float(t.name) else rounded.get(t.name, values[t.name])
        for t in graph.outputs
    }


def _constant(
    unit: Any, node: gs.Node, index: int, value: Array, params: dict[str, Any], placement: Placement, target: Any
) -> Array:
    if not unit.integer or node is not unit.node or value.dtype != np.float32:
        return value
    rule = unit.rule.weight
    if rule is not None and index in (rule.index, rule.bias):
        weight = constant_value(node.inputs[rule.index])
        assert weight is not None
        scale = float(params[placement.classes[unit.inputs[0].name]].scale)
        axis = rule.axis(node, weight.ndim)
        alpha, beta = (
            np.float32(attribute(node, name, 1.0)) if node.op == "Gemm" else np.float32(1) for name in ("alpha", "beta")
        )
        bias = node.inputs[rule.bias] if rule.bias is not None and len(node.inputs) > rule.bias else None
        offset = constant_value(bias) if bias is not None and bias.name else None
        if offset is not None:
            offset = np.broadcast_to((offset * beta).reshape(-1), (weight.shape[axis],))
        found = weight_qparams(weight * alpha, target.weights, axis, bias=offset, input_scale=scale)
        if index == rule.index:
            return fake_quantize(weight * alpha, found) / alpha
        name = unit.outputs[0].name
        if unit.keeps_float and (name not in placement.quantized or placement.writes_float(name)):
            step = np.float32(scale) * found.scale
            return (np.rint(offset.astype(np.float64) / step) * step).astype(np.float32) / beta
        return value
    if any(t is node.inputs[index] for t in unit.inputs) and not unit.moves:
        interval = Range(float(value.min(initial=0.0)), float(value.max(initial=0.0)))
        return fake_quantize(value, activation_qparams(interval, target.activations))
    return value
