"""What a choice of channels costs, without cutting: multiply-accumulates and parameters as products of axis lengths.

Channels of a group are alike, so the number that is kept of each group says it all. Each node's count is a constant
times the lengths of the axes that may be cut, and each length is what stays plus so many positions for each channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.graph import Graph, attribute, walk_graphs
from onnxcompress.pruning.coupling import CouplingGroup
from onnxcompress.shapes import TensorType, node_macs

__all__ = ["ChannelCosts"]

Counts = Mapping[str, int]


@dataclass(frozen=True)
class _Length:
    """An axis: positions that always stay, and positions for each channel of the groups on it."""

    fixed: int
    per_channel: tuple[tuple[str, int], ...]

    def at(self, counts: Counts) -> int:
        return self.fixed + sum(each * counts[name] for name, each in self.per_channel)


@dataclass(frozen=True)
class _Product:
    """``scale`` times some lengths."""

    scale: float
    lengths: tuple[_Length, ...]

    def at(self, counts: Counts) -> float:
        return self.scale * prod(length.at(counts) for length in self.lengths)

    def slopes(self, counts: Counts) -> Iterator[tuple[str, float]]:
        """What one channel less of each group saves, to first order."""
        found = [length.at(counts) for length in self.lengths]
        for number, length in enumerate(self.lengths):
            rest = self.scale * prod(found[:number] + found[number + 1 :])
            for name, each in length.per_channel:
                yield name, rest * each


class ChannelCosts:
    """Counts for any number of kept channels of the groups of one graph.

    Args:
        graph: the graph that ``groups`` are of.
        groups: all of them, or those that may be cut.
        types: shapes as for :func:`onnxcompress.shapes.node_macs`; symbols (the batch) count as one.
    """

    def __init__(self, graph: Graph, groups: Sequence[CouplingGroup], types: Mapping[str, TensorType]) -> None:
        self.full = {group.name: group.channels for group in groups}
        self._lengths = _lengths(groups)
        dense = node_macs(graph, types)
        self._macs = {
            node.name: self._product(_mac_axes(node, types), dense[node.name])
            for node in graph.nodes
            if node.name in dense
        }
        self._parameters = [self._weight(constant) for constant in _weights(graph)]

    def macs(self, counts: Counts | None = None) -> int:
        """Multiply-accumulates of the whole graph; ``counts`` names the groups that are not whole."""
        filled = {**self.full, **(counts or {})}
        return round(sum(product.at(filled) for product in self._macs.values()))

    def parameters(self, counts: Counts | None = None) -> int:
        """Elements of the weights (integers of 64 bits are shapes and do not count)."""
        filled = {**self.full, **(counts or {})}
        return round(sum(product.at(filled) for product in self._parameters))

    def macs_per_channel(self, counts: Counts | None = None) -> dict[str, float]:
        """{group: multiply-accumulates that one channel less saves while the other groups stay as ``counts`` says}."""
        return self._slopes(list(self._macs.values()), counts)

    def parameters_per_channel(self, counts: Counts | None = None) -> dict[str, float]:
        """{group: weights that one channel less saves}."""
        return self._slopes(self._parameters, counts)

    def node_macs(self, counts: Counts | None = None) -> dict[str, int]:
        """{node: multiply-accumulates}."""
        filled = {**self.full, **(counts or {})}
        return {name: round(product.at(filled)) for name, product in self._macs.items()}

    def hanging(self) -> dict[str, int]:
        """{group: multiply-accumulates of the nodes that shrink with it, as they are now}."""
        found = dict.fromkeys(self.full, 0)
        for product in self._macs.values():
            value = round(product.at(self.full))
            for name in {name for length in product.lengths for name, _ in length.per_channel}:
                found[name] += value
        return found

    def _slopes(self, products: Sequence[_Product], counts: Counts | None) -> dict[str, float]:
        filled = {**self.full, **(counts or {})}
        found = dict.fromkeys(self.full, 0.0)
        for product in products:
            for name, slope in product.slopes(filled):
                found[name] += slope
        return found

    def _product(self, axes: Sequence[tuple[str, int]], value: int) -> _Product:
        lengths = tuple(self._lengths[axis] for axis in axes if axis in self._lengths)
        whole = prod(length.at(self.full) for length in lengths)
        return _Product(value / whole, lengths)

    def _weight(self, constant: gs.Constant) -> _Product:
        axes = [(constant.name, axis) for axis in range(len(constant.shape))]
        return self._product(axes, prod(constant.shape))


def _lengths(groups: Sequence[CouplingGroup]) -> dict[tuple[str, int], _Length]:
    sizes: dict[tuple[str, int], int] = {}
    shares: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for group in groups:
        for member in group.members:
            place = (member.tensor, member.axis)
            positions = int(np.count_nonzero(member.channel_of >= 0))
            sizes[place] = member.channel_of.size
            shares.setdefault(place, []).append((group.name, positions // group.channels))
    counts = {group.name: group.channels for group in groups}
    return {
        place: _Length(sizes[place] - sum(each * counts[name] for name, each in own), tuple(own))
        for place, own in shares.items()
    }


def _mac_axes(node: gs.Node, types: Mapping[str, TensorType]) -> list[tuple[str, int]]:
    """The axes whose lengths multiply to the node's count."""
    out = node.outputs[0].name
    first, second = node.inputs[0].name, node.inputs[1].name
    if node.op == "Conv":
        return [(out, 1), (second, 1)]
    if node.op == "ConvTranspose":
        return [(first, 1), (second, 1)]
    if node.op == "Gemm":
        return [(out, 0), (out, 1), (first, 0 if attribute(node, "transA", 0) else 1)]
    if node.op != "MatMul":
        return []  # integer products have no rule: what they touch stays
    rank = _rank(node.outputs[0], types)
    inner = _rank(node.inputs[0], types)
    return [*((out, axis) for axis in range(rank)), (first, inner - 1)]


def _rank(tensor: gs.Tensor, types: Mapping[str, TensorType]) -> int:
    if isinstance(tensor, gs.Constant):
        return len(tensor.shape)
    known = types.get(tensor.name)
    return len(known.shape) if known is not None and known.shape is not None else 0


def _weights(graph: Graph) -> Iterator[gs.Constant]:
    """Each constant of the graph and of those nested in it once, without shapes and indices."""
    seen: set[int] = set()
    for part in walk_graphs(graph):
        for node in part.nodes:
            for tensor in (*node.inputs, *(v for v in node.attrs.values() if isinstance(v, gs.Constant))):
                if isinstance(tensor, gs.Constant) and id(tensor) not in seen and tensor.dtype != np.int64:
                    seen.add(id(tensor))
                    yield tensor
