"""Remove whole channels, neurons and attention heads, so that tensors get smaller.

First goes what costs no accuracy: padding that only repeats a bias (:mod:`onnxcompress.passes.fold_padding`); what
that saves counts as removed. Constants are folded and vectors that an exporter merged are taken apart. Which positions
of which tensors go together is found by :mod:`onnxcompress.pruning.coupling`, they are cut by
:mod:`onnxcompress.pruning.surgery`. Before anything is repaired, the cut graph is run beside the original with the
removed channels masked at every consumer: both must answer the same, or an error is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from onnxcompress.base import Change, Context, Cut, Decision, Detail, Guarantee, Pass, Refusal
from onnxcompress.benchmark import BenchmarkResult, benchmark
from onnxcompress.data import Dataset, synthetic_data
from onnxcompress.errors import DataError, ModelError, OnnxCompressError, UsageError
from onnxcompress.graph import Graph, copy_graph, input_specs, replace_contents
from onnxcompress.kept import positions_text, read_positions
from onnxcompress.lockstep import decibels
from onnxcompress.passes.eliminate_dead_nodes import EliminateDeadNodes
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.passes.fold_padding import FoldPadding
from onnxcompress.pruning.allocation import TIME_WORTH
from onnxcompress.pruning.branches import drop_branches, drop_constants, still_there, vanishing
from onnxcompress.pruning.choose import Aim, Chooser
from onnxcompress.pruning.costs import ChannelCosts
from onnxcompress.pruning.coupling import Coupling, CouplingGroup, couple
from onnxcompress.pruning.importance import Combine, Criterion, batch_norm_scales
from onnxcompress.pruning.mixing import find_mixing_layers
from onnxcompress.pruning.prepare import share_vectors, unshare_vectors
from onnxcompress.pruning.reconstruct import Recovery, Step, recover
from onnxcompress.pruning.surgery import Cuts, masked, remove_channels
from onnxcompress.pruning.timing import saved_times
from onnxcompress.quantization.integer_form import integer_form
from onnxcompress.shapes import TensorType, infer_shapes, node_macs
from onnxcompress.targets import Target, get_target
from onnxcompress.verify import OutputComparison, compare

__all__ = ["Prepared", "PruneChannels", "prepare"]

Ints = NDArray[np.int64]

#: relative L2 between the cut graph and its masked original; the larger one where numbers are rounded inside
_TOLERANCE = 1e-5
_COARSE_TOLERANCE = 2e-2
#: absolute difference that rounding makes in numbers up to one
_TINY = 1e-6
#: times what the runtime's own optimisations change
_NOISE = 10.0
#: samples that both run on
_CHECKED = 4
#: share of the multiply-accumulates that remains where nobody says
_DEFAULT_MACS = 0.75
#: what rounding has to gain to be worth it
_PAYS = 0.02
#: candidates that are timed for an aim in time, and about how long each takes
_TIMINGS = 8
_TIMING_SECONDS = 2.0


@dataclass
class Prepared:
    """A graph whose channels can be counted: folded, with its coupling and shapes."""

    graph: Graph
    coupling: Coupling
    types: dict[str, TensorType]
    #: vectors that were taken apart: {name: name of the original}
    copies: dict[str, str]
    #: multiply-accumulates before padding was folded, which counts as removed
    whole: int

    @property
    def folded(self) -> bool:
        """True where folding padding alone saved something."""
        return self.costs.macs() < self.whole

    @cached_property
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
    shapes = {t.name: tuple(t.shape) for t in graph.inputs if t.shape is not None}
    whole = sum(node_macs(graph, infer_shapes(graph, shapes)).values())
    graph = FoldPadding()(graph).graph
    copies = unshare_vectors(graph)
    types = infer_shapes(graph, shapes)
    return Prepared(graph, couple(graph, types), types, copies, whole)


@dataclass
class Candidates:
    """Choices of channels for different aims, and how fast the graphs are that they leave.

    What the choice rests on is found once: ``chooser`` judges channels, and only sharing out is repeated.
    """

    ready: Prepared
    chooser: Chooser
    aim: Callable[..., Aim]
    context: Context
    #: what to quantise for before anything is timed; None: nothing is quantised
    integers: Target | None = None

    def __post_init__(self) -> None:
        self.removals = self.chooser.removals()
        self.curves = self.chooser.curves(self.removals)

    def keep(self, aim: Aim, round_to: int) -> dict[str, Ints]:
        """The channels that stay of the groups that lose some."""
        self.chooser.round_to = round_to
        curves = {n: replace(c, allowed=self.chooser.allowed(self.removals[n])) for n, c in self.curves.items()}
        counts = self.chooser.counts(aim, curves)
        return {name: self.removals[name].kept(self.removals[name].channels - n) for name, n in counts.items()}

    def faster(self, roundings: tuple[int, int]) -> tuple[dict[str, Ints], int]:
        """The choice at the first rounding, or at the second where its graph is surely faster."""
        first, second = (self.keep(self.aim(), rounding) for rounding in roundings)
        ratio = self._ratio(self._cut(first), self._cut(second))
        return (second, roundings[1]) if ratio.low > 1 + _PAYS else (first, roundings[0])

    def in_time(self, share: float, round_to: int) -> tuple[dict[str, Ints], float]:
        """The choice of the most multiply-accumulates that takes ``share`` of the time, and the share that it takes."""
        low, high = 0.02, 1.0
        best: tuple[dict[str, Ints], float] | None = None
        for _ in self.context.progress.track(range(_TIMINGS), "timing candidates", _TIMINGS):
            middle = (low * high) ** 0.5 if best is None else (low + high) / 2
            try:
                keep = self.keep(self.aim(middle), round_to)
            except UsageError:
                low = middle
                continue
            found = 1 / self._ratio(self.ready.graph, self._cut(keep)).ratio
            if best is None or found <= share or found < best[1]:
                best = (keep, found)
            low, high = (middle, high) if found <= share else (low, middle)
        if best is None:
            raise UsageError("no choice of channels could be timed; give macs instead")
        return best

    def _cut(self, keep: Mapping[str, Ints]) -> Graph:
        groups = self.ready.coupling.groups
        pruned, cuts = remove_channels(self.ready.graph, groups, _at_least_one(keep), self.ready.coupling)
        return _without(pruned, cuts, groups, keep, constants=True)[0]

    def _ratio(self, reference: Graph, candidate: Graph) -> BenchmarkResult:
        data = _few_samples(self.ready.graph, self.context)
        if data is None:
            raise DataError("no samples fit the model's inputs, so nothing can be timed; give some with --data")
        if self.integers is not None:
            shapes = {name: value.shape for name, value in data.first().feeds.items()}
            reference, candidate = (integer_form(graph, self.integers, shapes) for graph in (reference, candidate))
        with self.context.progress.paused():
            return benchmark(reference, candidate, data, seconds=_TIMING_SECONDS, sessions=6, seed=self.context.seed)


class PruneChannels(Pass):
    """Remove channels, neurons and heads that matter least, exactly, and repair what remains."""

    name: ClassVar[str] = "prune_channels"

    macs: float | None = Field(
        None, gt=0, le=1, description="Share of the multiply-accumulates that remains; 0.75 where nothing else is said"
    )
    params: float | None = Field(None, gt=0, le=1, description="Share of the parameters that remains")
    time: float | None = Field(None, gt=0, le=1, description="Share of the time that remains, measured on this machine")
    ffn: float | None = Field(None, gt=0, le=1, description="Share of the neurons between matrix products that remains")
    heads: float | None = Field(None, gt=0, le=1, description="Share of the attention heads that remains")
    importance: Criterion = Field(
        "obs", description="How channels are judged; obs and activation use samples, obs without any is l2"
    )
    combine: Combine = Field("mean", description="How scores of the layers that make a channel become one")
    allocation: Literal["output", "local", "uniform"] = Field(
        "output", description="Who gives channels up: by what the outputs lose, by the criterion alone, or all alike"
    )
    min_channels: int = Field(1, ge=1, description="Fewest channels that stay of a group")
    round_to: int = Field(
        0, ge=0, description="Keep multiples of this many channels; 0: what timing each width shows to pay"
    )
    timed_as: Literal["float", "int8"] = Field(
        "float",
        description="What is timed where time counts: the model as it is, or as it will be once it is quantised",
    )
    time_worth: float = Field(
        TIME_WORTH, ge=0, description="Decibels of output error that twice the speed is worth when channels are chosen"
    )
    size_worth: float = Field(
        0.0, ge=0, description="Decibels of output error that half the parameters are worth when channels are chosen"
    )
    drop_branches: bool = Field(
        True, description="Let whole residual branches go where that costs least; only with obs, repair and no rounding"
    )
    exclude_nodes: tuple[str, ...] = Field(
        (), description="Leave channels whole that these nodes make; name or pattern"
    )
    recover: bool = Field(True, description="Repair the layers that remain, from samples")
    repair: Literal["weights", "bias"] = Field("weights", description="What of a layer is repaired")
    sweeps: int = Field(2, ge=1, le=8, description="Times that all layers are repaired; each is kept where it helps")
    max_samples: int = Field(
        1024, ge=1, description="Most calibration samples that the repair uses; memory may allow fewer"
    )
    keep: dict[str, str] | None = Field(
        None, description="The channels that stay of each group, as a saved recipe has them; nothing is chosen then"
    )

    @model_validator(mode="after")
    def _aims_at_one_thing(self) -> Self:
        if self.time is not None and (self.macs is not None or self.params is not None):
            raise ValueError("time is an aim of its own; leave macs and params out")
        return self

    @property
    def guarantee(self) -> Guarantee:
        """Removes weights: judged by the task metric."""
        return Guarantee.APPROXIMATE

    @property
    def needs_data(self) -> bool:
        """The repair learns from samples, and so do the better criteria."""
        return self.recover or (self.keep is None and self.importance in ("obs", "activation"))

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail | Cut]:
        """Couple, choose, cut, check, repair."""
        scales = batch_norm_scales(graph)
        ready = prepare(graph, fold_batch_norm=self.recover)
        free = []
        for group in ready.coupling.groups:
            if group.pinned is not None:
                yield Refusal((group.producers or group.consumers)[0], f"its channels stay: {group.pinned}")
            elif self._excluded(group):
                yield Refusal((group.producers or group.consumers)[0], "its channels stay: excluded")
            else:
                free.append(group)
        if self.keep is not None:
            keep = self._given(ready.coupling.groups)
        else:
            keep = yield from self._choose(ready, free, scales, context)
        full = {group.name: group.channels for group in ready.coupling.groups}
        keep = {name: kept for name, kept in keep.items() if len(kept) < full[name]}
        if not keep:
            if ready.folded:
                yield from _folded(ready)
                share_vectors(ready.graph, ready.copies)
                replace_contents(graph, ready.graph)
            else:
                context.warn("prune_channels removed nothing; inspect --coupling says which channels stay, and why")
            return
        yield Decision("keep", {name: positions_text(kept.tolist()) for name, kept in keep.items()})
        least = _at_least_one(keep)
        pruned, cuts = remove_channels(ready.graph, ready.coupling.groups, least, ready.coupling)
        self._check(ready, pruned, least, context)
        pruned, cuts = _without(pruned, cuts, ready.coupling.groups, keep, constants=self.recover)
        yield from _folded(ready)
        yield from _told(ready, keep)
        if self.recover and context.data is not None:
            pruned = yield from self._recovered(pruned, ready, cuts, context)
        share_vectors(pruned, ready.copies)
        replace_contents(graph, pruned)
        yield from _cut_axes(ready.graph, cuts)

    # ---- choice

    def _excluded(self, group: CouplingGroup) -> bool:
        names = (*group.producers, *group.passing)
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.exclude_nodes)

    def _given(self, groups: Sequence[CouplingGroup]) -> dict[str, Ints]:
        assert self.keep is not None
        known = {group.name for group in groups}
        found = {}
        for name, text in self.keep.items():
            if name not in known:
                raise UsageError(
                    f"keep names the group {name!r}, which this model lacks; inspect --coupling lists its groups"
                )
            try:
                found[name] = np.array(read_positions(text), np.int64)
            except ValueError as error:
                raise UsageError(f"keep of group {name!r}: {error}; expected positions as in 0-5,7,9") from error
        return found

    def _choose(
        self, ready: Prepared, free: Sequence[CouplingGroup], scales: Mapping[str, NDArray[Any]], context: Context
    ) -> Generator[Refusal | Decision, None, dict[str, Ints]]:
        """The channels that stay; what could not be judged as asked is told."""
        chooser = Chooser(
            copy_graph(ready.graph),
            free,
            ready.costs,
            context.data,
            criterion=self.importance,
            combine=self.combine,
            shared=self.allocation,
            least=self.min_channels,
            round_to=max(self.round_to, 1),
            time_worth=self.time_worth,
            size_worth=self.size_worth,
            seed=context.seed,
            threads=context.threads,
            scales=scales,
            **self._measured(ready, free, context),
            progress=context.progress,
        )
        aim = partial(self._aim, ready)
        candidates = Candidates(ready, chooser, aim, context, self._integers(context))
        yield from (Refusal(_node_of(free, name), reason) for name, reason in chooser.notes.items())
        if self.time is not None:
            keep, reached = candidates.in_time(self.time, self.round_to or 1)
            yield Decision("round_to", self.round_to or 1)
            if reached > self.time:
                context.warn(f"prune_channels: {reached:.2f} of the time remains, {self.time:g} was asked for")
            return keep
        if self.round_to or self._timed(context):
            return candidates.keep(aim(), self.round_to or 1)
        keep, rounded = candidates.faster((1, 8))
        yield Decision("round_to", rounded)
        return keep

    def _integers(self, context: Context) -> Target | None:
        """The target that what is timed is quantised for."""
        return get_target(context.target) if self.timed_as == "int8" else None

    def _timed(self, context: Context) -> bool:
        """True where effects on the outputs are known, so that time can be weighed against them width by width."""
        known = self.importance == "obs" and self.allocation == "output" and context.data is not None
        return known and self.round_to == 0

    def _measured(self, ready: Prepared, free: Sequence[CouplingGroup], context: Context) -> dict[str, Any]:
        """The time that channels save, and which groups may go as a whole."""
        if not self._timed(context) or context.data is None:
            return {}
        batch = context.data.take(context.data.fixed_batch or 1).first()
        types = infer_shapes(ready.graph, {name: value.shape for name, value in batch.feeds.items()})

        def cut(keep: Mapping[str, Sequence[int]]) -> Graph:
            return remove_channels(ready.graph, ready.coupling.groups, keep, ready.coupling)[0]

        may_vanish: set[str] = set()
        if self.drop_branches and self.recover and self.min_channels == 1:
            may_vanish = vanishing(free, {layer.name: layer for layer in find_mixing_layers(ready.graph)}, types)
        saved = saved_times(free, cut, types, batch.feeds, integers=self._integers(context), progress=context.progress)
        return {"saved": saved, "may_vanish": frozenset(may_vanish)}

    def _aim(self, ready: Prepared, macs: float | None = None) -> Aim:
        """What remains of ``ready``, whose padding is folded already; ``macs`` stands for an aim in time."""
        if macs is None:
            others = (self.params, self.ffn, self.heads)
            macs = _DEFAULT_MACS if self.macs is None and all(aim is None for aim in others) else self.macs
        if macs is not None:
            macs = min(macs * ready.whole / max(ready.costs.macs(), 1), 1.0)
        return Aim(macs, self.params, self.ffn, self.heads)

    # ---- repair

    def _recovered(
        self, pruned: Graph, ready: Prepared, cuts: Cuts, context: Context
    ) -> Generator[Change | Refusal | Detail, None, Graph]:
        assert context.data is not None
        options = Recovery(
            samples=self.max_samples,
            sweeps=self.sweeps,
            method=self.repair,
            seed=context.seed,
            threads=context.threads,
            progress=context.progress,
        )
        try:
            found = recover(pruned, ready.graph, cuts, context.data, options)
        except ModelError as error:
            context.warn(f"prune_channels: nothing was repaired: {error}")
            return pruned
        yield from (Refusal(node, f"not repaired: {reason}") for node, reason in found.skipped)
        if found.overlap:
            context.warn("too few calibration samples to hold any out; repairs were judged on what they learned from")
        repaired: dict[str, list[Step]] = {}
        for step in found.steps:
            repaired.setdefault(step.node, []).append(step)
        for node, steps in repaired.items():
            before, after = decibels(steps[0].before), decibels(steps[-1].after)
            yield Change("repaired", node, f"{before:.2f} -> {after:.2f} dB on held-out samples")
        facts = {"output_error": [found.before, found.after], "sweeps": found.sweeps}
        yield Detail("recovery", {**facts, "train": found.train, "held_out": found.held_out})
        return found.graph

    # ---- proof

    def _check(self, ready: Prepared, pruned: Graph, keep: Mapping[str, Ints], context: Context) -> None:
        """The cut graph must equal the original with these channels masked, on a few samples."""
        reference = masked(ready.graph, ready.coupling.groups, keep, ready.coupling)
        data = _few_samples(ready.graph, context)
        if data is None:
            context.warn("prune_channels: no samples fit the model's inputs, so the cut was not checked by running it")
            return
        try:
            next(iter(compare(reference, reference, data, threads=context.threads)), None)
        except ModelError:
            if context.data is not None:
                raise
            context.warn(
                "prune_channels: made-up samples do not run, so the cut was not checked; give some with --data"
            )
            return
        found = {o.name: o for o in compare(reference, pruned, data, threads=context.threads)}
        tolerance = _COARSE_TOLERANCE if _is_coarse(ready) else _TOLERANCE
        if all(_error(output) <= tolerance for output in found.values()):
            return
        # Some networks magnify rounding. What the runtime's own optimisations change says how much.
        noise = compare(reference, reference, data, optimization=("disabled", "all"), threads=context.threads)
        allowed = {o.name: max(tolerance, min(_NOISE * _error(o), _COARSE_TOLERANCE)) for o in noise}
        for name, output in found.items():
            # A probability near zero is rounded as a number near one is.
            tiny = output.max_abs <= _TINY and _error(output) <= _COARSE_TOLERANCE
            if not (_error(output) <= allowed[name] or tiny):
                raise OnnxCompressError(
                    f"cutting channels changed output {name!r} (relative error {_error(output):.3g}) where masking "
                    "them did not; nothing was changed, please report it with the model"
                )


def _at_least_one(keep: Mapping[str, Ints]) -> dict[str, Ints]:
    """A group that goes as a whole is cut to one channel like any other, and checked, before its branch is dropped."""
    return {name: kept if len(kept) else np.zeros(1, np.int64) for name, kept in keep.items()}


def _without(
    pruned: Graph, cuts: Cuts, groups: Sequence[CouplingGroup], keep: Mapping[str, Ints], *, constants: bool
) -> tuple[Graph, Cuts]:
    """The graph without the branches of groups that keep nothing, and what was cut of the tensors that are left.

    With ``constants`` what a branch adds to the stream on average goes as well: repair makes up for it.
    """
    readers = [name for group in groups if group.name in keep and not len(keep[group.name]) for name in group.consumers]
    if not readers:
        return pruned, cuts
    layers = {layer.name: layer for layer in find_mixing_layers(pruned)}
    for name in readers:
        if name not in layers or layers[name].sum_output is None:
            raise UsageError(f"keep leaves nothing of what {name!r} reads, which is no branch that can go")
    sums = [str(tensor.name) for name in readers if (tensor := layers[name].sum_output) is not None]
    pruned = drop_branches(pruned, readers)
    if constants:
        pruned = drop_constants(pruned, sums)
    return pruned, still_there(cuts, pruned)


def _error(output: OutputComparison) -> float:
    """Relative L2; for outputs that are not floating point the share of unequal elements."""
    return output.relative_l2 if output.equal_elements is None else 1.0 - output.equal_elements


def _is_coarse(ready: Prepared) -> bool:
    """True where a different order of additions may show: half precision, and rounding to integers inside."""
    types = (known.dtype.name for known in ready.types.values() if known.dtype is not None)
    rounded = any(node.op in ("QuantizeLinear", "Round", "ArgMax", "TopK") for node in ready.graph.nodes)
    return rounded or not {"float16", "bfloat16"}.isdisjoint(types)


def _node_of(groups: Sequence[CouplingGroup], name: str) -> str:
    group = next(group for group in groups if group.name == name)
    return (group.producers or group.consumers)[0]


def _few_samples(graph: Graph, context: Context) -> Dataset | None:
    try:
        if context.data is not None:
            return context.data.take(max(_CHECKED, context.data.fixed_batch or 1))
        return synthetic_data(input_specs(graph), graph=graph, samples=2, batch=2, seed=context.seed)
    except (DataError, ModelError, UsageError):
        return None


def _folded(ready: Prepared) -> Iterator[Change]:
    if ready.folded:
        saved = ready.whole - ready.costs.macs()
        yield Change("folded", "", f"padding: {saved} multiply-accumulates less without removing a channel")


def _told(ready: Prepared, keep: Mapping[str, Ints]) -> Iterator[Change | Detail]:
    groups = {group.name: group for group in ready.coupling.groups}
    for name, kept in keep.items():
        group = groups[name]
        node = (group.producers or group.consumers)[0]
        yield Change("pruned", node, f"{len(kept)} of {group.channels} {group.kind} stay")
    costs = ready.costs
    counts = {name: len(kept) for name, kept in keep.items()}
    facts: dict[str, Any] = {
        "macs": [ready.whole, costs.macs(counts)],
        "parameters": [costs.parameters(), costs.parameters(counts)],
    }
    yield Detail("pruning", facts)


def _cut_axes(graph: Graph, cuts: Cuts) -> Iterator[Cut]:
    """What is left of each tensor that nodes make: weights can be read from the graph itself."""
    for node in graph.nodes:
        for tensor in node.outputs:
            for axis, kept in cuts.get(tensor.name, {}).items():
                yield Cut(tensor.name, axis, tuple(kept.tolist()))
