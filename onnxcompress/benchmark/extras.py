"""What a service needs to know besides the latency: cold start, peak memory, throughput.

A cold start is measured in fresh processes, as the service would start: importing the runtime, creating the session,
the first run. The files themselves are warm in the system's cache from the second process on. Memory is the difference
of the process's peak to what it held before the model was opened, so that interpreter and libraries do not count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.benchmark.pairs import warm_up
from onnxcompress.benchmark.runners import Runner, WorkerRunner
from onnxcompress.errors import OnnxCompressError, UsageError
from onnxcompress.graph import InputSpec
from onnxcompress.session import Feeds

__all__ = ["ColdStart", "Throughput", "cold_start", "resized", "throughput"]

#: rounds in which all models take turns
ROUNDS = 5


@dataclass(frozen=True)
class ColdStart:
    """Medians over fresh processes, in seconds and bytes."""

    processes: int
    #: importing the runtime and finding its device
    load_s: float
    #: reading the model and preparing it
    session_creation_s: float
    first_run_s: float
    #: peak resident memory above what was held before the model was opened; None where the system does not tell
    peak_bytes: int | None
    #: the device's memory in use after the first run, context and workspaces included; None: it has none of its own
    device_bytes: int | None = None

    @property
    def total_s(self) -> float:
        """From the import to the first answer."""
        return self.load_s + self.session_creation_s + self.first_run_s


@dataclass(frozen=True)
class Throughput:
    """Samples a second of one batch size and thread count, one run after the other."""

    batch: int
    threads: int
    samples_per_second: float | None = None
    #: the lowest and highest of the rounds
    low: float | None = None
    high: float | None = None
    #: why there is no figure
    reason: str | None = None


def cold_start(spec: str, model: Path, feeds: Sequence[Feeds], threads: int, processes: int) -> ColdStart:
    """Start ``model`` in ``processes`` fresh processes, one after the other.

    Raises:
        OnnxCompressError: it cannot be started.
    """
    rows = []
    peaks, devices = [], []
    for _ in range(processes):
        worker = WorkerRunner(spec, model, threads)
        try:
            worker.feed(feeds[:1])
            started = worker.open()
            memory = worker.memory()
        finally:
            worker.end()
        rows.append((worker.load_s, started.creation_s, started.first_run_s))
        if memory is not None:
            peaks.append(max(0, memory.peak - memory.before))
            devices.extend([memory.device] if memory.device is not None else [])
    load, creation, first = (float(value) for value in np.median(np.array(rows), axis=0))
    peak, device = (int(np.median(values)) if values else None for values in (peaks, devices))
    return ColdStart(processes, load, creation, first, peak, device)


def resized(feeds: Feeds, specs: Sequence[InputSpec], batch: int) -> Feeds:
    """``feeds`` with ``batch`` samples, repeated where there are fewer.

    Raises:
        UsageError: an input has a fixed first axis of another size, or none.
    """
    arrays: dict[str, Any] = {}
    for spec in specs:
        if spec.name not in feeds:
            continue
        array = feeds[spec.name]
        size = spec.shape[0] if spec.shape else None
        if spec.shape is not None and not spec.shape:
            raise UsageError(f"input {spec.name!r} is a scalar and has no batch axis")
        if isinstance(size, int) and size != batch:
            raise UsageError(f"input {spec.name!r} has a fixed batch of {size}")
        arrays[spec.name] = np.take(array, np.arange(batch) % array.shape[0], axis=0)
    return arrays


def throughput(
    runners: Mapping[int, Runner],
    feeds: Feeds,
    batch: int,
    threads: int,
    seconds: float,
    generator: np.random.Generator,
) -> dict[int, Throughput]:
    """Samples a second of each of ``runners``, which take turns, ``seconds`` each in all; a failure has its reason."""
    rates: dict[int, list[float]] = {}
    found: dict[int, Throughput] = {}
    for key, runner in runners.items():
        try:
            runner.feed([feeds])
            runner.open()
            warm_up(runner, 1)
            rates[key] = []
        except OnnxCompressError as error:
            found[key] = Throughput(batch, threads, reason=str(error))
    pause = max((runner.lingers_s for runner in runners.values()), default=0.0)
    for _ in range(ROUNDS):
        for key in generator.permutation(np.array(list(rates), dtype=np.int64)).tolist():
            time.sleep(pause)
            taken: list[int] = []
            end = time.perf_counter() + seconds / ROUNDS
            while not taken or time.perf_counter() < end:
                taken.extend(runners[key].sample(0, 1))
            rates[key].append(batch * len(taken) / (sum(taken) / 1e9))
    for key, values in rates.items():
        found[key] = Throughput(batch, threads, float(np.median(values)), min(values), max(values))
    for key in runners:
        runners[key].close()
    return found
