"""Run a recipe so that its result keeps to an accuracy budget and no part of it costs more time than it saves.

The recipe runs. Where the result misses the budget, :mod:`onnxcompress.quantization.layer_search` finds which layers
have to return to float, and the recipe runs again with these excluded; what is written is what a recipe with these
exclusions writes, so that a saved recipe replays to the same bytes and searches nothing.

Samples have one use each. The budget is searched on samples that are held out of the calibration data and that no pass
ever sees (``held_out`` of the recipe); what judges the result in the end is read by nobody here. They are held out
where a budget was asked for, or where a look at a few of the calibration samples shows that the result is far from any
budget; otherwise all samples calibrate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from onnxcompress.base import Context, Guarantee, Pass, PassResult
from onnxcompress.data import Dataset
from onnxcompress.errors import DataError, ModelError
from onnxcompress.graph import Graph
from onnxcompress.islands import TimedIslands, real_types, time_islands
from onnxcompress.passes import load_pass
from onnxcompress.quantization.gauge import Gauge, Goal, Reading
from onnxcompress.quantization.group_search import search_groups
from onnxcompress.quantization.layer_search import (
    LayerSearch,
    ReturnedLayers,
    as_details,
    describe,
    search_layers,
)
from onnxcompress.quantization.sensitivity import affordable_samples, weighing_units
from onnxcompress.quantization.simulation import Simulation
from onnxcompress.quantization.variants import Variants
from onnxcompress.recipe import Recipe
from onnxcompress.session import Session, is_large
from onnxcompress.shapes import infer_shapes, node_macs
from onnxcompress.stages import open_stages

__all__ = ["SEARCH_SHARE", "BudgetedRun", "run_within_budget"]

#: share of the calibration samples that is held out for the search, and the most samples of it
SEARCH_SHARE = 0.25
_MOST_HELD_OUT = 512
#: samples of a first look
_LOOK = 16
#: samples on which a choice of layers is judged, at least and at most, and multiply-accumulates for some dozens of them
_JUDGED = (16, 256)
_JUDGED_MACS = 1.5e10
#: kinds of changes that cost accuracy and are undone by excluding the node
_LOSSY_CHANGES = ("quantised", "converted")
#: how often the recipe runs again
_ATTEMPTS = 3


@dataclass
class BudgetedRun:
    """What :func:`run_within_budget` did.

    Attributes:
        result: of the last run of the recipe.
        recipe: that recipe, with what was excluded and how many samples were held out.
        samples: how many calibrated, and how many the search was held to ("calibration", "search").
        search: what was searched, for the report; None where the budget was met at once.
        islands: what was timed.
        variants: of the last run; None where the recipe has no static quantiser.
        missed: why the budget was not met on the samples of the search; None where it was.
        misses_in_float: True where no choice of layers keeps it: what came before quantisation costs too much.
    """

    result: PassResult
    recipe: Recipe
    samples: dict[str, int] = field(default_factory=dict)
    search: Mapping[str, Any] | None = None
    islands: TimedIslands = field(default_factory=TimedIslands)
    variants: Variants | None = None
    missed: str | None = None
    misses_in_float: bool = False

    @property
    def returned(self) -> dict[str, str]:
        """By node that returned to float, why."""
        reasons = {}
        for step in (self.search or {}).get("returned", ()):
            reasons.update(dict.fromkeys(step["floats"], "returned to float to keep the accuracy budget"))
        reasons.update(dict.fromkeys(self.islands.returned, "returned to float: faster so, by measurement"))
        return reasons


def run_within_budget(
    recipe: Recipe,
    graph: Graph,
    context: Context,
    goals: Sequence[Goal],
    *,
    asked: bool = False,
    time_it: bool = False,
) -> BudgetedRun:
    """Run ``recipe`` on ``graph``, and again with layers excluded where it misses ``goals``.

    Args:
        recipe: what to run.
        graph: the model.
        context: data and so on; its evaluation data is not read.
        goals: what to keep to; without any nothing is searched.
        asked: somebody asked for this budget, so that samples are held out for it from the start.
        time_it: time integer islands that may cost more than they save.
    """
    return _Runner(recipe, graph, context, goals, asked, time_it).run()


class _Runner:
    def __init__(
        self, recipe: Recipe, graph: Graph, context: Context, goals: Sequence[Goal], asked: bool, time_it: bool
    ) -> None:
        self._graph = graph
        # What took long does not run again because a layer after it returns to float.
        self._context = context if context.stages is not None else replace(context, stages=open_stages())
        self._given = context
        self._goals = goals
        self._asked = asked
        self._time_it = time_it
        self._recipe = recipe
        self._data = context.data
        self._held_out: Dataset | None = None
        self._last = context
        self._original: Session | None = None
        quantiser = load_pass("insert_qdq")
        self._static = next((i for i, step in enumerate(recipe.passes) if isinstance(step, quantiser)), None)
        #: passes that lose accuracy and can leave nodes alone
        self._lossy = [
            i
            for i, step in enumerate(recipe.passes)
            if step.guarantee is Guarantee.APPROXIMATE and "exclude_nodes" in type(step).model_fields
        ]

    def run(self) -> BudgetedRun:
        """The whole of it."""
        searches = bool(self._lossy) and bool(self._goals) and self._data is not None
        if searches and (self._asked or self._recipe.held_out is not None):
            self._hold_out()
        outcome = self._first(searches)
        if self._time_it and outcome.variants is not None and outcome.variants.target.audited:
            self._return_islands(outcome)
        for warning in self._last.warnings:
            self._given.warn(warning)
        self._given.reference, self._given.variants = self._last.reference, self._last.variants
        outcome.samples = self._samples()
        return outcome

    def _first(self, searches: bool) -> BudgetedRun:
        """The recipe as it is and, where that misses the budget, what was found instead."""
        outcome = self._pass(self._recipe)
        if not searches:
            return outcome
        if self._held_out is None:
            assert self._data is not None
            look = self._gauge(self._data, _LOOK)
            if self._met(look.read(self._runner(outcome))) or self._is_hopeless(outcome, look):
                return outcome
            if not self._hold_out():
                return outcome
            outcome = self._pass(self._recipe)
        return self._searched(outcome)

    def _is_hopeless(self, outcome: BudgetedRun, look: Gauge) -> bool:
        """True where all layers in float would miss the budget as well: pruning, say, is not undone by that."""
        if outcome.variants is None or self._others(outcome) or self._static_suffices(outcome, look, self._goals):
            return False
        outcome.missed, outcome.misses_in_float = "the model that was quantised misses it in floats already", True
        return True

    def _pass(self, recipe: Recipe) -> BudgetedRun:
        """Run ``recipe`` once."""
        self._last = replace(self._context, data=self._data, warnings=[], reference=None, variants=None)
        result = recipe.pipeline()(self._graph, self._last)
        return BudgetedRun(result, recipe, variants=self._last.variants)

    def _hold_out(self) -> bool:
        """Take the samples of the search out of those that passes see; False where there are too few."""
        assert self._data is not None
        share = self._recipe.held_out
        if share is None:
            share = min(SEARCH_SHARE, round(_MOST_HELD_OUT / self._data.samples, 6))
        try:
            self._data, self._held_out = self._data.split(share, self._context.seed)
        except DataError as error:
            self._context.warn(f"no samples were held out to search with, so the budget was not searched: {error}")
            return False
        self._recipe = replace(self._recipe, held_out=share)
        return True

    def _samples(self) -> dict[str, int]:
        if self._data is None or self._recipe.pipeline().guarantee is not Guarantee.APPROXIMATE:
            return {}
        found = {"calibration": self._data.samples}
        return found if self._held_out is None else {**found, "search": self._held_out.samples}

    # ---- judging

    def _gauge(self, data: Dataset, samples: int) -> Gauge:
        original = self._original
        if original is None:
            original = Session(self._graph, threads=self._context.threads)
            if not is_large(self._graph):  # which is not held beside its variants
                self._original = original
        if samples < data.samples:
            with suppress(DataError):  # too few batches to choose from: the first ones, then
                # spread over all of them, whatever their order
                data = data.split(samples / data.samples, self._context.seed)[1]
        return Gauge(original.run, data, samples)

    def _runner(self, outcome: BudgetedRun) -> Any:
        return Session(outcome.result.graph, threads=self._context.threads).run

    def _met(self, reading: Reading) -> bool:
        return all(goal.met(reading) for goal in self._goals)

    # ---- searching

    def _searched(self, outcome: BudgetedRun) -> BudgetedRun:
        """``outcome`` where it keeps the budget on the samples of the search, otherwise what does."""
        data = self._held_out
        assert data is not None
        types = infer_shapes(self._graph, data.sample_shapes())
        macs = node_macs(self._graph, types)
        cost = max(sum(macs.values()), 1)
        judging = self._gauge(data, max(_JUDGED[0], min(_JUDGED[1], int(_JUDGED_MACS / cost))))
        before = judging.read(self._runner(outcome))
        if self._met(before):
            return outcome
        hopeless = self._is_hopeless(outcome, judging)
        self._recipe = self._decided(outcome)
        others = self._others(outcome)
        aims = [goal.tightened() for goal in self._goals]
        if hopeless:
            best = outcome
        elif outcome.variants is not None and (not others or self._static_suffices(outcome, judging, aims)):
            best = self._simulated(outcome, before, judging, aims, cost)
        elif others:
            best = self._rerun(outcome, before, judging, aims, macs)
        else:
            best = outcome
        if best is outcome and not hopeless:
            outcome.missed = f"no layer that returns to float brings it closer: {describe(self._goals, before)}"
        if best.missed is not None:
            self._context.warn(f"on {judging.samples} samples held out for the search, {best.missed}")
        return best

    def _others(self, outcome: BudgetedRun) -> list[str]:
        """Nodes that passes other than the static quantiser changed and could leave alone."""
        names: dict[str, None] = {}
        for i in self._lossy:
            if i != self._static:
                changes = outcome.result.report.children[i].changes
                names.update(dict.fromkeys(c.node for c in changes if c.node and c.kind in _LOSSY_CHANGES))
        return list(names)

    def _static_suffices(self, outcome: BudgetedRun, judging: Gauge, aims: Sequence[Goal]) -> bool:
        """True where what the static quantiser was given keeps the budget."""
        assert outcome.variants is not None
        reading = judging.read(Session(outcome.variants.graph, threads=self._context.threads).run)
        return all(goal.met(reading) for goal in aims)

    def _simulated(
        self, outcome: BudgetedRun, before: Reading, judging: Gauge, aims: Sequence[Goal], cost: int
    ) -> BudgetedRun:
        """Search static INT8 by simulation; what is found runs for real."""
        variants, data = outcome.variants, self._held_out
        assert variants is not None and data is not None and self._static is not None
        units = weighing_units(variants.placement.units)
        ranking = self._gauge(data, affordable_samples(2 * len(units), cost))
        simulation = Simulation(variants, outcome.result.graph, threads=self._context.threads)
        types = real_types(variants, data)
        samples = {"ranking": ranking.samples, "judging": judging.samples}

        def search(goals: Sequence[Goal], start: tuple[str, ...], known: Mapping[str, float]) -> LayerSearch:
            progress = self._context.progress
            return search_layers(
                simulation, ranking, judging, goals, start=start, types=types, known=known, progress=progress
            )

        start: tuple[str, ...] = ()
        known: dict[str, float] = {}
        told: list[ReturnedLayers] = []
        best = outcome
        for _ in range(_ATTEMPTS):
            found = search(aims, start, known)
            if not found.met:  # what leaves no room to spare is better than nearly nothing in integers
                exact = search(self._goals, start, dict(found.sources))
                found = exact if exact.met else found
            known = dict(found.sources)
            told += found.steps[1:] if start else found.steps  # the first is what earlier searches found
            if found.exclude == start:
                break
            best = self._pass(self._excluding(found.exclude, [self._static]))
            after = judging.read(self._runner(best))
            found = replace(found, steps=tuple(told))
            best.search = {**self._details(found, before, after, samples), "macs": cost}
            best.missed = None if self._met(after) else self._missed(found, after, len(units))
            if best.missed is None or not found.met:
                break
            start = found.exclude
        return best

    def _rerun(
        self,
        outcome: BudgetedRun,
        before: Reading,
        judging: Gauge,
        aims: Sequence[Goal],
        macs: Mapping[str, int],
    ) -> BudgetedRun:
        """Search by running the recipe again and again."""
        candidates = self._others(outcome)
        if outcome.variants is not None:
            static = (unit.node.name for unit in weighing_units(outcome.variants.placement.units))
            candidates += [name for name in static if name not in candidates]
        order = {node.name: i for i, node in enumerate(self._graph.nodes)}
        candidates.sort(key=lambda name: order.get(name, len(order)))

        def measure(names: tuple[str, ...]) -> Reading:
            return judging.read(self._runner(self._pass(self._excluding(names, self._lossy))))

        last = self._last
        found = search_groups(candidates, measure, aims, macs, self._context.progress)
        if not found.exclude:
            self._last = last
            return outcome
        best = self._pass(self._excluding(found.exclude, self._lossy))
        after = judging.read(self._runner(best))
        samples = {"ranking": judging.samples, "judging": judging.samples}
        best.search = {**self._details(found, before, after, samples), "macs": max(sum(macs.values()), 1)}
        best.missed = None if self._met(after) else self._missed(found, after, len(candidates))
        return best

    def _details(
        self, found: LayerSearch, before: Reading, after: Reading, samples: Mapping[str, int]
    ) -> dict[str, Any]:
        """For the report: the steps as they were simulated, and what the written graphs were found to do."""
        return as_details(replace(found, before=before, after=after, met=self._met(after)), self._goals, samples)

    def _missed(self, found: LayerSearch, after: Reading, layers: int) -> str:
        count = len({name for step in found.steps for name in step.floats})
        return f"the budget is missed even with {count} of {layers} layers float: {describe(self._goals, after)}"

    def _decided(self, outcome: BudgetedRun) -> Recipe:
        """The recipe with what its passes decided, so that nothing is measured anew for every choice of layers.

        The static quantiser decides again: the best ranges depend on which layers are integer.
        """
        passes = list(self._recipe.passes)
        for i, child in enumerate(outcome.result.report.children):
            if i != self._static and child.decisions:
                options = {**passes[i].model_dump(mode="json", exclude_defaults=True), **child.decisions}
                passes[i] = type(passes[i]).model_validate(options)
        return replace(self._recipe, passes=tuple(passes))

    def _excluding(self, names: Sequence[str], positions: Sequence[int]) -> Recipe:
        """The recipe whose passes at ``positions`` leave ``names`` float as well."""
        passes = list(self._recipe.passes)
        for i in positions:
            passes[i] = _with_excluded(passes[i], names)
        return replace(self._recipe, passes=tuple(passes))

    # ---- islands

    def _return_islands(self, outcome: BudgetedRun) -> None:
        """Return to float what costs time as integers."""
        variants, data = outcome.variants, self._data
        assert variants is not None
        if data is None or not variants.placement.integer_units:
            return
        try:
            outcome.islands = time_islands(variants, data, seed=self._context.seed, progress=self._context.progress)
        except ModelError as error:  # a variant that the runtime does not take is no better than what there is
            self._context.warn(f"integer regions were not timed: {error}")
            return
        returned = outcome.islands.returned
        if returned:
            self._recipe = outcome.recipe
            assert self._static is not None
            again = self._pass(self._excluding(returned, [self._static]))
            outcome.result, outcome.recipe, outcome.variants = again.result, again.recipe, again.variants
            if again.variants is not None and not again.variants.placement.integer_units:
                self._context.warn(
                    "no part of the model is faster as integers on this machine, so all of it stays float; without "
                    "the benchmark (--no-benchmark) nothing is timed, and it is quantised for its size"
                )


def _with_excluded(step: Pass, names: Sequence[str]) -> Pass:
    options = step.model_dump(mode="json", exclude_defaults=True)
    options["exclude_nodes"] = list(dict.fromkeys([*options.get("exclude_nodes", []), *names]))
    return type(step).model_validate(options)
