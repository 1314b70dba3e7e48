"""What a runtime is to the benchmark: something that opens a model file and runs it, and says how.

A :class:`Runtime` is a runtime on a device with its options, e.g. ``onnxruntime:cuda,use_tf32=true``. It opens a
model as an :class:`Opened`, which runs it and tells where each node runs.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from onnxcompress.errors import UsageError
from onnxcompress.session import Feeds

__all__ = [
    "Feeds",
    "NodePlacement",
    "NodeTime",
    "Opened",
    "Options",
    "Runtime",
    "RuntimeFacts",
    "Source",
    "Trace",
    "as_path",
    "contiguous",
    "median_times",
    "missing_inputs",
    "one_line",
]

#: what a runtime opens: a file, or a serialised model
Source = bytes | str | os.PathLike[str]


class Options(BaseModel):
    """The options of a runtime, each with its default; an unknown one is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class RuntimeFacts:
    """What a time is worth nothing without: which runtime, on what, how."""

    #: as it was asked for, e.g. ``onnxruntime:cuda,use_tf32=true``
    spec: str
    runtime: str
    version: str
    device: str
    #: of float32 models: what is multiplied and added
    precision: str
    #: threads of one operator; 0: the runtime chooses
    threads: int
    #: every option as it was used, those at their defaults too
    options: Mapping[str, str]


@dataclass(frozen=True)
class NodePlacement:
    """Where a node of the model runs."""

    node: str
    op: str
    #: the execution provider, or the device
    provider: str


@dataclass(frozen=True)
class NodeTime:
    """Seconds of one node of the graph as the runtime executes it, in one run of the model; the median over runs."""

    node: str
    op: str
    provider: str
    seconds: float


@dataclass(frozen=True)
class Trace:
    """The runtime's own times of each node, from a run of its own: tracing itself costs time."""

    runs: int
    nodes: tuple[NodeTime, ...]
    #: nodes that do nothing but copy between devices
    copies: int

    @property
    def seconds(self) -> float:
        """All nodes together, in one run."""
        return sum(node.seconds for node in self.nodes)

    def by_operator(self) -> dict[str, float]:
        """{operator type: seconds in one run}, the longest first."""
        total: dict[str, float] = {}
        for node in self.nodes:
            total[node.op] = total.get(node.op, 0.0) + node.seconds
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


class Opened(ABC):
    """A model that a runtime has opened."""

    input_names: Sequence[str]
    output_names: Sequence[str]

    @abstractmethod
    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one batch: {input name: array} in, {output name: array} out. Inputs that the model lacks are ignored.

        Raises:
            ModelError: the runtime cannot run the model on them.
        """

    @abstractmethod
    def bind(self, feeds: Feeds) -> Callable[[], Any]:
        """A function that runs ``feeds`` to the end, the device's work included, and does nothing else."""

    @abstractmethod
    def placement(self) -> tuple[NodePlacement, ...]:
        """Where each node runs."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the model's memory."""


class Runtime(ABC):
    """A runtime on a device, with its options. Importing this module imports no runtime; :meth:`check` does."""

    #: as it is asked for, without options
    name: ClassVar[str]
    #: what runs the models
    library: ClassVar[str]
    #: the options that it has
    options_type: ClassVar[type[Options]] = Options
    #: names of runtimes that disturb this one inside one process; both then work in processes of their own
    clashes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: Options | None = None, spec: str | None = None) -> None:
        options = options if options is not None else self.options_type()
        if not isinstance(options, self.options_type):
            raise UsageError(f"{self.name} was given {type(options).__name__}; expected {self.options_type.__name__}")
        self.options = options
        self.spec = spec if spec is not None else self.name

    @abstractmethod
    def check(self) -> None:
        """Import the runtime and look for its device.

        Raises:
            RuntimeUnavailableError: it is not there; what is there, and what to install.
        """

    @abstractmethod
    def open(self, model: Source, threads: int) -> Opened:
        """``model``, ready to run; ``threads`` for one operator, 0: the runtime chooses.

        Raises:
            RuntimeUnavailableError: the runtime or its device is not there, or nodes would run elsewhere.
            ModelError: the runtime refuses the model.
        """

    @abstractmethod
    def trace(self, model: Source, threads: int, feeds: Sequence[Feeds], runs: int) -> Trace:
        """Run ``feeds`` in turn ``runs`` times after a warm-up, with the runtime's own profiler on.

        Raises:
            RuntimeUnavailableError, ModelError: as :meth:`open`.
        """

    @abstractmethod
    def version(self) -> str:
        """The version of the library."""

    @abstractmethod
    def precision(self) -> str:
        """What float32 operators compute in; a choice of the caller that is less says so."""

    def device(self) -> str:
        """The device by name."""
        return "CPU"

    def facts(self, threads: int) -> RuntimeFacts:
        """Version, device, precision, threads and options; :meth:`check` has passed."""
        return RuntimeFacts(
            spec=self.spec,
            runtime=self.library,
            version=self.version(),
            device=self.device(),
            precision=self.precision(),
            threads=threads,
            options=self.option_texts(),
        )

    def lingers(self, threads: int) -> float:
        """Seconds for which ``threads`` threads go on after a run, waiting for the next one; 0 for one thread."""
        return 0.0

    def device_memory(self) -> int | None:
        """Bytes in use on the device now; None for a device without memory of its own, or that does not tell."""
        return None

    def option_texts(self) -> dict[str, str]:
        """Every option as text."""
        return {name: str(value).lower() for name, value in self.options.model_dump().items()}


def median_times(taken: Mapping[tuple[str, str, str], Sequence[float]]) -> tuple[NodeTime, ...]:
    """{(node, operator, provider): seconds of each run} as medians, the longest first."""
    nodes = [NodeTime(*key, float(np.median(seconds))) for key, seconds in taken.items()]
    return tuple(sorted(nodes, key=lambda node: (-node.seconds, node.node)))


def contiguous(feeds: Feeds, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The arrays of ``feeds`` that ``names`` asks for, as runtimes want them in memory."""
    return {name: np.ascontiguousarray(feeds[name]) for name in names if name in feeds}


def missing_inputs(names: Sequence[str]) -> str:
    """What an error says of inputs that were not given."""
    return f"there is no input {', '.join(map(repr, names))}"


def one_line(error: BaseException, most: int = 500) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:most]


def as_path(model: Source) -> bytes | str:
    """Bytes as they are, a file by its name."""
    return model if isinstance(model, bytes) else os.fspath(Path(model))
