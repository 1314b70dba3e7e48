"""Cutting channels out of a graph, exactly, and the masked graph that the result has to equal.

:func:`remove_channels` drops positions from every weight that a group names and rewrites what counts channels: the
group of a convolution, sizes of a Split, amounts of a Pad, bounds of a Slice, indices of a Gather, targets of Reshape,
Expand and Resize. :func:`masked` keeps all shapes and multiplies, at every node that sums over channels, the removed
ones by zero. Both compute the same, up to the order of floating-point operations: nothing that a bias or a
BatchNormalization puts into a removed channel gets past a consumer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.errors import OnnxCompressError, UsageError
from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    change_constant,
    constant_value,
    copy_graph,
    first_output,
    remove_nodes,
    set_constant,
    sort_nodes,
)
from onnxcompress.node_evaluation import slice_window
from onnxcompress.pruning.coupling import Coupling, CouplingGroup, couple
from onnxcompress.pruning.movement import split_sizes
from onnxcompress.pruning.walk import Permutation, Size
from onnxcompress.shapes import infer_shapes

__all__ = ["Cuts", "cut_positions", "masked", "removal_mask", "remove_channels"]

Ints = NDArray[np.int64]
Keep = Mapping[str, Sequence[int] | Ints]
#: {tensor: {axis: positions that are kept, sorted}}
Cuts = dict[str, dict[int, Ints]]


def removal_mask(groups: Sequence[CouplingGroup], keep: Keep) -> dict[str, dict[int, NDArray[np.bool_]]]:
    """{tensor: {axis: which positions stay}} for every axis of which ``keep`` removes something.

    Groups that ``keep`` does not name stay as they are.

    Raises:
        UsageError: ``keep`` names an unknown or pinned group, a channel that it lacks, or leaves an axis without any.
    """
    by_name = {group.name: group for group in groups}
    masks: dict[str, dict[int, NDArray[np.bool_]]] = defaultdict(dict)
    for name, channels in keep.items():
        group = by_name.get(name)
        if group is None:
            raise UsageError(f"there is no coupling group {name!r}; inspect --coupling lists them")
        stays = np.zeros(group.channels, bool)
        index = np.asarray(channels, np.int64).reshape(-1)
        if index.size and not (int(index.min()) >= 0 and int(index.max()) < group.channels):
            raise UsageError(f"group {name!r} has the channels 0 to {group.channels - 1}, found {index.tolist()}")
        stays[index] = True
        if stays.all():
            continue
        if group.pinned is not None:
            raise UsageError(f"nothing of group {name!r} can be removed: {group.pinned}")
        for member in group.members:
            kept = np.where(member.channel_of < 0, True, stays[np.maximum(member.channel_of, 0)])
            known = masks[member.tensor].get(member.axis)
            masks[member.tensor][member.axis] = kept if known is None else known & kept
    for tensor, axes in masks.items():
        for axis, stays in axes.items():
            if not stays.any():
                raise UsageError(f"axis {axis} of tensor {tensor!r} would be left without positions; keep at least one")
    return dict(masks)


def cut_positions(groups: Sequence[CouplingGroup], keep: Keep) -> Cuts:
    """:func:`removal_mask` as positions that are kept."""
    masks = removal_mask(groups, keep)
    return {name: {axis: np.flatnonzero(stays) for axis, stays in axes.items()} for name, axes in masks.items()}


def remove_channels(
    graph: Graph, groups: Sequence[CouplingGroup], keep: Keep, coupling: Coupling | None = None
) -> tuple[Graph, Cuts]:
    """A copy of ``graph`` with the channels that ``keep`` leaves out cut off, and what is kept of each tensor.

    Args:
        graph: not changed.
        groups: as :func:`~onnxcompress.pruning.coupling.coupling_groups` gives them for this graph.
        keep: {group: channels that stay}; a group that is not named stays whole.
        coupling: what :func:`~onnxcompress.pruning.coupling.couple` found for this graph; None: found again.

    Raises:
        UsageError: as :func:`removal_mask`.
    """
    cuts = cut_positions(groups, keep)
    result = copy_graph(graph)
    if cuts:
        surgery = _Surgery(result, cuts, coupling if coupling is not None else couple(graph))
        surgery.run()
    return result, cuts


def masked(graph: Graph, groups: Sequence[CouplingGroup], keep: Keep, coupling: Coupling | None = None) -> Graph:
    """A copy of ``graph`` of the same shapes in which every consumer reads zeros for the removed channels.

    Arguments and errors are those of :func:`remove_channels`.
    """
    masks = removal_mask(groups, keep)
    coupling = coupling if coupling is not None else couple(graph)
    result = copy_graph(graph)
    types = infer_shapes(result)
    names = Names(result)
    nodes = {node.name: node for node in result.nodes}
    read = {(node.name, index): tensor.name for node in result.nodes for index, tensor in enumerate(node.inputs)}
    for name, index, axis in coupling.reads:
        source = read[name, index]
        stays = masks.get(source, {}).get(axis)
        if stays is not None:
            shape = [-1 if a == axis else 1 for a in range(len(coupling.dims[source]))]
            known = types.get(source)
            dtype = known.dtype if known is not None and known.dtype is not None else np.dtype(np.float32)
            nodes[name].inputs[index] = _masked(
                result, nodes[name].inputs[index], stays.astype(dtype).reshape(shape), names
            )
    sort_nodes(result)
    return result


def _masked(graph: Graph, tensor: gs.Tensor, factor: NDArray[Any], names: Names) -> gs.Variable:
    out = gs.Variable(names.free(f"{tensor.name}_masked"), factor.dtype)
    mask = gs.Constant(names.free(f"{tensor.name}_mask"), factor)
    graph.nodes.append(gs.Node("Mul", names.free(f"mask_{tensor.name}"), inputs=[tensor, mask], outputs=[out]))
    return out


# ---- surgery -------------------------------------------------------------------------------------------------------


@dataclass
class _Surgery:
    graph: Graph
    cuts: Cuts
    coupling: Coupling

    def run(self) -> None:
        self.names = Names(self.graph)
        self.opset = int(self.graph.opset)
        self.old = self._old_lengths()
        permutations = {p.nodes[2]: p for p in self.coupling.permutations}
        replaced: list[gs.Node] = []
        given = list(self.graph.nodes)  # what surgery adds is right already
        for node in given:
            if node.name in permutations:
                replaced += self._permute(node, permutations[node.name])
        skipped = {id(node) for node in replaced}
        for node in given:
            rewrite = _REWRITES.get(node.op)
            if rewrite is not None and id(node) not in skipped and self._touches(node):
                rewrite(self, node)
        remove_nodes(self.graph, replaced)
        self._cut_tensors()
        sort_nodes(self.graph)

    def _old_lengths(self) -> dict[str, list[int]]:
        return {name: [d.size for d in dims] for name, dims in self.coupling.dims.items()}

    def _touches(self, node: gs.Node) -> bool:
        return any(t.name in self.cuts for t in (*node.inputs, *node.outputs))

    def kept(self, tensor: gs.Tensor, axis: int) -> Ints | None:
        """Positions kept of an axis; None where it is whole."""
        return self.cuts.get(tensor.name, {}).get(axis)

    def length(self, tensor: gs.Tensor, axis: int) -> int:
        """New length of an axis, in one period of it."""
        kept = self.kept(tensor, axis)
        return self.old[tensor.name][axis] if kept is None else len(kept)

    def positions(self, tensor: gs.Tensor, axis: int) -> Ints:
        """Old positions that are kept."""
        kept = self.kept(tensor, axis)
        return np.arange(self.old[tensor.name][axis]) if kept is None else kept

    def constant(self, node: gs.Node, index: int, value: NDArray[Any]) -> None:
        """Give ``node`` a constant of its own for input ``index``."""
        stem = node.inputs[index].name if index < len(node.inputs) and node.inputs[index].name else first_output(node)
        set_constant(node, index, self.names.free(f"{stem}_kept"), value)

    def _cut_tensors(self) -> None:
        done: set[int] = set()
        for node in self.graph.nodes:
            for tensor in node.inputs:
                if id(tensor) in done or tensor.name not in self.cuts:
                    continue
                done.add(id(tensor))
                value = constant_value(tensor)
                if value is not None:
                    for axis, kept in self.cuts[tensor.name].items():
                        value = np.take(value, kept, axis)
                    change_constant(tensor, value)
            for tensor in node.outputs:
                self._shrink(tensor)
        for tensor in self.graph.outputs:
            if tensor.name in self.cuts:
                raise OnnxCompressError(f"the graph output {tensor.name!r} was cut; please report it with the model")

    def _shrink(self, tensor: gs.Tensor) -> None:
        cut = self.cuts.get(tensor.name)
        if cut and isinstance(tensor, gs.Variable) and tensor.shape is not None:
            shape = list(tensor.shape)
            for axis, kept in cut.items():
                old = self.old[tensor.name][axis]
                if isinstance(shape[axis], int) and shape[axis] > 0:
                    shape[axis] = shape[axis] // old * len(kept)
            tensor.shape = shape

    # ---- what counts channels

    def _permute(self, node: gs.Node, permutation: Permutation) -> list[gs.Node]:
        """A channel shuffle of which something was cut becomes a Gather."""
        middle = node.inputs[0].inputs[0]
        first = middle.inputs[0].inputs[0]
        x, out, axis = first.inputs[0], node.outputs[0], permutation.axis
        if self.kept(x, axis) is None and self.kept(out, axis) is None:
            return []
        entering, leaving = self.positions(x, axis), self.positions(out, axis)
        indices = gs.Constant(
            self.names.free(f"{out.name}_order"), np.searchsorted(entering, permutation.order[leaving])
        )
        gather = gs.Node("Gather", self.names.free(f"{node.name}_gather"), {"axis": axis}, [x, indices], [])
        node.outputs.clear()
        gather.outputs.append(out)
        self.graph.nodes.append(gather)
        return [first, middle, node]

    def conv(self, node: gs.Node) -> None:
        group = int(attribute(node, "group", 1))
        if group > 1:
            node.attrs["group"] = self.length(node.inputs[0], 1) // self.length(node.inputs[1], 1)

    def conv_transpose(self, node: gs.Node) -> None:
        group = int(attribute(node, "group", 1))
        if group > 1:
            node.attrs["group"] = self.length(node.outputs[0], 1) // self.length(node.inputs[1], 1)

    def group_normalization(self, node: gs.Node) -> None:
        size = self.old[node.inputs[0].name][1] // int(node.attrs["num_groups"])
        node.attrs["num_groups"] = self.length(node.inputs[0], 1) // size

    def attention(self, node: gs.Node) -> None:
        for name, index in (("q_num_heads", 0), ("kv_num_heads", 1)):
            tensor = node.inputs[index]
            if name in node.attrs and len(self.old[tensor.name]) == 3:
                size = self.old[tensor.name][2] // int(node.attrs[name])
                node.attrs[name] = self.length(tensor, 2) // size

    def reshape(self, node: gs.Node) -> None:
        self._target(node, 1, not attribute(node, "allowzero", 0))

    def expand(self, node: gs.Node) -> None:
        self._target(node, 1, False)

    def resize(self, node: gs.Node) -> None:
        if len(node.inputs) > 3 and node.inputs[3].name:
            self._target(node, 3, False, attribute(node, "axes"))

    def _target(self, node: gs.Node, index: int, zero_copies: bool, axes: Sequence[int] | None = None) -> None:
        """Rewrite lengths in a shape input; where it is computed, add what the constant elements change by."""
        x, out = node.inputs[0], node.outputs[0]
        shape = node.inputs[index]
        value = constant_value(shape)
        elements = value if value is not None else self.coupling.vectors.get(shape.name)
        if elements is None:
            return
        rank = len(self.old[out.name])
        change = np.zeros(len(elements), np.int64)
        for position, element in enumerate(elements):
            axis = int(axes[position]) % rank if axes is not None else position + rank - len(elements)
            old, new = self.old[out.name][axis], self.length(out, axis)
            if isinstance(element, Size) or element is None:
                continue
            if int(element) == 0 and zero_copies:
                if old != new or (axis < len(self.old[x.name]) and self.length(x, axis) != self.old[x.name][axis]):
                    same = axis < len(self.old[x.name]) and self.length(x, axis) == new
                    change[position] = 0 if same else new
                continue
            if old != new and int(element) > 0 and int(element) % old == 0:
                change[position] = int(element) // old * (new - old)
        if not change.any():
            return
        if value is not None:
            self.constant(node, index, value + change)
            return
        summed = gs.Variable(self.names.free(f"{shape.name}_kept"), np.int64)
        amount = gs.Constant(self.names.free(f"{shape.name}_change"), change)
        name = self.names.free(f"{node.name}_target")
        self.graph.nodes.append(gs.Node("Add", name, inputs=[shape, amount], outputs=[summed]))
        node.inputs[index] = summed

    def split(self, node: gs.Node) -> None:
        x = node.inputs[0]
        axis = int(attribute(node, "axis", 0)) % len(self.old[x.name])
        if self.kept(x, axis) is None and all(self.kept(t, axis) is None for t in node.outputs if t.name):
            return
        given = constant_value(node.inputs[1]) if self.opset >= 13 and len(node.inputs) > 1 else None
        sizes = split_sizes(node, self.opset, self.old[x.name][axis], given)
        bounds = np.cumsum([0, *sizes])
        kept = self.positions(x, axis)
        counts = np.diff(np.searchsorted(kept, bounds)).astype(np.int64)
        if self.opset < 13:
            node.attrs["split"] = counts.tolist()
        else:
            node.attrs.pop("num_outputs", None)
            self.constant(node, 1, counts)

    def pad(self, node: gs.Node) -> None:
        x, out = node.inputs[0], node.outputs[0]
        rank = len(self.old[x.name])
        given = constant_value(node.inputs[1]) if self.opset >= 11 else None
        amounts = np.array(given if given is not None else attribute(node, "pads", attribute(node, "paddings")))
        listed = constant_value(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3].name else None
        axes = list(range(rank)) if listed is None else [int(a) % rank for a in listed.reshape(-1)]
        amounts = amounts.astype(np.int64)
        for number, axis in enumerate(axes):
            if self.kept(out, axis) is None:
                continue
            before, length = int(amounts[number]), self.old[x.name][axis]
            kept = self.positions(out, axis)
            amounts[number] = int((kept < before).sum())
            amounts[number + len(axes)] = int((kept >= before + length).sum())
        if self.opset >= 11:
            self.constant(node, 1, amounts)
        else:
            node.attrs["pads"] = amounts.tolist()

    def gather(self, node: gs.Node) -> None:
        x = node.inputs[0]
        axis = int(attribute(node, "axis", 0)) % len(self.old[x.name])
        indices = constant_value(node.inputs[1])
        if indices is None or self.kept(x, axis) is None:
            return  # computed indices read an axis that is whole
        chosen = np.where(indices < 0, indices + self.old[x.name][axis], indices)
        if chosen.ndim == 1:
            chosen = chosen[self.positions(node.outputs[0], axis)]
        self.constant(node, 1, np.searchsorted(self.positions(x, axis), chosen).astype(indices.dtype))

    def slice(self, node: gs.Node) -> None:
        x, out = node.inputs[0], node.outputs[0]
        cut = [a for a in range(len(self.old[x.name])) if self.kept(x, a) is not None or self.kept(out, a) is not None]
        if not cut:
            return
        bounds = self._bounds(node)
        for axis in cut:
            if axis not in bounds:
                continue
            start, end, step = bounds[axis]
            old = np.arange(self.old[x.name][axis])[slice_window(start, end, step, self.old[x.name][axis])]
            picked = np.searchsorted(self.positions(x, axis), old[self.positions(out, axis)])
            window = _as_window(picked)
            if window is None:
                self._gather_after(node, axis, picked)
                del bounds[axis]
            else:
                bounds[axis] = window
        self._set_bounds(node, bounds)

    def _bounds(self, node: gs.Node) -> dict[int, tuple[int, int, int]]:
        rank = len(self.old[node.inputs[0].name])
        if self.opset < 10:
            starts, ends, axes = node.attrs["starts"], node.attrs["ends"], attribute(node, "axes")
            steps = None
        else:
            lists = [self._elements(node, i) for i in range(1, 5)]
            starts, ends, axes, steps = lists[0] or [], lists[1] or [], lists[2], lists[3]
        axes = range(len(starts)) if axes is None else axes
        steps = [1] * len(starts) if steps is None else steps
        return {int(a) % rank: (b, e, s) for a, b, e, s in zip(axes, starts, ends, steps, strict=True)}

    def _elements(self, node: gs.Node, index: int) -> list[Any] | None:
        if index >= len(node.inputs) or not node.inputs[index].name:
            return None
        value = constant_value(node.inputs[index])
        found = value if value is not None else self.coupling.vectors[node.inputs[index].name]
        return [int(e) if not isinstance(e, Size) and e is not None else e for e in found.reshape(-1)]

    def _gather_after(self, node: gs.Node, axis: int, picked: Ints) -> None:
        """Pick what no window of a Slice gives."""
        out = node.outputs[0]
        between = gs.Variable(self.names.free(f"{out.name}_whole"), out.dtype)
        indices = gs.Constant(self.names.free(f"{out.name}_picked"), picked.astype(np.int64))
        node.outputs.clear()
        node.outputs.append(between)
        name = self.names.free(f"{node.name}_gather")
        self.graph.nodes.append(gs.Node("Gather", name, {"axis": axis}, [between, indices], [out]))
        self.old[between.name] = self.old[out.name]

    def _set_bounds(self, node: gs.Node, bounds: Mapping[int, tuple[Any, Any, int]]) -> None:
        columns = list(zip(*((b, e, a, s) for a, (b, e, s) in bounds.items()), strict=True)) or [(), (), (), ()]
        if self.opset < 10:
            node.attrs["starts"], node.attrs["ends"], node.attrs["axes"] = (list(x) for x in columns[:3])
            return
        for index, values in enumerate(columns, start=1):
            if all(isinstance(v, int) for v in values):
                self.constant(node, index, np.array(values, np.int64))
            elif self._elements(node, index) != list(values):
                raise OnnxCompressError(
                    f"Slice {node.name!r} cuts computed and channel bounds at once; please report it"
                )


def _as_window(picked: Ints) -> tuple[int, int, int] | None:
    """Start, end and step of a Slice that gives ``picked``; None where no Slice does."""
    first, last = int(picked[0]), int(picked[-1])
    step = int(picked[1]) - first if len(picked) > 1 else 1
    if step == 0 or not np.array_equal(picked, first + step * np.arange(len(picked))):
        return None
    end = last + (1 if step > 0 else -1)
    return first, end if end >= 0 else -(2**31), step


_REWRITES: Mapping[str, Callable[[_Surgery, gs.Node], None]] = {
    "Attention": _Surgery.attention,
    "Conv": _Surgery.conv,
    "ConvTranspose": _Surgery.conv_transpose,
    "Expand": _Surgery.expand,
    "Gather": _Surgery.gather,
    "GroupNormalization": _Surgery.group_normalization,
    "Pad": _Surgery.pad,
    "Reshape": _Surgery.reshape,
    "Resize": _Surgery.resize,
    "Slice": _Surgery.slice,
    "Split": _Surgery.split,
}
