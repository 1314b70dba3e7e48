"""Remove what has no effect: dead nodes, unread initializers, and operators that hand their input through.

An operator hands its input through where the outputs are bit for bit the input, for every input of the graph:

- Identity; Dropout in inference mode whose mask nobody reads; Concat, Sum, Max, Min and Mean of one input
- Cast to the type that the data has; Transpose by the identity permutation
- Pad by zeros; Slice that takes all; Expand, Reshape, Flatten, Squeeze and Unsqueeze to the shape that the data has

Types and shapes are those that ONNX Inference derives from the graph inputs; what the file states for inner tensors is
not believed, so in nested graphs only what needs no shape is removed.

Graph outputs keep their names: where such an operator makes one, its producer takes the name over, if the producer is
a node of the same graph and its own name does not leave the graph as well. A node is dead where no output of the
graph depends on it; the inputs of a graph, overridable initializers among them, always stay.

What PyTorch's exporter notes at every node for debugging goes, too: stack traces with paths of the machine that
exported, module classes, its own intermediate form. On a small transformer that is half a percent of the file, 2 % once
the weights are 8-bit. Doc strings and metadata under any other key stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.base import Change, Context, Decision, Guarantee, Pass, Refusal
from onnxcompress.errors import ModelError
from onnxcompress.graph import (
    Graph,
    attribute,
    constant_value,
    element_type,
    extra,
    first_output,
    graph_output_ids,
    model_info,
    nested_graphs,
    normal_domain,
    redirect,
    remove_nodes,
    set_extra,
    walk_graphs,
)
from onnxcompress.shapes import DerivedTypes, Shape, derive_types

__all__ = ["EliminateDeadNodes"]

#: keys under which torch.onnx and onnxscript keep notes at nodes
_NAMESPACE, _PACKAGES = "namespace", ("pkg.torch.", "pkg.onnxscript.")
#: exporters write these for "to the end"; no axis is that long
WITHOUT_END = 2**31 - 1


class EliminateDeadNodes(Pass):
    """Remove dead nodes, unread initializers and operators that hand their input through."""

    name: ClassVar[str] = "eliminate_dead_nodes"

    @property
    def guarantee(self) -> Guarantee:
        """Nothing is computed in another way."""
        return Guarantee.EXACT

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision]:
        """Bypass what hands its input through, then remove what nothing depends on."""
        yield from _Bypass(graph).run()
        yield from _remove_dead(graph)
        for part in walk_graphs(graph):
            info = model_info(part)
            for constant in info.unread:
                yield Change("removed", constant.name, "initializer that nothing reads")
            info.unread.clear()
        stripped = sum(_strip_notes(node) for part in walk_graphs(graph) for node in part.nodes)
        if stripped:
            yield Change("removed", "", f"{stripped} bytes of the exporter's notes for debugging")


def _strip_notes(node: gs.Node) -> int:
    """Remove the exporter's notes from ``node``; returns how many bytes they took."""
    proto = extra(node)
    if proto is None:
        return 0
    kept = [p for p in proto.metadata_props if p.key != _NAMESPACE and not p.key.startswith(_PACKAGES)]
    if len(kept) == len(proto.metadata_props):
        return 0
    own = type(proto)()
    own.CopyFrom(proto)
    del own.metadata_props[:]
    own.metadata_props.extend(kept)
    set_extra(node, own)
    return int(proto.ByteSize() - own.ByteSize())


class _Refused(Exception):
    """A candidate that must stay; the message is the reason."""


class _Bypass:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.opset = int(graph.opset)
        self.leaving = graph_output_ids(graph)
        self.parts = list(walk_graphs(graph))
        self.types = DerivedTypes()

    def run(self) -> Iterator[Change | Refusal]:
        if any(node.op in _NEEDS_TYPES for node in self.graph.nodes):
            try:
                self.types = derive_types(self.graph)
            except ModelError as error:
                yield Refusal(str(self.graph.name), f"shapes are not known: {error}")
        removed: list[gs.Node] = []
        for part in self.parts:
            local = {id(node) for node in part.nodes}
            for node in part.nodes:
                if normal_domain(node) != "" or node.op not in _RULES or not node.outputs or not node.inputs:
                    continue
                try:
                    if not _RULES[node.op](node, self):
                        continue
                    self._bypass(node, local)
                except _Refused as refused:
                    yield Refusal(_label(node), str(refused))
                    continue
                removed.append(node)
                yield Change("removed", _label(node), f"{node.op} that hands its input through")
        remove_nodes(self.graph, removed)

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        """The shape of ``tensor`` for every input of the graph; None where its rank is not known."""
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        known = self.types.of(tensor)
        return known.shape if known is not None else None

    def dtype(self, tensor: gs.Tensor) -> np.dtype[Any] | None:
        """The type of ``tensor``; None where it is not known."""
        if isinstance(tensor, gs.Constant):
            dtype: np.dtype[Any] = np.dtype(tensor.dtype)
            return dtype
        known = self.types.of(tensor)
        return known.dtype if known is not None else None

    def _bypass(self, node: gs.Node, local: set[int]) -> None:
        """Let the readers of the output of ``node`` read its data; ``node`` itself is removed by the caller."""
        source, target = node.inputs[0], node.outputs[0]
        if id(target) not in self.leaving:
            redirect(target, source)
            return
        if not source.inputs:
            kind = "a constant" if isinstance(source, gs.Constant) else "a graph input"
            raise _Refused(f"it names the graph output {target.name!r}, and what it reads is {kind}")
        producer = source.inputs[0]
        if id(producer) not in local:
            raise _Refused(f"it names the graph output {target.name!r}, and what it reads belongs to an outer graph")
        if id(source) in self.leaving:
            raise _Refused(f"it names the graph output {target.name!r}, and what it reads is a graph output too")
        redirect(source, target)  # this node too: it reads its own output until it is removed
        index = next(i for i, t in enumerate(producer.outputs) if t is source)
        list.clear(target.inputs)
        producer.outputs[index] = target


# ---- rules: does the node hand its first input through? --------------------------------------------------------


def _always(node: gs.Node, types: _Bypass) -> bool:
    return True


def _of_one(node: gs.Node, types: _Bypass) -> bool:
    return len(node.inputs) == 1


def _dropout(node: gs.Node, types: _Bypass) -> bool:
    if any(t.outputs or id(t) in types.leaving for t in node.outputs[1:]):
        raise _Refused("its mask is read")
    if types.opset < 7:
        if not attribute(node, "is_test", 0):
            raise _Refused("it is in training mode (is_test is 0)")
        return True
    if types.opset >= 12 and len(node.inputs) > 2 and node.inputs[2].name:
        training = constant_value(node.inputs[2])
        if training is None:
            raise _Refused(f"its training mode {node.inputs[2].name!r} is no constant")
        if training.any():
            raise _Refused("it is in training mode")
    return True


def _cast(node: gs.Node, types: _Bypass) -> bool:
    to = node.attrs["to"]
    target = element_type(to) if isinstance(to, int) else np.dtype(to)
    known = types.dtype(node.inputs[0])
    return known is not None and known == target  # numpy takes None for float64


def _transpose(node: gs.Node, types: _Bypass) -> bool:
    perm = attribute(node, "perm")
    if perm is not None:
        return list(perm) == list(range(len(perm)))
    shape = types.shape(node.inputs[0])
    return shape is not None and len(shape) < 2


def _pad(node: gs.Node, types: _Bypass) -> bool:
    if types.opset < 11:
        pads = attribute(node, "pads", attribute(node, "paddings"))
        return pads is not None and not any(pads)
    value = constant_value(node.inputs[1])
    return value is not None and not value.any()


def _slice(node: gs.Node, types: _Bypass) -> bool:
    if types.opset < 10:
        starts, ends, axes = node.attrs["starts"], node.attrs["ends"], attribute(node, "axes")
        steps: list[int] = [1] * len(starts)
    else:
        values = [constant_value(t) if t.name else None for t in node.inputs[1:]]
        if any(v is None and t.name for v, t in zip(values, node.inputs[1:], strict=True)):
            return False
        lists = [None if v is None else [int(x) for x in v.reshape(-1)] for v in values] + [None, None]
        if lists[0] is None or lists[1] is None:
            return False
        starts, ends, axes = lists[0], lists[1], lists[2]
        steps = lists[3] or [1] * len(starts)
    shape = types.shape(node.inputs[0])
    for start, end, axis, step in zip(starts, ends, axes or range(len(starts)), steps, strict=True):
        size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        first = start == 0 or (isinstance(size, int) and start <= -size)
        last = end >= WITHOUT_END or (isinstance(size, int) and end >= size)
        if not (first and last and step == 1):
            return False
    return True


def _expand(node: gs.Node, types: _Bypass) -> bool:
    shape, value = types.shape(node.inputs[0]), constant_value(node.inputs[1])
    if shape is None or value is None or value.size > len(shape):
        return False
    target = [int(v) for v in value.reshape(-1)]
    return all(t in (1, size) for t, size in zip(target, shape[len(shape) - len(target) :], strict=True))


def _reshape(node: gs.Node, types: _Bypass) -> bool:
    shape = types.shape(node.inputs[0])
    if shape is None:
        return False
    if types.opset >= 5:
        value = constant_value(node.inputs[1])
        if value is None:
            return False
        target = [int(v) for v in value.reshape(-1)]
    else:
        target = [int(v) for v in node.attrs["shape"]]
    if len(target) != len(shape):
        return False
    copies = not attribute(node, "allowzero", 0)
    different = [t for t, size in zip(target, shape, strict=True) if t != size and not (t == 0 and copies)]
    return different in ([], [-1])  # a single -1 is what the other axes leave, and these are equal


def _flatten(node: gs.Node, types: _Bypass) -> bool:
    shape = types.shape(node.inputs[0])
    return shape is not None and len(shape) == 2 and attribute(node, "axis", 1) in (1, -1)


def _squeeze(node: gs.Node, types: _Bypass) -> bool:
    if attribute(node, "axes") is not None or any(t.name for t in node.inputs[1:]):
        return False
    shape = types.shape(node.inputs[0])
    return shape is not None and all(isinstance(size, int) and size != 1 for size in shape)


def _unsqueeze(node: gs.Node, types: _Bypass) -> bool:
    if types.opset < 13:
        return bool(attribute(node, "axes") == [])
    axes = constant_value(node.inputs[1])
    return axes is not None and axes.size == 0


_RULES: dict[str, Callable[[gs.Node, _Bypass], bool]] = {
    "Cast": _cast,
    "Concat": _of_one,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Identity": _always,
    "Max": _of_one,
    "Mean": _of_one,
    "Min": _of_one,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sum": _of_one,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
_NEEDS_TYPES = frozenset(("Cast", "Expand", "Flatten", "Reshape", "Slice", "Squeeze", "Transpose"))


# ---- dead nodes ------------------------------------------------------------------------------------------------


def _remove_dead(graph: Graph) -> Iterator[Change]:
    """Remove the nodes that no graph output depends on, in nested graphs too."""
    alive: set[int] = set()
    waiting: list[gs.Tensor] = list(graph.outputs)
    while waiting:
        for node in waiting.pop().inputs:
            if id(node) in alive:
                continue
            alive.add(id(node))
            waiting.extend(node.inputs)
            for part in nested_graphs(node):  # its outputs are read by position, so all of them are
                waiting.extend(part.outputs)
    dead: list[gs.Node] = []
    for part in walk_graphs(graph):
        for node in part.nodes:
            if id(node) not in alive:
                dead.append(node)
                yield Change("removed", _label(node), f"{node.op} that no output depends on")
    remove_nodes(graph, dead)


def _label(node: gs.Node) -> str:
    return str(node.name or first_output(node))
