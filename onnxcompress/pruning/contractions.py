"""Rules of what contracts several axes at once, Einsum and Attention: see :mod:`onnxcompress.pruning.rules`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.pruning.dims import Dim
from onnxcompress.pruning.labels import Bundle
from onnxcompress.pruning.walk import Coupler, Rule, Unsupported

__all__ = ["CONTRACTIONS", "axis_labels", "meet"]

Ints = NDArray[np.int64]


def axis_labels(c: Coupler, tensor: gs.Tensor, axis: int) -> Ints | None:
    """Labels along ``axis``, of which a bundle over several axes is tied to this one; None where there are none."""
    bundle = c.state(tensor).at(axis)
    if bundle is None:
        return None
    return c.collapse(tensor, bundle, axis).labels


def meet(c: Coupler, node: gs.Node, first: Ints | None, second: Ints | None) -> None:
    """Join two axes position by position; where one of them cannot be cut, the other cannot either."""
    if first is None and second is None:
        return
    if first is None or second is None:
        found = first if first is not None else second
        assert found is not None
        c.labels.pin(found, f"{node.op} {node.name!r} ties it to an axis that cannot be cut")
    elif first.shape != second.shape:
        raise Unsupported(f"{first.size} positions meet {second.size}")
    else:
        c.labels.join(first, second)


def _einsum(c: Coupler, node: gs.Node) -> None:
    """Axes of one letter go together; letters that the result lacks are summed over."""
    equation = str(node.attrs["equation"]).replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != len(node.inputs) or any(len(set(t)) < len(t) for t in terms):
        raise Unsupported(f"its equation {equation!r} is not followed")
    if any(len(t) != len(c.dims(tensor)) for t, tensor in zip(terms, node.inputs, strict=True)):
        raise Unsupported("its equation does not fit its inputs")
    places: dict[str, list[tuple[int, int]]] = {}
    for number, term in enumerate(terms):
        for axis, letter in enumerate(term):
            places.setdefault(letter, []).append((number, axis))
    bundles = []
    for letter, found in places.items():
        wide = [(n, a) for n, a in found if c.dims(node.inputs[n])[a] != Dim(1)] or found
        labels = [axis_labels(c, node.inputs[n], a) for n, a in wide]
        for other in labels[1:]:
            meet(c, node, labels[0], other)
        if letter not in result:
            for number, axis in wide:
                if not c.state(node.inputs[number]).constant:
                    c.consumes(node, number, axis)
        elif labels[0] is not None:
            out = result.index(letter)
            bundles.append(Bundle((out,), labels[0]))
            if any(c.state(node.inputs[n]).constant for n, _ in wide):
                c.produces(node, out)
    lengths = ([c.dims(node.inputs[n])[a] for n, a in places[letter]] for letter in result)
    c.set(node.outputs[0], [min(found, key=lambda d: (d == Dim(1), d.symbols)) for found in lengths], bundles)


def _attention(c: Coupler, node: gs.Node) -> None:
    """Scaled dot-product attention: whole heads are cut, with the queries that share keys and values.

    Inputs are [batch, heads, length, size], or [batch, length, heads * size] with the numbers of heads as attributes.
    """
    if any(t.name for t in node.inputs[4:]) or any(t.name for t in node.outputs[1:]):
        raise Unsupported("it keeps keys and values between runs")
    tensors = node.inputs[:3]
    flat = len(c.dims(tensors[0])) == 3
    if flat:
        counts = [int(node.attrs["q_num_heads"]), *[int(node.attrs["kv_num_heads"])] * 2]
    else:
        sizes = [c.dims(t)[1] for t in tensors]
        if any(not d.known for d in sizes):
            raise Unsupported("its number of heads is not known")
        counts = [d.size for d in sizes]
    axis = 2 if flat else 1
    if counts[1] != counts[2] or counts[0] % counts[1]:
        raise Unsupported("its heads do not share keys and values evenly")
    rows = []
    for tensor, count in zip(tensors, counts, strict=True):
        labels = axis_labels(c, tensor, axis)
        if labels is None or labels.size % count:
            for other in tensors:
                c.pin(other, f"{node.op} {node.name!r} ties it to an axis that cannot be cut")
            break
        rows.append(labels.reshape(counts[1], -1))
    for tensor in tensors:
        c.pin(tensor, f"{node.op} {node.name!r} multiplies queries with keys over it", _others(c, tensor, axis))
    for tensor in node.inputs[3:4]:
        if tensor.name:
            mask = c.dims(tensor)
            if len(mask) == 4 and mask[1] != Dim(1):
                for other in tensors:
                    c.pin(other, f"{node.op} {node.name!r} has a mask for each head")
            c.pin(tensor, f"{node.op} {node.name!r} masks by it")
    query, value = c.dims(tensors[0]), c.dims(tensors[2])
    last = _last(value[-1], counts) if flat else value[-1]
    bundles = []
    if len(rows) == 3:
        joint = np.concatenate(rows, axis=1)
        c.labels.join(joint[:, :1], joint)
        c.labels.mark_heads(joint[:, 0])
        if flat:
            bundles.append(Bundle((2,), np.repeat(rows[0][:, 0], last.size // counts[1])))
        else:
            bundles.append(Bundle((1,), rows[0].reshape(-1)))
    c.set(node.outputs[0], (*query[:-1], last), bundles)


def _others(c: Coupler, tensor: gs.Tensor, axis: int) -> list[int]:
    return [a for a in range(1, len(c.dims(tensor))) if a != axis]


def _last(value: Dim, counts: list[int]) -> Dim:
    """Length of the last axis where heads are joined: as many values as there are queries."""
    if not value.known:
        raise Unsupported("the size of its values is not known")
    return Dim(value.size // counts[2] * counts[0])


CONTRACTIONS: Mapping[str, Rule] = {"Attention": _attention, "Einsum": _einsum}
