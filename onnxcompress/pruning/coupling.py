"""Which positions of which tensor axes have to be removed together, as index maps.

The graph is walked once, in order. Each axis of a constant gets labels, one for each position; each operator's rule
(:mod:`onnxcompress.pruning.rules`) says how the labels of its inputs meet and which labels its outputs carry. What only
moves data moves labels: a Concat or Pad offsets them, a Slice or Gather picks some, a channel shuffle permutes them, a
Flatten repeats each, a grouped convolution or an attention head ties a block together. Whatever is not understood pins
the labels that it meets, with a reason. Positions that end in one class are a unit, a *channel* that is removed as a
whole; channels that stand in the same number of places of the same axes form a :class:`CouplingGroup`.

Cost grows linearly with the lengths of the axes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcompress.graph import Graph
from onnxcompress.pruning.dims import Dim
from onnxcompress.pruning.rules import READS_SIZES, RULES
from onnxcompress.pruning.walk import Coupler, Permutation, Use
from onnxcompress.shapes import TensorType, infer_shapes

__all__ = ["Coupling", "CouplingGroup", "Member", "couple", "coupling_groups"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one tensor that is cut with a group.

    ``channel_of`` holds for each position the channel of the group that it belongs to, -1 for none of them (it stays).
    An axis that merges the unknown batch with channels is described by one period of it.
    """

    tensor: str
    axis: int
    channel_of: Ints


@dataclass(frozen=True, eq=False)
class CouplingGroup:
    """Channels that are alike: each stands in the same number of places of the same axes.

    Removing one channel removes its positions from every member. ``producers`` are the nodes whose weights are cut
    along their output axis, ``consumers`` those that multiply with the channels and sum over them, ``passing`` those
    with parameters for each channel (BatchNormalization, depthwise Conv).
    """

    #: the first producer's output; with ``#2`` and so on where that has channels of several groups
    name: str
    #: ``channels`` (convolutions), ``neurons`` (matrix products) or ``heads`` (of attention)
    kind: str
    channels: int
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    passing: tuple[str, ...] = ()
    #: why nothing of it may be removed
    pinned: str | None = None


@dataclass
class Coupling:
    """What the walk found: :func:`coupling_groups` with what surgery and masking need beside."""

    groups: list[CouplingGroup]
    #: (node, input, axis) at which channels are summed over, that is where a mask acts
    reads: list[tuple[str, int, int]]
    permutations: list[Permutation]
    #: elements of small integer tensors that are computed, by name
    vectors: dict[str, NDArray[Any]]
    #: dimensions of each tensor
    dims: dict[str, tuple[Dim, ...]]


def coupling_groups(graph: Graph, types: Mapping[str, TensorType] | None = None) -> list[CouplingGroup]:
    """All coupling groups of ``graph`` in the order of their first producers, pinned ones with their reasons.

    Args:
        graph: not changed; best after ``fold_constants`` and ``eliminate_dead_nodes``.
        types: as :func:`onnxcompress.shapes.infer_shapes` gives them for the declared inputs; inferred where None.
    """
    return couple(graph, types).groups


def couple(graph: Graph, types: Mapping[str, TensorType] | None = None) -> Coupling:
    """:func:`coupling_groups` and what surgery needs to know beside."""
    if types is None:
        types = infer_shapes(graph, {t.name: tuple(t.shape) for t in graph.inputs if t.shape is not None})
    evenly: frozenset[str] = frozenset()
    while True:
        coupler = Coupler(graph, types, evenly)
        coupler.run(RULES, READS_SIZES)
        stuck = {name for name, labels in coupler.whole.items() if coupler.labels.pinned(labels).all()}
        if not stuck:
            return _Assembly(coupler).result()
        evenly |= stuck


@dataclass
class _Assembly:
    """From classes of labels to groups of alike channels."""

    coupler: Coupler
    axes: dict[tuple[str, int], Ints] = field(default_factory=dict)
    operators: dict[str, str] = field(default_factory=dict)

    def result(self) -> Coupling:
        coupler = self.coupler
        self.axes = {(name, axis): roots for name, axis, roots in coupler.axes_of()}
        self.operators = {node.name: node.op for node in coupler.graph.nodes}
        signature = self._signatures()
        groups = list(self._groups(signature))
        _, consumers, _ = coupler.uses
        reads = list(dict.fromkeys((u.node, u.index, u.axis) for u in consumers if (u.tensor, u.axis) in self.axes))
        vectors = {n: s.vector for n, s in coupler.states.items() if s.vector is not None and not s.constant}
        dims = {n: s.dims for n, s in coupler.states.items() if s.dims is not None}
        return Coupling(groups, reads, coupler.permutations, vectors, dims)

    def _signatures(self) -> dict[int, int]:
        """{class: number}, equal for classes that stand in the same number of places of the same axes."""
        numbers: dict[int, int] = {}
        known: dict[tuple[int, int, int], int] = {}

        def renumber(roots: Sequence[int], place: int, counts: Sequence[int]) -> None:
            for root, count in zip(roots, counts, strict=True):
                key = (numbers.get(root, 0), place, count)
                numbers[root] = known.setdefault(key, len(known) + 1)

        for place, roots in enumerate(self.axes.values()):
            unique, counts = np.unique(roots, return_counts=True)
            renumber(unique.tolist(), place, counts.tolist())
        roots = np.array(list(numbers), np.int64)
        labels = self.coupler.labels
        reasons = labels.reason_numbers(roots).tolist()
        renumber(roots.tolist(), -1, reasons)
        renumber(roots.tolist(), -2, labels.are_heads(roots).astype(int).tolist())
        return numbers

    def _used_by(self, uses: Sequence[Use], signature: Mapping[int, int]) -> dict[int, list[Use]]:
        """{signature: uses whose axis holds such classes}, in order."""
        found: dict[int, list[Use]] = defaultdict(list)
        for use in uses:
            roots = self.axes.get((use.tensor, use.axis))
            if roots is not None:
                for number in sorted({signature[r] for r in np.unique(roots).tolist()}):
                    found[number].append(use)
        return found

    def _groups(self, signature: Mapping[int, int]) -> Iterator[CouplingGroup]:
        producers, consumers, passing = (self._used_by(uses, signature) for uses in self.coupler.uses)
        members: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for (name, axis), classes in self.axes.items():
            for number in {signature[r] for r in np.unique(classes).tolist()}:
                members[number].append((name, axis))
        order: dict[int, list[int]] = defaultdict(list)
        firsts = {n: (uses[0].tensor, uses[0].axis) for n, uses in (consumers | producers).items()}
        for place in dict.fromkeys(firsts.values()):
            for root in dict.fromkeys(self.axes[place].tolist()):
                if firsts.get(signature[root]) == place:
                    order[signature[root]].append(root)
        position = {node.name: i for i, node in enumerate(self.coupler.graph.nodes)}
        names: dict[str, int] = defaultdict(int)
        first_use = {n: (producers.get(n) or consumers[n])[0] for n in order}
        for number in sorted(order, key=lambda n: (position[first_use[n].node], n)):
            roots = order[number]
            labels = self.coupler.labels
            reason = int(labels.reason_numbers(np.array(roots[:1]))[0])
            makers = list(dict.fromkeys(u.node for u in producers.get(number, ())))
            if reason >= 0 and not makers:
                continue  # part of an input, or of a constant: no candidate
            tensor = first_use[number].tensor
            names[tensor] += 1
            members_of = tuple(self._member(place, roots) for place in members[number])
            pinned = labels.reason(reason) if reason >= 0 else self._whole_axis(roots, members_of)
            yield CouplingGroup(
                name=tensor if names[tensor] == 1 else f"{tensor}#{names[tensor]}",
                kind=self._kind(roots[0], makers),
                channels=len(roots),
                members=members_of,
                producers=tuple(makers),
                consumers=tuple(dict.fromkeys(u.node for u in consumers.get(number, ()))),
                passing=tuple(dict.fromkeys(u.node for u in passing.get(number, ()))),
                pinned=pinned,
            )

    def _whole_axis(self, channels: Sequence[int], members: Sequence[Member]) -> str | None:
        """A single channel that fills an axis cannot go."""
        if len(channels) == 1:
            for member in members:
                if (member.channel_of == 0).all():
                    return f"all of axis {member.axis} of {member.tensor!r} goes together"
        return None

    def _member(self, place: tuple[str, int], channels: Sequence[int]) -> Member:
        own = np.array(channels, np.int64)
        order = np.argsort(own)
        roots = self.axes[place]
        found = np.searchsorted(own[order], roots)
        found = np.minimum(found, len(own) - 1)
        channel_of = np.where(own[order][found] == roots, order[found], -1)
        channel_of.flags.writeable = False
        return Member(place[0], place[1], channel_of)

    def _kind(self, root: int, makers: Sequence[str]) -> str:
        if self.coupler.labels.are_heads(np.array([root]))[0]:
            return "heads"
        operators = {self.operators[name] for name in makers}
        return "neurons" if operators and operators <= {"Gemm", "MatMul"} else "channels"
