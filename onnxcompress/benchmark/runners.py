"""A model on a runtime, ready to be timed: in this process, or in a process of its own.

Timing asks either for the same few things, so that a comparison may mix them. Where runtimes disturb each other inside
one process, each gets a process; they still work in turn, since the one that is not asked waits for a line to read.
The clock runs where the model runs, so that the way there and back is not part of a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from onnxcompress import errors
from onnxcompress.errors import OnnxCompressError, RuntimeUnavailableError
from onnxcompress.runtimes import NodePlacement, NodeTime, Opened, Runtime, Source, Trace, get_runtime
from onnxcompress.session import Feeds

__all__ = [
    "LocalRunner",
    "Memory",
    "Runner",
    "Started",
    "WorkerRunner",
    "make_runner",
    "read_arrays",
    "runtime_of",
    "write_arrays",
]


@dataclass(frozen=True)
class Started:
    """Seconds that a new session took to be created, and its first run."""

    creation_s: float
    first_run_s: float


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process in bytes: before the model was opened, and the most since."""

    before: int
    peak: int
    #: what is more in use on the device than before, by a process that is alone there; None: no such device
    device: int | None = None


class Runner(ABC):
    """A model on a runtime."""

    #: seconds for which threads go on after a run, and take the cores from whoever runs next
    lingers_s: float = 0.0

    @abstractmethod
    def feed(self, batches: Sequence[Feeds]) -> None:
        """The inputs that are run from now on, by their position."""

    @abstractmethod
    def open(self) -> Started:
        """Create a new session, bind every batch to it and run the first one once."""

    @abstractmethod
    def sample(self, index: int, repeats: int, *, settle: bool = False) -> list[int]:
        """Nanoseconds of each of ``repeats`` runs in a row of batch ``index``.

        With ``settle`` one more run goes before them untimed, so that the caches hold what this model needs, as they do
        where it runs all the time, and not what ran before it.
        """

    @abstractmethod
    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """{output name: array} of a session that exists or is created; not for timing."""

    @abstractmethod
    def placement(self) -> tuple[NodePlacement, ...]:
        """Where each node runs."""

    @abstractmethod
    def trace(self, runs: int) -> Trace:
        """The runtime's own times of each node, from a session of its own."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the session."""

    def end(self) -> None:
        """Let go of everything."""
        self.close()


class LocalRunner(Runner):
    """In this process."""

    def __init__(self, runtime: Runtime, source: Source, threads: int) -> None:
        self._runtime, self._source, self._threads = runtime, source, threads
        self.lingers_s = runtime.lingers(threads)
        self._batches: Sequence[Feeds] = ()
        self._opened: Opened | None = None
        self._runs: list[Callable[[], Any]] = []

    def feed(self, batches: Sequence[Feeds]) -> None:
        self.close()
        self._batches = batches

    def open(self) -> Started:
        self.close()
        begin = time.perf_counter()
        opened = self._runtime.open(self._source, self._threads)
        created = time.perf_counter()
        self._opened = opened
        first = opened.bind(self._batches[0])  # some runtimes find the shapes of the outputs here, by a run
        first()
        done = time.perf_counter()
        self._runs = [first, *(opened.bind(feeds) for feeds in self._batches[1:])]
        return Started(created - begin, done - created)

    def sample(self, index: int, repeats: int, *, settle: bool = False) -> list[int]:
        run = self._runs[index]
        clock = time.perf_counter_ns
        taken = []
        if settle:
            run()
        last = clock()
        for _ in range(repeats):
            run()
            now = clock()
            taken.append(now - last)
            last = now
        return taken

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        return self._any().run(feeds)

    def placement(self) -> tuple[NodePlacement, ...]:
        return self._any().placement()

    def trace(self, runs: int) -> Trace:
        return self._runtime.trace(self._source, self._threads, self._batches, runs)

    def _any(self) -> Opened:
        if self._opened is None:
            self._opened = self._runtime.open(self._source, self._threads)
        return self._opened

    def close(self) -> None:
        self._runs = []
        if self._opened is not None:
            self._opened.close()
        self._opened = None


class WorkerRunner(Runner):
    """In a process of its own, which ends with this object's :meth:`end`.

    Args:
        spec: the runtime, as :func:`~onnxcompress.runtimes.get_runtime` takes it.
        source: a file, or a serialised model, which is written to a temporary one.
        threads: as :meth:`~onnxcompress.runtimes.Runtime.open` has it.

    Raises:
        RuntimeUnavailableError: the runtime is not there.
    """

    def __init__(self, spec: str, source: Source, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="onnxcompress-worker-", ignore_cleanup_errors=True)
        self._process: subprocess.Popen[str] | None = None
        try:
            path = source if not isinstance(source, bytes) else self._written(source)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "onnxcompress.benchmark.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
            answer = self._ask("start", spec=spec, model=os.path.abspath(os.fspath(path)), threads=threads)  # noqa: PTH100
        except BaseException:
            self.end()
            raise
        #: seconds to import the runtime and find its device
        self.load_s = float(answer["load_s"])
        self.lingers_s = float(answer["lingers_s"])

    def _written(self, model: bytes) -> Path:
        path = Path(self._folder.name) / "model.onnx"
        path.write_bytes(model)
        return path

    def feed(self, batches: Sequence[Feeds]) -> None:
        files = []
        for index, feeds in enumerate(batches):
            files.append(Path(self._folder.name) / f"feeds-{index}.npz")
            write_arrays(files[-1], feeds)
        self._ask("feed", files=[str(file) for file in files])

    def open(self) -> Started:
        return Started(**self._ask("open"))

    def sample(self, index: int, repeats: int, *, settle: bool = False) -> list[int]:
        taken: list[int] = self._ask("sample", index=index, repeats=repeats, settle=settle)["taken"]
        return taken

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        given, answer = (Path(self._folder.name) / f"{name}.npz" for name in ("run-in", "run-out"))
        write_arrays(given, feeds)
        self._ask("run", given=str(given), answer=str(answer))
        return read_arrays(answer)

    def placement(self) -> tuple[NodePlacement, ...]:
        return tuple(NodePlacement(*node) for node in self._ask("placement")["nodes"])

    def trace(self, runs: int) -> Trace:
        answer = self._ask("trace", runs=runs)
        return Trace(answer["runs"], tuple(NodeTime(*node) for node in answer["nodes"]), answer["copies"])

    def memory(self) -> Memory | None:
        """The worker's memory; None where the system does not tell."""
        answer = self._ask("memory")
        if answer["before"] is None:
            return None
        return Memory(answer["before"], answer["peak"], answer["device"])

    def close(self) -> None:
        if self._process is not None:
            self._ask("close")

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()  # the worker ends where its input does
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer to one request.

        Raises:
            OnnxCompressError: of the kind that was raised in the worker.
            RuntimeUnavailableError: the worker died.
        """
        process = self._process
        if process is None:
            raise RuntimeUnavailableError("the worker process has ended")
        assert process.stdin is not None
        assert process.stdout is not None
        answer = _exchange(process.stdin, process.stdout, {"do": do, **arguments})
        if answer is None:
            raise RuntimeUnavailableError(
                f"the worker process ended with status {process.wait(timeout=10)} while it should {do}; "
                "the runtime crashed, or memory ran out"
            )
        if "error" in answer:
            kind: Any = getattr(errors, str(answer["error"]), OnnxCompressError)
            raise kind(answer["message"])
        return answer


def _exchange(to: IO[str], back: IO[str], request: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        to.write(json.dumps(request) + "\n")
        to.flush()
        line = back.readline()
    except OSError:
        return None
    answer: dict[str, Any] | None = json.loads(line) if line else None
    return answer


def make_runner(runtime: Runtime, source: Source, threads: int, *, isolated: bool) -> Runner:
    """A runner of either kind."""
    return WorkerRunner(runtime.spec, source, threads) if isolated else LocalRunner(runtime, source, threads)


def runtime_of(spec: str) -> Runtime:
    """The runtime of ``spec``, which is there.

    Raises:
        UsageError: there is no such runtime.
        RuntimeUnavailableError: it is not installed, or its device is missing.
    """
    runtime = get_runtime(spec)
    runtime.check()
    return runtime


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write ``arrays`` to ``path``; names may hold what file names may not, text is stored as fixed-width text."""
    values = {}
    for index, value in enumerate(arrays.values()):
        array = np.asarray(value)
        values[f"a{index}"] = array.astype(np.str_) if array.dtype.kind == "O" else array
    names = np.array(list(arrays), dtype=np.str_)
    types = np.array([str(value.dtype) for value in values.values()], dtype=np.str_)
    stored = {key: v.view(np.uint8) if v.dtype.kind == "V" else v for key, v in values.items()}
    np.savez(path, allow_pickle=False, names=names, types=types, **stored)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """What :func:`write_arrays` wrote; bfloat16 and its kin are known to numpy because onnx brings them."""
    arrays: dict[str, NDArray[Any]] = {}
    with np.load(path, allow_pickle=False) as file:
        for index, (name, kind) in enumerate(zip(file["names"].tolist(), file["types"].tolist(), strict=True)):
            array = file[f"a{index}"]
            arrays[name] = array if str(array.dtype) == kind else array.view(np.dtype(kind))
    return arrays
