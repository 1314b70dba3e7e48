"""Many models on many runtimes: which is faster, where, by how much, and whether it still computes the same.

Each pair of a model and a runtime is a *variant*. A variant is timed only when its outputs are right
(:mod:`~onnxcompress.benchmark.gate`); one that fails is a row with its reason, and the others go on. Every comparison
is one of pairs (:mod:`~onnxcompress.benchmark.pairs`), of three kinds:

- ``noise``: the first model that runs on a runtime, against itself: what this machine makes of no difference at all
- ``runtime``: the first model on a further runtime, against itself on the first runtime
- ``model``: a further model, against the first model on the same runtime
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from onnxcompress import errors
from onnxcompress.base import Progress, SilentProgress
from onnxcompress.benchmark.extras import ColdStart, Throughput, cold_start, resized, throughput
from onnxcompress.benchmark.gate import check_model, check_runtime, compare_outputs, is_reduced, outputs_of
from onnxcompress.benchmark.pairs import (
    BenchmarkResult,
    ModelTiming,
    Samples,
    Subject,
    compare_subjects,
    paired_feeds,
)
from onnxcompress.benchmark.runners import Runner, make_runner, runtime_of
from onnxcompress.data import Dataset, open_data
from onnxcompress.environment import describe_environment, environment_warnings
from onnxcompress.errors import OnnxCompressError, UsageError
from onnxcompress.evaluate import label_ranks
from onnxcompress.graph import Graph, InputSpec, input_specs, model_info
from onnxcompress.io import load, model_bytes
from onnxcompress.runtimes import NodePlacement, Runtime, RuntimeFacts, Trace, get_runtime
from onnxcompress.session import Feeds, Session, import_onnxruntime
from onnxcompress.shapes import graph_stats, infer_shapes, node_macs
from onnxcompress.verify import OutputComparison

__all__ = [
    "Comparison",
    "Failure",
    "MatrixResult",
    "ModelFacts",
    "Placed",
    "Variant",
    "benchmark_models",
    "placed_nodes",
    "trace_model",
]

Kind = Literal["noise", "runtime", "model"]
Item = TypeVar("Item")

#: runs that a trace is made of
TRACE_RUNS = 30


@dataclass(frozen=True)
class ModelFacts:
    """A model file. ``name`` tells it from the others."""

    name: str
    path: Path
    sha256: str | None
    bytes_on_disk: int
    nodes: int
    parameters: int
    macs: int
    #: computes with fewer bits than float32 by itself
    reduced: bool


@dataclass(frozen=True)
class Failure:
    """Why there is no time."""

    error: str
    message: str
    exit_code: int

    @classmethod
    def of(cls, error: OnnxCompressError) -> Failure:
        """The failure that ``error`` tells of."""
        return cls(type(error).__name__, str(error), error.exit_code)

    def raised(self, prefix: str = "") -> OnnxCompressError:
        """The failure as an error of its kind again."""
        kind: type[OnnxCompressError] = getattr(errors, self.error, OnnxCompressError)
        return kind(f"{prefix}{self.message}")


@dataclass(frozen=True)
class Placed:
    """What runs on one provider. ``macs`` counts the nodes whose names are the file's."""

    provider: str
    nodes: int
    macs: int
    operators: Mapping[str, int]


@dataclass(frozen=True)
class Variant:
    """A model on a runtime, by their positions, and all that was found. Without ``failure`` there is a ``timing``."""

    model: int
    runtime: int
    failure: Failure | None = None
    #: against the same model on the reference
    outputs: tuple[OutputComparison, ...] = ()
    #: against the first model on the reference
    against_first: tuple[OutputComparison, ...] = ()
    #: task metrics, where the data has labels
    metrics: Mapping[str, float] = field(default_factory=dict)
    timing: ModelTiming | None = None
    placement: tuple[Placed, ...] = ()
    trace: Trace | None = None
    cold_start: ColdStart | None = None
    throughput: tuple[Throughput, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """``result.ratio`` = time of variant ``reference`` / time of variant ``candidate``; positions in ``variants``."""

    kind: Kind
    reference: int
    candidate: int
    result: BenchmarkResult
    samples: Samples


@dataclass(frozen=True)
class MatrixResult:
    """All that :func:`benchmark_models` found."""

    models: tuple[ModelFacts, ...]
    #: as they were asked for
    runtimes: tuple[str, ...]
    #: None where a runtime is not there
    facts: tuple[RuntimeFacts | None, ...]
    #: the runtime that outputs are held against
    reference: RuntimeFacts
    variants: tuple[Variant, ...]
    comparisons: tuple[Comparison, ...]
    #: False: models were timed side by side whatever they compute
    output_check: bool
    isolated: bool
    threads: int
    batch: int | None
    seed: int
    samples: int
    seconds: float
    environment: Mapping[str, Any]
    warnings: tuple[str, ...]

    def label(self, variant: Variant) -> str:
        """What a variant is called: the model, and the runtime where there are several."""
        name = self.models[variant.model].name
        return name if len(self.runtimes) == 1 else f"{name} on {self.runtimes[variant.runtime]}"

    def best(self) -> Variant | None:
        """The variant with the shortest median; None where none was timed."""
        timed = [variant for variant in self.variants if variant.timing is not None]
        return min(timed, key=lambda v: v.timing.median_s if v.timing else 0.0, default=None)


def benchmark_models(
    models: Sequence[str | os.PathLike[str]],
    data: Any,
    *,
    runtimes: Sequence[str] = ("onnxruntime:cpu",),
    threads: int = 1,
    sessions: int = 10,
    seconds: float = 10.0,
    batch: int | None = 1,
    seed: int = 0,
    output_check: bool = True,
    noise_floor: bool = True,
    trace: bool = False,
    cold_starts: int = 0,
    batches: Sequence[int] = (),
    thread_counts: Sequence[int] = (),
    throughput_seconds: float = 1.0,
    isolate: bool | None = None,
    progress: Progress | None = None,
) -> MatrixResult:
    """Time ``models`` on ``runtimes``; the first of each is what the others are compared with.

    Args:
        models: ONNX files that take the same inputs.
        data: a :class:`~onnxcompress.data.Dataset` or whatever :func:`~onnxcompress.data.open_data` takes. The first
            eight batches take turns; all of it is read only where it has labels, for the metrics.
        runtimes: as :func:`~onnxcompress.runtimes.get_runtime` has them.
        threads: of one operator; 0 lets the runtime choose.
        sessions, seconds, batch, seed: of each comparison, as :func:`~onnxcompress.benchmark.benchmark` has them.
        output_check: refuse to time what does not compute the same.
        noise_floor: time a model against itself on every runtime.
        trace: record the runtime's own times of each node, in a run of its own.
        cold_starts: fresh processes to start each variant in; 0: none.
        batches: batch sizes to measure the throughput at.
        thread_counts: thread counts to measure it at; ``threads`` where only ``batches`` are given.
        throughput_seconds: seconds for one figure.
        isolate: one process a variant; None: where runtimes disturb each other.
        progress: where to report to.

    Raises:
        UsageError: a model or runtime is named twice, or models take different inputs.
        ModelError: a file is no model, or the reference cannot run the first one.
        DataError: the data does not fit.
        RuntimeUnavailableError: onnxruntime, which is the reference, is missing.
    """
    import_onnxruntime()
    if not models or not runtimes:
        raise UsageError("nothing to time; give at least one model and one runtime")
    chosen = [get_runtime(spec) for spec in runtimes]
    for what, names in (("model", [os.fspath(m) for m in models]), ("runtime", [r.spec for r in chosen])):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None and not (what == "model" and len(names) == 2):
            raise UsageError(f"{what} {twice!r} is given more than once; name each once")
    with ExitStack() as stack:
        job = _Job(
            paths=[Path(model) for model in models],
            runtimes=chosen,
            data=data,
            threads=threads,
            sessions=sessions,
            seconds=seconds,
            batch=batch,
            seed=seed,
            output_check=output_check,
            progress=progress if progress is not None else SilentProgress(),
            isolate=isolate,
            stack=stack,
        )
        job.prepare()
        job.check_outputs()
        job.compare(noise_floor)
        if trace:
            job.look_inside()
        if cold_starts:
            job.start_cold(cold_starts)
        if batches or thread_counts:
            job.measure_throughput(batches or (batch or 1,), thread_counts or (threads,), throughput_seconds)
        return job.result()


def trace_model(
    model: str | os.PathLike[str], feeds: Sequence[Feeds], *, runtime: str = "onnxruntime:cpu", threads: int = 1
) -> Trace:
    """The runtime's own times of each node of a model file, from a run of its own on ``feeds`` in turn.

    Raises:
        UsageError, RuntimeUnavailableError, ModelError: as :meth:`~onnxcompress.runtimes.Runtime.open`.
    """
    return runtime_of(runtime).trace(Path(model), threads, feeds, TRACE_RUNS)


def placed_nodes(placement: Sequence[NodePlacement], macs: Mapping[str, int]) -> tuple[Placed, ...]:
    """Nodes and MACs by provider, the one with the most MACs first."""
    groups: dict[str, list[NodePlacement]] = {}
    for node in placement:
        groups.setdefault(node.provider, []).append(node)
    placed = []
    for provider, nodes in groups.items():
        operators: dict[str, int] = {}
        for node in nodes:
            operators[node.op] = operators.get(node.op, 0) + 1
        total = sum(macs.get(node.node, 0) for node in nodes)
        placed.append(Placed(provider, len(nodes), total, dict(sorted(operators.items(), key=lambda i: (-i[1], i[0])))))
    return tuple(sorted(placed, key=lambda p: (-p.macs, -p.nodes, p.provider)))


def _clash(runtimes: Sequence[Runtime]) -> bool:
    names = {runtime.name for runtime in runtimes}
    return any(runtime.clashes & names for runtime in runtimes)


def _names(paths: Sequence[Path]) -> list[str]:
    """File names where they differ, otherwise as much of the paths as tells them apart; numbered where nothing does."""
    for name in (lambda p: p.name, lambda p: f"{p.parent.name}/{p.name}", str):
        names = [name(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=False)]


@dataclass
class _Job:
    """One run of :func:`benchmark_models`: what was asked for, and what is known so far."""

    paths: list[Path]
    runtimes: list[Runtime]
    data: Any
    threads: int
    sessions: int
    seconds: float
    batch: int | None
    seed: int
    output_check: bool
    progress: Progress
    #: None: where runtimes that are there disturb each other
    isolate: bool | None
    stack: ExitStack
    isolated: bool = False
    models: list[ModelFacts] = field(default_factory=list)
    macs: list[dict[str, int]] = field(default_factory=list)
    specs: list[InputSpec] = field(default_factory=list)
    feeds: list[Feeds] = field(default_factory=list)
    samples: int = 0
    #: outputs of each model on the reference
    expected: list[list[Mapping[str, Any]]] = field(default_factory=list)
    facts: list[RuntimeFacts | None] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    runners: dict[int, Runner] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=describe_environment)
    started: float = field(default_factory=time.perf_counter)

    # -- before anything is timed -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read models and data, and look which runtimes are there."""
        for path, name in zip(self.paths, _names(self.paths), strict=True):
            graph = load(path)
            self.models.append(self._described(graph, path, name))
            if not self.specs:
                self.specs = input_specs(graph)
        self.feeds = paired_feeds(self.paths, self.data, self.batch)
        self.samples = sum(len(next(iter(feeds.values()), ())) if feeds else 0 for feeds in self.feeds)
        for runtime_index, runtime in enumerate(self.runtimes):
            failure = None
            try:
                runtime.check()
                self.facts.append(runtime.facts(self.threads))
            except OnnxCompressError as error:
                failure = Failure.of(error)
                self.facts.append(None)
            for model_index in range(len(self.models)):
                self.variants.append(Variant(model_index, runtime_index, failure))
        there = [runtime for runtime, facts in zip(self.runtimes, self.facts, strict=True) if facts is not None]
        self.isolated = _clash(there) if self.isolate is None else self.isolate

    def _described(self, graph: Graph, path: Path, name: str) -> ModelFacts:
        stats = graph_stats(graph)
        macs = node_macs(graph, infer_shapes(graph))
        self.macs.append(macs)
        return ModelFacts(
            name,
            path,
            model_info(graph).source_sha256,
            model_bytes(path),
            stats.nodes,
            stats.parameters,
            sum(macs.values()),
            is_reduced(graph),
        )

    def attempt(self, position: int, work: Callable[[Variant], Variant]) -> None:
        """Replace a variant by what ``work`` makes of it; an error makes it a failure."""
        variant = self.variants[position]
        if variant.failure is not None:
            return
        try:
            self.variants[position] = work(variant)
        except OnnxCompressError as error:
            self.variants[position] = replace(variant, failure=Failure.of(error))
            self._end(position)

    def each(self, description: str) -> Iterator[int]:
        """The positions of the variants, with progress."""
        positions = range(len(self.variants))
        return iter(self.progress.track(positions, description, len(positions)))

    def runner(self, position: int) -> Runner:
        """The variant's runner, fed with the batches."""
        if position not in self.runners:
            self.runners[position] = self._made(self.variants[position])
        return self.runners[position]

    def _made(self, variant: Variant, threads: int | None = None) -> Runner:
        runner = make_runner(
            self.runtimes[variant.runtime],
            self.paths[variant.model],
            self.threads if threads is None else threads,
            isolated=self.isolated,
        )
        self.stack.callback(runner.end)
        runner.feed(self.feeds)
        return runner

    def _end(self, position: int) -> None:
        runner = self.runners.pop(position, None)
        if runner is not None:
            runner.end()

    def check_outputs(self) -> None:
        """Hold every variant's outputs against the reference's."""
        for path in self.paths:
            session = Session(path, optimization="disabled", threads=self.threads)
            self.expected.append(outputs_of(session.run, self.feeds))
        for position in self.each("checking outputs"):
            self.attempt(position, partial(self._checked, position))

    def _checked(self, position: int, variant: Variant) -> Variant:
        runner, facts = self.runner(position), self.facts[variant.runtime]
        assert facts is not None
        found = outputs_of(runner.run, self.feeds)
        outputs = self._compared(self.expected[variant.model], found)
        first = self._compared(self.expected[0], found)
        model = self.models[variant.model]
        if self.output_check:
            exact = facts.precision.startswith("float32") and not model.reduced
            check_runtime(outputs, exact=exact, where=f"{model.name} on {facts.spec}")
            if variant.model:
                self._check_model(first, model)
        placement = placed_nodes(runner.placement(), self.macs[variant.model])
        metrics = self._metrics(runner)
        runner.close()
        return replace(variant, outputs=outputs, against_first=first, placement=placement, metrics=metrics)

    def _compared(
        self, reference: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
    ) -> tuple[OutputComparison, ...]:
        try:
            return compare_outputs(reference, found, self.feeds)
        except OnnxCompressError:
            if self.output_check:
                raise
            return ()

    def _check_model(self, outputs: Sequence[OutputComparison], model: ModelFacts) -> None:
        try:
            check_model(outputs, model=model.name, first=self.models[0].name)
        except OnnxCompressError as error:
            raise type(error)(f"{error}; --no-output-check times them anyway") from error

    def _metrics(self, runner: Runner) -> dict[str, float]:
        """top-1 and top-5 where the data has labels and the model has scores."""
        dataset = self.data
        if not (isinstance(dataset, Dataset) and dataset.has_labels):
            return {}
        labelled = open_data(dataset, self.specs)
        try:
            return label_ranks(runner.run, labelled, progress=self.progress).metrics()
        except OnnxCompressError as error:
            self.warn(f"no task metric: {error}")
            return {}

    def warn(self, message: str) -> None:
        """Record a warning once."""
        if message not in self.warnings:
            self.warnings.append(message)

    # -- timing -----------------------------------------------------------------------------------------------------

    def plan(self, noise_floor: bool) -> list[tuple[Kind, int, int]]:
        """(kind, position of the reference, of the candidate) of each comparison."""
        works = [position for position, variant in enumerate(self.variants) if variant.failure is None]
        planned: list[tuple[Kind, int, int]] = []
        for runtime in range(len(self.runtimes)):
            here = [p for p in works if self.variants[p].runtime == runtime]
            if not here:
                continue
            first = here[0]
            elsewhere = [p for p in works if self.variants[p].model == self.variants[first].model and p < first]
            if noise_floor:
                planned.append(("noise", first, first))
            if elsewhere:
                planned.append(("runtime", elsewhere[0], first))
            planned.extend(("model", first, position) for position in here[1:])
        compared = {position for _, *pair in planned for position in pair}
        return [*planned, *(("noise", position, position) for position in works if position not in compared)]

    def compare(self, noise_floor: bool) -> None:
        """Make every comparison, in the order of the plan."""
        about = f"timing, about {self.seconds:g} s a comparison"
        total = len(self.plan(noise_floor))
        for number, (kind, reference, candidate) in enumerate(
            self.progress.track(self.pending(noise_floor), about, total)
        ):
            self.attempt(candidate, partial(self._timed, kind, reference, candidate, number))

    def pending(self, noise_floor: bool) -> Iterator[tuple[Kind, int, int]]:
        """The comparisons of the plan that were not made yet; what fails on the way changes the plan."""
        done: set[tuple[Kind, int, int]] = set()
        while remaining := [item for item in self.plan(noise_floor) if item not in done]:
            done.add(remaining[0])
            yield remaining[0]

    def _timed(self, kind: Kind, reference: int, candidate: int, number: int, variant: Variant) -> Variant:
        sizes = [self.models[self.variants[p].model].bytes_on_disk for p in (reference, candidate)]
        twin = self._made(variant) if reference == candidate else self.runner(candidate)
        subjects = Subject(self.runner(reference), sizes[0]), Subject(twin, sizes[1])
        try:
            result, samples = compare_subjects(
                *subjects,
                len(self.feeds),
                sessions=self.sessions,
                seconds=self.seconds,
                seed=self.seed + number,
                progress=self.progress,
            )
        finally:
            if reference == candidate:
                twin.end()
        result = replace(
            result,
            threads=self.threads,
            provider=self.runtimes[variant.runtime].spec,
            batch=self.batch,
            environment=self.environment,
        )
        self.comparisons.append(Comparison(kind, reference, candidate, result, samples))
        first = self.variants[reference]
        if first.timing is None:
            self.variants[reference] = replace(first, timing=result.reference)
        if reference == candidate:
            return self.variants[reference]
        return variant if variant.timing is not None else replace(variant, timing=result.candidate)

    # -- what a service needs besides -------------------------------------------------------------------------------

    def look_inside(self) -> None:
        """Trace every variant."""
        for position in self.each("tracing operators"):
            self.extra(position, lambda v, p=position: replace(v, trace=self.runner(p).trace(TRACE_RUNS)))  # type: ignore[misc]

    def start_cold(self, processes: int) -> None:
        """Start every variant in fresh processes."""
        for position in self.each("starting in fresh processes"):
            self.extra(position, lambda v: replace(v, cold_start=self._cold(v, processes)))

    def _cold(self, variant: Variant, processes: int) -> ColdStart:
        spec, path = self.runtimes[variant.runtime].spec, self.paths[variant.model]
        return cold_start(spec, path, self.feeds, self.threads, processes)

    def extra(self, position: int, work: Callable[[Variant], Variant]) -> None:
        """As :meth:`attempt`, but what fails leaves the times as they are, and a warning."""
        variant = self.variants[position]
        if variant.failure is None:
            try:
                self.variants[position] = work(variant)
            except OnnxCompressError as error:
                self.warn(f"{self.models[variant.model].name} on {self.runtimes[variant.runtime].spec}: {error}")

    def measure_throughput(self, batches: Sequence[int], threads: Sequence[int], seconds: float) -> None:
        """All variants in turn, for each batch size and thread count."""
        generator = np.random.default_rng(self.seed)
        works = [position for position, variant in enumerate(self.variants) if variant.failure is None]
        points = [(count, batch) for count in threads for batch in batches]
        for count, batch in self.progress.track(points, "measuring throughput", len(points)):
            found: dict[int, Throughput]
            try:
                feeds = resized(self.feeds[0], self.specs, batch)
            except UsageError as error:
                found = {position: Throughput(batch, count, reason=str(error)) for position in works}
            else:
                with self.progress.paused():
                    runners = {position: self._made(self.variants[position], count) for position in works}
                    found = throughput(runners, feeds, batch, count, seconds, generator)
                    for runner in runners.values():
                        runner.end()
            for position, figure in found.items():
                variant = self.variants[position]
                self.variants[position] = replace(variant, throughput=(*variant.throughput, figure))

    # -- the answer -------------------------------------------------------------------------------------------------

    def result(self) -> MatrixResult:
        """All that is known, with the warnings that matter."""
        integer = any(model.reduced for model in self.models)
        for message in environment_warnings(self.environment, threads=self.threads, integer=integer):
            self.warn(message)
        for comparison in self.comparisons:
            found = comparison.result
            if comparison.kind == "noise" and found.verdict in ("FASTER", "SLOWER"):
                self.warn(
                    f"a model against itself seems {found.verdict} here, {found.ratio:.3f} [{found.low:.3f}, "
                    f"{found.high:.3f}]: the machine is not quiet, and differences of that size mean nothing"
                )
        if not self.output_check:
            self.warn("outputs were not checked: the models may compute different things")
        return MatrixResult(
            models=tuple(self.models),
            runtimes=tuple(runtime.spec for runtime in self.runtimes),
            facts=tuple(self.facts),
            reference=replace(
                get_runtime("onnxruntime:cpu,optimization=disabled").facts(self.threads), spec="onnxruntime:cpu"
            ),
            variants=tuple(self.variants),
            comparisons=tuple(self.comparisons),
            output_check=self.output_check,
            isolated=self.isolated,
            threads=self.threads,
            batch=self.batch,
            seed=self.seed,
            samples=self.samples,
            seconds=round(time.perf_counter() - self.started, 1),
            environment=self.environment,
            warnings=tuple(self.warnings),
        )
