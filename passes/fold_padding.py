"""Leave out what is constant at the border of padded 1x1 convolutions whose outputs are only averaged.

::

    Conv(1x1, padded) -> [Relu | LeakyRelu | Identity | Dropout ...] -> average over all positions

On padding such a convolution sees zeros and gives its bias ``b``, so every border position adds the same to the mean.
With ``n`` positions inside of ``m`` in all, and an activation ``f`` that a positive factor passes through::

    mean(f(padded)) = mean(f(n/m * W x + n/m * b)) + (1 - n/m) * f(b)

Padding goes, the factor goes into weight and bias, and the rest becomes an Add behind the mean. The last convolution of
SqueezeNet is padded like that: it computes 256 positions of which 196 differ. A mean is GlobalAveragePool, AveragePool
of everything, or ReduceMean over exactly the spatial axes; their sizes must be known from the graph's inputs.

Arithmetic is in float64, results are stored in the type of the weight. Tensors between convolution and mean get new
names, for they hold something else; the mean keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.base import Change, Context, Guarantee, Pass, Refusal
from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    constant_value,
    normal_domain,
    set_constant,
    sort_nodes,
    tensors_read_inside,
)
from onnxcompress.shapes import TensorType, infer_shapes

__all__ = ["FoldPadding"]

#: activations that a positive factor passes through
_HOMOGENEOUS = ("Relu", "LeakyRelu", "Identity", "Dropout")
_MEANS = ("GlobalAveragePool", "AveragePool", "ReduceMean")
#: ReduceMean takes its axes as an input since this version of the operator set
_AXES_ARE_INPUT = 18


class FoldPadding(Pass):
    """Compute 1x1 convolutions without their padding where a mean over all positions makes up for it."""

    name: ClassVar[str] = "fold_padding"

    @property
    def guarantee(self) -> Guarantee:
        """Equal but for rounding."""
        return Guarantee.EQUIVALENT

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal]:
        """Rewrite every such convolution of the outermost graph."""
        padded = [node for node in graph.nodes if _is_padded_pointwise(node)]
        if not padded:
            return
        types = infer_shapes(graph, {})
        names = Names(graph)
        used_elsewhere = {id(tensor) for tensor in (*graph.outputs, *tensors_read_inside(graph))}
        for node in padded:
            chain = _chain_to_mean(node, used_elsewhere)
            if chain is None:
                continue
            known = types.get(node.outputs[0].name)
            sizes = [size for size in ((known.shape or ()) if known is not None else ())[2:] if isinstance(size, int)]
            reason = _misfit(graph, node, chain[-1], known, sizes)
            if reason is not None:
                yield Refusal(node.name, f"its padding stays: {reason}")
                continue
            inner = _inner(node, sizes)
            _fold(graph, node, chain, sizes, inner, names)
            yield Change("folded", node.name, f"padding: {prod(inner)} positions instead of {prod(sizes)}")
        sort_nodes(graph)


def _is_padded_pointwise(node: gs.Node) -> bool:
    """True for a Conv of kernel 1 and stride 1 with a stored weight and bias, and some padding."""
    if node.op != "Conv" or normal_domain(node) != "":
        return False
    weight = constant_value(node.inputs[1])
    if weight is None or weight.ndim < 3 or set(weight.shape[2:]) != {1}:
        return False
    if len(node.inputs) > 2 and node.inputs[2].name and constant_value(node.inputs[2]) is None:
        return False
    pads, strides = attribute(node, "pads", []), attribute(node, "strides", [1])
    explicit = attribute(node, "auto_pad", "NOTSET") == "NOTSET" and len(pads) == 2 * (weight.ndim - 2)
    return explicit and set(strides) == {1} and min(pads) >= 0 and max(pads) > 0


def _chain_to_mean(node: gs.Node, used_elsewhere: set[int]) -> list[gs.Node] | None:
    """The nodes from behind ``node`` to the mean, each the only one to read what the one before it makes."""
    chain: list[gs.Node] = []
    while not chain or chain[-1].op not in _MEANS:
        made = (chain[-1] if chain else node).outputs
        if any(tensor.outputs or id(tensor) in used_elsewhere for tensor in made[1:]):
            return None
        if id(made[0]) in used_elsewhere or len(made[0].outputs) != 1:
            return None
        reader = made[0].outputs[0]
        if normal_domain(reader) != "" or reader.op not in (*_HOMOGENEOUS, *_MEANS) or reader.inputs[0] is not made[0]:
            return None
        if reader.op == "Dropout" and len(reader.inputs) > 2:
            return None
        chain.append(reader)
    return chain


def _misfit(graph: Graph, node: gs.Node, mean: gs.Node, known: TensorType | None, sizes: list[int]) -> str | None:
    """Why the border of ``node``, whose output has these fixed ``sizes``, is no fixed share of the mean, or None."""
    if known is None or known.shape is None or len(known.shape) != len(sizes) + 2:
        return "the size of the image is not fixed"
    if known.dtype is None or known.dtype.kind != "f":
        return "its numbers are not floating point"
    if min(_inner(node, sizes)) <= 0:
        return "there is nothing but padding"
    if mean.op == "AveragePool":
        whole = list(attribute(mean, "kernel_shape", [])) == sizes and set(attribute(mean, "dilations", [1])) == {1}
        padded = any(attribute(mean, "pads", [0])) or attribute(mean, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        if padded or not whole:
            return "its reader averages windows"
    if mean.op == "ReduceMean":
        axes = attribute(mean, "axes")
        if graph.opset >= _AXES_ARE_INPUT:
            axes = constant_value(mean.inputs[1]) if len(mean.inputs) > 1 else None
        rank = len(sizes) + 2
        if axes is None or sorted(int(axis) % rank for axis in np.ravel(axes)) != list(range(2, rank)):
            return "its reader averages over other axes"
    return None


def _inner(node: gs.Node, sizes: list[int]) -> list[int]:
    """Sizes of the output without padding."""
    pads = [int(pad) for pad in node.attrs["pads"]]
    return [size - pads[axis] - pads[axis + len(sizes)] for axis, size in enumerate(sizes)]


def _fold(graph: Graph, node: gs.Node, chain: list[gs.Node], sizes: list[int], inner: list[int], names: Names) -> None:
    """Rewrite ``node``, whose output is of ``sizes`` and without padding of ``inner``, and what follows it."""
    mean = chain[-1]
    share = prod(inner) / prod(sizes)
    weight = constant_value(node.inputs[1])
    assert weight is not None
    bias = constant_value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else None
    del node.attrs["pads"]
    _scale(node, 1, weight, share, names)
    for made in (node, *chain[:-1]):
        made.outputs[0].name = names.free(f"{made.outputs[0].name}_inner")
        made.outputs[0].shape = None
    if mean.op == "AveragePool":
        mean.attrs["kernel_shape"] = inner
    if bias is None or not np.any(bias):
        return
    _scale(node, 2, bias, share, names)
    border = bias.astype(np.float64)
    for step in chain[:-1]:
        if step.op in ("Relu", "LeakyRelu"):
            slope = attribute(step, "alpha", 0.01) if step.op == "LeakyRelu" else 0.0
            border = np.where(border > 0, border, slope * border)
    kept = len(sizes) if mean.op != "ReduceMean" or attribute(mean, "keepdims", 1) else 0
    rest = ((1 - share) * border).astype(bias.dtype).reshape(-1, *[1] * kept)
    result = mean.outputs[0]
    mean.outputs = [gs.Variable(names.free(f"{result.name}_inner"), result.dtype)]
    added = gs.Node("Add", names.free(f"{mean.name}_border"), {}, [mean.outputs[0]], [result])
    set_constant(added, 1, names.free(f"{node.name}_border"), rest)
    graph.nodes.append(added)


def _scale(node: gs.Node, index: int, value: NDArray[Any], factor: float, names: Names) -> None:
    """Multiply a stored input of ``node`` alone."""
    old = node.inputs[index]
    name = str(old.name) if isinstance(old, gs.Constant) and len(old.outputs) == 1 else names.free(f"{old.name}_inner")
    set_constant(node, index, name, (value.astype(np.float64) * factor).astype(value.dtype))
