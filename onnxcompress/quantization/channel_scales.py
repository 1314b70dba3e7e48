"""Which channels can be scaled together without changing what a network computes.

A channel of a tensor may be divided by ``s > 0`` where whoever makes it can divide a weight by ``s`` and whoever reads
it can multiply a weight by ``s``; operators in between have to commute with positive scaling (Relu, pooling, residual
Add, Concat). Channels are labels that are pushed through the graph: an Add makes labels one, a Concat joins them, a
Slice or Gather picks some. Whatever is unknown pins its labels, so that they keep the scale one.

Source of the idea: M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
ICCV 2019; for LayerNormalization, G. Xiao et al., "SmoothQuant", ICML 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    change_own_constant,
    constant_value,
    normal_domain,
    release,
    walk_graphs,
)
from onnxcompress.shapes import TensorType

__all__ = ["ChannelScales", "Channels", "Reader"]

Labels = NDArray[np.int64]
Scales = NDArray[np.float64]


@dataclass(frozen=True)
class Channels:
    """The labels along one axis of a tensor."""

    axis: int
    labels: Labels


@dataclass(frozen=True)
class Reader:
    """A weight that multiplies labelled channels."""

    node: gs.Node
    labels: Labels
    out_axis: int
    in_axis: int
    group: int

    def weight(self) -> NDArray[np.float64]:
        """Its values now, [groups, outputs per group, channels per group, taps]; a copy, which is not kept."""
        value = constant_value(self.node.inputs[1])
        assert value is not None
        moved = np.moveaxis(value, (self.out_axis, self.in_axis), (0, 1)).astype(np.float64)
        release(value)
        return moved.reshape(self.group, moved.shape[0] // self.group, moved.shape[1], -1)


@dataclass(frozen=True)
class _Absorber:
    """A constant that takes scales in: ``apply(one scale per entry of labels)`` rewrites its node."""

    node: gs.Node
    labels: Labels
    apply: Callable[[Scales], None]


class ChannelScales:
    """Labels of the channels of every tensor of a graph, and the weights that can absorb scales.

    Args:
        graph: the outermost graph, its nodes in order; :meth:`divide` changes it.
        types: from shape inference.
    """

    def __init__(self, graph: Graph, types: Mapping[str, TensorType]) -> None:
        self.tensors: dict[str, Channels] = {}
        self.readers: list[Reader] = []
        self._graph = graph
        self._types = types
        self._names = Names(graph)
        self._parent: list[int] = []
        self._pinned: set[int] = set()
        self._absorbers: list[_Absorber] = []
        self._limits: dict[int, float] = {}
        self._walk()
        self._roots = np.array([self._root(label) for label in range(len(self._parent))], np.int64)
        self.free = np.ones(len(self._parent), bool)
        self.free[[self._roots[label] for label in self._pinned]] = False
        self.limits = np.full(len(self._parent), np.inf)
        for label, bound in self._limits.items():
            root = self._roots[label]
            self.limits[root] = min(self.limits[root], bound)

    # ---- answers; arrays are indexed by representative label

    #: per representative label whether it may be scaled
    free: NDArray[np.bool_]
    #: per representative label the smallest upper bound of the Clips that it runs through
    limits: NDArray[np.float64]

    @property
    def count(self) -> int:
        """How many labels there are."""
        return len(self._parent)

    def representatives(self, labels: Labels) -> Labels:
        """The labels that stand for ``labels``: equal ones have to get equal scales."""
        return np.asarray(self._roots[labels])

    def divide(self, scales: Scales) -> list[gs.Node]:
        """Divide every channel by the scale of its representative; returns the nodes whose weights changed.

        Args:
            scales: float64 [count], positive; 1 where a channel stays as it is.
        """
        changed = []
        for absorber in self._absorbers:
            chosen = scales[self._roots[absorber.labels]]
            if (chosen != 1).any():
                absorber.apply(chosen)
                changed.append(absorber.node)
        return changed

    # ---- union-find

    def _fresh(self, count: int) -> Labels:
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def _root(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def _join(self, first: Labels, second: Labels) -> None:
        for a, b in zip(first, second, strict=True):
            self._parent[self._root(int(a))] = self._root(int(b))

    def _pin(self, tensor: gs.Tensor) -> None:
        channels = self.tensors.get(tensor.name)
        if channels is not None:
            self._pinned.update(channels.labels.tolist())

    # ---- the walk

    def _walk(self) -> None:
        for node in self._graph.nodes:
            rule = _RULES.get(node.op) if normal_domain(node) == "" else None
            if rule is None or not rule(self, node):
                for tensor in node.inputs:
                    self._pin(tensor)
        for part in walk_graphs(self._graph):
            for tensor in part.outputs:
                self._pin(tensor)
            if part is not self._graph:
                for node in part.nodes:
                    for tensor in node.inputs:
                        self._pin(tensor)

    def _shape(self, tensor: gs.Tensor) -> tuple[int | str | None, ...] | None:
        known = self._types.get(tensor.name)
        return None if known is None else known.shape

    def _weight(self, node: gs.Node, index: int) -> NDArray[Any] | None:
        """A float32 constant that this node alone reads; shared ones cannot be scaled for one reader."""
        if len(node.inputs) <= index or not node.inputs[index].name:
            return None
        tensor = node.inputs[index]
        value = constant_value(tensor)
        if value is None or value.dtype != np.float32 or len(tensor.outputs) != 1:
            return None
        return value

    def _replace(self, node: gs.Node, index: int, value: NDArray[Any]) -> None:
        change_own_constant(node, index, value.astype(np.float32), self._names)

    # ---- rules: True where the node's inputs need no pin

    def _linear(self, node: gs.Node, weight: NDArray[Any], out_axis: int, in_axis: int, group: int, axis: int) -> bool:
        """Conv, Gemm, MatMul: a reader of its input's labels and the maker of new ones."""
        bias_index = 2 if len(node.inputs) > 2 and node.inputs[2].name else None
        source = self.tensors.get(node.inputs[0].name)
        known = source is not None and source.axis == axis
        if known and source is not None:
            labels = source.labels
            per_group = weight.shape[in_axis]
            if labels.size != per_group * group:
                return False
            reader = Reader(node, labels, out_axis, in_axis, group)
            self.readers.append(reader)
            shape = np.moveaxis(weight, (out_axis, in_axis), (0, 1)).shape

            def multiply(scales: Scales) -> None:
                scaled = reader.weight() * scales.reshape(group, 1, per_group, 1)
                self._replace(node, 1, np.moveaxis(scaled.reshape(shape), (0, 1), (out_axis, in_axis)))

            self._absorbers.append(_Absorber(node, labels, multiply))
        bias = self._weight(node, bias_index) if bias_index is not None else None
        if bias_index is not None and (bias is None or bias.shape != (weight.shape[out_axis],)):
            return known
        labels = self._fresh(weight.shape[out_axis])
        self.tensors[node.outputs[0].name] = Channels(axis, labels)

        def divide(scales: Scales) -> None:
            current = constant_value(node.inputs[1])
            assert current is not None
            factor = scales.reshape([-1 if i == out_axis else 1 for i in range(current.ndim)])
            self._replace(node, 1, current.astype(np.float64) / factor)
            release(current)
            if bias_index is not None:
                offset = constant_value(node.inputs[bias_index])
                assert offset is not None
                self._replace(node, bias_index, offset.astype(np.float64) / scales)

        self._absorbers.append(_Absorber(node, labels, divide))
        return known

    def _conv(self, node: gs.Node) -> bool:
        weight = self._weight(node, 1)
        return weight is not None and self._linear(node, weight, 0, 1, int(attribute(node, "group", 1)), 1)

    def _gemm(self, node: gs.Node) -> bool:
        weight = self._weight(node, 1)
        if weight is None or attribute(node, "transA", 0):
            return False
        transposed = attribute(node, "transB", 0)
        return self._linear(node, weight, 0 if transposed else 1, 1 if transposed else 0, 1, 1)

    def _matmul(self, node: gs.Node) -> bool:
        weight = self._weight(node, 1)
        shape = self._shape(node.inputs[0])
        if weight is None or weight.ndim != 2 or shape is None or len(shape) < 2:
            return False
        return self._linear(node, weight, 1, 0, 1, len(shape) - 1)

    def _layer_normalization(self, node: gs.Node) -> bool:
        shape = self._shape(node.inputs[0])
        scale = self._weight(node, 1)
        bias = self._weight(node, 2)
        has_bias = len(node.inputs) > 2 and bool(node.inputs[2].name)
        if shape is None or scale is None or scale.ndim != 1 or (has_bias and bias is None):
            return False
        if attribute(node, "axis", -1) not in (-1, len(shape) - 1) or any(t.name for t in node.outputs[1:]):
            return False
        labels = self._fresh(scale.shape[0])
        self.tensors[node.outputs[0].name] = Channels(len(shape) - 1, labels)

        def divide(scales: Scales) -> None:
            for index in (1, 2) if has_bias else (1,):
                value = constant_value(node.inputs[index])
                assert value is not None
                self._replace(node, index, value.astype(np.float64) / scales)

        self._absorbers.append(_Absorber(node, labels, divide))
        return False  # what it normalises cannot be scaled

    def _same(self, node: gs.Node) -> bool:
        """Commutes with positive scaling, channel by channel."""
        channels = self.tensors.get(node.inputs[0].name)
        if channels is None or any(t.name for t in node.outputs[1:]):
            return False
        self.tensors[node.outputs[0].name] = channels
        return True

    def _spatial(self, node: gs.Node) -> bool:
        """Pooling and the like: the channel axis must be axis 1."""
        channels = self.tensors.get(node.inputs[0].name)
        return channels is not None and channels.axis == 1 and self._same(node)

    def _clip(self, node: gs.Node) -> bool:
        bounds: list[float | None] = []
        for index, name in ((1, "min"), (2, "max")):
            if len(node.inputs) > index and node.inputs[index].name:
                value = constant_value(node.inputs[index])
                if value is None or value.size != 1:
                    return False
                bounds.append(float(value.reshape(-1)[0]))
            else:
                found = attribute(node, name)
                bounds.append(found if found is None else float(found))
        low, high = bounds
        if low != 0 or not self._same(node):
            return False
        if high is not None and np.isfinite(high):
            for label in self.tensors[node.inputs[0].name].labels.tolist():
                self._limits[label] = min(high, self._limits.get(label, np.inf))
        return True

    def _add(self, node: gs.Node) -> bool:
        first, second = (self.tensors.get(t.name) for t in node.inputs[:2])
        shapes = [self._shape(t) for t in node.inputs[:2]]
        if first is None or second is None or first.axis != second.axis or first.labels.size != second.labels.size:
            return self._add_constant(node)
        if shapes[0] is None or shapes[1] is None or len(shapes[0]) != len(shapes[1]):
            return False
        self._join(first.labels, second.labels)
        self.tensors[node.outputs[0].name] = first
        return True

    def _add_constant(self, node: gs.Node) -> bool:
        """``Add(x, constant)`` with one value per channel takes the scale into the constant."""
        for index in (0, 1):
            channels = self.tensors.get(node.inputs[index].name)
            shape = self._shape(node.inputs[index])
            value = self._weight(node, 1 - index)
            if channels is None or shape is None or value is None:
                continue
            wanted = [channels.labels.size if i == channels.axis else 1 for i in range(len(shape))]
            padded = [1] * (len(shape) - value.ndim) + list(value.shape)
            if padded != wanted:
                return False
            other = 1 - index

            def divide(scales: Scales, other: int = other) -> None:
                current = constant_value(node.inputs[other])
                assert current is not None
                self._replace(node, other, (current.reshape(-1) / scales).reshape(current.shape))

            self._absorbers.append(_Absorber(node, channels.labels, divide))
            self.tensors[node.outputs[0].name] = channels
            return True
        return False

    def _concat(self, node: gs.Node) -> bool:
        parts = [self.tensors.get(t.name) for t in node.inputs]
        if any(p is None or p.axis != 1 for p in parts):
            return False
        known = [p for p in parts if p is not None]
        if attribute(node, "axis") == 1:
            self.tensors[node.outputs[0].name] = Channels(1, np.concatenate([p.labels for p in known]))
            return True
        if len({p.labels.size for p in known}) != 1:
            return False
        for part in known[1:]:
            self._join(known[0].labels, part.labels)
        self.tensors[node.outputs[0].name] = known[0]
        return True

    def _slice(self, node: gs.Node) -> bool:
        channels = self.tensors.get(node.inputs[0].name)
        shape = self._shape(node.inputs[0])
        if channels is None or shape is None or len(node.inputs) < 3:
            return False
        values = [constant_value(t) if t.name else None for t in node.inputs[1:5]]
        starts, ends = values[0], values[1]
        given = zip(node.inputs[1:5], values, strict=True)
        if starts is None or ends is None or any(t.name and v is None for t, v in given):
            return False
        axes = values[2] if len(values) > 2 and values[2] is not None else np.arange(len(starts))
        steps = values[3] if len(values) > 3 and values[3] is not None else np.ones(len(starts), np.int64)
        labels = channels.labels
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            if int(axis) % len(shape) == channels.axis:
                limit = int(end) if int(step) > 0 or int(end) >= -labels.size else None
                labels = labels[slice(int(start), limit, int(step))]
        self.tensors[node.outputs[0].name] = Channels(channels.axis, labels)
        return True

    def _pad(self, node: gs.Node) -> bool:
        channels = self.tensors.get(node.inputs[0].name)
        shape = self._shape(node.inputs[0])
        pads = constant_value(node.inputs[1]) if len(node.inputs) > 1 else None
        if channels is None or shape is None or pads is None or len(pads) != 2 * len(shape):
            return False
        if len(node.inputs) > 3 and node.inputs[3].name:
            return False
        if attribute(node, "mode", "constant") == "constant" and len(node.inputs) > 2 and node.inputs[2].name:
            value = constant_value(node.inputs[2])
            if value is None or (value.size and float(value.reshape(-1)[0]) != 0):
                return False
        before, after = int(pads[channels.axis]), int(pads[channels.axis + len(shape)])
        if min(before, after) < 0 or ((before or after) and attribute(node, "mode", "constant") != "constant"):
            return False
        labels = np.concatenate([self._fresh(before), channels.labels, self._fresh(after)])
        self.tensors[node.outputs[0].name] = Channels(channels.axis, labels)
        return True

    def _flatten(self, node: gs.Node) -> bool:
        """[N, C, H, W] to [N, C*H*W]: every position of a channel has its label."""
        channels = self.tensors.get(node.inputs[0].name)
        before, after = self._shape(node.inputs[0]), self._shape(node.outputs[0])
        if channels is None or channels.axis != 1 or before is None or after is None or len(after) != 2:
            return False
        inner = before[2:]
        size = int(np.prod([d for d in inner if isinstance(d, int)], dtype=np.int64))
        if not all(isinstance(d, int) for d in inner) or after[1] != size * channels.labels.size:
            return False
        self.tensors[node.outputs[0].name] = Channels(1, np.repeat(channels.labels, size))
        return True


_RULES: dict[str, Callable[[ChannelScales, gs.Node], bool]] = {
    "Conv": ChannelScales._conv,
    "Gemm": ChannelScales._gemm,
    "MatMul": ChannelScales._matmul,
    "LayerNormalization": ChannelScales._layer_normalization,
    "Relu": ChannelScales._same,
    "LeakyRelu": ChannelScales._same,
    "PRelu": ChannelScales._same,
    "Identity": ChannelScales._same,
    "Clip": ChannelScales._clip,
    "MaxPool": ChannelScales._spatial,
    "AveragePool": ChannelScales._spatial,
    "GlobalAveragePool": ChannelScales._spatial,
    "GlobalMaxPool": ChannelScales._spatial,
    "Add": ChannelScales._add,
    "Concat": ChannelScales._concat,
    "Slice": ChannelScales._slice,
    "Pad": ChannelScales._pad,
    "Flatten": ChannelScales._flatten,
    "Reshape": ChannelScales._flatten,
}
