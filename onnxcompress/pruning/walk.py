"""The walk over a graph that coupling is found by: states of tensors, and what the operators' rules report.

See :mod:`onnxcompress.pruning.coupling` for what it is for and :mod:`onnxcompress.pruning.rules` for the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.graph import Graph, constant_value, nested_graphs, normal_domain, walk_graphs
from onnxcompress.pruning.dims import Dim
from onnxcompress.pruning.labels import Bundle, Labels, State
from onnxcompress.shapes import TensorType

__all__ = ["LONGEST_SHAPE", "Coupler", "Permutation", "Rule", "Size", "Unsupported", "Use"]

Ints = NDArray[np.int64]
Rule = Callable[["Coupler", gs.Node], None]

#: before it, broadcasting was an attribute
OLDEST_OPSET = 7
#: elements of the largest integer tensor that is followed as a shape
LONGEST_SHAPE = 64


class Unsupported(Exception):
    """A rule cannot say how labels pass; the message is the reason, one line."""


@dataclass(frozen=True)
class Size:
    """An element of a shape vector: the length of an axis, which is ``dim`` as long as nothing is cut."""

    dim: Dim
    tensor: str
    axis: int


@dataclass(frozen=True, eq=False)
class Permutation:
    """Reshape, Transpose, Reshape that only permute the positions of one axis (a channel shuffle).

    ``order[i]`` is the position of the input that ends at position ``i`` of the output.
    """

    nodes: tuple[str, str, str]
    axis: int
    order: Ints


@dataclass(frozen=True)
class Use:
    """A node that multiplies with a labelled axis: input ``index`` for consumers, -1 for producers."""

    node: str
    index: int
    tensor: str
    axis: int


class Coupler:
    """The walk: states of tensors by name, and what the rules report."""

    def __init__(self, graph: Graph, types: Mapping[str, TensorType], evenly: frozenset[str] = frozenset()) -> None:
        self.graph = graph
        #: grouped convolutions whose groups are cut evenly, not as a whole
        self.evenly = evenly
        #: grouped convolutions whose groups are cut as a whole, with the labels of their outputs
        self.whole: dict[str, Ints] = {}
        self.opset = int(graph.opset)
        self.labels = Labels()
        self._types = types
        self._states: dict[str, State] = {}
        self._unknown = 0
        self._producers: list[Use] = []
        self._consumers: list[Use] = []
        self._passing: list[Use] = []
        #: (tensor, axis, tensor, axis): lengths that must stay equal
        self._same_length: list[tuple[str, int, str, int]] = []
        self.permutations: list[Permutation] = []
        #: tensors inside of permutations, which are replaced where something is cut
        self.inner: set[str] = set()

    # ---- what rules read

    def state(self, tensor: gs.Tensor) -> State:
        """The state of ``tensor``; labels are made for a constant that is met for the first time."""
        known = self._states.get(tensor.name)
        if known is not None:
            return known
        value = constant_value(tensor)
        if value is not None or isinstance(tensor, gs.Constant):
            # sparse tensors, text and types below one byte are not cut
            state = self._constant(tuple(tensor.shape) if value is None else value.shape, labelled=value is not None)
            if value is not None and value.dtype.kind in "iu" and value.ndim <= 1 and value.size <= LONGEST_SHAPE:
                state.vector = value.astype(object)
        else:
            state = State(self.declared(tensor))
        self._states[tensor.name] = state
        return state

    def _constant(self, shape: Sequence[int], *, labelled: bool) -> State:
        dims = tuple(Dim(int(n)) for n in shape)
        axes = [(axis, int(n)) for axis, n in enumerate(shape) if n > 1 and labelled]
        return State(dims, [Bundle((axis,), self.labels.fresh(n)) for axis, n in axes], constant=True)

    def dims(self, tensor: gs.Tensor) -> tuple[Dim, ...]:
        """Dimensions of ``tensor``.

        Raises:
            Unsupported: its rank is unknown.
        """
        found = self.state(tensor).dims
        if found is None:
            raise Unsupported(f"the rank of {tensor.name!r} is not known")
        return found

    def declared(self, tensor: gs.Tensor) -> tuple[Dim, ...] | None:
        """Dimensions as shape inference gives them; an unknown one is a symbol of its own."""
        known = self._types.get(tensor.name)
        if known is None or known.shape is None:
            return None
        return tuple(Dim(d) if isinstance(d, int) else Dim(1, (d or self._symbol(),)) for d in known.shape)

    def _symbol(self) -> str:
        self._unknown += 1
        return f"?{self._unknown}"

    def value(self, node: gs.Node, index: int) -> NDArray[Any] | None:
        """The constant value of input ``index``; None where it is left out.

        Raises:
            Unsupported: the input is not constant.
        """
        if index >= len(node.inputs) or not node.inputs[index].name:
            return None
        value = constant_value(node.inputs[index])
        if value is None:
            raise Unsupported(f"its input {node.inputs[index].name!r} is computed")
        return value

    # ---- what rules report

    def set(self, tensor: gs.Tensor, dims: Sequence[Dim] | None, bundles: Iterable[Bundle] = (), **more: Any) -> None:
        """The state of an output; outputs without a name are ignored."""
        if tensor.name:
            self._states[tensor.name] = State(None if dims is None else tuple(dims), list(bundles), **more)

    def produces(self, node: gs.Node, axis: int) -> None:
        """The weights of ``node`` make the positions on ``axis`` of its output."""
        self._producers.append(Use(node.name, -1, node.outputs[0].name, axis))

    def consumes(self, node: gs.Node, index: int, axis: int) -> None:
        """``node`` sums over ``axis`` of input ``index``: a position that is zero there adds nothing."""
        self._consumers.append(Use(node.name, index, node.inputs[index].name, axis))

    def passes(self, node: gs.Node, axis: int) -> None:
        """``node`` has parameters for each position on ``axis`` of its output."""
        self._passing.append(Use(node.name, -1, node.outputs[0].name, axis))

    def pin(self, tensor: gs.Tensor, reason: str, axes: Iterable[int] | None = None) -> None:
        """Nothing of ``tensor``, or of these axes, may be removed."""
        state = self.state(tensor)
        wanted = None if axes is None else set(axes)
        for bundle in state.bundles:
            if wanted is None or wanted & set(bundle.axes):
                self.labels.pin(bundle.labels, reason)

    def collapse(self, tensor: gs.Tensor, bundle: Bundle, axis: int) -> Bundle:
        """``bundle`` is cut along ``axis`` only: all positions that share theirs on ``axis`` are removed together."""
        state = self.state(tensor)
        single = self.tie(bundle, axis)
        state.bundles = [single if b is bundle else b for b in state.bundles]
        return single

    def tie(self, bundle: Bundle, axis: int) -> Bundle:
        """Join what shares its position on ``axis``."""
        if bundle.axes == (axis,):
            return bundle
        rows = np.moveaxis(bundle.labels, bundle.axes.index(axis), 0)
        rows = rows.reshape(rows.shape[0], -1)
        self.labels.join(rows[:, :1], rows)
        return Bundle((axis,), np.ascontiguousarray(rows[:, 0]))

    def same_length(self, size: Size, tensor: gs.Tensor, axis: int) -> None:
        """``axis`` of ``tensor`` is as long as ``size`` says, before and after."""
        self._same_length.append((size.tensor, size.axis, tensor.name, axis))

    # ---- the walk

    def run(self, rules: Mapping[str, Rule], reads_sizes: Collection[str]) -> None:
        """Walk the graph by ``rules``; operators of ``reads_sizes`` see to lengths among their inputs themselves."""
        self._walk(rules, reads_sizes)
        self._pin_what_leaves()
        while True:
            self._settle()
            if not self._check_lengths():
                break

    def _walk(self, rules: Mapping[str, Rule], reads_sizes: Collection[str]) -> None:
        for node in self.graph.nodes:
            rule = rules.get(node.op) if normal_domain(node) == "" else None
            try:
                if any(True for _ in nested_graphs(node)):
                    raise Unsupported("it has nested graphs")
                if rule is None:
                    raise Unsupported("there is no rule for this operator")
                if self.opset < OLDEST_OPSET:
                    raise Unsupported(f"opset {self.opset} is older than the rules, which begin at {OLDEST_OPSET}")
                self._apply(rule, node)
                if node.op not in reads_sizes:
                    self._watch_sizes(node)
            except Unsupported as unsupported:
                domain = normal_domain(node)
                reason = f"{domain + '.' if domain else ''}{node.op} {node.name!r}: {unsupported}"
                for tensor in node.inputs:
                    if tensor.name:
                        self.pin(tensor, reason)
                        self._pin_sizes(tensor, reason)
                for tensor in node.outputs:  # what the rule has said of them does not hold
                    self._forget(tensor, reason)
            for tensor in node.outputs:
                if tensor.name:
                    self.state(tensor)

    def _apply(self, rule: Rule, node: gs.Node) -> None:
        try:
            rule(self, node)
        except (ValueError, IndexError, KeyError, TypeError) as error:  # attributes and inputs that do not fit
            raise Unsupported(f"its inputs do not fit: {' '.join(str(error).split())[:120]}") from error

    def _forget(self, tensor: gs.Tensor, reason: str) -> None:
        state = self._states.pop(tensor.name, None) if tensor.name else None
        for bundle in state.bundles if state is not None else ():
            self.labels.pin(bundle.labels, reason)

    def _watch_sizes(self, node: gs.Node) -> None:
        """Lengths of cut axes may only go where it is known what they do: pin those that are computed with."""
        for tensor in node.inputs:
            state = self._states.get(tensor.name) if tensor.name else None
            if state is None or state.vector is None:
                continue
            if any(t.name and self._states[t.name].vector is not None for t in node.outputs if t.name in self._states):
                continue  # followed further
            self._pin_sizes(tensor, f"{node.op} {node.name!r} computes with its length")

    def _pin_sizes(self, tensor: gs.Tensor, reason: str) -> None:
        state = self._states.get(tensor.name)
        if state is None or state.vector is None:
            return
        for element in state.vector.reshape(-1):
            if isinstance(element, Size):
                bundle = self._states[element.tensor].at(element.axis)
                if bundle is not None:
                    self.labels.pin(bundle.labels, reason)

    def _pin_what_leaves(self) -> None:
        for part in walk_graphs(self.graph):
            for tensor in part.outputs:
                if tensor.name in self._states:
                    self.pin(tensor, f"{tensor.name!r} is a graph output")
                    self._pin_sizes(tensor, f"its length leaves the graph by {tensor.name!r}")
            if part is self.graph:
                continue
            for node in part.nodes:
                for tensor in node.inputs:
                    if tensor.name in self._states:
                        self.pin(tensor, f"{tensor.name!r} is read by a nested graph, in {node.name!r}")

    def _settle(self) -> None:
        """A tensor is cut along single axes: where labels differ along several, tie all but the longest together."""
        changed = True
        while changed:
            changed = False
            for name, state in self._states.items():
                if name in self.inner:
                    continue
                for number, bundle in enumerate(state.bundles):
                    if len(bundle.axes) == 1:
                        continue
                    varying = self._varying(bundle)
                    if len(varying) > 1:
                        lengths = {axis: bundle.labels.shape[bundle.axes.index(axis)] for axis in varying}
                        keep = max(varying, key=lambda axis: (lengths[axis], -axis))
                        changed = True
                    else:
                        keep = varying[0] if varying else bundle.axes[0]
                    state.bundles[number] = self.tie(bundle, keep)

    def _varying(self, bundle: Bundle) -> list[int]:
        """The axes along which the classes differ."""
        roots = self.labels.roots(bundle.labels)
        return [axis for position, axis in enumerate(bundle.axes) if (roots != np.take(roots, [0], position)).any()]

    def _check_lengths(self) -> bool:
        """Pin lengths that would no longer agree; True where something was pinned."""
        pinned = False
        for source, source_axis, target, target_axis in self._same_length:
            first, second = self._states[source].at(source_axis), self._states[target].at(target_axis)
            if first is None and second is None:
                continue
            if first is not None and second is not None and self._as_long(first, second):
                continue
            for bundle in (first, second):
                if bundle is not None and not self.labels.pinned(bundle.labels).all():
                    self.labels.pin(bundle.labels, f"the length of {target!r} is computed from that of {source!r}")
                    pinned = True
        return pinned

    def _as_long(self, first: Bundle, second: Bundle) -> bool:
        """True where both axes lose the same number of positions whatever is removed."""
        a, b = (np.sort(self.labels.roots(bundle.labels), axis=None) for bundle in (first, second))
        return np.array_equal(a, b)

    def axes_of(self) -> Iterator[tuple[str, int, Ints]]:
        """(tensor, axis, classes of the positions) of every axis that carries labels."""
        for name, state in self._states.items():
            if name not in self.inner:
                for bundle in state.bundles:
                    yield name, bundle.axes[0], self.labels.roots(bundle.labels).reshape(-1)

    @property
    def states(self) -> Mapping[str, State]:
        """States of all tensors met, by name."""
        return self._states

    @property
    def uses(self) -> tuple[list[Use], list[Use], list[Use]]:
        """Producers, consumers and passing nodes."""
        return self._producers, self._consumers, self._passing
