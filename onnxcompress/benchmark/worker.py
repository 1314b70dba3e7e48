"""The process that :class:`~onnxcompress.benchmark.runners.WorkerRunner` starts: one JSON request a line, one answer.

It runs one model on one runtime. Arrays come and go in files. What the runtime prints must not be taken for an answer,
so answers go to a copy of stdout, and stdout itself becomes stderr.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from onnxcompress.benchmark.runners import LocalRunner, Memory, read_arrays, runtime_of, write_arrays
from onnxcompress.errors import OnnxCompressError, ResourceError

__all__ = ["Worker", "main", "resident_memory"]


class Worker:
    """Answers requests; see :class:`~onnxcompress.benchmark.runners.WorkerRunner` for what they mean."""

    def __init__(self) -> None:
        self._runner: LocalRunner | None = None
        self._before: Memory | None = None
        self._device_memory: Callable[[], int | None] = lambda: None
        self._device_before: int | None = None

    @property
    def runner(self) -> LocalRunner:
        """The model.

        Raises:
            OnnxCompressError: ``start`` was not asked for.
        """
        if self._runner is None:
            raise OnnxCompressError("the worker was not started; this is a bug, please report it")
        return self._runner

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request; an error is an answer too."""
        do: Callable[..., dict[str, Any]] = getattr(self, f"do_{request['do']}")
        try:
            return do(**{key: value for key, value in request.items() if key != "do"})
        except OnnxCompressError as error:
            return {"error": type(error).__name__, "message": str(error)}
        except MemoryError:
            return {"error": ResourceError.__name__, "message": "memory ran out"}
        except Exception as error:
            return {"error": OnnxCompressError.__name__, "message": f"{type(error).__name__}: {error}"}

    def do_start(self, spec: str, model: str, threads: int) -> dict[str, Any]:
        """Import the runtime."""
        begin = time.perf_counter()
        runtime = runtime_of(spec)
        load_s = time.perf_counter() - begin
        self._runner = LocalRunner(runtime, Path(model), threads)
        self._device_memory = runtime.device_memory
        return {"load_s": load_s, "lingers_s": self._runner.lingers_s}

    def do_feed(self, files: list[str]) -> dict[str, Any]:
        """Read the batches."""
        self.runner.feed([read_arrays(Path(file)) for file in files])
        return {}

    def do_open(self) -> dict[str, Any]:
        """Create a session; the first one's memory is what ``memory`` tells of."""
        if self._before is None:
            self._device_before = self._device_memory()
            _forget_peak()
            self._before = resident_memory()
        return asdict(self.runner.open())

    def do_sample(self, index: int, repeats: int, settle: bool) -> dict[str, Any]:
        """Time runs."""
        return {"taken": self.runner.sample(index, repeats, settle=settle)}

    def do_run(self, given: str, answer: str) -> dict[str, Any]:
        """Run once; the outputs go to the file ``answer``."""
        write_arrays(Path(answer), self.runner.run(read_arrays(Path(given))))
        return {}

    def do_placement(self) -> dict[str, Any]:
        """Where nodes run."""
        return {"nodes": [astuple(node) for node in self.runner.placement()]}

    def do_trace(self, runs: int) -> dict[str, Any]:
        """The runtime's times of nodes."""
        trace = self.runner.trace(runs)
        return {"runs": trace.runs, "nodes": [astuple(node) for node in trace.nodes], "copies": trace.copies}

    def do_memory(self) -> dict[str, Any]:
        """Memory before the first session, and the most since."""
        now = resident_memory()
        if now is None or self._before is None:
            return {"before": None, "peak": None, "device": None}
        device = self._device_memory()
        known = device is not None and self._device_before is not None
        more = max(0, (device or 0) - (self._device_before or 0)) if known else None
        return {"before": self._before.before, "peak": now.peak, "device": more}

    def do_close(self) -> dict[str, Any]:
        """Let go of the session."""
        self.runner.close()
        return {}


def resident_memory(status: Path = Path("/proc/self/status")) -> Memory | None:
    """This process's resident memory now and at its most; None where the system does not tell it as Linux does."""
    with suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        now, peak = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        return Memory(now, peak)
    return None


def _forget_peak() -> None:
    """Start the record of the peak anew, so that what importing a runtime needed is not the model's."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Answer until the input ends."""
    gc.disable()  # as in the process that compares; the little that is allocated here makes no cycles
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        worker = Worker()
        for line in sys.stdin:
            out.write(json.dumps(worker.answer(json.loads(line))) + "\n")
            out.flush()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt, BrokenPipeError):
        main()
