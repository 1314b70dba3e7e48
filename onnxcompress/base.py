"""The contract of a pass: one graph in, a new graph and a report of what changed and what was refused out.

A pass is a frozen pydantic model: its typed fields are the options of the recipe and of the command line, so an
unknown or ill-typed option is rejected before any data is read. :meth:`Pass.__call__` is the one template::

    copy -> requires -> apply -> sort -> ensures -> report

``apply`` mutates the copy that it is given and yields what it did: a :class:`Change`, a :class:`Refusal` (a skip is a
result, not a log line), a :class:`Decision` (what was decided by measuring, so that a replay gives the same bytes) or a
:class:`Cut` (an axis that lost positions).
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from onnxcompress.blas import one_blas_thread
from onnxcompress.errors import DataError
from onnxcompress.graph import Graph, copy_graph, release_weights, sort_nodes
from onnxcompress.kept import Kept
from onnxcompress.shapes import GraphStats, graph_stats
from onnxcompress.spill import SPILLED_FROM, spill_weights

if TYPE_CHECKING:
    from onnxcompress.data import Dataset
    from onnxcompress.quantization.variants import Variants
    from onnxcompress.stages import Stages

__all__ = [
    "Change",
    "Context",
    "Cut",
    "Decision",
    "Detail",
    "Guarantee",
    "Pass",
    "PassReport",
    "PassResult",
    "Progress",
    "Refusal",
    "SilentProgress",
]

Item = TypeVar("Item")


class Guarantee(Enum):
    """What a pass promises about the outputs."""

    #: bit for bit the same
    EXACT = "exact"
    #: the same but for the order of floating-point operations
    EQUIVALENT = "equivalent"
    #: judged by the task metric
    APPROXIMATE = "approximate"


@dataclass(frozen=True)
class Change:
    """One thing that a pass did: a short kind (``folded``, ``removed``), the node's name, and details."""

    kind: str
    node: str
    detail: str = ""


@dataclass(frozen=True)
class Refusal:
    """A node that a pass left alone although it was a candidate, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """An option value found by measuring or searching; the saved recipe carries it, so that a replay repeats it."""

    option: str
    value: Any


@dataclass(frozen=True)
class Cut:
    """An axis of a tensor that is not constant lost positions; ``kept`` are those that are left, sorted."""

    tensor: str
    axis: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Detail:
    """A fact for the report under a key of its own, for example the fusion audit; plain JSON types only."""

    key: str
    value: Any


@dataclass(frozen=True)
class PassReport:
    """What one pass did. ``decisions`` overrides ``options`` in a saved recipe."""

    name: str
    options: dict[str, Any]
    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]
    decisions: dict[str, Any]
    before: GraphStats
    after: GraphStats
    seconds: float
    warnings: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    #: reports of the passes of a pipeline, in order
    children: tuple[PassReport, ...] = ()
    #: the pass did not run: its result was that of an earlier run, with the seconds of that
    reused: bool = False

    @property
    def changed(self) -> bool:
        """True where the pass changed anything."""
        return bool(self.changes)


@dataclass(frozen=True)
class PassResult:
    """A new graph, what was done to it, and ``kept``: what is left of each tensor that is not constant and was cut.

    An axis that merges the batch with channels is described by one period of it.
    """

    graph: Graph
    report: PassReport
    kept: Kept = field(default_factory=dict)


class Progress(Protocol):
    """Where long work reports to. ``track`` wraps an iterable; ``total`` is None where the length is unknown."""

    def track(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """Yield ``items`` while showing how far the work is."""
        ...

    def paused(self) -> AbstractContextManager[Any]:
        """A context in which nothing is drawn, for example while time is being measured."""
        ...


class SilentProgress:
    """Progress that shows nothing; the default of the Python API."""

    def track(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """Yield ``items``."""
        yield from items

    def paused(self) -> AbstractContextManager[Any]:
        """Nothing to pause."""
        return nullcontext()


@dataclass
class Context:
    """What a pass may use beside the graph.

    ``original`` is the graph that the recipe was given (the teacher); ``data`` calibrates and trains, ``eval_data``
    only judges. ``evaluate`` maps a callable that runs a model to a number, higher is better.
    """

    original: Graph | None = None
    data: Dataset | None = None
    eval_data: Dataset | None = None
    evaluate: Callable[[Callable[..., Any]], float] | None = None
    target: str = "cpu"
    seed: int = 0
    progress: Progress = field(default_factory=SilentProgress)
    work_dir: Path | None = None
    #: where results of finished passes are kept and found
    stages: Stages | None = None
    #: the float graph as the quantising pass of this run was given it: it computes what ``original`` does, but its
    #: tensors may be scaled (equalize_layers), and so are those of the quantised graph
    reference: Graph | None = None
    #: what the quantising pass of this run made its graph from, to write it again with other layers float
    variants: Variants | None = None
    #: what the passes of this run removed so far, as :class:`PassResult` has it; a pipeline keeps it up to date
    kept: Kept = field(default_factory=dict)
    #: threads of the sessions that calibrate and verify; 0: as many as the runtime chooses
    threads: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def teacher(self) -> Graph | None:
        """What tensors of a quantised graph are compared with, name by name."""
        return self.reference if self.reference is not None else self.original

    def warn(self, message: str) -> None:
        """Record a warning for the report; the same one is recorded once."""
        if message not in self.warnings:
            self.warnings.append(message)


class Pass(BaseModel, ABC):
    """One transformation of a graph. Subclasses set ``name``, declare options as fields and write ``apply``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: pass name = file = recipe key = command
    name: ClassVar[str]
    #: options that name files: a recipe file of a stranger may not put or find them anywhere
    file_options: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def guarantee(self) -> Guarantee:
        """What the pass promises with these options."""

    @property
    def needs_data(self) -> bool:
        """True where the pass reads calibration data; it is then not started without any."""
        return False

    def hold_out(self, data: Dataset, seed: int) -> tuple[Dataset, Dataset] | None:
        """(the rest, samples that this pass judges by), so that a recipe can keep the latter from the passes before it.

        What was fitted to a sample looks better on it than it is. None: there are none.
        """
        return None

    def check_available(self) -> None:
        """Raise where what the pass needs is not installed or not there; asked before any pass of a recipe runs.

        Raises:
            RuntimeUnavailableError: a package is not installed.
            UsageError: a file that an option names is not there.
        """

    def models(self) -> tuple[str, ...]:
        """Model files that options name, which are tried in a child process before they are opened, as the input is."""
        return ()

    def depends_on(self) -> Any:
        """What the result depends on beside the graph, the options and the context, as plain data.

        The contents of files that options name.
        """
        return None

    def requires(self, graph: Graph, context: Context) -> None:
        """Raise an :class:`~onnxcompress.errors.OnnxCompressError` where the pass cannot start."""

    @abstractmethod
    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail | Cut]:
        """Change ``graph`` in place and yield what was done, refused and decided."""

    def ensures(self, before: Graph, after: Graph, context: Context) -> None:
        """Raise where the result breaks a promise that can be checked on the graphs alone."""

    def _check_start(self, context: Context) -> None:
        """What can be said before any pass of a recipe runs."""
        if self.needs_data and context.data is None:
            raise DataError(f"{self.name} needs calibration data; give some samples with --data")
        self.check_available()

    def __call__(self, graph: Graph, context: Context | None = None) -> PassResult:
        """Run the pass on a copy of ``graph``; the argument is not changed.

        NumPy's matrix products run on one thread meanwhile, so that the result is the same on any number of them.
        """
        with one_blas_thread():
            return self._run(graph, context if context is not None else Context())

    def _run(self, graph: Graph, context: Context) -> PassResult:
        start = time.perf_counter()
        warned = len(context.warnings)
        self._check_start(context)
        self.requires(graph, context)
        after = copy_graph(graph)
        changes: list[Change] = []
        refusals: list[Refusal] = []
        decisions: dict[str, Any] = {}
        details: dict[str, Any] = {}
        kept: Kept = {}
        for item in self.apply(after, context):
            match item:
                case Change():
                    changes.append(item)
                case Refusal():
                    refusals.append(item)
                case Decision():
                    decisions[item.option] = item.value
                case Detail():
                    details[item.key] = item.value
                case Cut():
                    kept.setdefault(item.tensor, {})[item.axis] = item.kept
        sort_nodes(after)
        self.ensures(graph, after, context)
        stats = graph_stats(after)
        if stats.weight_bytes >= SPILLED_FROM:
            gc.collect()  # graphs are cycles, and what a pass tried or replaced may be as large as the model
        spill_weights(after)
        release_weights(after)
        release_weights(graph)
        report = PassReport(
            name=self.name,
            options=self.model_dump(mode="json", exclude_defaults=True),
            changes=tuple(changes),
            refusals=tuple(refusals),
            decisions=decisions,
            before=graph_stats(graph),
            after=stats,
            seconds=time.perf_counter() - start,
            warnings=tuple(context.warnings[warned:]),
            details=details,
        )
        return PassResult(after, report, kept)
