"""Residual branches that can go as a whole: all channels of a group removed, and with them the layers around it.

Where the layers that read a group give nothing but their bias once it is gone, and that only goes into an Add with a
shortcut, the branch is a constant. It saves far more time than a narrow branch, which pays for every start of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_graphsurgeon as gs

from onnxcompress.graph import (
    Graph,
    Names,
    constant_value,
    copy_graph,
    graph_output_ids,
    nested_graphs,
    normal_domain,
    redirect,
    remove_nodes,
    sort_nodes,
)
from onnxcompress.pruning.coupling import CouplingGroup
from onnxcompress.pruning.mixing import MixingLayer, find_mixing_layers
from onnxcompress.pruning.surgery import Cuts
from onnxcompress.shapes import TensorType

__all__ = ["drop_branches", "drop_constants", "still_there", "vanishing"]


def vanishing(
    groups: Sequence[CouplingGroup], layers: Mapping[str, MixingLayer], types: Mapping[str, TensorType]
) -> set[str]:
    """Names of the groups that may lose all channels.

    Args:
        groups: of one graph.
        layers: its mixing layers by the name of their node.
        types: shapes of its tensors.
    """
    found = set()
    for group in groups:
        whole = {(m.tensor, m.axis) for m in group.members if bool((m.channel_of >= 0).all())}
        if group.consumers and all(name in layers and _goes(layers[name], whole, types) for name in group.consumers):
            found.add(group.name)
    return found


def _goes(layer: MixingLayer, whole: set[tuple[str, int]], types: Mapping[str, TensorType]) -> bool:
    if layer.shortcut is None or layer.sum_output is None or layer.groups != 1:
        return False
    if not any(tensor == layer.data for tensor, _ in whole):
        return False
    own, other = types.get(str(layer.output.name)), types.get(str(layer.shortcut.name))
    if own is None or other is None or own.shape is None or own.shape != other.shape:
        return False
    return all(d is not None for d in own.shape)


def drop_branches(graph: Graph, consumers: Iterable[str]) -> Graph:
    """A copy of ``graph`` in which these layers, whose input is taken for zero, are the constants of their biases."""
    result = copy_graph(graph)
    layers = {layer.name: layer for layer in find_mixing_layers(result)}
    names = Names(result)
    for name in consumers:
        layer = layers[name]
        bias = layer.bias().reshape(-1).astype(layer.stored.dtype)
        if layer.axis == 1:
            bias = bias.reshape(1, -1, *(1 for _ in layer.kernel))
        constant = gs.Constant(names.free(f"{layer.output.name}_constant"), bias)
        redirect(layer.output, constant)
    _sweep(result)
    return result


def drop_constants(graph: Graph, sums: Iterable[str]) -> Graph:
    """A copy of ``graph`` without the Adds of branches that are constants, and without a Relu of what a Relu gave.

    The outputs change: what the constants added is for the layers behind to make up for.

    Args:
        graph: from :func:`drop_branches`.
        sums: outputs of the Adds.
    """
    result = copy_graph(graph)
    wanted = set(sums)
    outputs = graph_output_ids(result)
    doomed = []
    for node in result.nodes:
        if node.op != "Add" or node.outputs[0].name not in wanted or id(node.outputs[0]) in outputs:
            continue
        rest = [t for t in node.inputs if constant_value(t) is None]
        if len(rest) != 1:
            continue
        redirect(node.outputs[0], rest[0])
        doomed.append(node)
        for reader in list(rest[0].outputs):
            maker = rest[0].inputs[0] if rest[0].inputs else None
            twice = reader.op == "Relu" and maker is not None and maker.op == "Relu"
            if twice and normal_domain(reader) == "" and id(reader.outputs[0]) not in outputs:
                redirect(reader.outputs[0], rest[0])
                doomed.append(reader)
    remove_nodes(result, doomed)
    sort_nodes(result)
    return result


def _sweep(graph: Graph) -> None:
    """Remove nodes of the outermost graph that nothing reads any more."""
    needed = graph_output_ids(graph)
    inside = {t.name for node in graph.nodes for part in nested_graphs(node) for n in part.nodes for t in n.inputs}
    doomed = []
    dead: set[int] = set()
    for node in reversed(graph.nodes):
        alive = any(
            id(t) in needed or t.name in inside or any(id(reader) not in dead for reader in t.outputs)
            for t in node.outputs
        )
        if not alive:
            dead.add(id(node))
            doomed.append(node)
    remove_nodes(graph, doomed)
    sort_nodes(graph)


def still_there(cuts: Cuts, graph: Graph) -> Cuts:
    """``cuts`` of tensors that ``graph`` still has."""
    known = {t.name for node in graph.nodes for t in (*node.inputs, *node.outputs)}
    return {name: dict(axes) for name, axes in cuts.items() if name in known}
