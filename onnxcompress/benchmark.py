"""Two models timed against each other so that the answer can be trusted on a noisy machine.

What spoils a comparison, and what is done about it:

- The machine's speed drifts: both models run in turn, and only the ratio within such a pair counts.
- Whoever runs second finds other caches: pairs come in both orders, as many of each, shuffled.
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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from math import ceil, exp, log
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcompress.base import Progress, SilentProgress
from onnxcompress.environment import describe_environment
from onnxcompress.errors import DataError, UsageError
from onnxcompress.graph import Graph
from onnxcompress.session import Feeds, Session
from onnxcompress.statistics import (
    FEWEST_SESSIONS,
    Verdict,
    percentile,
    sequential_interval,
    session_log_ratio,
    verdict,
)

__all__ = ["BenchmarkResult", "Model", "ModelTiming", "benchmark"]

Model = Graph | onnx.ModelProto | bytes | str | os.PathLike[str]

#: the fewest sessions asked for are waited for no longer than this many times ``seconds``
PATIENCE = 3.0
#: real batches that take turns
FEEDS = 8
#: a sample lasts at least this long
SAMPLE_NS = 200_000
#: seconds of pairs that a session is worth creating for, where creating it takes less
SESSION_SECONDS = 0.1
Run = Callable[[], Any]


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
    #: the file with its external data; for a model in memory, its size when serialised
    bytes_on_disk: int


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
    if sessions < FEWEST_SESSIONS:
        raise UsageError(f"sessions is {sessions}; an interval needs {FEWEST_SESSIONS} or more")
    if not seconds > 0:
        raise UsageError(f"seconds is {seconds}; expected more than 0")
    if threads < 0:
        raise UsageError(f"threads is {threads}; expected 1 or more, or 0 to let the runtime choose")
    environment = describe_environment()
    models = (_Subject(reference, threads, provider), _Subject(candidate, threads, provider))
    feeds = _feeds(models, data, batch)
    generator = np.random.default_rng(seed)
    timing = _Timing(models, feeds, generator, seconds / sessions)
    start = time.perf_counter()

    def out_of_time(count: int) -> bool:
        elapsed = time.perf_counter() - start
        enough = sessions if elapsed < PATIENCE * seconds else FEWEST_SESSIONS
        return elapsed >= seconds and count >= enough

    with (progress or SilentProgress()).paused(), _no_garbage_collection():
        log_ratios = (timing.session(first) for first in _balanced(generator))
        centre, low, high, used = sequential_interval(log_ratios, sessions, out_of_time, seed=seed)
    return BenchmarkResult(
        ratio=exp(centre),
        low=exp(low),
        high=exp(high),
        verdict=verdict(exp(low), exp(high)),
        pairs=timing.pairs,
        sessions=len(used),
        runs_per_sample=timing.runs_per_sample,
        reference=models[0].timing(),
        candidate=models[1].timing(),
        session_ratios=tuple(exp(value) for value in used),
        threads=threads,
        provider=provider,
        batch=batch,
        seed=seed,
        seconds=round(time.perf_counter() - start, 3),
        environment=environment,
    )


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


class _Subject:
    """A model under test and the times taken of it."""

    def __init__(self, model: Model, threads: int, provider: str) -> None:
        self.bytes_on_disk, self.source = _measured(model)
        self._threads, self._provider = threads, provider
        self.creation: list[float] = []
        self.first_run: list[float] = []
        #: nanoseconds of each timed run
        self.runs: list[int] = []

    def session(self) -> Session:
        """A new session."""
        return Session(self.source, threads=self._threads, provider=self._provider)

    def start(self, feeds: Sequence[Feeds]) -> list[Run]:
        """A new session, run once; what it took is recorded."""
        begin = time.perf_counter()
        session = self.session()
        created = time.perf_counter()
        runs = [session.bind(f) for f in feeds]
        ready = time.perf_counter()
        runs[0]()
        self.first_run.append(time.perf_counter() - ready)
        self.creation.append(created - begin)
        return runs

    def timing(self) -> ModelTiming:
        """The times in seconds."""
        runs = np.array(self.runs) / 1e9
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
        )


def _measured(model: Model) -> tuple[int, bytes | Path]:
    """(bytes, what sessions are created from): a file stays a file, everything else is serialised once."""
    if isinstance(model, str | os.PathLike):
        from onnxcompress.io import model_bytes

        return model_bytes(Path(model)), Path(model)
    if isinstance(model, bytes):
        content = model
    else:
        from onnxcompress.proto import to_proto

        content = (model if isinstance(model, onnx.ModelProto) else to_proto(model)).SerializeToString()
    return len(content), content


def _feeds(models: tuple[_Subject, _Subject], data: Any, batch: int | None) -> list[Feeds]:
    """The first batches of ``data``, checked against both models."""
    from onnxcompress.data import open_data

    specs = models[0].session().input_specs()
    others = models[1].session().input_specs()
    names, other_names = sorted(s.name for s in specs), sorted(s.name for s in others)
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
        models: tuple[_Subject, _Subject],
        feeds: Sequence[Feeds],
        generator: np.random.Generator,
        seconds_per_session: float,
    ) -> None:
        self._models = models
        self._feeds = feeds
        self._generator = generator
        self._seconds = seconds_per_session
        self.runs_per_sample = 0
        self.pairs = 0

    def session(self, first: int) -> float:
        """Create both sessions, the one of model ``first`` first, and time pairs of samples: their log ratio."""
        begin = time.perf_counter()
        sequence = (first, 1 - first)
        runs = {index: self._models[index].start(self._feeds) for index in sequence}
        warm = [_warm_up(runs[index]) for index in sequence]
        if not self.runs_per_sample:
            self.runs_per_sample = max(1, ceil(SAMPLE_NS / 1e9 / min(warm)))
        preparation = time.perf_counter() - begin
        count = self._pairs(sum(warm) * self.runs_per_sample, preparation)
        reference_first = self._generator.permutation(np.arange(count) % 2 == 0)
        log_ratios = np.empty(count)
        for i in range(count):
            order = (0, 1) if reference_first[i] else (1, 0)
            total = [0, 0]
            for index in order:
                taken = _sample(runs[index][i % len(self._feeds)], self.runs_per_sample)
                self._models[index].runs.extend(taken)
                total[index] = sum(taken)
            log_ratios[i] = log(max(total[0], 1) / max(total[1], 1))
        self.pairs += count
        return session_log_ratio(log_ratios, reference_first)

    def _pairs(self, pair_seconds: float, preparation: float) -> int:
        """Pairs worth their time in a session: as long as creating it took, even, 4 to 100."""
        wanted = min(max(preparation, SESSION_SECONDS), max(self._seconds - preparation, 0.0)) / pair_seconds
        return int(np.clip(2 * round(wanted / 2), 4, 100))


def _sample(run: Run, repeats: int) -> list[int]:
    """Nanoseconds of each of ``repeats`` runs in a row."""
    clock = time.perf_counter_ns
    taken = []
    last = clock()
    for _ in range(repeats):
        run()
        now = clock()
        taken.append(now - last)
        last = now
    return taken


def _warm_up(runs: Sequence[Run], most_seconds: float = 0.2) -> float:
    """Run until the times fall no more; the seconds that a run then takes."""
    taken: list[float] = []
    begin = time.perf_counter()
    while True:
        start = time.perf_counter()
        runs[len(taken) % len(runs)]()
        end = time.perf_counter()
        taken.append(end - start)
        count = len(taken)
        if count >= 2 and end - begin >= most_seconds:
            break
        if count >= 2 * len(runs) + 2 and sum(taken[count // 2 :]) > 0.95 * sum(taken[: count - count // 2]):
            break
    return float(np.median(taken[count // 2 :]))
