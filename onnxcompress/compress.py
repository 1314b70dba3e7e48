"""The main job: load -> passes -> save aside -> verify -> measure -> save.

Everything is judged on a saved file, not on the graph in memory: the file is what will be served. That file lies in a
hidden folder beside the output, which goes away in any case. The output itself is written last, in one atomic step,
when the accuracy budget and the speed limit are met: a miss, an error or Ctrl-C leaves an older output untouched.
Saving is deterministic, and the two files' hashes are compared, so what was judged is what is written.
"""

from __future__ import annotations

import gc
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onnxcompress.atomic import staging_folder
from onnxcompress.base import Context, Guarantee, PassReport, PassResult, Progress, SilentProgress
from onnxcompress.benchmark import BenchmarkResult, benchmark, trace_model
from onnxcompress.budget import BudgetedRun, run_within_budget
from onnxcompress.data import Dataset, open_data, synthetic_data
from onnxcompress.destination import checked_destination
from onnxcompress.errors import AccuracyError, DataError, ModelError, OnnxCompressError, UsageError
from onnxcompress.evaluate import Evaluator, LabelRanks, checked_metric, label_ranks, load_evaluator
from onnxcompress.graph import Graph, input_specs, model_info
from onnxcompress.inspect_model import PlannedNode, plan, total_macs
from onnxcompress.io import SavedModel, copy_linked, load, model_bytes, save
from onnxcompress.islands import TimedIslands
from onnxcompress.judging import (
    DEFAULT_DROP,
    LEAST_SQNR,
    Budget,
    Metric,
    Verification,
    interval,
    points,
    sampling_error,
    search_goals,
    slower_error,
)
from onnxcompress.kept import write_kept
from onnxcompress.probe import Probe, check_unchanged, limits_note, probes
from onnxcompress.quantization.placement import costly_conversions
from onnxcompress.recipe import Recipe, load_recipe, unmatched_exclusions, with_decisions, with_exclusions
from onnxcompress.runtimes import Trace
from onnxcompress.session import Session, import_onnxruntime
from onnxcompress.shapes import graph_stats
from onnxcompress.spill import spill_weights
from onnxcompress.stages import Stages, open_stages
from onnxcompress.targets import get_target
from onnxcompress.verify import check_equivalent, compare

if TYPE_CHECKING:
    from onnxcompress.data import Preprocess

__all__ = [
    "Budget",
    "CompressResult",
    "Metric",
    "ModelSize",
    "Verification",
    "compress",
    "sampling_error",
    "slower_error",
]

#: relative L2 that a change of the order of floating-point operations may cause
EQUIVALENT_TOLERANCE = 1e-5
#: agreement below which a person should look, where there is no metric
GOOD_AGREEMENT = 0.995
#: share of ``data`` held out for verification where there is no ``eval_data``
HELD_OUT = 0.1
#: bytes of a result from which it is judged with its weights on disk
REOPENED_FROM = 1 << 28
#: threads that a session may have; many more than there are cores wait for each other for minutes
MOST_THREADS = max(64, os.cpu_count() or 1)
#: samples of synthetic data, where that is all there is
SYNTHETIC_SAMPLES = 16


@dataclass(frozen=True)
class ModelSize:
    """Nodes, parameters in elements, multiply-accumulates, and bytes on disk with external data."""

    nodes: int
    parameters: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class CompressResult:
    """What :func:`compress` did. ``saved`` is None after a dry run and where a budget was missed."""

    model: Path
    source_sha256: str | None
    output: Path
    saved: SavedModel | None
    #: the recipe as it ran, with every decision taken by measuring
    recipe: Recipe
    target: str
    guarantee: Guarantee
    before: ModelSize
    after: ModelSize | None = None
    report: PassReport | None = None
    planned: tuple[PlannedNode, ...] = ()
    verification: Verification | None = None
    metrics: tuple[Metric, ...] = ()
    budget: Budget | None = None
    #: the last pass's fusion audit: what the runtime made integer, what not and why
    audit: Mapping[str, Any] | None = None
    benchmark: BenchmarkResult | None = None
    #: the runtime's own times of nodes of the "original" and the "result", where they were asked for
    traces: Mapping[str, Trace] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    #: seconds by stage
    seconds: Mapping[str, float] = field(default_factory=dict)
    #: samples by what they were for: "calibration", "search", "evaluation"; none is in two of them
    samples: Mapping[str, int] = field(default_factory=dict)
    #: how the accuracy budget was searched; None where nothing had to be
    search: Mapping[str, Any] | None = None
    #: integer regions that were timed, and which of them returned to float
    islands: TimedIslands = field(default_factory=TimedIslands)
    #: by node that returned to float, why
    returned: Mapping[str, str] = field(default_factory=dict)
    #: the budget that was missed, where ``check=False`` asked not to raise it
    failure: OnnxCompressError | None = None


def compress(
    model: str | os.PathLike[str],
    data: Any = None,
    output: str | os.PathLike[str] = "",
    *,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    target: str | None = None,
    evaluate: str | Evaluator | None = None,
    eval_data: Any = None,
    preprocess: Preprocess | None = None,
    batch: int | None = None,
    samples: int | None = None,
    random_data: bool = False,
    exclude: Sequence[str] = (),
    max_drop: float | Literal["auto"] | None = "auto",
    benchmark: bool = True,
    benchmark_seconds: float = 10.0,
    fail_if_slower_than: float | None = None,
    trace: bool = False,
    verify: bool = True,
    seed: int | None = None,
    threads: int = 0,
    force: bool = False,
    dry_run: bool = False,
    check: bool = True,
    trusted: bool = False,
    hard_links: bool = False,
    work_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> CompressResult:
    """Compress the model file ``model`` and write the result to ``output``.

    Args:
        model: an ONNX file; it is never written to.
        data: calibration samples, anything that :func:`~onnxcompress.data.open_data` opens.
        output: the file to write; its folder must exist.
        recipe: a named recipe, a recipe file, or a :class:`~onnxcompress.recipe.Recipe`; None: the target's own, which
            is ``fp16`` for ``cuda`` and ``int8`` for the others.
        target: what to compress for; None: the recipe's target.
        evaluate: ``"file.py:function"`` or a callable: given a callable that runs the model ({input name: array} in,
            {output name: array} out), returns a number, of which 0.01 is a point and more is better.
        eval_data: samples to judge the result by, with labels or without; None: a held-out tenth of ``data``.
        preprocess: how images become arrays.
        batch: samples a batch; None: as the data comes.
        samples: read at most this many samples of ``data``.
        random_data: calibrate on random data where there is no ``data``; the result is of unknown accuracy.
        exclude: operators that are not quantised, by name, type or pattern.
        max_drop: how many points the metric may lose, or the agreement with the original where there is no metric.
            "auto": 0.5 for a metric of ``evaluate``; 0.5 and the sampling error of the comparison for labels,
            ``100 * sqrt(samples that only one of both models has right) / samples``; without a metric the first
            floating-point output must keep 10 dB SQNR. None: no budget. Where samples that are held out of ``data``
            (a quarter) show that it will be missed, layers return to float until it is kept; with "auto" they are held
            out only where a look at some samples shows that the result is far off.
        benchmark: time the result against the original, one thread, in pairs; and time integer regions that may cost
            more than they save, which return to float where they do.
        benchmark_seconds: about how long that may take.
        fail_if_slower_than: the least ratio of times (original over result) that is accepted.
        trace: record the runtime's own times of each node, of both models, in runs of their own.
        verify: compare the outputs with the original's.
        seed: seed of everything random; None: the recipe's, or 0.
        threads: threads to calibrate and verify with; 0: the runtime chooses.
        force: write the result although it misses a budget.
        dry_run: check model, recipe and data, plan, and write nothing.
        check: raise where a budget is missed; False: tell it in ``failure``. Nothing is written in either case.
        trusted: open the model here at once, without trying it in a process of its own with limits on memory and time
            first (:mod:`onnxcompress.probe`), which targets that run on a GPU do not do either; as ``hard_links``; and
            let a recipe file name files anywhere.
        hard_links: accept external data that has more than one name.
        work_dir: a folder that keeps what each pass made; where only the end of the recipe changes, the passes before
            it do not run again. It is made where it is missing, and can be deleted at any time.
        progress: where progress is shown.

    Raises:
        UsageError: an option, the recipe or the data cannot be used.
        ModelError: the model cannot be used, or crashes what reads it.
        ResourceError: reading the model takes too much memory or time, or the disk is full.
        AccuracyError: the accuracy budget was missed.
        SlowerError: ``fail_if_slower_than`` was missed.
        RuntimeUnavailableError: onnxruntime is needed and not installed.
    """
    if benchmark is False and fail_if_slower_than is not None:
        raise UsageError("fail_if_slower_than needs the benchmark; drop --no-benchmark or --fail-if-slower-than")
    _check_limits(max_drop, fail_if_slower_than, benchmark_seconds, samples, batch, threads, seed)
    if recipe is None:
        recipe = get_target(target if target is not None else "cpu").recipe
    chosen = with_exclusions(load_recipe(recipe, trusted=trusted), exclude)
    target_name = target if target is not None else chosen.target
    get_target(target_name)
    if data is not None and random_data:
        raise UsageError("both data and random data were asked for; give one of --data and --random-data")
    if data is None and not random_data and chosen.needs_data:
        raise UsageError(
            f"recipe {chosen.source!r} calibrates and needs samples; give --data, or --random-data for a result of "
            "unknown accuracy"
        )
    inputs = {"the model": model, "the data": data, "the evaluation data": eval_data, "the recipe": recipe}
    output_path = checked_destination(output, {**inputs, "the evaluator": evaluate})
    links = hard_links or trusted
    with ExitStack() as stack:
        probed = not trusted and probes(target_name)
        others = dict.fromkeys(path for step in chosen.passes for path in step.models())
        probe = stack.enter_context(Probe([model, *others], hard_links=links)) if probed else None
        if verify or benchmark:
            import_onnxruntime()
        chosen.pipeline().check_available()
        if isinstance(evaluate, str):
            evaluate = load_evaluator(evaluate)
        digests = probe.wait() if probe is not None else {}
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxcompress-"))
        job = _Job(
            model=Path(model),
            output=output_path,
            recipe=chosen,
            target=target_name,
            evaluate=evaluate,
            max_drop=max_drop,
            benchmark=benchmark,
            benchmark_seconds=benchmark_seconds,
            fail_if_slower_than=fail_if_slower_than,
            trace=trace,
            verify=verify,
            seed=seed if seed is not None else chosen.seed if chosen.seed is not None else 0,
            threads=threads,
            force=force,
            progress=progress if progress is not None else SilentProgress(),
            work_dir=Path(folder),
            stages=open_stages(work_dir) if not dry_run else None,
        )
        if probe is not None and (note := limits_note()) is not None:
            job.warn(note)
        with job.timed("load"):
            graph = load(model, trusted=links)
            check_unchanged(model, digests, model_info(graph).source_sha256)
            spill_weights(graph)  # those in the model file itself are in memory, and the original stays to the end
            (job.work_dir / "model").mkdir()
            job.runnable = copy_linked(model, job.work_dir / "model", trusted=links)
        checked_destination(output_path, {f"the model's {file.name}": file for file in model_info(graph).files})
        try:
            with job.timed("data"):
                job.open_data(graph, data, eval_data, random_data, preprocess, batch, samples)
            result = job.dry_run(graph) if dry_run else job.run(graph)
        finally:
            job.close()
    if check and result.failure is not None:
        raise result.failure
    return result


def _check_limits(
    max_drop: float | str | None,
    fail_if_slower_than: float | None,
    benchmark_seconds: float,
    samples: int | None,
    batch: int | None,
    threads: int,
    seed: int | None,
) -> None:
    if isinstance(max_drop, str) and max_drop != "auto":
        raise UsageError(f"a budget of {max_drop!r} is not possible; expected points, 'auto' or None")
    if isinstance(max_drop, int | float) and not 0 <= max_drop < math.inf:
        raise UsageError(f"a budget of {max_drop} points is not possible; expected a number from 0 up")
    if fail_if_slower_than is not None and not 0 < fail_if_slower_than < math.inf:
        raise UsageError(f"a ratio of {fail_if_slower_than} is not possible; expected a number above 0")
    if not 0 < benchmark_seconds < math.inf:
        raise UsageError(f"a benchmark of {benchmark_seconds} seconds is not possible; expected a number above 0")
    if not 0 <= threads <= MOST_THREADS:
        raise UsageError(f"threads is {threads}; expected 0 (the runtime chooses) to {MOST_THREADS}")
    if seed is not None and seed < 0:
        raise UsageError(f"seed is {seed}; expected 0 or more")
    for name, value in (("samples", samples), ("batch", batch)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; expected 1 or more")


@dataclass
class _Job:
    """One run of :func:`compress`: its checked options, its data and what it has found so far."""

    model: Path
    output: Path
    recipe: Recipe
    target: str
    evaluate: Evaluator | None
    max_drop: float | Literal["auto"] | None
    benchmark: bool
    benchmark_seconds: float
    fail_if_slower_than: float | None
    trace: bool
    verify: bool
    seed: int
    threads: int
    force: bool
    progress: Progress
    work_dir: Path
    stages: Stages | None
    #: ``model``, or a copy that the runtime opens
    runnable: Path = field(default_factory=Path)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    #: what ran, once it has
    budgeted: BudgetedRun | None = None
    #: what the passes read
    data: Dataset | None = None
    #: what the result is judged by
    eval_data: Dataset | None = None
    eval_source: str = "synthetic"

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes to ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def warn(self, message: str) -> None:
        """Record a warning once."""
        if message not in self.warnings:
            self.warnings.append(message)

    # -- data -----------------------------------------------------------------------------------------------------

    def open_data(
        self,
        graph: Graph,
        data: Any,
        eval_data: Any,
        random_data: bool,
        preprocess: Preprocess | None,
        batch: int | None,
        samples: int | None,
    ) -> None:
        """Open calibration and evaluation data and check them against the model's inputs."""
        specs = input_specs(graph)
        if data is not None:
            self.data = open_data(
                data, specs, batch=batch, preprocess=preprocess, work_dir=self.work_dir, limit=samples
            )
        elif random_data:
            if self.recipe.needs_data:
                self.warn("calibrated on random data: the accuracy of the result on real data is unknown")
            count = samples if samples is not None else SYNTHETIC_SAMPLES
            self.data = synthetic_data(specs, graph=graph, samples=count, batch=batch or 1, seed=self.seed)
        if eval_data is not None:
            if _same_file(data, eval_data):
                self.warn("data and evaluation data are the same file: the result is judged on what calibrated it")
            self.eval_source = "eval-data"
            self.eval_data = open_data(eval_data, specs, batch=batch, preprocess=preprocess, work_dir=self.work_dir)
        elif data is None:
            self.eval_source = "random" if random_data else "synthetic"
            self.eval_data = synthetic_data(
                specs, graph=graph, samples=SYNTHETIC_SAMPLES, batch=batch or 1, seed=self.seed + 1
            )
        elif self.data is not None and self.recipe.pipeline().guarantee is not Guarantee.APPROXIMATE:
            self.eval_source, self.eval_data = "data", self.data  # nothing is learned from it
        elif self.data is not None:
            self.eval_source = "held-out"
            try:
                self.data, self.eval_data = self.data.split(HELD_OUT, self.seed)
            except DataError:
                if self.recipe.needs_data:
                    raise
                self.eval_source, self.eval_data = "data", self.data
                self.warn("too few samples to hold any out: the result is judged on what its passes have seen")
        for dataset in (self.data, self.eval_data):
            for note in dataset.notes if dataset is not None else ():
                self.warn(note)

    def sample_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the inputs for one sample, where there is data."""
        data = self.data if self.data is not None else self.eval_data
        return None if data is None else data.sample_shapes()

    def close(self) -> None:
        """Remove the spools of the data."""
        for dataset in (self.data, self.eval_data):
            if dataset is not None:
                dataset.close()

    # -- the two ways to run ----------------------------------------------------------------------------------------

    def dry_run(self, graph: Graph) -> CompressResult:
        """Read all the data, plan, and write nothing."""
        with self.timed("data"):
            for dataset, name in ((self.data, "calibration data"), (self.eval_data, "evaluation data")):
                for _ in self.progress.track(dataset, f"checking the {name}", len(dataset)) if dataset else ():
                    pass
        with self.timed("plan"):
            planned = plan(graph, self.target, self.recipe, self.progress, self.sample_shapes())
        return replace(self.started(graph), planned=planned)

    def started(self, graph: Graph) -> CompressResult:
        """What is known before the passes have run."""
        return CompressResult(
            model=self.model,
            source_sha256=model_info(graph).source_sha256,
            output=self.output,
            saved=None,
            recipe=self.recipe,
            target=self.target,
            guarantee=self.recipe.pipeline().guarantee,
            before=_size(graph, model_bytes(self.model), self.sample_shapes()),
            warnings=tuple(self.warnings),
            seconds=self.seconds,
        )

    def run(self, graph: Graph) -> CompressResult:
        """All stages. The last one, writing the output, is left out where a budget is missed."""
        result = self.started(graph)
        context = Context(
            original=graph,
            data=self.data,
            eval_data=self.eval_data,
            evaluate=self.evaluate,
            target=self.target,
            seed=self.seed,
            progress=self.progress,
            work_dir=self.work_dir,
            stages=self.stages,
            threads=self.threads,
            warnings=self.warnings,
        )
        asked = not isinstance(self.max_drop, str | None)
        labels = [data is not None and data.has_labels for data in (self.data, self.eval_data)]
        goals = search_goals(self.max_drop, *labels, evaluates=self.evaluate is not None) if self.verify else []
        with self.timed("passes"):
            self.budgeted = run_within_budget(self.recipe, graph, context, goals, asked=asked, time_it=self.benchmark)
        done = self.budgeted.result
        for message in unmatched_exclusions(self.recipe, (graph, done.graph)):
            self.warn(message)
        recipe = with_decisions(self.budgeted.recipe, done.report)
        provenance: dict[str, str] | None
        provenance = {"recipe": recipe.to_yaml()} | ({"kept": write_kept(done.kept)} if done.kept else {})
        with staging_folder(self.output.parent) as folder:
            with self.timed("save"):
                staged = save(done.graph, folder / self.output.name, provenance=provenance)
                if staged.bytes > REOPENED_FROM and len(staged.files) > 1:
                    done, provenance = self.reopened(done, staged), None  # which the staged file has already
                    context.reference = None
                    gc.collect()  # graphs are cycles
            audits = [child.details["audit"] for child in done.report.children if "audit" in child.details]
            result = replace(
                result,
                recipe=recipe,
                report=done.report,
                after=_size(done.graph, staged.bytes, self.sample_shapes()),
                audit=_with_reasons(audits[-1], self.budgeted.returned) if audits else None,
                samples=self.sample_counts(),
                search=self.budgeted.search,
                islands=self.budgeted.islands,
                returned=self.budgeted.returned,
            )
            result = self.judged(result, staged)
            if result.failure is None or self.force:
                if result.failure is not None:
                    self.warn(f"{result.failure}; written because of --force")
                with self.timed("save"):
                    saved = save(done.graph, self.output, provenance=provenance, source=self.model)
                if saved.sha256 != staged.sha256:
                    raise OnnxCompressError(
                        f"{self.output} is not what was verified: the same graph was saved with other bytes; "
                        "this is a bug, please report it"
                    )
                result = replace(result, saved=saved, failure=None)
            else:
                result = replace(result, failure=type(result.failure)(f"{result.failure}; nothing was written"))
        return replace(result, warnings=tuple(self.warnings))

    def reopened(self, done: PassResult, staged: SavedModel) -> PassResult:
        """``done`` with its weights in the staged files instead of in memory, which judging needs for the runtime."""
        done = replace(done, graph=load(staged.path, trusted=True))
        if self.budgeted is not None:
            self.budgeted = replace(self.budgeted, result=done)
        return done

    def sample_counts(self) -> dict[str, int]:
        """Samples by what they were for."""
        counts = dict(self.budgeted.samples) if self.budgeted is not None else {}
        if self.eval_data is not None and self.eval_data is not self.data:
            counts["evaluation"] = self.eval_data.samples
        return counts

    # -- judging ----------------------------------------------------------------------------------------------------

    def judged(self, result: CompressResult, staged: SavedModel) -> CompressResult:
        """``result`` with everything that is measured on the staged file, and the first budget that it misses."""
        failure: OnnxCompressError | None = None
        if self.verify:
            with self.timed("verify"):
                verification = self.verified(result, staged)
            with self.timed("evaluate"):
                metrics, sampling_error = self.measured(staged)
            budget = self.budget(verification, metrics, sampling_error)
            result = replace(result, verification=verification, metrics=metrics, budget=budget)
            if budget is not None and not budget.met:
                failure = AccuracyError(self.missed(budget, verification))
        if self.benchmark and (failure is None or self.force):
            if not get_target(self.target).audited:
                self.warn(f"timed on ONNX Runtime's CPU provider, which says nothing about target {self.target}")
            with self.timed("benchmark"):
                timing = self.timing(staged)
            result = replace(result, benchmark=timing)
            limit = self.fail_if_slower_than
            if timing.apart:
                self.warn("the models are large, so they were timed one after the other to save memory, not in pairs")
            if timing.verdict == "SLOWER":
                self.warn(f"the result is slower than the original: its speed is {interval(timing)}{self.slowed_by()}")
            if limit is not None:
                failure = failure or slower_error(timing, limit)
                if timing.low < limit <= timing.high:
                    self.warn(
                        f"whether the result reaches {limit:g}x is undecided: its speed is {interval(timing)}; "
                        "measure longer with --benchmark-seconds"
                    )
        if self.trace and (failure is None or self.force) and self.eval_data is not None:
            with self.timed("trace"):
                feeds = [self.eval_data.rebatch(1).first().feeds]
                files = {"original": self.runnable, "result": staged.path}
                result = replace(result, traces={name: trace_model(path, feeds) for name, path in files.items()})
        return replace(result, failure=failure)

    def slowed_by(self) -> str:
        """The conversions that cost most; nothing where there are none but at the borders of the model."""
        variants = self.budgeted.variants if self.budgeted is not None else None
        costly = costly_conversions(variants.placement) if variants is not None else []
        if len(costly) <= 2:
            return ""
        names = ", ".join(repr(name) for name, _ in costly[:3])
        return f"; {len(costly)} tensors go between integers and floats, the costliest {names}"

    def verified(self, result: CompressResult, staged: SavedModel) -> Verification:
        """All outputs of the staged file against the original's; a lossless recipe must reproduce them.

        A lossless result is compared without the runtime's own optimisations, which reorder operations on either side;
        a lossy one as it will be served, since that is the accuracy that its user gets.
        """
        data = self.eval_data
        if data is None:
            raise OnnxCompressError("there is no evaluation data; this is a bug, please report it")
        if result.guarantee is Guarantee.APPROXIMATE:
            outputs = compare(
                self.runnable,
                staged.path,
                data,
                optimization=("all", "all"),
                threads=self.threads,
                progress=self.progress,
            )
        else:
            outputs = check_equivalent(
                self.runnable,
                staged.path,
                data,
                tolerance=EQUIVALENT_TOLERANCE,
                threads=self.threads,
                progress=self.progress,
            )
        return Verification(self.eval_source, data.samples, data.fingerprint(), tuple(outputs))

    def measured(self, staged: SavedModel) -> tuple[tuple[Metric, ...], float]:
        """The task metric of both models, and the sampling error in points of the first one's difference.

        It is the evaluator's metric, of which the error is not known (0), or top-1 and top-5 where the data has labels.
        """
        labelled = self.eval_data if self.eval_data is not None and self.eval_data.has_labels else None
        if self.evaluate is None and labelled is None:
            return (), 0.0
        scores: list[dict[str, float]] = []
        ranks: list[LabelRanks] = []
        for path in (self.runnable, staged.path):
            found, ranked = self.scored(path, labelled)
            scores.append(found)
            ranks += ranked
        metrics = tuple(Metric(name, value, scores[1][name]) for name, value in scores[0].items())
        return metrics, sampling_error(*ranks) if ranks else 0.0

    def scored(self, path: Path, labelled: Dataset | None) -> tuple[dict[str, float], list[LabelRanks]]:
        """The metrics of one model; its session is closed on return."""
        session = Session(path, optimization="all", threads=self.threads)
        if self.evaluate is not None:
            try:
                return {"metric": checked_metric(self.evaluate(session.run), "evaluate")}, []
            except ModelError as error:  # both models ran on the evaluation data before
                raise DataError(f"evaluate: {error}; check what it feeds to the model") from error
        if labelled is None:
            return {}, []
        ranks = label_ranks(session.run, labelled, progress=self.progress)
        return ranks.metrics(), [ranks]

    def budget(self, verification: Verification, metrics: Sequence[Metric], error: float) -> Budget | None:
        """What the result is held against, see ``max_drop`` of :func:`compress`; None where there is nothing to hold.

        ``error`` is the sampling error of the first metric's difference in points. A budget that was asked for is
        strict.
        """
        if self.max_drop is None:
            return None
        if metrics:
            limit = DEFAULT_DROP + error if self.max_drop == "auto" else self.max_drop
            return Budget(metrics[0].name, limit, metrics[0].drop)
        if self.max_drop == "auto":
            return self.floor(verification)
        if verification.agreement is None:
            self.warn("the accuracy budget was not checked: no output has classes and there is no metric; --evaluate")
            return None
        return Budget("agreement", self.max_drop, 100.0 * (1.0 - verification.agreement))

    def floor(self, verification: Verification) -> Budget | None:
        """Without a metric only what surely computes something else is turned down; the rest is for a person to judge.

        Whether an output holds class scores or an embedding is not known, so a low agreement is told and not enforced.
        """
        rows = next((o for o in verification.outputs if o.score_rows and o.same_argmax is not None), None)
        if rows is not None and rows.same_argmax is not None and rows.same_argmax < GOOD_AGREEMENT:
            self.warn(
                f"agreement {100 * rows.same_argmax:.2f} % with the original on {verification.samples} samples; give "
                "labels or --evaluate to judge accuracy, --max-drop to enforce"
            )
        first = next((o for o in verification.outputs if o.equal_elements is None), None)
        return None if first is None else Budget("SQNR", LEAST_SQNR, first.sqnr_db)

    def missed(self, budget: Budget, verification: Verification) -> str:
        """What to say about a missed budget."""
        on = f" on {verification.samples} samples ({verification.source})" if self.evaluate is None else ""
        told = self.told_by_search()
        if budget.basis == "SQNR":
            first = next(o for o in verification.outputs if o.equal_elements is None)
            return (
                f"output {first.name!r} kept {budget.found:.1f} dB SQNR{on}, below {budget.limit:g} dB: the result "
                f"computes something else{told}; {self.ways('exclude operators', 'use --recipe lossless')}"
            )
        data = ["use --eval-data or --evaluate"] if self.evaluate is None and self.eval_source == "held-out" else []
        what = "agreement with the original" if budget.basis == "agreement" else budget.basis
        automatic = self.max_drop == "auto" and (self.budgeted is None or self.budgeted.search is None)
        drop = "give --max-drop to let layers return to float" if automatic else "raise --max-drop"
        layers = [drop, "exclude operators"]
        if self.budgeted is not None and self.budgeted.misses_in_float:
            layers = ["raise --max-drop", "have the passes ahead of it take less"]
        return (
            f"{what} is {budget.found:.2f} points lower{on}, the budget is {points(budget.limit)}{told}; "
            f"{self.ways(*data, *layers)}"
        )

    def ways(self, *known: str) -> str:
        """What can be done about a missed budget, as one phrase."""
        ways = known if self.force else (*known, "--force it")
        return f"{', '.join(ways[:-1])} or {ways[-1]}"

    def told_by_search(self) -> str:
        """What the search of layers adds to the message of a missed budget."""
        if self.budgeted is None:
            return ""
        if self.budgeted.missed is not None:
            return f"; also on the samples of the search {self.budgeted.missed}"
        if self.budgeted.search is not None:
            count = self.budgeted.search["samples"]["judging"]
            return f"; on {count} samples of the search it is kept: calibrate on more of them, more like these"
        return ""

    def timing(self, staged: SavedModel) -> BenchmarkResult:
        """Time the staged file against the original, one sample at a time on one thread."""
        description = f"timing both models, about {self.benchmark_seconds:g} s"
        for path in self.progress.track((staged.path,), description, 1):
            result = benchmark(
                self.runnable,
                path,
                self.eval_data,
                threads=1,
                seconds=self.benchmark_seconds,
                seed=self.seed,
                progress=self.progress,
            )
        return result


def _with_reasons(audit: Mapping[str, Any], returned: Mapping[str, str]) -> Mapping[str, Any]:
    """``audit`` with the reasons of those nodes that returned to float by measurement."""
    floats = [{**node, "reason": returned.get(node["node"], node["reason"])} for node in audit["floats"]]
    return {**audit, "floats": floats}


def _same_file(data: Any, eval_data: Any) -> bool:
    paths = [Path(p) for p in (data, eval_data) if isinstance(p, str | os.PathLike)]
    return len(paths) == 2 and all(p.exists() for p in paths) and paths[0].samefile(paths[1])


def _size(graph: Graph, size: int, shapes: Mapping[str, tuple[int, ...]] | None) -> ModelSize:
    stats = graph_stats(graph)
    return ModelSize(stats.nodes, stats.parameters, total_macs(graph, shapes), size)
