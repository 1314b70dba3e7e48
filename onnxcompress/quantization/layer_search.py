"""Which layers return to float so that the quantised model keeps to an accuracy budget.

Rounding has two kinds of sources: the stored weights of a layer, and a class of tensors with one scale. What each adds
to the error at the outputs is measured with nothing else quantised; such errors add up, roughly. A tensor is float only
when whoever makes it and whoever reads it is, so candidates are single layers and the layers around one tensor. Round
by round the candidate with the largest gain per lost time is tried, among those that gain a fair share of the best one,
and kept where the error falls in fact. When the budget is met, what turned out not to be needed becomes integer again.

All of it runs on samples that nothing else sees, in one :class:`~onnxcompress.quantization.simulation.Simulation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any

from onnxcompress.quantization.gauge import Gauge, Goal, Reading
from onnxcompress.quantization.placement import Placement, Unit, saved_nanoseconds
from onnxcompress.quantization.sensitivity import read, rounded, total, weighing_units
from onnxcompress.quantization.simulation import Simulation, Switches
from onnxcompress.shapes import TensorType, node_macs
from onnxcompress.targets import Role

if TYPE_CHECKING:
    from onnxcompress.base import Progress

__all__ = ["LayerSearch", "ReturnedLayers", "as_details", "describe", "search_layers"]

#: candidates whose placement is worked out in a round
_SHORTLIST = 24
#: share of the largest gain that a candidate must have to be taken for its small cost
_FAIR = 0.25
#: where no layer stands out, as many are taken at once as remove this share of the error
_STRIDE = 0.1
#: an error that is not smaller by this share has not fallen
_FELL = 0.005
#: steps after which the error has not fallen, until all are taken
_REJECTED = 8
#: rounds at most
_ROUNDS = 64
#: steps that are tried without, once the budget is met
_PRUNED = 12
#: what stands for an error that is not finite
_HUGE = 1e9
#: nanoseconds below which a cost is not told from none
_LEAST_COST = 100.0


@dataclass(frozen=True)
class ReturnedLayers:
    """One step: layers that returned to float together.

    Attributes:
        nodes: what was excluded by name.
        floats: all integer operators that became float by it; neighbours that gain too little alone are among them.
        why: what was rounded badly.
        sqnr_before_db: at the model's outputs, on the samples of the search; None where the outputs are equal.
        sqnr_after_db: the same afterwards.
        macs: multiply-accumulates a sample that are float now.
        microseconds: of a run that they are estimated to cost; only proportions mean something. None: not known.
    """

    nodes: tuple[str, ...]
    floats: tuple[str, ...]
    why: str
    sqnr_before_db: float | None
    sqnr_after_db: float | None
    macs: int
    microseconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain types for the report."""
        return asdict(self)


@dataclass(frozen=True)
class LayerSearch:
    """What :func:`search_layers` found.

    Attributes:
        exclude: node names that stay float.
        steps: how it came to that, in order.
        met: the budget is met, by the simulation.
        exhausted: nothing integer was left, or nothing helped any more.
        before: with nothing excluded.
        after: with ``exclude``.
        variants: how many were run.
        sources: what each weight and each tensor costs alone, the worst first: (``unit`` or ``tensor`` and a name,
            relative squared error at the outputs); empty where nothing had to be searched.
    """

    exclude: tuple[str, ...]
    steps: tuple[ReturnedLayers, ...]
    met: bool
    exhausted: bool
    before: Reading
    after: Reading
    variants: int
    sources: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class _Candidate:
    """Layers that would return together, and the most that it can gain."""

    nodes: tuple[str, ...]
    bound: float


@dataclass(frozen=True)
class _State:
    """One choice of float layers."""

    exclude: tuple[str, ...]
    placement: Placement
    on: Switches
    saved: float

    @property
    def integer(self) -> dict[str, Unit]:
        return {unit.node.name: unit for unit in self.placement.integer_units}


def search_layers(
    simulation: Simulation,
    ranking: Gauge,
    judging: Gauge,
    goals: Sequence[Goal],
    *,
    start: Iterable[str] = (),
    types: Mapping[str, TensorType] | None = None,
    known: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> LayerSearch:
    """Return layers to float until all of ``goals`` are met.

    Args:
        simulation: the quantised model.
        ranking: few samples, on which every layer is measured.
        judging: more samples, on which the goals are held.
        goals: what to keep to.
        start: nodes that are excluded already; at least one more is then returned.
        types: of a real sample, by which costs are estimated; default: those that the quantiser went by.
        known: ``sources`` of an earlier search, which are then not measured again.
        progress: shows how far the work is.
    """
    search = _Search(simulation, ranking, judging, goals, types, known or {}, progress)
    return search.run(tuple(start))


class _Search:
    def __init__(
        self,
        simulation: Simulation,
        ranking: Gauge,
        judging: Gauge,
        goals: Sequence[Goal],
        types: Mapping[str, TensorType] | None,
        known: Mapping[str, float],
        progress: Progress | None,
    ) -> None:
        self._simulation = simulation
        self._variants = simulation.variants
        self._ranking = ranking
        self._judging = judging
        self._goals = goals
        self._progress = progress
        self._types = simulation.variants.sizes if types is None else types
        self._macs = node_macs(simulation.variants.graph, self._types)
        self._runs = 0
        self._tried: set[tuple[str, ...]] = set()
        self._whole = self._state(())
        self._units = weighing_units(self._whole.placement.units)
        #: switches of each source, and the error that it makes alone
        self._sources: dict[str, Switches] = {}
        self._errors: dict[str, float] = dict(known)

    # ---- measuring

    def _state(self, exclude: tuple[str, ...]) -> _State:
        placement = self._variants.placed(exclude)
        on = self._simulation.of(placement)
        return _State(exclude, placement, on, saved_nanoseconds(replace(placement, sizes=self._types), self._macs))

    def _read(self, gauge: Gauge, on: Switches) -> Reading:
        self._runs += 1
        return read(self._simulation, gauge, on)

    def _met(self, reading: Reading) -> bool:
        return all(goal.met(reading) for goal in self._goals)

    def _measure_sources(self) -> None:
        """What the weights of each unit and each class of tensors cost alone."""
        for unit in self._units:
            self._sources[f"unit {unit.node.name}"] = self._simulation.weights(unit)
        for representative in self._whole.placement.sources:
            self._sources[f"tensor {representative}"] = self._simulation.tensors(representative)
        if self._errors:
            return
        floor = _finite(self._read(self._ranking, frozenset()).error)
        names = [name for name, on in self._sources.items() if on]
        tracked: Iterable[str] = names
        if self._progress is not None:
            tracked = self._progress.track(names, "measuring layers", len(names))
        for name in tracked:
            error = _finite(self._read(self._ranking, self._sources[name]).error)
            self._errors[name] = max(error - floor, 0.0)

    def _predicted(self, on: Switches) -> float:
        return sum(error for name, error in self._errors.items() if self._sources[name] & on)

    # ---- candidates

    def _candidates(self, state: _State) -> list[_Candidate]:
        """Single layers and the layers around one tensor, those that can gain most first."""
        integer = state.integer
        units = [unit for unit in self._units if unit.node.name in integer]
        around = self._around(state)
        classes: dict[str, list[str]] = {}
        for representative, names in around.items():
            for name in names:
                classes.setdefault(name, []).append(representative)
        weights = {u.node.name: self._errors.get(f"unit {u.node.name}", 0.0) for u in units}
        tensors = {c: self._errors.get(f"tensor {c}", 0.0) for c in around}
        found: dict[tuple[str, ...], float] = {}
        for name in weights:
            found[(name,)] = weights[name] + sum(tensors[c] for c in classes.get(name, []))
        for names in around.values():
            group = tuple(name for name in names if name in weights)
            if group:
                reached = dict.fromkeys(c for name in group for c in classes[name])
                found[group] = sum(weights[n] for n in group) + sum(tensors[c] for c in reached)
        candidates = [_Candidate(nodes, bound) for nodes, bound in found.items() if nodes not in self._tried]
        return sorted(candidates, key=lambda c: -c.bound)[:_SHORTLIST]

    def _around(self, state: _State) -> dict[str, list[str]]:
        """By class of tensors, the integer units because of which it is rounded."""
        placement = state.placement
        whole = self._whole.placement
        around: dict[str, dict[str, None]] = {}
        for name in placement.quantized:
            names = around.setdefault(whole.classes.get(name, name), {})
            maker = placement.producer.get(name)
            if maker is not None and maker.integer and not maker.keeps_float and not maker.moves:
                names[maker.node.name] = None
            for reader in placement.consumers.get(name, []):
                if reader.integer and not reader.moves:
                    names[reader.node.name] = None
        return {representative: list(names) for representative, names in around.items()}

    def _next(self, state: _State) -> _State | None:
        """``state`` with the most worthwhile candidate, or several where none stands out; None where none is left."""
        now = self._predicted(state.on)
        worked: list[tuple[float, float, _Candidate]] = []
        best = 0.0
        for candidate in self._candidates(state):
            if candidate.bound < _FAIR * best:
                break  # bounds only fall from here on
            tried = self._state((*state.exclude, *candidate.nodes))
            gain = now - self._predicted(tried.on)
            if gain > 0:
                best = max(best, gain)
                worked.append((gain, max(state.saved - tried.saved, _LEAST_COST), candidate))
        worked = [entry for entry in worked if entry[0] >= _FAIR * best]
        if not worked:
            return None
        worked.sort(key=lambda entry: -entry[0] / entry[1])
        chosen: list[str] = []
        for gain, _, candidate in worked:
            chosen += [name for name in candidate.nodes if name not in chosen]
            now_with = self._state((*state.exclude, *chosen))
            if gain >= _STRIDE * now or self._predicted(now_with.on) <= (1 - _STRIDE) * now:
                break
        return now_with

    # ---- searching

    def run(self, start: tuple[str, ...]) -> LayerSearch:
        """The search, from ``start`` on."""
        before = after = self._read(self._judging, self._whole.on)
        if not start and self._met(before):
            return LayerSearch((), (), True, False, before, before, self._runs)
        self._measure_sources()
        states = [self._whole]
        if start:
            states.append(self._state(start))
            after = self._read(self._judging, states[-1].on)
        met = exhausted = False
        rounds = self._rounds(states)
        for after in (
            self._progress.track(rounds, "returning layers to float") if self._progress is not None else rounds
        ):
            met = self._met(after)
            if met:
                break
        exhausted = not met
        if met:
            states, after = self._pruned(states, after, len(start))
        steps = self._steps(states)
        sources = tuple(sorted(self._errors.items(), key=lambda item: -item[1]))
        return LayerSearch(states[-1].exclude, steps, met, exhausted, before, after, self._runs, sources)

    def _rounds(self, states: list[_State]) -> Iterator[Reading]:
        """Grow ``states`` by one after another; yields what the judging samples say.

        A step after which the error has not fallen is not taken, for errors can cancel. Where there are many such, or
        none is left, they are taken all the same: the fewer layers round, the less there is to cancel.
        """
        current = _finite(self._read(self._ranking, states[-1].on).error)
        rejected = 0
        for _ in range(_ROUNDS):
            state = self._next(states[-1])
            if (state is None or rejected == _REJECTED) and rejected <= _REJECTED:
                rejected = _REJECTED + 1
                self._tried.clear()
                state = self._next(states[-1])
            if state is None or not _computes(state.placement):
                return
            added = state.exclude[len(states[-1].exclude) :]
            error = _finite(self._read(self._ranking, state.on).error)
            if rejected <= _REJECTED and error > (1 - _FELL) * current:
                self._tried.update((added, *((name,) for name in added)))
                rejected += 1
                continue
            states.append(state)
            current = error
            yield self._read(self._judging, state.on)

    def _pruned(self, states: list[_State], after: Reading, fixed: int) -> tuple[list[_State], Reading]:
        """Without what is not needed: half of the last step, then whole steps, the last and least worth first."""
        parts = [b.exclude[len(a.exclude) :] for a, b in pairwise(states)]
        first = 1 if fixed else 0

        def tried(kept: Sequence[tuple[str, ...]]) -> Reading | None:
            reading = self._read(self._judging, self._state(tuple(name for part in kept for name in part)).on)
            return reading if self._met(reading) else None

        while len(parts) > first and len(parts[-1]) > 1:
            halved = [*parts[:-1], parts[-1][: (len(parts[-1]) + 1) // 2]]
            reading = tried(halved)
            if reading is None:
                break
            parts, after = halved, reading
        for part in list(reversed(parts[first:]))[:_PRUNED]:
            kept = [p for p in parts if p is not part]
            if len(kept) == first:
                break
            reading = tried(kept)
            if reading is not None:
                parts, after = kept, reading
        kept_states = [self._whole]
        for part in parts:
            kept_states.append(self._state((*kept_states[-1].exclude, *part)))
        return kept_states, after

    # ---- telling

    def _steps(self, states: Sequence[_State]) -> tuple[ReturnedLayers, ...]:
        steps = []
        before = self._read(self._judging, states[0].on)
        for old, new in pairwise(states):
            after = self._read(self._judging, new.on)
            floats = tuple(name for name in old.integer if name not in new.integer)
            steps.append(
                ReturnedLayers(
                    new.exclude[len(old.exclude) :],
                    floats,
                    self._why(old, new),
                    rounded(before.decibels),
                    rounded(after.decibels),
                    total(self._macs, floats),
                    round((old.saved - new.saved) / 1000.0, 1),
                )
            )
            before = after
        return tuple(steps)

    def _why(self, old: _State, new: _State) -> str:
        """What of the sources that are gone cost most."""
        gone = {n: e for n, e in self._errors.items() if self._sources[n] & old.on and not self._sources[n] & new.on}
        if not gone:
            return "its neighbours are float"
        worst = max(gone, key=lambda name: gone[name])
        kind, _, name = worst.partition(" ")
        alone = _alone(gone[worst])
        kept = "nothing is lost" if alone is None else f"{alone:.1f} dB are left at the outputs"
        if kind == "unit":
            return f"with nothing but the weight of {name!r} in 8 bits {kept}"
        low, high = self._range(name)
        return f"with nothing but tensor {name!r} in 8 bits, over {low:.3g} to {high:.3g}, {kept}"

    def _range(self, representative: str) -> tuple[float, float]:
        ranges = self._variants.ranges_of(self._whole.placement)
        found = [ranges[name] for name in self._whole.placement.sources[representative]]
        return min(r.low for r in found), max(r.high for r in found)


def _alone(error: float) -> float | None:
    return rounded(Reading(error, None, {}, 0.0, 0).decibels)


def _computes(placement: Placement) -> bool:
    """True where a convolution or matrix product is integer."""
    return any(unit.rule is not None and unit.rule.role is Role.COMPUTE for unit in placement.integer_units)


def _finite(error: float) -> float:
    return error if isfinite(error) and error < _HUGE else _HUGE


def describe(goals: Sequence[Goal], reading: Reading) -> str:
    """What ``reading`` says about ``goals``, in one phrase."""
    return ", ".join(goal.describe(reading) for goal in goals)


def as_details(search: LayerSearch, goals: Sequence[Goal], samples: Mapping[str, int]) -> dict[str, Any]:
    """``search`` for the report, as plain types."""
    return {
        "goals": [asdict(goal) for goal in goals],
        "met": search.met,
        "samples": dict(samples),
        "variants": search.variants,
        "before": {"sqnr_db": rounded(search.before.decibels), "found": describe(goals, search.before)},
        "after": {"sqnr_db": rounded(search.after.decibels), "found": describe(goals, search.after)},
        "returned": [step.to_dict() for step in search.steps],
        "sensitivity": [
            {"kind": source.partition(" ")[0], "name": source.partition(" ")[2], "alone_sqnr_db": _alone(error)}
            for source, error in search.sources
        ],
    }
