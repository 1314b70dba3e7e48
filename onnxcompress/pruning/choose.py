"""From groups, samples and an aim to the channels that stay: importance, effect on the outputs, allocation.

With calibration samples the criterion is block OBS, and the budget is shared out by what the model's outputs lose. The
other criteria need no samples (``activation`` does) and share the budget out by their own scores, or uniformly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxcompress.base import Progress, SilentProgress
from onnxcompress.graph import Graph
from onnxcompress.lockstep import Samples, samples_that_fit, split_samples
from onnxcompress.patches import Moments
from onnxcompress.pruning.allocation import (
    TIME_WEIGHTS,
    TIME_WEIGHTS_OF_CHANCES,
    TIME_WORTH,
    Budget,
    CostBudget,
    Curve,
    Size,
    allocate,
    output_effects,
    uniform,
)
from onnxcompress.pruning.costs import ChannelCosts
from onnxcompress.pruning.coupling import CouplingGroup
from onnxcompress.pruning.importance import (
    LEVELS,
    Combine,
    Criterion,
    Readers,
    Removal,
    eliminate,
    random_order,
    removal_by_scores,
    scores,
    weight_axis,
)
from onnxcompress.pruning.mixing import MixingLayer, find_mixing_layers
from onnxcompress.pruning.outputs import judged_outputs

if TYPE_CHECKING:
    from onnxcompress.data import Dataset

__all__ = ["Aim", "Chooser"]

Array = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: samples that Gram matrices are made from, and samples on which effects on the outputs are measured: most and fewest
_LEARNED = 512
_PROBED = 64
_FEWEST_PROBED = 8
#: multiply-accumulates that measuring effects on the outputs may take, unless that were too few samples
_PROBE_MACS = 1.5e12
#: bytes of all Gram matrices that are held at once; groups that need more are judged by the norm of their weights
_GRAM_BYTES = 1 << 30


@dataclass(frozen=True)
class Aim:
    """Shares that remain; None: not asked for. ``ffn`` and ``heads`` count what groups of that kind keep in all."""

    macs: float | None = None
    params: float | None = None
    ffn: float | None = None
    heads: float | None = None


@dataclass(frozen=True)
class CountBudget:
    """The channels of some groups, counted."""

    full: Mapping[str, int]

    def remaining(self, counts: Mapping[str, int]) -> float:
        """See :class:`~onnxcompress.pruning.allocation.Budget`."""
        return sum(counts[name] for name in self.full) / max(sum(self.full.values()), 1)

    def slopes(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        """See :class:`~onnxcompress.pruning.allocation.Budget`."""
        return dict.fromkeys(self.full, 1.0 / max(sum(self.full.values()), 1))


@dataclass
class Chooser:
    """Chooses the channels that stay.

    Attributes:
        graph: folded, sorted; its weights are changed on the way and put back.
        groups: those that may be cut.
        costs: of all groups.
        data: calibration samples, None for none.
        criterion: how channels are judged; ``obs`` needs samples.
        combine: how scores of several nodes become one.
        shared: ``output``: non-uniform by the error of the outputs; ``local``: by the criterion alone; ``uniform``.
        least: fewest channels that stay of a group.
        round_to: multiples of this many channels stay where a group has as many.
        scales: of BatchNormalization, for that criterion.
        time_worth: decibels of output error that a doubling of speed is worth.
        size_worth: decibels of output error that half the parameters are worth.
        saved: for some groups, the share of the time that 0, 1, ... removed channels save.
        may_vanish: groups that may lose all channels, where what that does to the outputs can be measured.
    """

    graph: Graph
    groups: Sequence[CouplingGroup]
    costs: ChannelCosts
    data: Dataset | None = None
    criterion: Criterion = "obs"
    combine: Combine = "mean"
    shared: str = "output"
    least: int = 1
    round_to: int = 1
    time_worth: float = TIME_WORTH
    size_worth: float = 0.0
    seed: int = 0
    threads: int = 0
    scales: Mapping[str, Array] = field(default_factory=dict)
    saved: Mapping[str, Floats] = field(default_factory=dict)
    may_vanish: frozenset[str] = frozenset()
    progress: Progress = field(default_factory=SilentProgress)
    #: groups that block OBS could not judge, with the reason
    notes: dict[str, str] = field(default_factory=dict)
    _measured: dict[str, Floats] | None = field(default=None, init=False, repr=False)
    _layers: dict[str, MixingLayer] | None = field(default=None, init=False, repr=False)
    _learned: Samples | None = field(default=None, init=False, repr=False)

    def choose(self, aim: Aim) -> dict[str, Ints]:
        """{group: channels that stay}, for all groups of which something goes.

        Raises:
            UsageError: the aim is out of reach.
        """
        removals = self.removals()
        curves = self.curves(removals)
        counts = self.counts(aim, curves)
        return {
            name: removals[name].kept(removals[name].channels - count)
            for name, count in counts.items()
            if count < removals[name].channels
        }

    # -- sharing out --------------------------------------------------------------------------------------------------

    def counts(self, aim: Aim, curves: Mapping[str, Curve]) -> dict[str, int]:
        """How many channels stay of each group."""
        full = dict(self.costs.full)
        weights = TIME_WEIGHTS_OF_CHANCES if self._answers_chances() else TIME_WEIGHTS
        by_error = partial(allocate, time_weights=weights, time_worth=self.time_worth)
        share = uniform if self.shared == "uniform" else by_error
        found: dict[str, int] = {}
        for kind, ratio in (("neurons", aim.ffn), ("heads", aim.heads)):
            if ratio is None:
                continue
            own = {g.name: curves[g.name] for g in self.groups if g.kind == kind and g.name in curves}
            found |= share(CountBudget({name: full[name] for name in own}), own, ratio, full) if own else {}
        rest = {name: curve for name, curve in curves.items() if name not in found}
        fixed = dict(found)
        for kind, ratio in (("macs", aim.macs), ("parameters", aim.params)):
            if ratio is not None:
                if self.size_worth and self.shared != "uniform":
                    size = Size(_Fixed(CostBudget(self.costs, "parameters"), fixed), self.size_worth)
                    share = partial(by_error, size=size)
                counts = share(_Fixed(CostBudget(self.costs, kind), fixed), rest, ratio, full)
                found |= counts
                rest = {name: _at_least(curve, full[name] - counts[name]) for name, curve in rest.items()}
        return found

    def _answers_chances(self) -> bool:
        """True where an output of the model is made by a Softmax, so that its divergence is what is measured."""
        return any(axes is not None for axes in judged_outputs(self.graph).values())

    def curves(self, removals: Mapping[str, Removal]) -> dict[str, Curve]:
        """What the outputs lose with each group, and how many channels may go."""
        effects: Mapping[str, Floats] = {}
        if self.shared == "output" and any(removal.mended for removal in removals.values()):
            effects = self._effects(list(removals.values()))
        worst = max((float(np.median(e[1:] / _lost(removals[n].error)[1:])) for n, e in effects.items()), default=1.0)
        found = {}
        for name, removal in removals.items():
            # Where nothing could be measured, the group counts as one of the most sensitive.
            error = effects[name] if name in effects else worst * _lost(removal.error)
            found[name] = Curve(error, self.allowed(removal), self.saved.get(name))
        return found

    def allowed(self, removal: Removal) -> Ints:
        """Numbers of channels of a group that may go."""
        channels = removal.channels
        kept = np.arange(channels, 0, -1)
        fits = kept >= min(self.least, channels)
        if self.round_to > 1 and channels >= self.round_to:
            fits &= (kept % self.round_to == 0) | (kept == channels)
        saved = self.saved.get(removal.group)
        if saved is not None:
            fits &= np.isfinite(saved[channels - kept])
        gone = channels - kept[fits]
        if channels in removal.mended:
            gone = np.append(gone, channels)
        return np.asarray(gone, np.int64)

    def _effects(self, removals: Sequence[Removal]) -> dict[str, Floats]:
        assert self.data is not None
        probes = sum(len(removal.mended) for removal in removals)
        fits = int(_PROBE_MACS / max(probes * self.costs.macs(), 1))
        samples = max(min(_PROBED, fits), _FEWEST_PROBED, self.data.fixed_batch or 1)
        # Weights were mended, and channels chosen, by the others: on those, removing looks cheaper than it is, and the
        # more so the wider a layer is.
        feeds = [dict(b.feeds) for b in _rebatched(self._unseen().take(samples))]
        return output_effects(self.graph, removals, feeds, threads=self.threads, progress=self.progress)

    def _unseen(self) -> Dataset:
        assert self.data is not None
        if self._learned is None:
            return self.data
        held_out = self._learned.held_out
        return held_out if held_out.samples >= _FEWEST_PROBED else self._learned.whole

    # -- order --------------------------------------------------------------------------------------------------------

    def removals(self) -> dict[str, Removal]:
        """The removal order of every group."""
        found: dict[str, Removal] = {}
        if self.criterion == "obs" and self.data is not None:
            found = self._by_obs()
        for number, group in enumerate(self.groups):
            if group.name not in found:
                found[group.name] = self._by_scores(group, number)
        return {group.name: found[group.name] for group in self.groups}

    def _by_scores(self, group: CouplingGroup, number: int) -> Removal:
        if self.criterion == "random":
            return random_order(group, np.random.default_rng([self.seed, number]))
        criterion: Criterion = "l2" if self.criterion == "obs" else self.criterion
        power = self._power if criterion == "activation" else {}
        values = scores(group, self.graph, criterion, combine=self.combine, scales=self.scales, power=power)
        if values is None and criterion != "l2":
            self.notes[group.name] = f"nothing for {criterion} to go by; judged by the norm of its weights"
            values = scores(group, self.graph, "l2", combine=self.combine)
        if values is None:
            self.notes[group.name] = "no stored weights to judge by; its last channels go first"
            values = np.arange(group.channels, 0, -1, dtype=np.float64)
        return removal_by_scores(group, values)

    @property
    def _power(self) -> dict[str, Floats]:
        """Mean squares of the inputs of all layers that read groups, by tensor."""
        if self.data is None:
            return {}
        if self._measured is None:
            layers = {id(each): each for group in self.groups for each, _ in self._readers(group)}
            power: dict[str, Floats] = {}
            for layer, moments in self._run_readers(list(layers.values())):
                diagonal = np.einsum("gii->gi", moments.gram) / max(moments.count, 1)
                taps = diagonal.size // max(_inputs(layer), 1)
                power[layer.data] = diagonal.reshape(-1, max(taps, 1)).mean(axis=1)
            self._measured = power
        return self._measured

    def _readers(self, group: CouplingGroup) -> list[tuple[MixingLayer, Ints]]:
        """The layers that read ``group``, with the channel of each position of their input."""
        if self._layers is None:
            self._layers = {layer.name: layer for layer in find_mixing_layers(self.graph)}
        members = {(m.tensor, m.axis): m.channel_of for m in group.members}
        found = []
        for name in dict.fromkeys(group.consumers):
            layer = self._layers.get(name)
            if layer is None:
                continue
            if layer.groups > 1:
                channel_of = members.get((layer.data, 1))
            else:
                axis = weight_axis(layer.node, layer.stored.ndim, reading=True)
                channel_of = members.get((str(layer.node.inputs[1].name), axis))
            if channel_of is not None and len(channel_of) == _inputs(layer):
                found.append((layer, channel_of))
        return found

    def _run_readers(self, layers: Sequence[MixingLayer]) -> Iterable[tuple[MixingLayer, Moments]]:
        assert self.data is not None
        place = {id(node): i for i, node in enumerate(self.graph.nodes)}
        ordered = sorted(layers, key=lambda layer: place[id(layer.node)])
        schedule = [[layer.data, str(layer.output.name)] for layer in ordered]
        limit = min(_LEARNED, samples_that_fit([(self.graph, schedule)], self.data))
        self._learned = split_samples(self.data, self.seed, limit)
        feeds = [dict(batch.feeds) for batch in _rebatched(self._learned.train)]
        return Readers(self.graph, ordered, feeds, seed=self.seed, threads=self.threads, progress=self.progress).run()

    def _by_obs(self) -> dict[str, Removal]:
        readers = {group.name: self._readers(group) for group in self.groups}
        budget = _GRAM_BYTES
        chosen: dict[str, CouplingGroup] = {}
        for group in self.groups:
            own = readers[group.name]
            if not own:
                self.notes[group.name] = "no layer with stored weights reads it; judged by the norm of its weights"
                continue
            held = sum(_gram_bytes(layer) for layer, _ in own) if len(own) > 1 else 0
            if held > budget or any(_gram_bytes(layer) > _GRAM_BYTES for layer, _ in own):
                self.notes[group.name] = "its Gram matrices are too large; judged by the norm of its weights"
                continue
            budget -= held
            chosen[group.name] = group
        waiting = {name: {id(layer) for layer, _ in readers[name]} for name in chosen}
        users: dict[int, list[str]] = {}
        for name in chosen:
            for layer, _ in readers[name]:
                users.setdefault(id(layer), []).append(name)
        layers = {id(layer): layer for name in chosen for layer, _ in readers[name]}
        moments: dict[int, Moments] = {}
        found: dict[str, Removal] = {}
        for layer, sums in self._run_readers(list(layers.values())):
            moments[id(layer)] = sums
            for name in users[id(layer)]:
                waiting[name].discard(id(layer))
                if not waiting[name]:
                    parts = [(each, moments[id(each)], channel_of) for each, channel_of in readers[name]]
                    levels = (*LEVELS, 1.0) if name in self.may_vanish else LEVELS
                    found[name] = eliminate(chosen[name], parts, levels=levels)
            pending = {id(each) for name, left in waiting.items() if left for each, _ in readers[name]}
            moments = {key: value for key, value in moments.items() if key in pending}
        return found


@dataclass(frozen=True)
class _Fixed:
    """A budget with some groups cut beforehand."""

    budget: Budget
    counts: Mapping[str, int]

    def remaining(self, counts: Mapping[str, int]) -> float:
        return self.budget.remaining({**counts, **self.counts})

    def slopes(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        return self.budget.slopes({**counts, **self.counts})


def _at_least(curve: Curve, gone: int) -> Curve:
    """``curve`` for a group of which ``gone`` channels go in any case."""
    return Curve(curve.error, curve.allowed[curve.allowed >= gone], curve.saved)


def _lost(error: Floats) -> Floats:
    return np.concatenate([[0.0], np.maximum(error, 1e-12)])


def _inputs(layer: MixingLayer) -> int:
    """Channels that the layer reads."""
    shape = layer.stored.shape
    if layer.op == "Conv":
        return int(shape[1] * layer.groups)
    return int(shape[weight_axis(layer.node, len(shape), reading=True)])


def _gram_bytes(layer: MixingLayer) -> int:
    groups, _, columns = layer.filters().shape
    return int(8 * groups * columns**2)


def _rebatched(data: Dataset) -> Dataset:
    """Larger batches, where the samples are small."""
    return data if data.fixed_batch else data.rebatch(64)
