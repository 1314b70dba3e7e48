"""The fusion audit: what the runtime really runs as integers, read from the graph as the runtime optimises it.

A QDQ file is only a request. Whether Conv between two pairs becomes QLinearConv is up to the runtime's optimiser, and a
pair that it leaves in place costs time and accuracy for nothing. The audit optimises the model as the runtime does
(level EXTENDED), counts integer operators and left-over QuantizeLinear and DequantizeLinear, and names every float
operator with its reason; against a placement it also lists each unit that did not become what the rule table says.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxcompress.graph import Graph, constant_value
from onnxcompress.quantization.placement import ALREADY, NESTED, Placement, why
from onnxcompress.session import Session
from onnxcompress.targets import Role, Target

__all__ = ["FloatNode", "FusionAudit", "Mismatch", "audit", "optimized_structure"]

_EXTRA_INTEGER_OPS = {
    "QGemm",
    "QAttention",
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "QEmbedLayerNormalization",
}
_CONVERSIONS = {"QuantizeLinear", "DequantizeLinear"}
_FLOAT_TYPES = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
_EIGHT_BIT = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
#: operators whose output has the type of their first input
_SAME_TYPE = frozenset(
    (
        *("Clip", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Relu"),
        *("Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    )
)


@dataclass(frozen=True)
class FloatNode:
    """An operator of the optimised graph that computes in floats, and why."""

    node: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Mismatch:
    """A unit that was placed on integers and that the runtime left in floats, or the other way round."""

    node: str
    expected: str
    found: str


@dataclass(frozen=True)
class FusionAudit:
    """What is integer and what is not in the optimised graph.

    Attributes:
        integer: count by operator type, data movement on integers included.
        floats: every operator that computes in floats.
        quantize: QuantizeLinear left in the graph (conversions of activations).
        dequantize: DequantizeLinear left.
        stranded: left-over conversions where the placement has no border between integers and floats; they cost time
            and change nothing. Empty without a placement.
        mismatches: placed on integers yet float, or the other way round; empty without a placement.
    """

    integer: dict[str, int]
    floats: tuple[FloatNode, ...]
    quantize: int
    dequantize: int
    stranded: tuple[str, ...] = ()
    mismatches: tuple[Mismatch, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)


def optimized_structure(model: Graph | onnx.ModelProto | str | os.PathLike[str]) -> onnx.ModelProto:
    """The model as onnxruntime's CPU provider optimises it at level EXTENDED, without the payload of its weights."""
    with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
        path = Path(folder) / "optimized.onnx"
        # Weights go to a file of their own, which is never read: only the structure matters.
        config = {
            "session.optimized_model_external_initializers_file_name": "weights.bin",
            "session.optimized_model_external_initializers_min_size_in_bytes": "65536",
        }
        Session(model, optimization="extended", threads=1, optimized_path=path, config=config)
        return onnx.load(path, load_external_data=False)


def audit(
    model: Graph | onnx.ModelProto | str | os.PathLike[str], target: Target, placement: Placement | None = None
) -> FusionAudit:
    """Compare what became integer with what the rule table promises.

    Args:
        model: the quantised model; any model can be audited.
        target: the rule table.
        placement: what was planned; without it nothing can be a mismatch.
    """
    graph = optimized_structure(model).graph
    types = _element_types(graph)
    integer: Counter[str] = Counter()
    conversions: Counter[str] = Counter()
    planned = {unit.node.name: unit for unit in placement.units} if placement is not None else {}
    folded = {unit.activation.name: unit for unit in planned.values() if unit.activation is not None}
    floats: list[FloatNode] = []
    for node in graph.node:
        if node.op_type in _CONVERSIONS:
            conversions[node.op_type] += 1
        elif _is_integer(node, target, types):
            integer[node.op_type] += 1
        elif any(types.get(name) in _FLOAT_TYPES for name in (*node.input, *node.output)):
            name = node.name.removeprefix("fused ")
            if name in planned and not planned[name].integer:
                reason = why(planned[name])
            elif name in folded and not folded[name].integer:
                reason = f"{folded[name].node.name} is float"
            else:
                reason = target.float_reasons.get(node.op_type, "it is not among what the runtime fuses here")
            floats.append(
                FloatNode(name or node.output[0], node.op_type, reason)
            )  # the runtime names not all of its own
        floats.extend(_nested_floats(node, target))
    return FusionAudit(
        dict(sorted(integer.items())),
        tuple(floats),
        conversions["QuantizeLinear"],
        conversions["DequantizeLinear"],
        tuple(_stranded(graph, placement)) if placement is not None else (),
        tuple(_mismatches(graph, target, types, placement)) if placement is not None else (),
    )


def _nested_floats(node: onnx.NodeProto, target: Target) -> Iterator[FloatNode]:
    """Operators with weights in the nested graphs of ``node`` that might be integer in the graph itself."""
    for attribute in node.attribute:
        for part in (*attribute.graphs, attribute.g):
            for inner in part.node:
                rule = target.rules.get(inner.op_type)
                if rule is not None and rule.weight is not None:
                    yield FloatNode(inner.name or inner.output[0], inner.op_type, NESTED)
                yield from _nested_floats(inner, target)


def _element_types(graph: onnx.GraphProto) -> dict[str, int]:
    types = {t.name: t.data_type for t in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    for node in graph.node:  # of tensors between operators of its own the runtime may not tell the type
        if node.op_type == "DequantizeLinear":
            types.setdefault(node.output[0], onnx.TensorProto.FLOAT)
        elif node.op_type == "QuantizeLinear" or node.op_type.startswith("QLinear"):
            kinds = [types[name] for name in node.input if types.get(name) in _EIGHT_BIT]
            if kinds:
                types.setdefault(node.output[0], kinds[-1])  # the zero point of the output, or of what is joined
        elif node.op_type in _SAME_TYPE and node.input[0] in types:
            for name in node.output:
                types.setdefault(name, types[node.input[0]])
    return types


def _is_integer(node: onnx.NodeProto, target: Target, types: dict[str, int]) -> bool:
    if node.op_type.startswith("QLinear") or node.op_type in _EXTRA_INTEGER_OPS:
        return True
    rule = target.rules.get(node.op_type)
    moves = node.op_type == "Concat" or (rule is not None and rule.role in (Role.MOVEMENT, Role.ACTIVATION))
    return moves and bool(node.input) and types.get(node.input[0]) in _EIGHT_BIT


def _stranded(graph: onnx.GraphProto, placement: Placement) -> list[str]:
    """Conversions that belong to no border. The runtime moves, copies and renames them: their scale tells them."""
    quantize, dequantize = placement.borders()
    own = _scales_of_the_file(placement)
    expected = {
        "QuantizeLinear": own | placement.absorbed | {placement.scales[c] for c in quantize},
        "DequantizeLinear": own | {placement.scales[c] for c in dequantize},
    }
    constants = {t.name: t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL}
    stranded = []
    for node in graph.node:
        if node.op_type in _CONVERSIONS:
            scale = constants.get(node.input[1])  # one per channel where a float operator's weight is protected
            values = set() if scale is None else set(onnx.numpy_helper.to_array(scale).ravel().tolist())
            if not values or not values <= expected[node.op_type]:
                stranded.append(node.name or node.output[0])
    return stranded


def _scales_of_the_file(placement: Placement) -> set[float]:
    """Scales of conversions that were in the file before: they are respected, not judged."""
    scales: set[float] = set()
    for unit in placement.units:
        if unit.node.op in _CONVERSIONS and len(unit.node.inputs) > 1:
            value = constant_value(unit.node.inputs[1])
            scales.update(() if value is None else value.ravel().tolist())
    return scales


def _mismatches(graph: onnx.GraphProto, target: Target, types: dict[str, int], placement: Placement) -> list[Mismatch]:
    """Units that the optimised graph runs in the other domain than placed, found by name."""
    # A float operator that took its activation in is called "fused" and its name.
    by_name = {node.name.removeprefix("fused "): node for node in graph.node}
    found = []
    for unit in placement.units:
        node = by_name.get(unit.node.name)
        # A node that is gone was fused into a neighbour or did nothing; one of the wrong domain would keep its name.
        if node is None or unit.rule is None or _is_integer(node, target, types) == unit.integer:
            continue
        if unit.reason == ALREADY:
            continue  # it became what the file asked for
        if unit.integer:
            found.append(Mismatch(unit.node.name, unit.rule.integer_ops[0], node.op_type))
        elif node.op_type.startswith("Q"):
            found.append(Mismatch(unit.node.name, unit.node.op, node.op_type))
    return found
