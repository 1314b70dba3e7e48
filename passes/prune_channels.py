"""Remove whole channels, neurons and attention heads, so that tensors get smaller.

Which positions of which tensors go together is found by :mod:`onnxcompress.pruning.coupling`, they are cut by
:mod:`onnxcompress.pruning.surgery`. Before that, constants are folded and vectors that an exporter merged are taken
apart. Before anything is repaired, the cut graph is run beside the original with the removed channels masked at every
consumer: both must answer the same, or an error is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from onnxcompress.base import Change, Context, Cut, Decision, Detail, Guarantee, Pass, Refusal
from onnxcompress.data import Dataset, synthetic_data
from onnxcompress.errors import DataError, ModelError, OnnxCompressError, UsageError
from onnxcompress.graph import Graph, constant_value, input_specs, replace_contents
from onnxcompress.kept import positions_text, read_positions
from onnxcompress.passes.eliminate_dead_nodes import EliminateDeadNodes
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.pruning.costs import ChannelCosts
from onnxcompress.pruning.coupling import Coupling, CouplingGroup, couple
from onnxcompress.pruning.prepare import share_vectors, unshare_vectors
from onnxcompress.pruning.surgery import Cuts, masked, remove_channels
from onnxcompress.shapes import TensorType, infer_shapes
from onnxcompress.verify import compare

__all__ = ["Prepared", "PruneChannels", "prepare"]

Ints = NDArray[np.int64]
Counts = dict[str, int]

#: relative L2 between the cut graph and its masked original, by the type of the output
_TOLERANCE = {"float64": 1e-5, "float32": 1e-5}
_COARSE_TOLERANCE = 2e-2
#: samples that both run on
_CHECKED = 4


@dataclass
class Prepared:
    """A graph whose channels can be counted: folded, with its coupling and shapes."""

    graph: Graph
    coupling: Coupling
    types: dict[str, TensorType]
    #: vectors that were taken apart: {name: name of the original}
    copies: dict[str, str]

    @property
    def costs(self) -> ChannelCosts:
        """What a choice of channels costs."""
        return ChannelCosts(self.graph, self.coupling.groups, self.types)


def prepare(graph: Graph, *, fold_batch_norm: bool) -> Prepared:
    """Fold what hides coupling, and couple. ``graph`` is not changed."""
    steps: list[Pass] = [FoldConstants(), EliminateDeadNodes()]
    if fold_batch_norm:
        steps.append(FoldBatchNorm())
    for step in steps:
        graph = step(graph).graph
    copies = unshare_vectors(graph)
    types = infer_shapes(graph, {t.name: tuple(t.shape) for t in graph.inputs if t.shape is not None})
    return Prepared(graph, couple(graph, types), types, copies)


class PruneChannels(Pass):
    """Remove channels, neurons and heads that matter least, exactly, and repair what remains."""

    name: ClassVar[str] = "prune_channels"

    macs: float | None = Field(None, gt=0, le=1, description="Share of the multiply-accumulates that remains")
    params: float | None = Field(None, gt=0, le=1, description="Share of the parameters that remains")
    ffn: float | None = Field(None, gt=0, le=1, description="Share of the neurons between two matrix products")
    heads: float | None = Field(None, gt=0, le=1, description="Share of the attention heads that remains")
    min_channels: int = Field(1, ge=1, description="Fewest channels that stay of a group")
    round_to: int = Field(1, ge=1, description="Keep multiples of this many channels of a group where it has as many")
    exclude_nodes: tuple[str, ...] = Field((), description="Leave channels whole that these nodes produce; patterns")
    recover: bool = Field(True, description="Fold BatchNormalization and repair the weights that remain")
    keep: dict[str, str] | None = Field(
        None, description="The channels that stay of each group, as a saved recipe has them; nothing is chosen then"
    )

    @model_validator(mode="after")
    def _aims_at_something(self) -> Self:
        if all(aim is None for aim in (self.macs, self.params, self.ffn, self.heads, self.keep)):
            raise ValueError("say how much remains: macs, params, ffn or heads, for example macs: 0.5")
        return self

    @property
    def guarantee(self) -> Guarantee:
        """Removes weights: judged by the task metric."""
        return Guarantee.APPROXIMATE

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail | Cut]:
        """Couple, choose, cut, check, repair."""
        ready = prepare(graph, fold_batch_norm=self.recover)
        groups = ready.coupling.groups
        free = [g for g in groups if g.pinned is None and not self._excluded(g)]
        for group in groups:
            if group.pinned is not None:
                yield Refusal(group.producers[0], f"its channels stay: {group.pinned}")
            elif self._excluded(group):
                yield Refusal(group.producers[0], "its channels stay: excluded")
        keep = self._given(groups) if self.keep is not None else self._choose(ready, free)
        keep = {name: kept for name, kept in keep.items() if len(kept) < _group(groups, name).channels}
        if not keep:
            return
        yield Decision("keep", {name: positions_text(kept.tolist()) for name, kept in keep.items()})
        pruned, cuts = remove_channels(ready.graph, groups, keep, ready.coupling)
        self._check(ready, pruned, keep, context)
        share_vectors(pruned, ready.copies)
        replace_contents(graph, pruned)
        yield from _told(ready, keep)
        yield from _cut_axes(ready.graph, cuts)

    # ---- choice

    def _excluded(self, group: CouplingGroup) -> bool:
        names = (*group.producers, *group.passing)
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.exclude_nodes)

    def _given(self, groups: Sequence[CouplingGroup]) -> dict[str, Ints]:
        assert self.keep is not None
        known = {group.name for group in groups}
        for name in self.keep:
            if name not in known:
                raise UsageError(
                    f"keep names the group {name!r}, which this model lacks; inspect --coupling lists them"
                )
        return {name: np.array(read_positions(text), np.int64) for name, text in self.keep.items()}

    def _choose(self, ready: Prepared, free: Sequence[CouplingGroup]) -> dict[str, Ints]:
        orders = {group.name: _removal_order(ready.graph, group) for group in free}
        counts = self._counts(ready, free)
        return {name: np.sort(orders[name][len(orders[name]) - count :]) for name, count in counts.items()}

    def _counts(self, ready: Prepared, free: Sequence[CouplingGroup]) -> Counts:
        """How many channels stay of each group: own ratios for FFN and heads, one ratio for the others."""
        own = {"heads": self.heads, "neurons": self.ffn}
        fixed = {g.name: self._rounded(g, ratio) for g in free if (ratio := own.get(g.kind)) is not None}
        rest = [g for g in free if g.name not in fixed]
        if self.macs is None and self.params is None:
            return fixed
        costs = ready.costs
        aims = [(costs.macs, self.macs), (costs.parameters, self.params)]

        def reached(counts: Counts) -> bool:
            return all(aim is None or cost(counts) <= aim * cost() for cost, aim in aims)

        ratios = sorted({k / g.channels for g in rest for k in range(1, g.channels + 1)}) or [1.0]
        low, high = 0, len(ratios) - 1  # the largest ratio that reaches the aims
        counts = fixed | {g.name: self._rounded(g, ratios[low]) for g in rest}
        if not reached(counts):
            found = ", ".join(f"{cost(counts) / cost():.3f}" for cost, aim in aims if aim is not None)
            raise UsageError(
                f"the aim cannot be reached: with the fewest channels {found} remains; ask for more, lower "
                "min_channels or exclude less"
            )
        while low < high:
            middle = (low + high + 1) // 2
            candidate = fixed | {g.name: self._rounded(g, ratios[middle]) for g in rest}
            low, high, counts = (middle, high, candidate) if reached(candidate) else (low, middle - 1, counts)
        return counts

    def _rounded(self, group: CouplingGroup, ratio: float) -> int:
        count = int(np.floor(ratio * group.channels + 1e-9))
        if group.channels >= self.round_to:
            count = max(count // self.round_to, 1) * self.round_to
        return min(max(count, self.min_channels, 1), group.channels)

    # ---- proof

    def _check(self, ready: Prepared, pruned: Graph, keep: Mapping[str, Ints], context: Context) -> None:
        """The cut graph must equal the original with these channels masked, on a few samples."""
        reference = masked(ready.graph, ready.coupling.groups, keep, ready.coupling)
        data = _few_samples(ready.graph, context)
        if data is None:
            context.warn("prune_channels: no samples fit the model's inputs, so the cut was not checked by running it")
            return
        for output in compare(reference, pruned, data, threads=context.threads):
            dtype = ready.types[output.name].dtype if output.name in ready.types else None
            tolerance = _TOLERANCE.get(dtype.name if dtype is not None else "", _COARSE_TOLERANCE)
            wrong = output.equal_elements is not None and output.equal_elements < 1 - _COARSE_TOLERANCE
            if wrong or (output.equal_elements is None and not output.relative_l2 <= tolerance):
                raise OnnxCompressError(
                    f"cutting channels changed output {output.name!r} (relative L2 {output.relative_l2:.3g}) where "
                    "masking them did not; nothing was changed, please report it with the model"
                )


def _group(groups: Sequence[CouplingGroup], name: str) -> CouplingGroup:
    return next(group for group in groups if group.name == name)


def _few_samples(graph: Graph, context: Context) -> Dataset | None:
    try:
        if context.data is not None:
            return context.data.take(min(_CHECKED, context.data.samples))
        return synthetic_data(input_specs(graph), graph=graph, samples=2, batch=2, seed=context.seed)
    except (DataError, ModelError, UsageError):
        return None


def _removal_order(graph: Graph, group: CouplingGroup) -> Ints:
    """Channels by the L2 norm of the weights that make them, smallest first."""
    power = np.zeros(group.channels)
    producers = set(group.producers)
    weights = {m.tensor: m for m in group.members}
    for node in graph.nodes:
        if node.name not in producers:
            continue
        for tensor in node.inputs[1:2]:
            value, member = constant_value(tensor), weights.get(tensor.name)
            if value is not None and member is not None and member.axis < value.ndim:
                rows = np.moveaxis(value, member.axis, 0).reshape(value.shape[member.axis], -1).astype(np.float64)
                inside = member.channel_of >= 0
                np.add.at(power, member.channel_of[inside], np.square(rows[inside]).sum(axis=1))
    return np.argsort(power, kind="stable")


def _told(ready: Prepared, keep: Mapping[str, Ints]) -> Iterator[Change | Detail]:
    groups = {group.name: group for group in ready.coupling.groups}
    for name, kept in keep.items():
        group = groups[name]
        node = (group.producers or group.consumers)[0]
        yield Change("pruned", node, f"{len(kept)} of {group.channels} {group.kind} stay")
    costs = ready.costs
    counts = {name: len(kept) for name, kept in keep.items()}
    facts: dict[str, Any] = {
        "macs": [costs.macs(), costs.macs(counts)],
        "parameters": [costs.parameters(), costs.parameters(counts)],
    }
    yield Detail("pruning", facts)


def _cut_axes(graph: Graph, cuts: Cuts) -> Iterator[Cut]:
    """What is left of each tensor that nodes make: weights can be read from the graph itself."""
    for node in graph.nodes:
        for tensor in node.outputs:
            for axis, kept in cuts.get(tensor.name, {}).items():
                yield Cut(tensor.name, axis, tuple(kept.tolist()))
