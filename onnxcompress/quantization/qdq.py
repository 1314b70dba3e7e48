"""Writes a placement into a graph: quantisers, dequantisers and integer weights.

The form, per tensor that becomes integer:

- made by an integer operator with its own scales: ``T_float -> QuantizeLinear -> T_quantized -> DequantizeLinear ->
  T``; whoever read ``T`` still does. The runtime fuses the operator with the pairs around it.
- made by a float operator or fed to the graph: ``T -> QuantizeLinear -> T_quantized``; integer operators read
  ``T_dequantized``, float ones go on reading ``T``.
- made by data movement (Reshape, Slice, Pad, MaxPool, a Concat of equal parameters): the operator itself is written on
  the integers, ``T_in_quantized -> op -> T_quantized``, so that no fusion has to happen; ``T`` is its dequantised form.
  A target whose ``movement`` is ``qdq`` gets the first form here too, with equal parameters on both sides.

Biases stay float: the runtime stores them as int32 itself. Only where an integer Gemm or MatMul keeps a float output
does it need an int32 bias in the file.

The runtime goes further than asked: a float Conv, ConvTranspose or Gemm that reads a dequantised tensor and ends in a
quantiser gets its weight quantised too, to int8 with one scale for all channels (its WeightBiasQuantization). That
takes the accuracy of operators that were to stay float, and gains nothing for ConvTranspose, which has no integer
kernel. It looks for a scalar scale, so such an operator reads through a dequantiser that repeats the scale for every
channel.

A SiLU, ``x * sigmoid(x)``, is left float: the runtime fuses it into one operator, QuickGelu of alpha 1, that takes
a third of what the two integer operators take. But the runtime first gives each reader of a DequantizeLinear one of
its own, after which Sigmoid and Mul no longer read the same tensor and stay two. So behind a DequantizeLinear, on a
target that is this runtime, SiLU is written as the ``com.microsoft`` operator at once; everywhere else it keeps its
form. Integer convolutions run with channels last, and the runtime moves its transpositions past operators of ONNX
only; so between integers the operator stands between transpositions of its own, which cancel those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.composites import aligned_chain, mark_of, silu
from onnxcompress.graph import Graph, Names, attribute, constant_value, release, remove_node, remove_nodes
from onnxcompress.quantization.affine import (
    LevelRange,
    QParams,
    Range,
    activation_qparams,
    quantize,
    quantize_weight,
    weight_qparams,
)
from onnxcompress.quantization.placement import Placement, Unit, activation_bounds
from onnxcompress.targets import Role

__all__ = ["class_qparams", "insert_quantizers"]

#: how nodes are named after their outputs; there are hundreds of them, and small files feel it
_LABELS = {"QuantizeLinear": "Q", "DequantizeLinear": "DQ"}
#: a value this share of a level away from its own is still rounded to it, whatever the order of the arithmetic
_MOST_FRACTION = 0.48


def class_qparams(placement: Placement, ranges: Mapping[str, Range]) -> dict[str, QParams]:
    """Parameters by class representative, from the observed ranges of the class's sources."""
    params = {}
    for representative, sources in placement.sources.items():
        interval = ranges[sources[0]]
        for source in sources[1:]:
            interval = interval.union(ranges[source])
        bounds = placement.bounds.get(representative)
        if bounds is not None:
            interval = interval.clipped(bounds.low, bounds.high)
        found = activation_qparams(interval, placement.target.activations)
        params[representative] = found if bounds is None else _inside(found, bounds)
    return params


def _inside(params: QParams, bounds: Range) -> QParams:
    """Shrink the scale until all that the integers can stand for lies in ``bounds``; only then does a Clip fold."""
    info = np.iinfo(params.zero_point.dtype)
    below, above = int(params.zero_point) - info.min, info.max - int(params.zero_point)
    scale = params.scale
    while (np.float32(below) * scale > np.float32(-bounds.low)) or (
        np.float32(above) * scale > np.float32(bounds.high)
    ):
        limits = [float(scale)]
        if below:
            limits.append(-bounds.low / below)
        if above:
            limits.append(bounds.high / above)
        scale = np.nextafter(np.float32(min(limits)), np.float32(0))
    return QParams(np.array(scale, np.float32), params.zero_point)


def insert_quantizers(
    graph: Graph, placement: Placement, ranges: Mapping[str, Range], *, weight_range: Literal["max", "mse"] = "max"
) -> Iterator[tuple[gs.Node, str]]:
    """Rewrite ``graph``, on which ``placement`` was made, in place; yields (node, what became of it).

    Args:
        graph: the float graph.
        placement: from :func:`onnxcompress.quantization.placement.place` on this very graph.
        ranges: observed ranges of every tensor in ``placement.sources``.
        weight_range: see :func:`onnxcompress.quantization.affine.weight_qparams`.
    """
    yield from _Writer(graph, placement, ranges, weight_range).run()


class _Writer:
    def __init__(
        self, graph: Graph, placement: Placement, ranges: Mapping[str, Range], weight_range: Literal["max", "mse"]
    ) -> None:
        self.graph = graph
        self.weight_range = weight_range
        self.placement = placement
        self.params = class_qparams(placement, ranges)
        self.aligned = {name for name, found in ranges.items() if isinstance(found, LevelRange)}
        #: what Pads append to aligned images, by the name of the result
        self.marks = {str(n.outputs[0].name): mark for n in graph.nodes if (mark := mark_of(n)) is not None}
        self.names = Names(graph)
        self.kind = placement.target.activations.numpy_dtype
        self.integers: dict[str, gs.Variable] = {}  # integer form, by the name of the float tensor
        self.detours: dict[str, gs.Variable] = {}  # dequantised form where the tensor itself stays float
        self.scales: dict[str, gs.Constant] = {}
        self.zero_points: dict[tuple[str, bytes, tuple[int, ...]], gs.Constant] = {}
        self.constants: dict[tuple[str, bytes], gs.Variable] = {}

    def run(self) -> Iterator[tuple[gs.Node, str]]:
        for name, tensor in self.placement.quantized.items():
            self._activation(name, tensor)
        for unit in self.placement.integer_units:
            if self._on_integers(unit):
                self._move(unit)
                yield unit.node, f"{unit.node.op} on integers"
            else:
                self._compute(unit)
                yield unit.node, "quantised"
        self._fuse_silus()
        self._absorb_affine()
        self._protect_float_weights()

    def _node(self, op: str, inputs: list[gs.Tensor], output: gs.Tensor, attrs: dict[str, Any] | None = None) -> None:
        label = self.names.free(f"{output.name}_{_LABELS.get(op, op)}")
        self.graph.nodes.append(gs.Node(op, label, attrs or {}, inputs, [output]))

    def _variable(self, label: str, like: gs.Tensor, dtype: np.dtype[Any]) -> gs.Variable:
        return gs.Variable(self.names.free(label), dtype, list(like.shape) if like.shape is not None else None)

    def _on_integers(self, unit: Unit) -> bool:
        """True where the operator itself is written on the integers."""
        return unit.integer and unit.moves and self.placement.target.movement == "integers"

    # ---- activations

    def _activation(self, name: str, tensor: gs.Tensor) -> None:
        """Give ``tensor`` its integer form, and its dequantised form to those who need one.

        What an integer operator made is read in its dequantised form by everyone, so that form takes over the tensor's
        name. What a float operator made stays as it is for float readers.
        """
        integers = self.integers[name] = self._variable(f"{name}_quantized", tensor, self.kind)
        maker = self.placement.producer.get(name)
        readers = self.placement.consumers.get(name, [])
        if self.placement.writes_float(name):
            self._node("QuantizeLinear", [tensor, *self._parameters(name)], integers)
            if any(reader.integer and not self._on_integers(reader) for reader in readers):
                detour = self.detours[name] = self._variable(f"{name}_dequantized", tensor, np.dtype(np.float32))
                self._node("DequantizeLinear", [integers, *self._parameters(name)], detour)
            return
        assert maker is not None
        last = maker.activation if maker.activation is not None else maker.node
        position = next(i for i, t in enumerate(last.outputs) if t is tensor)
        if self._on_integers(maker):
            last.outputs[position] = integers
        else:
            last.outputs[position] = made = self._variable(f"{name}_float", tensor, np.dtype(np.float32))
            self._node("QuantizeLinear", [made, *self._parameters(name)], integers)
        if name in self.placement.outputs or any(not self._on_integers(reader) for reader in readers):
            self._node("DequantizeLinear", [integers, *self._parameters(name)], tensor)

    def _parameters(self, name: str) -> list[gs.Constant]:
        representative = self.placement.classes[name]
        params = self.params[representative]
        if representative not in self.scales:
            self.scales[representative] = gs.Constant(self.names.free(f"{representative}_scale"), params.scale)
            self.placement.scales[representative] = float(params.scale)
        return [self.scales[representative], self._integer_constant(params.zero_point)]

    def _integer_constant(self, value: NDArray[Any]) -> gs.Constant:
        """Zero points are few, so equal ones are stored once."""
        key = (str(value.dtype), value.tobytes(), value.shape)
        if key not in self.zero_points:
            label = f"zero_point_{int(value)}" if value.ndim == 0 else f"zero_points_{value.shape[0]}"
            self.zero_points[key] = gs.Constant(self.names.free(label), value)
        return self.zero_points[key]

    # ---- data movement, on the integers

    def _move(self, unit: Unit) -> None:
        node = unit.node
        mark = self.marks.get(unit.outputs[0].name)
        for index in range(len(node.inputs) if node.op == "Concat" else 1):
            node.inputs[index] = self.integers[unit.inputs[index].name]
        params = self.params[self.placement.classes[unit.outputs[0].name]]
        if node.op == "Pad" and attribute(node, "mode", "constant") == "constant":
            inputs = list(node.inputs)
            inputs += [gs.Variable.empty() for _ in range(3 - len(inputs))]
            value = params.zero_point
            if mark is not None:
                value = quantize(np.array([mark], np.float32), params).reshape(())
            inputs[2] = self._integer_constant(value)
            node.inputs = inputs
        if unit.rule is not None and unit.rule.role is Role.ACTIVATION:
            self._clip_integers(node, params)

    def _clip_integers(self, node: gs.Node, params: QParams) -> None:
        """Relu or Clip of what the integers stand for is a Clip of the integers."""
        bounds = activation_bounds(node)
        assert bounds is not None
        info = np.iinfo(self.kind)
        ends = []
        for bound, end in ((bounds.low, info.min), (bounds.high, info.max)):
            value = np.array(end, self.kind)
            ends.append(quantize(np.array(bound, np.float32), params) if np.isfinite(bound) else value)
        node.op, node.attrs = "Clip", {}
        node.inputs = [node.inputs[0], *(self._integer_constant(np.array(end)) for end in ends)]

    # ---- operators with scales of their own

    def _compute(self, unit: Unit) -> None:
        assert unit.rule is not None
        node = unit.node
        weight_index = unit.rule.weight.index if unit.rule.weight is not None else None
        for index, tensor in enumerate(node.inputs):
            if not any(tensor is value for value in unit.inputs):
                continue
            value = constant_value(tensor)
            if value is None:
                node.inputs[index] = self.detours.get(tensor.name, tensor)
            elif index != weight_index:
                interval = Range(float(value.min(initial=0.0)), float(value.max(initial=0.0)))
                params = activation_qparams(interval, self.placement.target.activations)
                node.inputs[index] = self._constant(tensor, quantize(value, params), params, explicit=True)
        if weight_index is not None and constant_value(node.inputs[weight_index]) is not None:
            self._weight(unit, weight_index)

    def _constant(self, tensor: gs.Tensor, integers: NDArray[Any], params: QParams, *, explicit: bool) -> gs.Variable:
        """A stored integer constant and its DequantizeLinear, shared where tensor and parameters are.

        ``explicit`` writes the zero points although they are zero.
        """
        key = (tensor.name, params.scale.tobytes())
        if key not in self.constants:
            inputs: list[gs.Tensor] = [
                gs.Constant(self.names.free(f"{tensor.name}_quantized"), integers),
                gs.Constant(self.names.free(f"{tensor.name}_scale"), params.scale),
            ]
            if explicit:
                inputs.append(self._integer_constant(params.zero_point))
            label = self.names.free(f"{tensor.name}_dequantized")
            result = gs.Variable(label, np.dtype(np.float32), list(integers.shape))
            self._node("DequantizeLinear", inputs, result, {} if params.axis is None else {"axis": params.axis})
            self.constants[key] = result
        return self.constants[key]

    def _weight(self, unit: Unit, index: int) -> None:
        assert unit.rule is not None and unit.rule.weight is not None
        node, rule = unit.node, unit.rule.weight
        tensor = node.inputs[index]
        weight = constant_value(tensor)
        assert weight is not None
        axis = rule.axis(node, weight.ndim)
        bias = self._bias(node, rule.bias, weight.shape[axis])
        rewritten = bias is not None and not self._is_stored(node.inputs[rule.bias or 0], bias)
        stored = weight
        if node.op == "Gemm":  # the integer kernel knows alpha and beta of one only
            weight = weight * np.float32(attribute(node, "alpha", 1.0))
            node.attrs = {k: v for k, v in node.attrs.items() if k not in ("alpha", "beta")}
        input_scale = float(self.params[self.placement.classes[unit.inputs[0].name]].scale)
        params = weight_qparams(
            weight,
            self.placement.target.weights,
            axis,
            bias=bias,
            input_scale=input_scale,
            method=self.weight_range,
        )
        # The integer Gemm and MatMul are matched only with explicit zero points; Conv saves their bytes.
        explicit = node.op != "Conv"
        integers = quantize_weight(weight, params, self.placement.target.weights)
        integers = np.clip(integers, *self.placement.target.weights.limits)  # ranges by mean squared error cut some off
        release(stored)
        node.inputs[index] = self._constant(tensor, integers, params, explicit=explicit)
        mark = self.marks.get(unit.inputs[0].name)
        if mark is not None and bias is not None:
            # Inside of the image the marking channel is a constant, and so is what rounding its weights costs.
            away = integers[:, -1] * params.scale.reshape(-1, *(1,) * (weight.ndim - 2)) - weight[:, -1]
            bias = bias - np.float32(mark) * away.sum(axis=tuple(range(1, away.ndim)))
            rewritten = True
        writes_float = unit.keeps_float and self._stays_float(unit)
        if bias is not None and rule.bias is not None:
            stored = node.inputs[rule.bias]
            if writes_float:
                node.inputs[rule.bias] = self._int32(stored, bias, params, input_scale)
            elif rewritten:
                node.inputs[rule.bias] = gs.Constant(self.names.free(f"{stored.name}_vector"), bias)
        if node.op == "MatMul" and writes_float:
            self._bias_of_matmul(unit, params, input_scale)

    def _stays_float(self, unit: Unit) -> bool:
        name = unit.outputs[0].name
        return name not in self.placement.quantized or self.placement.writes_float(name)

    def _bias(self, node: gs.Node, index: int | None, channels: int) -> NDArray[np.float32] | None:
        """The bias as float32 [channels], beta multiplied in; None where the node has none."""
        if index is None or len(node.inputs) <= index or not node.inputs[index].name:
            return None
        value = constant_value(node.inputs[index])
        assert value is not None
        if node.op == "Gemm":
            value = value * np.float32(attribute(node, "beta", 1.0))
        return np.ascontiguousarray(np.broadcast_to(value.reshape(-1), (channels,)), dtype=np.float32)

    def _is_stored(self, tensor: gs.Tensor, bias: NDArray[np.float32]) -> bool:
        value = constant_value(tensor)
        return value is not None and value.shape == bias.shape and bool(np.array_equal(value, bias))

    def _int32(self, tensor: gs.Tensor, bias: NDArray[Any], weight: QParams, input_scale: float) -> gs.Variable:
        scale = (np.float32(input_scale) * weight.scale).astype(np.float32)
        integers = np.rint(bias.astype(np.float64) / scale.astype(np.float64)).astype(np.int32)
        params = QParams(scale, np.zeros(scale.shape, np.int32), 0 if scale.ndim else None)
        return self._constant(tensor, integers, params, explicit=False)

    def _bias_of_matmul(self, unit: Unit, weight: QParams, input_scale: float) -> None:
        """``MatMul -> Add(bias)`` of known shape: the runtime makes it a Gemm, which needs the bias as int32."""
        result = unit.outputs[0]
        known = self.placement.types.get(result.name)
        if known is None or known.shape is None or not all(isinstance(d, int) for d in known.shape):
            return
        if len(result.outputs) != 1 or result.outputs[0].op != "Add":
            return
        add = result.outputs[0]
        index = 1 if add.inputs[0] is result else 0
        bias = constant_value(add.inputs[index])
        if bias is not None and bias.shape == (known.shape[-1],):
            add.inputs[index] = self._int32(add.inputs[index], bias, weight, input_scale)

    # ---- operators that stay float

    def _fuse_silus(self) -> None:
        """Write SiLU behind a dequantiser as the operator that the runtime makes of it; see the module's docstring."""
        for unit in self.placement.units:
            found = silu(unit.node) if unit.node.op == "Mul" and not unit.integer else None
            if found is None or not self.placement.target.audited:
                continue
            sigmoid, product = found
            source, gate = sigmoid.inputs[0], sigmoid.outputs[0]
            if len(source.inputs) != 1 or source.inputs[0].op != "DequantizeLinear":
                continue
            if gate.name in self.placement.outputs or len(self.placement.consumers.get(gate.name, [])) != 1:
                continue
            remove_node(sigmoid)
            product.op, product.domain, product.attrs = "QuickGelu", "com.microsoft", {"alpha": 1.0}
            product.inputs = [source]
            self._channels_last(product)

    def _absorb_affine(self) -> None:
        """``Mul(f_c) -> Add(o_c) -> Q(scale, zero)`` of an aligned image: one Q with a scale and zero point a channel.

        ``round((x * f + o) / scale) + zero`` is ``round(x / (scale / f)) + zero + o / scale`` where no value is close
        to the middle between two levels; what is aligned never is, unless ``o / scale`` has a fraction of a half.
        """
        if not self.placement.target.audited:
            return
        gone: list[gs.Node] = []
        for name in [name for name in self.integers if name in self.aligned]:
            node = self.integers[name].inputs[0]
            chain = aligned_chain(node.inputs[0])
            if chain is None or len(node.inputs[0].outputs) != 1:
                continue
            source, factors, offsets, nodes = chain
            params = self.params[self.placement.classes[name]]
            places = float(params.zero_point) + offsets / float(params.scale)
            zeros = np.rint(places)
            info = np.iinfo(self.kind)
            if np.abs(places - zeros).max() > _MOST_FRACTION or zeros.min() < info.min or zeros.max() > info.max:
                continue
            scales = (float(params.scale) / factors).astype(np.float32)
            self.placement.absorbed.update(scales.tolist())
            scale = gs.Constant(self.names.free(f"{source.name}_scales"), scales)
            node.inputs = [source, scale, self._integer_constant(zeros.astype(self.kind))]
            node.attrs = {**node.attrs, "axis": 1}
            gone += nodes
        remove_nodes(self.graph, gone)

    def _channels_last(self, node: gs.Node) -> None:
        """Put transpositions of the integers on both sides of ``node``, which cancel those of integer convolutions."""
        source, result = node.inputs[0], node.outputs[0]
        known = self.placement.types.get(source.name)
        if known is None or known.shape is None or len(known.shape) != 4 or result.name in self.placement.outputs:
            return
        if len(result.outputs) != 1 or result.outputs[0].op != "QuantizeLinear":
            return
        reader, writer = source.inputs[0], result.outputs[0]
        shape = gs.Variable("", None, [known.shape[axis] for axis in (0, 2, 3, 1)])
        moved = self._variable(f"{source.name}_channels_last", shape, self.kind)
        self._node("Transpose", [reader.inputs[0]], moved, {"perm": [0, 2, 3, 1]})
        floats = self._variable(f"{source.name}_float_channels_last", shape, np.dtype(np.float32))
        self._node("DequantizeLinear", [moved, *reader.inputs[1:]], floats)
        node.inputs = [floats]
        if not source.outputs and source.name not in self.placement.outputs:
            remove_node(reader)
        node.outputs = [self._variable(f"{result.name}_float_channels_last", shape, np.dtype(np.float32))]
        writer.inputs[0] = node.outputs[0]
        integers = writer.outputs[0]
        writer.outputs = [self._variable(f"{result.name}_channels_last", shape, self.kind)]
        self._node("Transpose", [writer.outputs[0]], integers, {"perm": [0, 3, 1, 2]})

    def _protect_float_weights(self) -> None:
        """Keep the runtime from quantising the weights of float operators; see the module's docstring."""
        for unit in self.placement.units:
            node = unit.node
            if unit.integer or node.op not in ("Conv", "ConvTranspose", "Gemm") or not self._ends_in_quantizer(unit):
                continue
            source = node.inputs[0]
            weight = constant_value(node.inputs[1])
            if weight is None or len(source.inputs) != 1 or source.inputs[0].op != "DequantizeLinear":
                continue
            reader = source.inputs[0]
            axis = 0 if node.op == "Gemm" and attribute(node, "transA", 0) else 1
            channels = {
                "Conv": weight.shape[1] * attribute(node, "group", 1),
                "ConvTranspose": weight.shape[0],
                "Gemm": weight.shape[1 if attribute(node, "transB", 0) else 0],
            }[node.op]
            scale, zero_point = (np.repeat(t.values, channels) for t in reader.inputs[1:3])
            if scale.size != channels or channels == 1:
                continue
            label = self.names.free(f"{source.name}_per_channel")
            detour = gs.Variable(label, np.dtype(np.float32), list(source.shape) if source.shape is not None else None)
            vector = gs.Constant(self.names.free(f"{reader.inputs[1].name}_per_channel"), scale)
            zero_points = gs.Constant(self.names.free(f"{reader.inputs[2].name}_per_channel"), zero_point)
            self._node("DequantizeLinear", [reader.inputs[0], vector, zero_points], detour, {"axis": axis})
            node.inputs[0] = detour
            if not source.outputs and source.name not in self.placement.outputs:
                remove_node(reader)

    def _ends_in_quantizer(self, unit: Unit) -> bool:
        tensor = unit.outputs[0]
        while len(tensor.outputs) == 1 and tensor.name not in self.placement.outputs:
            reader = tensor.outputs[0]
            if reader.op == "QuantizeLinear":
                return True
            if reader.op not in ("Relu", "Clip"):
                return False
            tensor = reader.outputs[0]
        return False
