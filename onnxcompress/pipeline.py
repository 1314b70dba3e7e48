"""An ordered sequence of passes that is itself a pass."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from pydantic import Field, SerializeAsAny

from onnxcompress.base import (
    Change,
    Context,
    Cut,
    Decision,
    Detail,
    Guarantee,
    Pass,
    PassReport,
    PassResult,
    Refusal,
)
from onnxcompress.data import Dataset
from onnxcompress.graph import Graph, copy_graph, replace_contents
from onnxcompress.kept import Kept, compose_kept
from onnxcompress.shapes import graph_stats

__all__ = ["Pipeline"]

_WEAKNESS = {Guarantee.EXACT: 0, Guarantee.EQUIVALENT: 1, Guarantee.APPROXIMATE: 2}


class Pipeline(Pass):
    """Run ``passes`` in order, each on the result of the one before.

    The report holds the reports of the passes as ``children``; its changes, refusals and warnings are theirs in order.
    A decision or detail of the pass at position ``i`` is found under ``passes[i].name.key``.
    """

    name: ClassVar[str] = "pipeline"

    passes: tuple[SerializeAsAny[Pass], ...] = Field(description="the passes in the order in which they run")

    def __init__(self, passes: Sequence[Pass]) -> None:
        super().__init__(passes=tuple(passes))  # type: ignore[call-arg] # the base has no fields

    @property
    def guarantee(self) -> Guarantee:
        """The weakest guarantee of the passes; an empty pipeline is exact."""
        return max((p.guarantee for p in self.passes), key=_WEAKNESS.__getitem__, default=Guarantee.EXACT)

    @property
    def needs_data(self) -> bool:
        """True where any of the passes reads calibration data."""
        return any(p.needs_data for p in self.passes)

    def check_available(self) -> None:
        """What any of the passes needs."""
        for step in self.passes:
            step.check_available()

    def __call__(self, graph: Graph, context: Context | None = None) -> PassResult:
        """Run the passes; ``graph`` is not changed.

        The checks of the template run within each pass, so the pipeline adds only the composition of what they report.
        ``context.original`` is set to ``graph`` where it is None. What a pass cannot start without is missed before the
        first one runs. Passes whose results ``context.stages`` has do not run.
        """
        context = context if context is not None else Context()
        if context.original is None:
            context.original = graph
        start = time.perf_counter()
        for step in self.passes:
            step._check_start(context)
        before = graph_stats(graph)
        reports: list[PassReport] = []
        kept: Kept = {}
        whole, seen = context.data, self._seen(context)
        unseen = [0 if own is None or whole is None else whole.samples - own.samples for own in seen]
        stages = None if context.stages is None else context.stages.start(self.passes, graph, context, unseen)
        found = None if stages is None else stages.finished()
        if found is not None:
            graph, kept = found.graph, found.kept
            reports, context.kept = list(found.reports), found.kept
        for number, step in enumerate(self.passes[len(reports) :], start=len(reports) + 1):
            description = f"{step.name} ({number}/{len(self.passes)})"
            context.data = seen[number - 1]
            try:
                for running in context.progress.track((step,), description, 1):
                    result = running(graph, context)
            finally:
                context.data = whole
            graph = result.graph
            reports.append(result.report)
            kept = context.kept = compose_kept(kept, result.kept)
            if stages is not None:
                stages.keep(graph, reports, kept)
        if not self.passes:
            graph = copy_graph(graph)
        return PassResult(graph, self._report(reports, before, graph, time.perf_counter() - start), kept)

    def _seen(self, context: Context) -> list[Dataset | None]:
        """The samples that each pass is given: not those that a later one judges by."""
        seen = [context.data] * len(self.passes)
        for number, step in enumerate(self.passes):
            parts = None if context.data is None else step.hold_out(context.data, context.seed)
            if parts is not None:
                return [parts[0]] * number + seen[number:]
        return seen

    def _report(self, reports: list[PassReport], before: Any, graph: Graph, seconds: float) -> PassReport:
        return PassReport(
            name=self.name,
            options={},
            changes=tuple(change for report in reports for change in report.changes),
            refusals=tuple(refusal for report in reports for refusal in report.refusals),
            decisions=_by_position(reports, [report.decisions for report in reports]),
            before=before,
            after=graph_stats(graph),
            seconds=seconds,
            warnings=tuple(dict.fromkeys(warning for report in reports for warning in report.warnings)),
            details=_by_position(reports, [report.details for report in reports]),
            children=tuple(reports),
            reused=bool(reports) and all(report.reused for report in reports),
        )

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail | Cut]:
        """Run the passes on ``graph`` itself, for callers that hold a graph of their own."""
        result = self(graph, context)
        replace_contents(graph, result.graph)
        yield from result.report.changes
        yield from result.report.refusals
        yield from (Decision(option, value) for option, value in result.report.decisions.items())
        yield from (Detail(key, value) for key, value in result.report.details.items())
        yield from (Cut(name, axis, kept) for name, axes in result.kept.items() for axis, kept in axes.items())


def _by_position(reports: Sequence[PassReport], values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        f"passes[{i}].{report.name}.{key}": value
        for i, (report, items) in enumerate(zip(reports, values, strict=True))
        for key, value in items.items()
    }
