"""Two models timed against each other so that the answer can be trusted on a noisy machine.

What spoils a comparison, and what is done about it:

- The machine's speed drifts: both models run in turn, and only the ratio within such a pair counts.
- Each model finds the caches as the other left them: an untimed run goes before each sample, since a model that is
  served finds its own. Pairs come in both orders, as many of each, shuffled.
- Threads that spin on after a run take the cores from the other model: where a runtime has such, both wait until they
  sleep.
- Where memory happens to lie makes a session faster or slower for as long as it lives: both sessions are created anew
  many times, in both orders, and the interval is over sessions (:mod:`onnxcompress.statistics`).
- A neighbour takes the core for a while: medians within a session, the middle half of the sessions between them.
- The clock: short runs are repeated until a sample lasts 200 microseconds. Garbage collection waits.
- Stopping as soon as the answer pleases makes wrong answers likely: the interval is looked at ever more rarely, and a
  difference ends the run early only where it is far beyond what counts as the same.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import ceil, exp, log
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.base import Progress, SilentProgress
from onnxcompress.benchmark.runners import LocalRunner, Runner
from onnxcompress.environment import describe_environment
from onnxcompress.errors import DataError, UsageError
from onnxcompress.graph import Graph
from onnxcompress.runtimes import get_runtime
from onnxcompress.session import Feeds, Session, is_large
from onnxcompress.statistics import (
    FEWEST_SESSIONS,
    Verdict,
    percentile,
    sequential_interval,
    session_log_ratio,
    verdict,
)

__all__ = [
    "FEEDS",
    "BenchmarkResult",
    "Model",
    "ModelTiming",
    "Samples",
    "Subject",
    "benchmark",
    "compare_subjects",
    "measured",
    "paired_feeds",
]

Model = Graph | onnx.ModelProto | bytes | str | os.PathLike[str]

#: the fewest sessions asked for are waited for no longer than this many times ``seconds``
PATIENCE = 3.0
#: real batches that take turns
FEEDS = 8
#: a sample lasts at least this long
SAMPLE_NS = 200_000
#: models with more bytes between them are not held in memory together
TOGETHER_BYTES = 1 << 30
#: seconds of pairs that a session is worth creating for, where creating it takes less
SESSION_SECONDS = 0.1


@dataclass(frozen=True)
class ModelTiming:
    """Times of one model in seconds per run, and its size.

    ``median_s`` and the percentiles are over all timed runs of all sessions; a percentile is None where the sample is
    too small for it. ``session_creation_s`` and ``first_run_s`` are medians over sessions.
    """

    median_s: float
    p50_s: float | None
    p90_s: float | None
    p95_s: float | None
    p99_s: float | None
    runs: int
    session_creation_s: float
    first_run_s: float
    #: the file with its external data; for a model in memory, its size when it is written
    bytes_on_disk: int
    #: of the timed runs: edges of equal bins up to the last one, which holds everything above
    histogram_edges_s: tuple[float, ...] = ()
    histogram_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class BenchmarkResult:
    """How much faster the candidate is: ``ratio`` = time of the reference / time of the candidate.

    ``low`` and ``high`` bound the 95 % interval of the ratio. ``session_ratios`` holds the ratio of each session in
    order. ``batch`` is None where batches were taken as the data has them.
    """

    ratio: float
    low: float
    high: float
    verdict: Verdict
    pairs: int
    sessions: int
    runs_per_sample: int
    reference: ModelTiming
    candidate: ModelTiming
    session_ratios: tuple[float, ...]
    threads: int
    provider: str
    batch: int | None
    seed: int
    seconds: float
    environment: dict[str, Any]
    #: True where the models were too large to be open at once: each session of one came after that of the other
    apart: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return asdict(self) | {"session_ratios": list(self.session_ratios)}


def benchmark(
    reference: Model,
    candidate: Model,
    data: Any,
    *,
    threads: int = 1,
    sessions: int = 10,
    seconds: float = 10.0,
    batch: int | None = 1,
    seed: int = 0,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Time two models against each other on the same inputs, at the runtime's full optimisation.

    Args:
        reference: the model to compare with: a graph, a proto, bytes or a file.
        candidate: the model in question.
        data: a :class:`~onnxcompress.data.Dataset` or whatever :func:`~onnxcompress.data.open_data` takes. The first
            eight batches take turns.
        threads: intra-op threads of both models; 0 lets the runtime choose.
        sessions: how often both sessions are created, at least.
        seconds: when to stop if the interval has not become narrow before. Large models go over it, up to three times,
            until there are enough sessions.
        batch: samples a run; None: batches as the data has them.
        seed: of the order of sessions and pairs, and of the bootstrap.
        provider: ``cpu`` or ``cuda``.
        progress: paused all the while.

    Raises:
        UsageError: the models have different inputs, or a number is out of range.
        DataError: the data does not fit the models.
        ModelError: the runtime cannot open or run a model.
        RuntimeUnavailableError: onnxruntime or the provider is missing.
    """
    _check(sessions, seconds, threads)
    environment = describe_environment()
    runtime = get_runtime(f"onnxruntime:{provider}")
    with tempfile.TemporaryDirectory(prefix="onnxcompress-", ignore_cleanup_errors=True) as folder:
        models = (reference, candidate)
        large = any(isinstance(model, gs.Graph) and is_large(model) for model in models)
        folders = [Path(folder) / name if large else None for name in ("reference", "candidate")]
        sizes, sources = zip(*map(measured, models, folders), strict=True)
        feeds = paired_feeds(sources, data, batch)
        subjects = [
            Subject(LocalRunner(runtime, source, threads), size) for source, size in zip(sources, sizes, strict=True)
        ]
        for subject in subjects:
            subject.runner.feed(feeds)
        result, _ = compare_subjects(
            subjects[0],
            subjects[1],
            len(feeds),
            sessions=sessions,
            seconds=seconds,
            seed=seed,
            progress=progress,
        )
    return replace(result, threads=threads, provider=provider, batch=batch, environment=environment)


def _check(sessions: int, seconds: float, threads: int) -> None:
    if sessions < FEWEST_SESSIONS:
        raise UsageError(f"sessions is {sessions}; an interval needs {FEWEST_SESSIONS} or more")
    if not seconds > 0:
        raise UsageError(f"seconds is {seconds}; expected more than 0")
    if threads < 0:
        raise UsageError(f"threads is {threads}; expected 1 or more, or 0 to let the runtime choose")


@dataclass(frozen=True)
class Samples:
    """Everything that was timed in one comparison."""

    #: nanoseconds of each run
    reference_ns: NDArray[np.int64]
    candidate_ns: NDArray[np.int64]
    #: the log ratio of each session
    session_log_ratios: NDArray[np.float64]


def compare_subjects(
    reference: Subject,
    candidate: Subject,
    feeds: int,
    *,
    sessions: int = 10,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[BenchmarkResult, Samples]:
    """Time two subjects, which were fed ``feeds`` batches, against each other; arguments as :func:`benchmark` has them.

    The result knows nothing of threads, provider, batch and environment; whoever calls does.
    """
    _check(sessions, seconds, 0)
    generator = np.random.default_rng(seed)
    timing = _Timing((reference, candidate), feeds, generator, seconds / sessions)
    start = time.perf_counter()

    def out_of_time(count: int) -> bool:
        elapsed = time.perf_counter() - start
        enough = sessions if elapsed < PATIENCE * seconds else FEWEST_SESSIONS
        return elapsed >= seconds and count >= enough

    with (progress or SilentProgress()).paused(), _no_garbage_collection():
        log_ratios = (timing.session(first) for first in _balanced(generator))
        centre, low, high, used = sequential_interval(log_ratios, sessions, out_of_time, seed=seed)
    result = BenchmarkResult(
        ratio=exp(centre),
        low=exp(low),
        high=exp(high),
        verdict=verdict(exp(low), exp(high)),
        pairs=timing.pairs,
        sessions=len(used),
        runs_per_sample=timing.runs_per_sample,
        reference=reference.timing(),
        candidate=candidate.timing(),
        session_ratios=tuple(exp(value) for value in used),
        threads=0,
        provider="",
        batch=None,
        seed=seed,
        seconds=round(time.perf_counter() - start, 3),
        environment={},
        apart=timing.apart,
    )
    return result, Samples(np.array(reference.runs), np.array(candidate.runs), np.array(used))


def _balanced(generator: np.random.Generator) -> Iterator[int]:
    """0 or 1 for ever: which model's session is created first; of every two, one each, in random order."""
    while True:
        first = int(generator.integers(2))
        yield first
        yield 1 - first


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Subject:
    """A model under test and the times taken of it."""

    def __init__(self, runner: Runner, bytes_on_disk: int) -> None:
        self.runner = runner
        self.bytes_on_disk = bytes_on_disk
        self.creation: list[float] = []
        self.first_run: list[float] = []
        #: nanoseconds of each timed run
        self.runs: list[int] = []

    def open(self) -> None:
        """A new session, run once; what it took is recorded."""
        started = self.runner.open()
        self.first_run.append(started.first_run_s)
        self.creation.append(started.creation_s)

    def timing(self) -> ModelTiming:
        """The times in seconds."""
        runs = np.array(self.runs) / 1e9
        edges, counts = histogram(runs)
        return ModelTiming(
            median_s=float(np.median(runs)),
            p50_s=percentile(runs, 50),
            p90_s=percentile(runs, 90),
            p95_s=percentile(runs, 95),
            p99_s=percentile(runs, 99),
            runs=runs.size,
            session_creation_s=float(np.median(self.creation)),
            first_run_s=float(np.median(self.first_run)),
            bytes_on_disk=self.bytes_on_disk,
            histogram_edges_s=edges,
            histogram_counts=counts,
        )


def histogram(values: NDArray[np.float64], bins: int = 60) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """(edges, counts) of ``values``; the few that lie far above the rest are all in the last bin, which has no end."""
    low, high = float(values.min()), min(float(np.percentile(values, 98)), 2.5 * float(np.median(values)))
    edges = np.linspace(low, max(high, low * 1.001), bins)
    counts, _ = np.histogram(values, np.append(edges, np.inf))
    return tuple(edges.tolist()), tuple(counts.tolist())


def measured(model: Model, folder: Path | None) -> tuple[int, bytes | Path]:
    """(bytes, what sessions are created from).

    A file stays a file; a graph becomes one in ``folder``, which is made for it, where there is one; everything else is
    serialised once.
    """
    from onnxcompress.io import model_bytes, write_files

    if isinstance(model, gs.Graph) and folder is not None:
        folder.mkdir()
        model = write_files(model, folder)
    if isinstance(model, str | os.PathLike):
        return model_bytes(Path(model)), Path(model)
    if isinstance(model, bytes):
        content = model
    else:
        from onnxcompress.proto import to_proto

        content = (model if isinstance(model, onnx.ModelProto) else to_proto(model)).SerializeToString()
    return len(content), content


def paired_feeds(sources: Sequence[bytes | Path], data: Any, batch: int | None) -> list[Feeds]:
    """The first batches of ``data``, checked against all the models, the first of which says what is expected.

    Raises:
        UsageError: the models have different inputs.
        DataError: the data does not fit.
    """
    from onnxcompress.data import open_data

    specs, *others = (Session(source, threads=1).input_specs() for source in sources)
    names = sorted(s.name for s in specs)
    for other in others:
        other_names = sorted(s.name for s in other)
        if names != other_names:
            raise UsageError(
                f"the models have different inputs, {', '.join(names)} and {', '.join(other_names)}; "
                "give two models that take the same data"
            )
    feeds: list[Feeds] = [b.feeds for b in islice(open_data(data, specs, batch=batch), FEEDS)]
    missing = [s.name for s in specs if not s.optional and s.name not in feeds[0]]
    if missing:
        raise DataError(f"the data has no {', '.join(missing)}; expected an array for each of {', '.join(names)}")
    return feeds


class _Timing:
    """Times both models, a pair of sessions at a time."""

    def __init__(
        self,
        subjects: tuple[Subject, Subject],
        feeds: int,
        generator: np.random.Generator,
        seconds_per_session: float,
    ) -> None:
        self._subjects = subjects
        self._feeds = feeds
        self._generator = generator
        self._seconds = seconds_per_session
        self._pause = max(subject.runner.lingers_s for subject in subjects)
        self.runs_per_sample = 0
        self.pairs = 0
        self.apart = sum(subject.bytes_on_disk for subject in subjects) > TOGETHER_BYTES

    def session(self, first: int) -> float:
        """Create both sessions, the one of model ``first`` first, and time pairs of samples: their log ratio."""
        try:
            return self._session_apart(first) if self.apart else self._session(first)
        finally:
            for subject in self._subjects:
                subject.runner.close()

    def _session(self, first: int) -> float:
        begin = time.perf_counter()
        sequence = (first, 1 - first)
        for index in sequence:
            self._subjects[index].open()
        warm = [warm_up(self._subjects[index].runner, self._feeds) for index in sequence]
        if not self.runs_per_sample:
            self.runs_per_sample = max(1, ceil(SAMPLE_NS / 1e9 / min(warm)))
        preparation = time.perf_counter() - begin
        count = self._pairs(sum(warm) * (self.runs_per_sample + 1) + 2 * self._pause, preparation)
        reference_first = self._generator.permutation(np.arange(count) % 2 == 0)
        log_ratios = np.empty(count)
        for i in range(count):
            order = (0, 1) if reference_first[i] else (1, 0)
            total = [0, 0]
            for index in order:
                if self._pause:
                    time.sleep(self._pause)
                taken = self._subjects[index].runner.sample(i % self._feeds, self.runs_per_sample, settle=True)
                self._subjects[index].runs.extend(taken)
                total[index] = sum(taken)
            log_ratios[i] = log(max(total[0], 1) / max(total[1], 1))
        self.pairs += count
        return session_log_ratio(log_ratios, reference_first)

    def _session_apart(self, first: int) -> float:
        """As :meth:`_session`, with one session closed before the other is created.

        What the machine's speed does in between is not cancelled within the session, only between sessions.
        """
        medians = [0.0, 0.0]
        for index in (first, 1 - first):
            subject = self._subjects[index]
            begin = time.perf_counter()
            subject.open()
            warm = warm_up(subject.runner, self._feeds)
            if not self.runs_per_sample:
                self.runs_per_sample = max(1, ceil(SAMPLE_NS / 1e9 / warm))
            count = self._pairs(2 * warm * self.runs_per_sample, time.perf_counter() - begin)
            totals = []
            for i in range(count):
                taken = subject.runner.sample(i % self._feeds, self.runs_per_sample)
                subject.runs.extend(taken)
                totals.append(sum(taken))
            medians[index] = float(np.median(totals))
            subject.runner.close()
            self.pairs += count if index == first else 0
        return log(max(medians[0], 1) / max(medians[1], 1))

    def _pairs(self, pair_seconds: float, preparation: float) -> int:
        """Pairs worth their time in a session: as long as creating it took, even, 4 to 100."""
        wanted = min(max(preparation, SESSION_SECONDS), max(self._seconds - preparation, 0.0)) / pair_seconds
        return int(np.clip(2 * round(wanted / 2), 4, 100))


def warm_up(runner: Runner, feeds: int, most_seconds: float = 0.2) -> float:
    """Run until the times fall no more; the seconds that a run then takes."""
    taken: list[float] = []
    begin = time.perf_counter()
    while True:
        taken.extend(nanoseconds / 1e9 for nanoseconds in runner.sample(len(taken) % feeds, 1))
        count = len(taken)
        if count >= 2 and time.perf_counter() - begin >= most_seconds:
            break
        if count >= 2 * feeds + 2 and sum(taken[count // 2 :]) > 0.95 * sum(taken[: count - count // 2]):
            break
    return float(np.median(taken[count // 2 :]))
