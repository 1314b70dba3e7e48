"""What a quantised graph was made from, so that it can be written again with some layers left float.

:class:`~onnxcompress.passes.insert_qdq.InsertQdq` leaves a :class:`Variants` in its context. Whoever asks what a layer
costs, in accuracy or in time, writes variants of the same model from it: no calibration, no search.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from onnxcompress.graph import Graph, copy_graph, sort_nodes
from onnxcompress.quantization.affine import Range
from onnxcompress.quantization.placement import Placement, place
from onnxcompress.quantization.qdq import insert_quantizers
from onnxcompress.shapes import TensorType, node_macs
from onnxcompress.targets import Target

__all__ = ["Variants"]


@dataclass(frozen=True)
class Variants:
    """A float graph with the ranges of its tensors, and the ways to quantise it.

    Attributes:
        graph: the float graph as it was placed; never written to.
        target: the rule table.
        exclude_nodes: node names and patterns that stay float in every variant.
        exclude_operators: operator types that do.
        ranges: of every tensor that has quantisers of its own in :attr:`placement`.
        types: shapes and types of the tensors.
        sizes: those of a real sample, by which costs are estimated.
        weight_range: see :func:`onnxcompress.quantization.affine.weight_qparams`.
    """

    graph: Graph = field(repr=False)
    target: Target
    exclude_nodes: tuple[str, ...]
    exclude_operators: tuple[str, ...]
    ranges: Mapping[str, Range] = field(repr=False)
    types: Mapping[str, TensorType] = field(repr=False)
    sizes: Mapping[str, TensorType] = field(repr=False)
    weight_range: Literal["max", "mse"] = "max"

    @cached_property
    def placement(self) -> Placement:
        """Where everything stays integer that is."""
        return self.placed()

    @cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates by node."""
        return node_macs(self.graph, self.sizes)

    def placed(self, exclude: Iterable[str] = ()) -> Placement:
        """The placement, on :attr:`graph` itself, that leaves ``exclude`` float as well."""
        return self._placed(self.graph, exclude)

    def _placed(self, graph: Graph, exclude: Iterable[str]) -> Placement:
        return place(
            graph,
            self.target,
            exclude_nodes=(*self.exclude_nodes, *exclude),
            exclude_operators=self.exclude_operators,
            types=self.types,
            sizes=self.sizes,
        )

    def ranges_of(self, placement: Placement) -> dict[str, Range]:
        """Ranges for the sources of ``placement``; a tensor that had no quantiser of its own has its class's range."""
        known = dict(self.ranges)
        whole = self.placement
        for sources in placement.sources.values():
            for name in sources:
                others = whole.sources.get(whole.classes.get(name, name), ())
                for other in others:
                    if name not in self.ranges and other in self.ranges:
                        found = self.ranges[other]
                        known[name] = known[name].union(found) if name in known else found
        return known

    def written(self, exclude: Iterable[str] = ()) -> Graph:
        """The quantised graph that leaves ``exclude`` float as well."""
        graph = copy_graph(self.graph)
        placement = self._placed(graph, exclude)
        for _ in insert_quantizers(graph, placement, self.ranges_of(placement), weight_range=self.weight_range):
            pass
        sort_nodes(graph)
        return graph
