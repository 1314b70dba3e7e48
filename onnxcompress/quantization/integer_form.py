"""A graph as integers with made-up ranges: it computes nothing of use, but takes the time that the real one will.

Integer kernels want other widths than float ones. ONNX Runtime's fast convolution of 8-bit integers takes whole blocks
of filters (16 with AVX-512) and of input channels (4); a layer that does not fill them falls back to a slower one. So
what is going to be quantised has to be timed as integers (:mod:`onnxcompress.pruning.timing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from onnxcompress.graph import Graph, copy_graph, sort_nodes
from onnxcompress.quantization.affine import Range
from onnxcompress.quantization.canonical import canonicalize
from onnxcompress.quantization.placement import place
from onnxcompress.quantization.qdq import insert_quantizers
from onnxcompress.shapes import Shape, infer_shapes
from onnxcompress.targets import Target

__all__ = ["integer_form"]

#: range of every tensor; kernels do not look at values
_RANGE = Range(-4.0, 4.0)


def integer_form(graph: Graph, target: Target, shapes: Mapping[str, Shape], *, whole: bool = True) -> Graph:
    """A copy of ``graph`` with Q/DQ pairs where ``target`` has them.

    Args:
        graph: float; not changed.
        target: what for.
        shapes: of the graph's inputs.
        whole: False for a piece of a network, whose ends are no conversions: what can be integer is then.
    """
    graph = copy_graph(graph)
    canonicalize(graph, target, shapes)
    if not whole:
        target = replace(target, costs=replace(target.costs, quantize=0.0, dequantize=0.0, node=0.0))
    placement = place(graph, target, types=infer_shapes(graph, shapes))
    sources = (name for names in placement.sources.values() for name in names)
    for _ in insert_quantizers(graph, placement, dict.fromkeys(sources, _RANGE)):
        pass
    sort_nodes(graph)
    return graph
