"""ONNX Runtime's CPU provider, and what the CUDA provider shares with it.

Threads spin while they wait for work. With several threads, those of one session would go on for a while after a run
and take the cores from the model that runs next, so they are told to stop at the end of a run unless ``spinning``
says otherwise.
"""

from __future__ import annotations

import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

from numpy.typing import NDArray

from onnxcompress.errors import ModelError, RuntimeUnavailableError
from onnxcompress.runtimes.base import (
    Feeds,
    NodePlacement,
    Opened,
    Options,
    Runtime,
    Source,
    Trace,
    as_path,
    median_times,
    one_line,
)
from onnxcompress.session import Optimization, Session, import_onnxruntime

__all__ = ["CpuOptions", "OnnxRuntimeCpu", "OpenedSession", "installed_builds", "read_trace"]

#: rounds of the feeds before a trace counts
_WARM_UP = 3
#: distributions that all install the module onnxruntime
_BUILDS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-training")
#: seconds after which threads that spin have gone to sleep
_LINGERS = 0.01
_SPINNING = {
    "stop": {"session.force_spinning_stop": "1"},
    "on": {},
    "off": {"session.intra_op.allow_spinning": "0", "session.inter_op.allow_spinning": "0"},
}


class CpuOptions(Options):
    """Options of ``onnxruntime:cpu``."""

    #: the graph optimisation level
    optimization: Optimization = "all"
    #: whether idle threads spin: ``stop`` lets them, but not after the end of a run
    spinning: Literal["stop", "on", "off"] = "stop"
    #: bind inputs and outputs to buffers once, instead of handing arrays over at every run
    io_binding: bool = False


class OnnxRuntimeCpu(Runtime):
    """ONNX Runtime on the CPU. It is also what the outputs of every other runtime are held against."""

    name = "onnxruntime:cpu"
    library = "onnxruntime"
    options_type = CpuOptions
    provider: ClassVar[str] = "cpu"
    provider_name: ClassVar[str] = "CPUExecutionProvider"

    def check(self) -> None:
        import_onnxruntime()

    def session(
        self, model: Source, threads: int, *, profile: Path | None = None, cpu_fallback: bool = False
    ) -> Session:
        """A session with these options; with ``profile``, the prefix of the file that its profiler writes."""
        options = self.options
        assert isinstance(options, CpuOptions)
        return Session(
            as_path(model),
            optimization=options.optimization,
            threads=threads,
            provider=self.provider,
            provider_options=self.provider_options(),
            cpu_fallback=cpu_fallback,
            config={**_SPINNING[options.spinning], "session.record_ep_graph_assignment_info": "1"},
            profile=profile,
        )

    def lingers(self, threads: int) -> float:
        assert isinstance(self.options, CpuOptions)
        return _LINGERS if threads != 1 and self.options.spinning == "on" else 0.0

    def provider_options(self) -> dict[str, str]:
        """Options of the provider."""
        return {}

    def open(self, model: Source, threads: int) -> Opened:
        assert isinstance(self.options, CpuOptions)
        return OpenedSession(self.session(model, threads), io_binding=self.options.io_binding)

    def trace(self, model: Source, threads: int, feeds: Sequence[Feeds], runs: int) -> Trace:
        with tempfile.TemporaryDirectory(prefix="onnxcompress-trace-", ignore_cleanup_errors=True) as folder:
            session = self.session(model, threads, profile=Path(folder) / "trace")
            bound = [session.bind(f) for f in feeds]
            warm_up = _WARM_UP * len(bound)
            for index in range(warm_up + runs):
                bound[index % len(bound)]()
            return read_trace(Path(session.end_profiling()), warm_up)

    def version(self) -> str:
        builds = " and ".join(installed_builds()) or "package unknown"
        return f"{import_onnxruntime().__version__} ({builds})"

    def precision(self) -> str:
        return "float32"


class OpenedSession(Opened):
    """A :class:`~onnxcompress.session.Session` behind the interface of runtimes."""

    def __init__(self, session: Session, *, io_binding: bool = False) -> None:
        self._session: Session | None = session
        self._io_binding = io_binding
        self.input_names = session.input_names
        self.output_names = session.output_names

    @property
    def session(self) -> Session:
        """The session.

        Raises:
            ModelError: it was closed.
        """
        if self._session is None:
            raise ModelError("the model was closed")
        return self._session

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        return self.session.run(feeds)

    def bind(self, feeds: Feeds) -> Callable[[], Any]:
        return self.session.bind_buffers(feeds) if self._io_binding else self.session.bind(feeds)

    def placement(self) -> tuple[NodePlacement, ...]:
        return tuple(NodePlacement(name, op, provider) for name, op, provider in self.session.assignment())

    def close(self) -> None:
        self._session = None


def installed_builds() -> list[str]:
    """The installed distributions that bring the module onnxruntime, e.g. ``["onnxruntime 1.32.0"]``."""
    found = []
    for name in _BUILDS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def read_trace(path: str | os.PathLike[str], warm_up: int) -> Trace:
    """The profile that ONNX Runtime wrote to ``path``, without its first ``warm_up`` runs.

    Its events are Chrome trace events with times in microseconds. ``model_run`` spans one run; events of category
    ``Node`` that end in ``_kernel_time`` are the kernels, each inside of a run.

    Raises:
        RuntimeUnavailableError: the runtime wrote no trace that can be read.
    """
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RuntimeUnavailableError(f"onnxruntime wrote no trace that can be read: {one_line(error)}") from error
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")[warm_up:]
    if not starts:
        raise RuntimeUnavailableError("onnxruntime's trace holds no run of the model")
    taken: dict[tuple[str, str, str], list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        run = bisect_right(starts, event["ts"]) - 1
        if event.get("cat") != "Node" or not name.endswith("_kernel_time") or run < 0:
            continue
        facts = event.get("args", {})
        key = (name.removesuffix("_kernel_time"), str(facts.get("op_name", "")), str(facts.get("provider", "")))
        taken.setdefault(key, [0.0] * len(starts))[run] += event["dur"] / 1e6  # a node in a loop runs several times
    nodes = median_times(taken)
    return Trace(len(starts), nodes, sum(node.op.startswith("Memcpy") for node in nodes))
