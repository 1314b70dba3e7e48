"""Rules of the operators that move data: labels move as the data does (see :mod:`onnxcompress.pruning.rules`).

Small integer tensors, the targets and bounds of such operators, are followed element by element
(:class:`~onnxcompress.pruning.walk.Size`), because exporters compute them from the shapes of labelled tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.graph import attribute
from onnxcompress.node_evaluation import DATA_MOVEMENT, move_data, shape_range, slice_window
from onnxcompress.pruning.dims import ONE, Dim, inner_symbols, match_axes, periods, product
from onnxcompress.pruning.labels import Bundle
from onnxcompress.pruning.walk import LONGEST_SHAPE, Coupler, Permutation, Size, Unsupported

__all__ = ["MOVEMENT", "READS_SIZES", "normal_axis", "reshape_target", "split_sizes"]

Ints = NDArray[np.int64]
Roots = Callable[[Ints], Ints]
Join = Callable[[Ints, Ints], None]


def normal_axis(axis: int, rank: int) -> int:
    """``axis`` counted from the front.

    Raises:
        Unsupported: there is no such axis.
    """
    if not -rank <= axis < rank:
        raise Unsupported(f"axis {axis} of rank {rank}")
    return axis % rank


# ---- shape vectors -------------------------------------------------------------------------------------------------

#: operators that are told what a length does to them
READS_SIZES = frozenset(("Reshape", "Expand", "Resize", "Shape", "Constant"))


def _vector(c: Coupler, node: gs.Node) -> NDArray[Any] | None:
    """Elements of the output where all inputs are small integer tensors that are followed."""
    inputs: list[NDArray[Any] | None] = []
    followed = False
    for index, tensor in enumerate(node.inputs):
        state = c.state(tensor) if tensor.name else None
        if state is None:
            inputs.append(None)
        elif state.vector is None:
            return None
        elif index == 0 or node.op == "Concat":
            inputs.append(state.vector)
            followed = followed or not state.constant
        elif any(not isinstance(e, int) for e in state.vector.reshape(-1)):
            return None
        else:
            inputs.append(state.vector.astype(np.int64))
    if not followed:
        return None
    if node.op == "Cast":
        return inputs[0]
    if node.op not in DATA_MOVEMENT:
        return None
    try:
        found = move_data(node, inputs, c.opset, 1 << 20)[0]
    except (ValueError, IndexError, TypeError, KeyError):
        return None
    return found if found.size <= LONGEST_SHAPE else None


def _following(rule: Callable[[Coupler, gs.Node], None]) -> Callable[[Coupler, gs.Node], None]:
    """``rule``, or what it does to a small integer tensor."""

    def follow(c: Coupler, node: gs.Node) -> None:
        vector = _vector(c, node)
        if vector is None:
            rule(c, node)
        else:
            c.set(node.outputs[0], tuple(Dim(n) for n in vector.shape), vector=vector)

    return follow


def _shape(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    state, dims = c.state(x), c.dims(x)
    start, end = shape_range(node, len(dims))
    elements = np.empty(end - start, object)
    for position, axis in enumerate(range(start, end)):
        plain = dims[axis].known and state.at(axis) is None
        elements[position] = dims[axis].size if plain else Size(dims[axis], x.name, axis)
    c.set(node.outputs[0], (Dim(len(elements)),), vector=elements)


def _target(c: Coupler, node: gs.Node, index: int) -> list[Any] | None:
    """Elements of a shape input, None for unknown ones; None where even their number is not known."""
    if index >= len(node.inputs) or not node.inputs[index].name:
        return None
    vector = c.state(node.inputs[index]).vector
    return None if vector is None else list(vector.reshape(-1))


def _element_dim(element: Any) -> Dim | None:
    if isinstance(element, Size):
        return element.dim
    return Dim(int(element)) if isinstance(element, int) and element >= 0 else None


# ---- Reshape and its like ------------------------------------------------------------------------------------------


def reshape_target(c: Coupler, node: gs.Node) -> tuple[tuple[Dim, ...], list[Any] | None]:
    """Dimensions after a Reshape, and the elements of its target as far as they are followed."""
    before = c.dims(node.inputs[0])
    elements = _target(c, node, 1)
    declared = c.declared(node.outputs[0])
    if elements is None:
        if declared is None:
            raise Unsupported("its target is computed and not known")
        return _fill(declared, before), None
    dims: list[Dim | None] = []
    for axis, element in enumerate(elements):
        if element == 0 and not attribute(node, "allowzero", 0):
            dims.append(before[axis])
        elif isinstance(element, int) and element == -1:
            dims.append(None)
        else:
            dims.append(_element_dim(element) or (declared[axis] if declared is not None else None))
    if dims.count(None) == 1:
        rest = product(before).over(product([d for d in dims if d is not None]))
        dims = [rest if d is None else d for d in dims]
    if any(d is None for d in dims):
        raise Unsupported("its target is computed and not known")
    return tuple(d for d in dims if d is not None), elements


def _fill(dims: tuple[Dim, ...], before: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """One dimension that inference does not know follows from the number of elements."""
    unknown = [i for i, d in enumerate(dims) if any(s.startswith("?") for s in d.symbols)]
    if len(unknown) != 1:
        return dims
    rest = product(before).over(product([d for i, d in enumerate(dims) if i != unknown[0]]))
    return dims if rest is None else (*dims[: unknown[0]], rest, *dims[unknown[0] + 1 :])


def regroup(
    bundle: Bundle, before: Sequence[Dim], after: Sequence[Dim], roots: Roots, join: Join | None = None
) -> Bundle | None:
    """``bundle`` of a tensor of shape ``before`` as it lies in the tensor of shape ``after``; None where it cannot be.

    Axes along which all classes agree are left out. ``join`` ties labels together where only blocks can be told apart;
    without it there is no answer then.
    """
    runs = match_axes(before, after)
    if runs is None:
        return None
    touched = [run for run in runs if set(run[0]) & set(bundle.axes)]
    axes_before = [a for run in touched for a in run[0]]
    axes_after = [a for run in touched for a in run[1]]
    sizes_before: list[int] = []
    sizes_after: list[int] = []
    blocks: list[int] = []
    for run in touched:
        dims = [before[a] for a in run[0]], [after[a] for a in run[1]]
        old, new = periods(dims[0]), periods(dims[1])
        if old is None or new is None:
            old, new = inner_symbols(dims[0]), inner_symbols(dims[1])
            if old is None or new is None or any(before[a].symbols for a in run[0] if a in bundle.axes):
                return None
            blocks += [len(sizes_after) + i for i, d in enumerate(dims[1]) if d.symbols and d.size > 1]
        if np.prod(old, dtype=np.int64) != np.prod(new, dtype=np.int64):
            return None
        sizes_before += old
        sizes_after += new
    spread = [sizes_before[i] if a in bundle.axes else 1 for i, a in enumerate(axes_before)]
    labels = np.broadcast_to(bundle.labels.reshape(spread), sizes_before).reshape(sizes_after)
    for axis in blocks:
        if join is None:
            return None
        join(np.take(labels, [0], axis), labels)
    classes = roots(labels)
    keep = [
        i for i in range(len(axes_after)) if sizes_after[i] > 1 and (classes != np.take(classes, [0], axis=i)).any()
    ]
    if not keep:  # one class: the whole of the longest axis
        keep = [int(np.argmax([1 if i in blocks else n for i, n in enumerate(sizes_after)]))]
    picked = labels[tuple(slice(None) if i in keep else 0 for i in range(len(axes_after)))]
    return Bundle(tuple(axes_after[i] for i in keep), np.ascontiguousarray(picked))


def _reshape(c: Coupler, node: gs.Node) -> None:
    x, out = node.inputs[0], node.outputs[0]
    before = c.dims(x)
    after, elements = reshape_target(c, node)
    bundles: list[Bundle] = []
    # where two meet on one axis the outer one stays free, unless it is pinned anyway
    for bundle in sorted(c.state(x).bundles, key=lambda b: (bool(c.labels.pinned(b.labels).all()), b.axes)):
        moved = regroup(bundle, before, after, c.labels.roots, c.labels.join)
        if moved is None or any(set(moved.axes) & set(b.axes) for b in bundles):
            c.labels.pin(bundle.labels, f"{node.op} {node.name!r} mixes it with other axes")
        else:
            bundles.append(moved)
    c.set(out, after, bundles, constant=c.state(x).constant)
    _tie_elements(c, node, elements, after, bundles)
    _find_permutation(c, node)


def _tie_elements(
    c: Coupler, node: gs.Node, elements: list[Any] | None, dims: Sequence[Dim], bundles: Sequence[Bundle]
) -> None:
    """Computed lengths in a target have to follow the axis that they are for."""
    cut = {axis for b in bundles for axis in b.axes}
    if elements is None:
        for bundle in bundles:
            c.labels.pin(bundle.labels, f"{node.op} {node.name!r} has a target that is computed")
        return
    for axis, element in enumerate(elements):
        if isinstance(element, Size):
            c.same_length(element, node.outputs[0], axis)
        elif element is None and axis in cut:
            c.pin(node.outputs[0], f"{node.op} {node.name!r} has a target that is computed", [axis])


def _find_permutation(c: Coupler, last: gs.Node) -> None:
    """Remember Reshape, Transpose, Reshape that permute one axis: it can be cut anywhere, the tensors inside cannot."""
    middle = last.inputs[0].inputs[0] if len(last.inputs[0].inputs) == 1 else None
    if middle is None or middle.op != "Transpose":
        return
    first = middle.inputs[0].inputs[0] if len(middle.inputs[0].inputs) == 1 else None
    if first is None or first.op != "Reshape":
        return
    inside = (first.outputs[0], middle.outputs[0])
    leaving = {id(t) for t in c.graph.outputs}
    if any(len(t.outputs) != 1 or id(t) in leaving or c.state(t).dims is None for t in inside):
        return
    before, after = c.dims(first.inputs[0]), c.dims(last.outputs[0])
    if before != after or len(before) < 2:
        return
    split = c.dims(inside[0])
    perm = [int(p) for p in attribute(middle, "perm", range(len(split))[::-1])]
    moved: list[tuple[int, Ints]] = []
    for axis, dim in enumerate(before):
        if dim.size == 1:
            continue
        start = Bundle((axis,), np.arange(dim.size))
        taken = regroup(start, before, split, np.asarray)
        turned = None if taken is None else taken.moved([perm.index(a) for a in taken.axes])
        end = None if turned is None else regroup(turned, c.dims(inside[1]), after, np.asarray)
        if end is None or end.axes != (axis,):
            return
        if not np.array_equal(end.labels, start.labels):
            moved.append((axis, end.labels))
    if len(moved) == 1 and before[moved[0][0]].known:
        c.permutations.append(Permutation((first.name, middle.name, last.name), *moved[0]))
        c.inner.update(t.name for t in inside)


def _relabelled(c: Coupler, node: gs.Node, after: Sequence[Dim]) -> None:
    """Flatten, Squeeze, Unsqueeze: a Reshape whose target cannot be wrong."""
    x = node.inputs[0]
    bundles: list[Bundle] = []
    for bundle in c.state(x).bundles:
        moved = regroup(bundle, c.dims(x), after, c.labels.roots, c.labels.join)
        if moved is None or any(set(moved.axes) & set(b.axes) for b in bundles):
            raise Unsupported("it mixes axes of unknown size")
        bundles.append(moved)
    c.set(node.outputs[0], after, bundles, constant=c.state(x).constant)


def _flatten(c: Coupler, node: gs.Node) -> None:
    dims = c.dims(node.inputs[0])
    axis = int(attribute(node, "axis", 1))
    axis += len(dims) if axis < 0 else 0
    _relabelled(c, node, (product(dims[:axis]), product(dims[axis:])))


def _listed_axes(c: Coupler, node: gs.Node) -> list[int] | None:
    given = c.value(node, 1) if c.opset >= 13 else attribute(node, "axes")
    return None if given is None else [int(a) for a in np.asarray(given).reshape(-1)]


def _squeeze(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    dims = c.dims(x)
    listed = _listed_axes(c, node)
    if listed is None and any(not d.known for d in dims):
        raise Unsupported("which axes it drops is not known")
    gone = (
        [i for i, d in enumerate(dims) if d == ONE] if listed is None else [normal_axis(a, len(dims)) for a in listed]
    )
    renamed = {a: i for i, a in enumerate(a for a in range(len(dims)) if a not in gone)}
    bundles = []
    for bundle in c.state(x).bundles:
        if set(bundle.axes) & set(gone):
            raise Unsupported("it drops a labelled axis")
        bundles.append(bundle.moved([renamed[a] for a in bundle.axes]))
    c.set(node.outputs[0], [d for i, d in enumerate(dims) if i not in gone], bundles, constant=c.state(x).constant)


def _unsqueeze(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    listed = _listed_axes(c, node)
    if listed is None:
        raise Unsupported("its axes are missing")
    rank = len(c.dims(x)) + len(listed)
    new = {normal_axis(a, rank) for a in listed}
    old = [a for a in range(rank) if a not in new]
    dims = iter(c.dims(x))
    after = [ONE if a in new else next(dims) for a in range(rank)]
    bundles = [b.moved([old[a] for a in b.axes]) for b in c.state(x).bundles]
    c.set(node.outputs[0], after, bundles, constant=c.state(x).constant)


def _transpose(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    dims = c.dims(x)
    perm = [int(p) for p in attribute(node, "perm", range(len(dims))[::-1])]
    where = {old: new for new, old in enumerate(perm)}
    bundles = [b.moved([where[a] for a in b.axes]) for b in c.state(x).bundles]
    c.set(node.outputs[0], [dims[p] for p in perm], bundles, constant=c.state(x).constant)


def _same(c: Coupler, node: gs.Node) -> None:
    state = c.state(node.inputs[0])
    for tensor in node.outputs:
        c.set(tensor, state.dims, state.bundles, constant=state.constant)


# ---- picking positions ---------------------------------------------------------------------------------------------


def _pick(c: Coupler, node: gs.Node, output: gs.Tensor, picks: Mapping[int, Ints]) -> None:
    """``output`` holds the positions ``picks[axis]`` of each axis named, and all of the others."""
    x = node.inputs[0]
    dims = list(c.dims(x))
    bundles = list(c.state(x).bundles)
    for axis, positions in picks.items():
        bundles = [_take(b, axis, positions) for b in bundles]
        dims[axis] = Dim(len(positions))
    c.set(output, dims, [b for b in bundles if b.labels.size], constant=c.state(x).constant)


def _take(bundle: Bundle, axis: int, positions: Ints) -> Bundle:
    if axis not in bundle.axes:
        return bundle
    labels = np.take(bundle.labels, positions, bundle.axes.index(axis))
    if len(positions) == 1 and len(bundle.axes) > 1:  # queries among queries, keys and values: no axis to cut any more
        return Bundle(tuple(a for a in bundle.axes if a != axis), labels.squeeze(bundle.axes.index(axis)))
    return Bundle(bundle.axes, labels)


def _slice(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    dims = list(c.dims(x))
    axes: list[int] | None
    if c.opset < 10:
        starts, ends = list(node.attrs["starts"]), list(node.attrs["ends"])
        axes, steps = attribute(node, "axes"), None
    else:
        given = [_target(c, node, index) for index in range(1, 5)]
        if given[0] is None or given[1] is None:
            raise Unsupported("its bounds are computed")
        starts, ends, axes, steps = given[0], given[1], given[2], given[3]
        if any(len(node.inputs) > i and node.inputs[i].name and given[i - 1] is None for i in (3, 4)):
            raise Unsupported("its axes are computed")
    axes = list(range(len(starts))) if axes is None else [normal_axis(int(a), len(dims)) for a in axes]
    declared = c.declared(node.outputs[0])
    picks: dict[int, Ints] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        whole = start == 0 and step == 1 and isinstance(end, int) and end >= 2**31 - 1
        if whole:
            continue
        if c.state(x).at(axis) is None:
            dims[axis] = declared[axis] if declared is not None else Dim(1, (f"?{node.name}.{axis}",))
            continue
        if not dims[axis].known or not all(isinstance(v, int) for v in (start, end, step)):
            raise Unsupported("it cuts a labelled axis at bounds that are not known")
        picks[axis] = np.arange(dims[axis].size)[slice_window(start, end, step, dims[axis].size)]
    bundles = list(c.state(x).bundles)
    for axis, positions in picks.items():
        bundles = [_take(b, axis, positions) for b in bundles]
        dims[axis] = Dim(len(positions))
    c.set(node.outputs[0], dims, [b for b in bundles if b.labels.size], constant=c.state(x).constant)


def _gather(c: Coupler, node: gs.Node) -> None:
    x, indices = node.inputs[0], node.inputs[1]
    dims = c.dims(x)
    axis = normal_axis(int(attribute(node, "axis", 0)), len(dims))
    shape = c.dims(indices)
    if c.state(indices).constant:
        value = c.value(node, 1)
        assert value is not None
        if value.ndim <= 1:
            _gather_constant(c, node, axis, value)
            return
    if c.state(indices).bundles and not c.state(indices).constant:
        c.pin(indices, f"{node.op} {node.name!r} looks up by it")
    c.pin(x, f"{node.op} {node.name!r} looks up positions that are computed", [axis])
    renamed = {a: a if a < axis else a + len(shape) - 1 for a in range(len(dims))}
    bundles = [b.moved([renamed[a] for a in b.axes]) for b in c.state(x).bundles if axis not in b.axes]
    if c.state(x).constant:
        for bundle in bundles:
            _made_by(c, node, bundle)
    c.set(node.outputs[0], [*dims[:axis], *shape, *dims[axis + 1 :]], bundles)


def _made_by(c: Coupler, node: gs.Node, bundle: Bundle) -> None:
    if len(bundle.axes) == 1:
        c.produces(node, bundle.axes[0])


def _gather_constant(c: Coupler, node: gs.Node, axis: int, value: NDArray[Any]) -> None:
    x = node.inputs[0]
    dims = c.dims(x)
    state = c.state(x)
    if value.ndim == 1:
        if state.at(axis) is not None and not dims[axis].known:
            raise Unsupported("it picks from a labelled axis of unknown length")
        positions = np.where(value < 0, value + dims[axis].size, value).astype(np.int64)
        _pick(c, node, node.outputs[0], {axis: positions})
        return
    position = int(value) + (dims[axis].size if value < 0 else 0)
    bundles = []
    for bundle in state.bundles:
        if axis not in bundle.axes:
            bundles.append(bundle)
            continue
        picked = np.take(bundle.labels, position, bundle.axes.index(axis))
        rest = tuple(a for a in bundle.axes if a != axis)
        if rest:
            bundles.append(Bundle(rest, picked))
        else:
            c.labels.pin(picked.reshape(-1), f"{node.op} {node.name!r} picks this position alone")
    bundles = [b.moved([a - (a > axis) for a in b.axes]) for b in bundles]
    c.set(node.outputs[0], [*dims[:axis], *dims[axis + 1 :]], bundles, constant=state.constant)


def split_sizes(node: gs.Node, opset: int, total: int | None, given: NDArray[Any] | None) -> list[int]:
    """How many positions each output of a Split gets.

    Raises:
        Unsupported: that is not known.
    """
    listed = attribute(node, "split") if opset < 13 else given
    count = len(node.outputs)
    if listed is not None:
        return [int(n) for n in np.asarray(listed).reshape(-1)]
    if total is None:
        raise Unsupported("the length that it splits is not known")
    size = -(-total // count)
    return [size] * (count - 1) + [total - size * (count - 1)]


def _split(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    dims = c.dims(x)
    axis = normal_axis(int(attribute(node, "axis", 0)), len(dims))
    if not dims[axis].known:
        raise Unsupported("the length that it splits is not known")
    given = c.value(node, 1) if c.opset >= 13 else None
    start = 0
    for tensor, size in zip(node.outputs, split_sizes(node, c.opset, dims[axis].size, given), strict=True):
        _pick(c, node, tensor, {axis: np.arange(start, start + size)})
        start += size


# ---- putting together ----------------------------------------------------------------------------------------------


def _concat(c: Coupler, node: gs.Node) -> None:
    tensors = list(node.inputs)
    dims = [c.dims(t) for t in tensors]
    rank = len(dims[0])
    axis = normal_axis(int(node.attrs["axis"]), rank)
    constant = all(c.state(t).constant for t in tensors)
    spanning = {len(b.axes) for t in tensors for b in c.state(t).bundles}
    if spanning - {1} and len({tuple(b.axes for b in c.state(t).bundles) for t in tensors}) > 1:
        for tensor in tensors:
            for bundle in list(c.state(tensor).bundles):
                c.collapse(tensor, bundle, bundle.axes[0])
    bundles = []
    keys = dict.fromkeys(b.axes for t in tensors for b in c.state(t).bundles)
    for axes in keys:
        if axis in axes:
            if any(not d[axis].known for d in dims):
                raise Unsupported("it joins labelled positions with some of unknown number")
            bundles.append(Bundle(axes, _joined(c, node, tensors, dims, axes, axis)))
        else:
            labels = [b.labels for t in tensors for b in c.state(t).bundles if b.axes == axes]
            for other in labels[1:]:
                if other.shape != labels[0].shape:
                    raise Unsupported("lengths that are not known to be equal meet")
                c.labels.join(labels[0], other)
            if len(labels) < len(tensors):
                c.labels.pin(labels[0], f"{node.op} {node.name!r} ties it to an axis that cannot be cut")
            bundles.append(Bundle(axes, labels[0]))
    total = Dim(sum(d[axis].size for d in dims)) if all(d[axis].known for d in dims) else None
    declared = c.declared(node.outputs[0])
    if total is None:
        total = declared[axis] if declared is not None else Dim(1, (f"?{node.name}",))
    after = [
        total if a == axis else min((d[a] for d in dims), key=lambda d: (bool(d.symbols), d.symbols))
        for a in range(rank)
    ]
    c.set(node.outputs[0], after, bundles, constant=constant)


def _joined(
    c: Coupler,
    node: gs.Node,
    tensors: Sequence[gs.Tensor],
    dims: Sequence[Sequence[Dim]],
    axes: tuple[int, ...],
    axis: int,
) -> Ints:
    parts = []
    for tensor, own in zip(tensors, dims, strict=True):
        bundle = next((b for b in c.state(tensor).bundles if b.axes == axes), None)
        if bundle is not None:
            parts.append(bundle.labels)
            continue
        labels = c.labels.fresh([own[a].size for a in axes])
        if not (c.state(tensor).constant and labels.size <= 1):
            c.labels.pin(labels, f"{node.op} {node.name!r} joins it from {tensor.name!r}, which cannot be cut")
        else:
            c.labels.pin(labels, f"{tensor.name!r} has one position")
        parts.append(labels)
    return np.concatenate(parts, axes.index(axis))


def _pad(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    dims = list(c.dims(x))
    given = attribute(node, "pads", attribute(node, "paddings")) if c.opset < 11 else c.value(node, 1)
    if given is None:
        raise Unsupported("its amounts are not known")
    amounts = [int(n) for n in np.asarray(given).reshape(-1)]
    listed = c.value(node, 3)
    axes = range(len(dims)) if listed is None else [normal_axis(int(a), len(dims)) for a in listed.reshape(-1)]
    if len(amounts) != 2 * len(axes):
        raise Unsupported("its amounts do not fit its input")
    if len(node.inputs) > 2 and node.inputs[2].name:
        c.value(node, 2)
    bundles = list(c.state(x).bundles)
    declared = c.declared(node.outputs[0])
    for number, axis in enumerate(axes):
        before, after = amounts[number], amounts[number + len(axes)]
        if before == after == 0:
            continue
        bundle = next((b for b in bundles if axis in b.axes), None)
        if bundle is not None:
            bundles[bundles.index(bundle)] = _padded(c, node, bundle, axis, dims[axis], before, after)
        if dims[axis].known:
            dims[axis] = Dim(dims[axis].size + before + after)
        else:
            dims[axis] = declared[axis] if declared is not None else Dim(1, (f"?{node.name}.{axis}",))
    c.set(node.outputs[0], dims, bundles)


def _padded(c: Coupler, node: gs.Node, bundle: Bundle, axis: int, dim: Dim, before: int, after: int) -> Bundle:
    if attribute(node, "mode", "constant") != "constant":
        raise Unsupported("it repeats positions of a labelled axis")
    if not dim.known or bundle.axes != (axis,) or min(before, after) < 0:
        raise Unsupported("it pads a labelled axis in a way that is not followed")
    return Bundle((axis,), np.concatenate([c.labels.fresh(before), bundle.labels, c.labels.fresh(after)]))


def _expand(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    elements = _target(c, node, 1)
    declared = c.declared(node.outputs[0])
    dims = c.dims(x)
    if elements is None:
        if declared is None:
            raise Unsupported("its target is computed and not known")
        elements = [None] * len(declared)
    rank = max(len(dims), len(elements))
    shift = rank - len(dims)
    after: list[Dim] = []
    for axis in range(rank):
        own = dims[axis - shift] if axis >= shift else ONE
        element = elements[axis - rank + len(elements)] if axis >= rank - len(elements) else 1
        wanted = _element_dim(element)
        if own != ONE:
            after.append(own)
        else:
            after.append(wanted if wanted is not None else declared[axis] if declared is not None else Dim(1, ("?",)))
    bundles = [b.moved([a + shift for a in b.axes]) for b in c.state(x).bundles]
    c.set(node.outputs[0], after, bundles)
    if len(elements) == rank:
        _tie_wide(c, node, elements, bundles)
    else:
        _tie_wide(c, node, [1] * (rank - len(elements)) + elements, bundles)


def _tie_wide(c: Coupler, node: gs.Node, elements: list[Any], bundles: Sequence[Bundle]) -> None:
    cut = {axis for b in bundles for axis in b.axes}
    for axis, element in enumerate(elements):
        if isinstance(element, Size):
            c.same_length(element, node.outputs[0], axis)
        elif element is None and axis in cut:
            c.pin(node.outputs[0], f"{node.op} {node.name!r} has a target that is computed", [axis])


def _tile(c: Coupler, node: gs.Node) -> None:
    x = node.inputs[0]
    repeats = c.value(node, 1)
    dims = list(c.dims(x))
    if repeats is None or repeats.size != len(dims):
        raise Unsupported("its repeats are not known")
    bundles = list(c.state(x).bundles)
    for axis, count in enumerate(int(n) for n in repeats.reshape(-1)):
        if count == 1:
            continue
        for number, bundle in enumerate(bundles):
            if axis in bundle.axes:
                if not dims[axis].known:
                    raise Unsupported("it repeats a labelled axis of unknown length")
                times = [count if a == axis else 1 for a in bundle.axes]
                bundles[number] = Bundle(bundle.axes, np.tile(bundle.labels, times))
        dims[axis] = dims[axis] * Dim(count)
    c.set(node.outputs[0], dims, [b for b in bundles if b.labels.size])


def _resize(c: Coupler, node: gs.Node) -> None:
    """Axes that keep their length pass; the others are interpolated."""
    x, out = node.inputs[0], node.outputs[0]
    dims, declared = c.dims(x), c.declared(node.outputs[0])
    rank = len(dims)
    listed = attribute(node, "axes")
    axes = list(range(rank)) if listed is None else [normal_axis(int(a), rank) for a in listed]
    scales = None
    if node.op == "Upsample" and c.opset < 9:
        scales = np.asarray(node.attrs["scales"])
    else:
        index = 1 if node.op == "Upsample" or c.opset < 11 else 2
        if index < len(node.inputs) and node.inputs[index].name:
            scales = c.value(node, index)
            scales = scales if scales is not None and scales.size else None
    sizes = _target(c, node, 3) if c.opset >= 11 else None
    if scales is None and sizes is None:
        raise Unsupported("how much it scales is computed")
    if attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Unsupported("it crops")
    if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("it keeps the aspect ratio, so its sizes are not what they say")
    after = list(dims)
    moved: set[int] = set()
    for number, axis in enumerate(axes):
        if scales is not None:
            same = float(scales.reshape(-1)[number]) == 1.0
        else:
            assert sizes is not None
            size = sizes[number]
            same = _element_dim(size) == dims[axis]
            if isinstance(size, Size) and same:
                c.same_length(size, out, axis)
        if not same:
            moved.add(axis)
            after[axis] = declared[axis] if declared is not None else Dim(1, (f"?{node.name}.{axis}",))
    reason = f"{node.op} {node.name!r} interpolates over it"
    for bundle in c.state(x).bundles:
        if set(bundle.axes) & moved:
            c.labels.pin(bundle.labels, reason)
    c.set(out, after, [b for b in c.state(x).bundles if not set(b.axes) & moved])


def _between_space_and_depth(
    c: Coupler, node: gs.Node, verb: str
) -> tuple[tuple[Dim, ...], tuple[Dim, ...], list[Bundle]]:
    """(dimensions of the input, of the output, bundles that stay) of an image whose pixels go to or come from depth."""
    x = node.inputs[0]
    dims, declared = c.dims(x), c.declared(node.outputs[0])
    if len(dims) != 4 or not dims[1].known or declared is None:
        raise Unsupported("its input is not known")
    c.pin(x, f"{node.op} {node.name!r} {verb} it", (2, 3))
    return dims, declared, [b for b in c.state(x).bundles if b.axes == (0,)]


def _depth_to_space(c: Coupler, node: gs.Node) -> None:
    dims, declared, bundles = _between_space_and_depth(c, node, "spreads")
    x, block = node.inputs[0], int(node.attrs["blocksize"])
    bundle = c.state(x).at(1)
    channels = dims[1].size // block**2
    if bundle is not None:
        labels = c.collapse(x, bundle, 1).labels
        last = attribute(node, "mode", "DCR") == "CRD"
        rows = labels.reshape(channels, -1) if last else labels.reshape(-1, channels).T
        c.labels.join(rows[:, :1], rows)
        bundles.append(Bundle((1,), np.ascontiguousarray(rows[:, 0])))
    c.set(node.outputs[0], (dims[0], Dim(channels), *declared[2:]), [b for b in bundles if b.labels.size > 1])


def _space_to_depth(c: Coupler, node: gs.Node) -> None:
    dims, declared, bundles = _between_space_and_depth(c, node, "gathers")
    x, block = node.inputs[0], int(node.attrs["blocksize"])
    bundle = c.state(x).at(1)
    if bundle is not None:
        bundles.append(Bundle((1,), np.tile(c.collapse(x, bundle, 1).labels, block**2)))
    c.set(node.outputs[0], (dims[0], Dim(dims[1].size * block**2), *declared[2:]), bundles)


MOVEMENT: Mapping[str, Callable[[Coupler, gs.Node], None]] = {
    "Cast": _following(_same),
    "Concat": _following(_concat),
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _following(_gather),
    "Identity": _following(_same),
    "Pad": _pad,
    "Reshape": _following(_reshape),
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _following(_slice),
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _following(_squeeze),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _following(_unsqueeze),
    "Upsample": _resize,
}
