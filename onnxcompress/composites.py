"""LayerNormalization, Gelu and SiLU as exporters write them out, in the operators of older opsets.

The runtime recognises these patterns and runs each as one operator. A pass that folds a scale out of one, or quantises
a part of it, leaves the runtime with the pieces: several times slower, and with integers in the middle less accurate.

::

    LayerNormalization    (x - mean) / sqrt(variance + epsilon) * scale + bias
    Gelu                  x * (1 + erf(x / sqrt(2))) * 0.5, the factors in any order; tanh in the approximation
    SiLU                  x * sigmoid(x), a Sigmoid that only this Mul reads
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.graph import attribute, constant_value, normal_domain

__all__ = ["aligned_chain", "composite", "mark_of", "silu"]

Floats = NDArray[np.float64]


def composite(node: gs.Node) -> str | None:
    """The function that ``node``, an Add, Mul or Div, is the end of or a part of; None where it stands by itself."""
    if node.op not in ("Add", "Mul", "Div") or len(node.inputs) < 2:
        return None
    if node.op == "Add" and any(_is_constant(c) and _normalises(_maker(other)) for c, other in _operands(node)):
        return "LayerNormalization"
    if _normalises(node):
        return "LayerNormalization"
    return "Gelu" if node.op != "Div" and _of_gelu(node) else None


def silu(node: gs.Node) -> tuple[gs.Node, gs.Node] | None:
    """(Sigmoid, Mul) of the written-out SiLU that ``node`` is one of, or None."""
    if node.op == "Sigmoid" and node.outputs:
        readers = node.outputs[0].outputs
        if len(readers) == 1 and readers[0].op == "Mul" and _is_silu(node, readers[0]):
            return node, readers[0]
    elif node.op == "Mul":
        for maker in map(_maker, node.inputs):
            if maker is not None and maker.op == "Sigmoid" and _is_silu(maker, node):
                return maker, node
    return None


def _is_silu(sigmoid: gs.Node, product: gs.Node) -> bool:
    gate = sigmoid.outputs[0]
    if (
        len(gate.outputs) != 1
        or len(product.inputs) != 2
        or not {sigmoid.domain, product.domain} <= {None, "", "ai.onnx"}
    ):
        return False
    return any(a is gate and b is sigmoid.inputs[0] for a, b in _operands(product))


def _is_constant(tensor: gs.Tensor) -> bool:
    return constant_value(tensor) is not None


def _maker(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if len(tensor.inputs) == 1 else None


def _normalises(node: gs.Node | None) -> bool:
    """True for the Div (or Mul by a reciprocal) that ends a written-out LayerNormalization, and for its scale."""
    if node is None or node.op not in ("Div", "Mul"):
        return False
    if node.op == "Mul" and any(_is_constant(t) and _normalises(_maker(o)) for t, o in _operands(node)):
        return True
    return any(
        maker is not None and (maker.op == "Sqrt" or (maker.op in ("Reciprocal", "Div") and _roots(maker)))
        for maker in map(_maker, node.inputs)
    )


def _roots(node: gs.Node) -> bool:
    return any(maker is not None and maker.op == "Sqrt" for maker in map(_maker, node.inputs))


def _operands(node: gs.Node) -> tuple[tuple[gs.Tensor, gs.Tensor], tuple[gs.Tensor, gs.Tensor]]:
    """Both ways to tell the inputs of a node apart."""
    first, second = node.inputs[:2]
    return (first, second), (second, first)


def _one_plus_erf(tensor: gs.Tensor) -> bool:
    """True for 1 + Erf or 1 + Tanh, the factor of a written-out Gelu, also halved."""
    maker = _maker(tensor)
    if maker is None or maker.op not in ("Add", "Mul") or len(maker.inputs) < 2:
        return False
    for constant, other in _operands(maker):
        inner = _maker(other)
        if _is_constant(constant) and inner is not None:
            if maker.op == "Add" and inner.op in ("Erf", "Tanh"):
                return True
            if maker.op == "Mul" and inner.op == "Add" and _one_plus_erf(other):
                return True
    return False


def _of_gelu(node: gs.Node) -> bool:
    """True for each Mul and Add of a written-out Gelu behind its Erf or Tanh, and for ``x * 0.5`` in front."""
    if node.op == "Add":
        return _one_plus_erf(node.outputs[0])
    if any(_one_plus_erf(tensor) for tensor in (*node.inputs, node.outputs[0])):
        return True
    for constant, other in _operands(node):
        inner = _maker(other)
        if _is_constant(constant) and inner is not None and inner.op == "Mul":
            return any(_one_plus_erf(tensor) for tensor in inner.inputs)
    readers = node.outputs[0].outputs
    return len(readers) == 1 and readers[0].op == "Mul" and any(_one_plus_erf(t) for t in readers[0].inputs)


# ----------------------------------------------------------------------------------------------------------------------
# Images whose channels were put onto one set of levels (onnxcompress.quantization.input_levels)


def aligned_chain(
    tensor: gs.Tensor,
) -> tuple[gs.Tensor, Floats, Floats, list[gs.Node]] | None:
    """(what goes in, factors, offsets, nodes) where ``tensor`` is made by Mul and Add of one constant a channel.

    The nodes are in order and nothing else reads what is between them.
    """
    nodes: list[gs.Node] = []
    found: dict[str, Floats] = {}
    for op in ("Add", "Mul"):
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None or node.op != op or (nodes and len(tensor.outputs) != 1) or normal_domain(node) != "":
            break
        constant = constant_value(node.inputs[1])
        if constant is None or constant.ndim < 3 or constant.size != constant.shape[1]:
            break
        found[op] = constant.reshape(-1).astype(np.float64)
        nodes.insert(0, node)
        tensor = node.inputs[0]
    if "Add" not in found:
        return None
    return tensor, found.get("Mul", np.ones_like(found["Add"])), found["Add"], nodes


def mark_of(node: gs.Node) -> float | None:
    """The constant that ``node``, a Pad, appends as one more channel to an aligned image; None for any other node."""
    if node.op != "Pad" or normal_domain(node) != "" or len(node.inputs) != 3:
        return None
    if attribute(node, "mode", "constant") != "constant":
        return None
    pads, value = (constant_value(tensor) for tensor in node.inputs[1:])
    if pads is None or value is None or value.size != 1 or pads.ndim != 1 or len(pads) < 6 or len(pads) % 2:
        return None
    ends = [0] * len(pads)
    ends[len(pads) // 2 + 1] = 1
    if pads.tolist() != ends or aligned_chain(node.inputs[0]) is None:
        return None
    return float(value.reshape(-1)[0])
