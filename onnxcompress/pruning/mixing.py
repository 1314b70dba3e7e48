"""Layers with stored float weights, each seen as one matrix product ``W X + b`` that a least squares problem can solve.

Conv (dense, grouped, depthwise), ConvTranspose, Gemm, MatMul with a constant weight and the Add of its bias behind, and
BatchNormalization, which is one weight and one bias a channel. The weight is ``[groups, filters, columns]``, the input
``[groups, columns, rows]`` (:mod:`onnxcompress.patches`); a row is one output position of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    constant_value,
    graph_output_ids,
    nested_graphs,
    normal_domain,
    set_constant,
    tensors_read_inside,
)
from onnxcompress.patches import conv_pads, output_sizes, spread_out, unfold

__all__ = ["MixingLayer", "find_mixing_layers", "wanted_rows"]

Array = NDArray[Any]
Floats = NDArray[np.float64]

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_PRODUCTS = ("Gemm", "MatMul")
#: rows a column that are sampled of a layer's input, fewest and most rows, and products that a Gram matrix may take
_ROWS_PER_COLUMN = 128
_FEWEST_ROWS = 16384
_MOST_ROWS = 65536
_GRAM_PRODUCTS = 2e10


def wanted_rows(columns: int) -> int:
    """Rows to sample for a least squares problem of so many columns: at least four a column."""
    rows = min(max(_ROWS_PER_COLUMN * columns, _FEWEST_ROWS), _MOST_ROWS, int(_GRAM_PRODUCTS / columns**2))
    return max(rows, 4 * columns)


@dataclass(eq=False)
class MixingLayer:
    """A node with a stored float weight and bias.

    Attributes:
        node: Conv, ConvTranspose, Gemm, MatMul or BatchNormalization.
        output: its tensor behind the bias, with channels on ``axis``.
        axis: 1, or -1 for matrix products.
        bias_node: the node that adds the bias: ``node`` itself, the Add behind a MatMul, or None.
        bias_index: the input of ``bias_node`` that is the bias, be it there or not.
        bounds: the values beyond which whatever reads ``sum_output`` sees no difference: (0, inf) before a Relu.
        shortcut: the other operand where ``output`` only goes into an Add and that operand holds no later layer.
        sum_output: the output of that Add; otherwise ``output``.
    """

    node: gs.Node
    output: gs.Tensor
    axis: int
    bias_node: gs.Node | None
    bias_index: int
    bounds: tuple[float, float] = (-inf, inf)
    shortcut: gs.Tensor | None = field(default=None, repr=False)
    sum_output: gs.Tensor | None = field(default=None, repr=False)
    own_bounds: tuple[float, float] = (-inf, inf)

    @property
    def name(self) -> str:
        """The node's name."""
        return str(self.node.name)

    @property
    def op(self) -> str:
        """The operator."""
        return str(self.node.op)

    @property
    def data(self) -> str:
        """Name of the tensor that is mixed."""
        return str(self.node.inputs[0].name)

    @property
    def stored(self) -> Array:
        """The weight as the file has it."""
        value = constant_value(self.node.inputs[1])
        assert value is not None
        return value

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial sizes of the kernel; none for a matrix product."""
        return tuple(self.stored.shape[2:]) if self.op in _CONVOLUTIONS else ()

    @property
    def groups(self) -> int:
        """Groups of a convolution; a BatchNormalization has one for each channel."""
        if self.op == "BatchNormalization":
            return int(self.stored.size)
        return int(attribute(self.node, "group", 1)) if self.op in _CONVOLUTIONS else 1

    @property
    def transposed(self) -> bool:
        """True where the weight of a matrix product is [columns, filters]."""
        return self.op == "MatMul" or (self.op == "Gemm" and not attribute(self.node, "transB", 0))

    def filters(self) -> Floats:
        """The weight as [groups, filters, columns], with everything that scales it."""
        weight, groups = self.stored.astype(np.float64), self.groups
        if self.op == "BatchNormalization":
            return (weight / self._deviation()).reshape(groups, 1, 1)
        if self.op == "Conv":
            return weight.reshape(groups, weight.shape[0] // groups, -1)
        if self.op == "ConvTranspose":
            weight = np.flip(weight, tuple(range(2, weight.ndim)))
            weight = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
            return weight.swapaxes(1, 2).reshape(groups, weight.shape[2], -1)
        if self.transposed:
            weight = weight.T
        return weight[None] * float(attribute(self.node, "alpha", 1.0))

    def bias(self) -> Floats:
        """The bias as the layer adds it, [groups, filters]; zeros where there is none."""
        groups, channels = self.groups, self.channels
        if not self.has_bias:
            return np.zeros((groups, channels // groups))
        assert self.bias_node is not None
        value = constant_value(self.bias_node.inputs[self.bias_index])
        assert value is not None
        bias = np.broadcast_to(value.reshape(-1).astype(np.float64), (channels,))
        if self.op == "Gemm":
            bias = bias * float(attribute(self.node, "beta", 1.0))
        if self.op == "BatchNormalization":
            mean = constant_value(self.node.inputs[3])
            assert mean is not None
            bias = bias - mean.astype(np.float64) * self.filters().reshape(-1)
        return bias.reshape(groups, -1)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        shape = self.stored.shape
        if self.op == "ConvTranspose":
            return int(shape[1] * self.groups)
        return int(shape[1] if self.op in _PRODUCTS and self.transposed else shape[0])

    @property
    def has_bias(self) -> bool:
        """True where a bias is stored."""
        node, index = self.bias_node, self.bias_index
        return node is not None and len(node.inputs) > index and bool(node.inputs[index].name)

    def set_filters(self, filters: Floats, names: Names) -> None:
        """Store another weight, given as :meth:`filters` gives it."""
        stored, groups = self.stored, self.groups
        if self.op == "BatchNormalization":
            weight = filters.reshape(-1) * self._deviation()
        elif self.op == "Conv":
            weight = filters.reshape(stored.shape)
        elif self.op == "ConvTranspose":
            per_group, taps = stored.shape[0] // groups, stored.shape[2:]
            weight = filters.reshape(groups, stored.shape[1], per_group, *taps).swapaxes(1, 2).reshape(stored.shape)
            weight = np.flip(weight, tuple(range(2, weight.ndim)))
        else:
            weight = filters[0] / float(attribute(self.node, "alpha", 1.0))
            weight = weight.T if self.transposed else weight
        old = self.node.inputs[1]
        set_constant(self.node, 1, _name_for(old, names), np.array(weight, stored.dtype))

    def set_bias(self, bias: Floats, names: Names) -> bool:
        """Store another bias, [groups, filters], as a new constant where there was none; False where none can be."""
        if self.bias_node is None:
            return False
        value: Array = bias.reshape(-1)
        if self.op == "BatchNormalization":
            mean = constant_value(self.node.inputs[3])
            assert mean is not None
            value = value + mean.astype(np.float64) * self.filters().reshape(-1)
        if self.op == "Gemm":
            value = value / float(attribute(self.node, "beta", 1.0))
        value = value.astype(self.stored.dtype)
        if not self.has_bias:
            set_constant(self.bias_node, self.bias_index, names.free(f"{self.node.name}_bias"), value)
            return True
        old = self.bias_node.inputs[self.bias_index]
        known = constant_value(old)
        assert known is not None
        if known.size == value.size:
            value = value.reshape(known.shape)
        set_constant(self.bias_node, self.bias_index, _name_for(old, names), value)
        return True

    def _deviation(self) -> Floats:
        variance = constant_value(self.node.inputs[4])
        assert variance is not None
        return np.sqrt(variance.astype(np.float64) + float(attribute(self.node, "epsilon", 1e-5)))

    # -- rows and columns ---------------------------------------------------------------------------------------------

    def positions(self, output: Array) -> int:
        """Rows that one sample of ``output``, the layer's own, has; for matrix products those of the whole array."""
        return prod(output.shape[2:]) if self.axis == 1 else prod(output.shape[:-1])

    def columns(self, inputs: Array, sizes: tuple[int, ...], positions: NDArray[np.int64]) -> Array:
        """``[groups, columns, rows]`` at ``positions`` of every sample; ``sizes``: spatial sizes of the output.

        For matrix products ``positions`` count the rows of the flattened input.
        """
        if self.axis == -1:
            return inputs.reshape(-1, inputs.shape[-1])[positions].T[None]
        if self.op == "BatchNormalization":
            flat = inputs.reshape(*inputs.shape[:2], -1)[:, :, positions]
            return np.ascontiguousarray(flat.swapaxes(0, 1)).reshape(inputs.shape[1], 1, -1)
        kernel = self.kernel
        if self.op == "ConvTranspose":
            padded, strides, dilations = spread_out(self.node, inputs, kernel, sizes)
        else:
            strides = list(attribute(self.node, "strides", [1] * len(kernel)))
            dilations = list(attribute(self.node, "dilations", [1] * len(kernel)))
            pads = conv_pads(self.node, inputs.shape[2:], kernel, strides, dilations)
            padded = np.pad(inputs, [(0, 0), (0, 0), *pads])
        if tuple(output_sizes(padded.shape[2:], kernel, strides, dilations)) != tuple(sizes):
            raise ValueError(f"{self.name}: an output of {sizes} does not fit its input")
        return unfold(padded, self.groups, kernel, strides, dilations, positions)

    def rows(self, output: Array, positions: NDArray[np.int64]) -> Array:
        """``[groups, filters, rows]`` of an array that is like the layer's own output, at ``positions``."""
        if self.axis == -1:
            return output.reshape(-1, output.shape[-1])[positions].T[None]
        flat = output.reshape(*output.shape[:2], -1)[:, :, positions]
        return np.ascontiguousarray(flat.swapaxes(0, 1)).reshape(self.groups, -1, flat.shape[0] * flat.shape[2])


def find_mixing_layers(graph: Graph) -> list[MixingLayer]:
    """All layers of the outermost graph in order; those whose weight is shared or not float32 are left out.

    Args:
        graph: sorted.
    """
    outputs = graph_output_ids(graph)
    inside = {t.name for t in tensors_read_inside(graph)}
    found = []
    for node in graph.nodes:
        layer = _layer(node, outputs)
        if layer is None:
            continue
        owned = [node.inputs[1]]
        if layer.has_bias:
            assert layer.bias_node is not None
            owned.append(layer.bias_node.inputs[layer.bias_index])
        if any(len(t.outputs) != 1 or id(t) in outputs or t.name in inside for t in owned):
            continue
        found.append(layer)
    position = {id(layer.node): i for i, layer in enumerate(found)}
    latest = _latest(graph, position)
    for i, layer in enumerate(found):
        layer.own_bounds = _bounds(layer.output, outputs)
        layer.bounds = layer.own_bounds
        _join(layer, i, latest, outputs)
    return found


def _layer(node: gs.Node, outputs: set[int]) -> MixingLayer | None:
    if normal_domain(node) != "" or len(node.inputs) < 2 or constant_value(node.inputs[0]) is not None:
        return None
    weight = constant_value(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or weight.size == 0:
        return None
    if node.op == "BatchNormalization":
        values = [constant_value(t) for t in node.inputs[1:5]]
        plain = all(v is not None and v.shape == weight.shape for v in values) and len(values) == 4
        if not plain or attribute(node, "training_mode", 0) or sum(bool(t.name) for t in node.outputs) != 1:
            return None
        return MixingLayer(node, node.outputs[0], 1, node, 2)
    if node.op in _CONVOLUTIONS:
        if len(node.inputs) > 2 and node.inputs[2].name and constant_value(node.inputs[2]) is None:
            return None
        return MixingLayer(node, node.outputs[0], 1, node, 2)
    if weight.ndim != 2 or node.op not in _PRODUCTS:
        return None
    if node.op == "MatMul":
        add = _bias_add(node, weight.shape[1], outputs)
        if add is None:
            return MixingLayer(node, node.outputs[0], -1, None, 0)
        return MixingLayer(node, add[0].outputs[0], -1, *add)
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    if attribute(node, "transA", 0) or alpha == 0.0 or beta == 0.0:
        return None
    if len(node.inputs) > 2 and node.inputs[2].name:
        bias = constant_value(node.inputs[2])
        filters = weight.shape[0 if attribute(node, "transB", 0) else 1]
        if bias is None or bias.size not in (1, filters) or (bias.ndim == 2 and bias.shape[0] != 1):
            return None
    return MixingLayer(node, node.outputs[0], -1, node, 2)


def _bias_add(node: gs.Node, filters: int, outputs: set[int]) -> tuple[gs.Node, int] | None:
    """The Add behind a MatMul that adds one constant a channel, and which of its inputs that is."""
    product = node.outputs[0]
    if len(product.outputs) != 1 or product.outputs[0].op != "Add" or id(product) in outputs:
        return None
    add = product.outputs[0]
    index = 1 if add.inputs[0] is product else 0
    value = constant_value(add.inputs[index])
    return (add, index) if value is not None and value.shape == (filters,) else None


def _bounds(tensor: gs.Tensor, outputs: set[int]) -> tuple[float, float]:
    """Between which values a difference matters to those that read ``tensor``."""
    if id(tensor) in outputs or not tensor.outputs:
        return -inf, inf
    low, high = inf, -inf
    for reader in tensor.outputs:
        if reader.op == "Relu" and normal_domain(reader) == "":
            bounds = (0.0, inf)
        elif reader.op == "Clip" and reader.inputs[0] is tensor:
            bounds = _clip_bounds(reader)
        else:
            return -inf, inf
        low, high = min(low, bounds[0]), max(high, bounds[1])
    return low, high


def _clip_bounds(node: gs.Node) -> tuple[float, float]:
    ends = [float(attribute(node, "min", -inf)), float(attribute(node, "max", inf))]
    for index in (1, 2):
        if len(node.inputs) > index and node.inputs[index].name:
            value = constant_value(node.inputs[index])
            if value is None or value.size != 1:
                return -inf, inf
            ends[index - 1] = float(value.reshape(()))
    return ends[0], ends[1]


def _latest(graph: Graph, positions: Mapping[int, int]) -> dict[int, float]:
    """The last layer that each computed tensor holds, by ``id()``; infinite where nested graphs hide what is read."""
    latest: dict[int, float] = {}
    for node in graph.nodes:
        held = max((latest.get(id(t), -1.0) for t in node.inputs), default=-1.0)
        if any(True for _ in nested_graphs(node)):
            held = inf
        held = max(held, float(positions.get(id(node), -1)))
        latest.update((id(t), held) for t in node.outputs)
    return latest


def _join(layer: MixingLayer, position: int, latest: Mapping[int, float], outputs: set[int]) -> None:
    """Let ``layer`` aim at the sum that its output goes into, where the other operand holds no later layer."""
    tensor = layer.output
    if len(tensor.outputs) != 1 or id(tensor) in outputs or tensor.outputs[0].op != "Add":
        return
    add = tensor.outputs[0]
    other = add.inputs[1] if add.inputs[0] is tensor else add.inputs[0]
    if other is tensor or constant_value(other) is not None or latest.get(id(other), -1.0) >= position:
        return
    layer.shortcut, layer.sum_output = other, add.outputs[0]
    layer.bounds = _bounds(add.outputs[0], outputs)


def _name_for(old: gs.Tensor, names: Names) -> str:
    """The old constant's name where nobody else reads it, otherwise a free one."""
    alone = len(old.outputs) == 1 and isinstance(old, gs.Constant)
    return str(old.name) if alone else names.free(old.name)
