"""How large a model becomes once its local functions are inlined.

A function may call another one twice, and that one the next: forty of them stand for 2^40 nodes, which shape inference
and runtimes would try to write out. Counting needs one visit of each function.

https://github.com/onnx/onnx/blob/main/docs/IR.md#functions
"""

from __future__ import annotations

import graphlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import onnx

from onnxcompress.errors import ModelError

__all__ = ["MOST_NODES", "expanded_nodes"]

#: nodes after inlining that a model may have
MOST_NODES = 1_000_000

_Key = tuple[str, str, str]


def expanded_nodes(model: onnx.ModelProto) -> int:
    """Number of nodes of ``model``, nested graphs included, with each call of a local function replaced by its body.

    Raises:
        ModelError: functions call each other in a circle.
    """
    calls = {_key(f.domain, f.name, f.overload): _calls(f.node) for f in model.functions}
    if not calls:
        return sum(1 for _ in _nodes(model.graph.node))
    try:
        order = list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError as error:
        names = " -> ".join(".".join(key[:2]) for key in error.args[1])
        raise ModelError(f"its functions call each other in a circle: {names}") from error
    sizes: dict[_Key, int] = {}
    for key in order:
        sizes[key] = _size(calls[key], sizes) if key in calls else 1
    return _size(_calls(model.graph.node), sizes)


def _key(domain: str, name: str, overload: str) -> _Key:
    return "" if domain == "ai.onnx" else domain, name, overload


def _calls(nodes: Iterable[onnx.NodeProto]) -> Counter[_Key]:
    return Counter(_key(node.domain, node.op_type, node.overload) for node in _nodes(nodes))


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g.node)
            for graph in attribute.graphs:
                yield from _nodes(graph.node)


def _size(calls: Mapping[_Key, int], sizes: Mapping[_Key, int]) -> int:
    return sum(count * sizes.get(key, 1) for key, count in calls.items())
