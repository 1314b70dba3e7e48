"""A graph run piece by piece, so that what lies ahead can be changed on the way; samples held out; outputs judged.

What mends a student layer by layer needs, for each layer, what the student computes *after* all earlier layers were
mended. Running the whole network once more for each layer would be quadratic. :class:`Advance` keeps, for each batch,
only the tensors that nodes still to come read, and runs the piece of the graph up to the next layer. All layers
together then cost one run of the network, and two networks can advance side by side.

What lies between two pieces is held in memory, so the number of samples is bounded (:func:`samples_that_fit`);
dequantised tensors are held as the integers that they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import log10
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.errors import DataError, ModelError
from onnxcompress.graph import (
    Graph,
    default_values,
    nested_graphs,
    part_info,
    sort_nodes,
    walk_graphs,
    walk_nodes,
)
from onnxcompress.recorded import NotRecordableError, Recorded
from onnxcompress.session import Optimization, Session, is_large
from onnxcompress.verify import compare

if TYPE_CHECKING:
    from onnxcompress.data import Dataset

__all__ = ["Advance", "Judge", "SampleErrors", "Samples", "decibels", "samples_that_fit", "split_samples"]

Array = NDArray[Any]
Floats = NDArray[np.float64]

#: bytes of activations that all networks together may hold between two pieces
MEMORY = 512 * 2**20
#: one of this many samples is held out
HELD_OUT = 4
#: fewer held-out samples do not judge outputs
FEW = 32
#: computed again wherever they are read: cheap, and their input is a quarter of the size
_AGAIN = ("DequantizeLinear", "Constant")


# ----------------------------------------------------------------------------------------------------------------------
# Samples


@dataclass(frozen=True)
class Samples:
    """Batches to learn from and batches to judge by.

    ``overlap`` is True where there are too few samples to hold any out, so that both are the same.
    """

    train: Dataset
    held_out: Dataset
    whole: Dataset
    overlap: bool = False

    @property
    def judging(self) -> Dataset:
        """What the model's outputs are judged by: the held-out samples, or all where those are few.

        The outputs' error differs so much from sample to sample that a handful says less than samples which were
        learned from, layer by layer and with a ridge.
        """
        return self.held_out if self.held_out.samples >= FEW else self.whole

    def feeds(self) -> list[tuple[dict[str, Array], bool]]:
        """(feeds, held out?) of all batches, in memory; with ``overlap`` each batch comes once for either use."""
        parts = [(self.train, False), (self.held_out, True)]
        return [(dict(batch.feeds), held) for data, held in parts for batch in data]


def split_samples(data: Dataset, seed: int, limit: int) -> Samples:
    """At most ``limit`` samples spread evenly over ``data``, one of :data:`HELD_OUT` held out."""
    limit = max(limit, 1)
    if limit < data.samples:
        try:
            data = data.split(limit / data.samples, seed)[1]
        except DataError:
            data = data.take(limit)
    try:
        train, held_out = data.split(1 / HELD_OUT, seed)
    except DataError:
        return Samples(data, data, data, overlap=True)
    return Samples(train, held_out, data)


def samples_that_fit(plans: Sequence[tuple[Graph, Sequence[Sequence[str]]]], data: Dataset) -> int:
    """Samples of ``data`` whose activations between two pieces fit into :data:`MEMORY`.

    Runs each graph once on one sample (or the batch that the model demands).

    Args:
        plans: per graph, what :class:`Advance` is going to be asked for.
        data: the samples.

    Raises:
        ModelError: a value is no tensor of numbers, so that nothing can be kept between two pieces.
    """
    batch = data.take(data.fixed_batch or 1).first()
    peak = 1
    for graph, schedule in plans:
        peak += _peak_bytes(graph, schedule, batch.feeds)
    return max(batch.samples, MEMORY * batch.samples // peak)


def _peak_bytes(graph: Graph, schedule: Sequence[Sequence[str]], feeds: Mapping[str, Array]) -> int:
    advance = Advance(graph, [dict(feeds)], schedule, threads=1)
    peak = advance.held_bytes()
    for _ in schedule:
        list(advance.step())
        peak = max(peak, advance.held_bytes())
    return peak


# ----------------------------------------------------------------------------------------------------------------------
# Running in pieces


class Advance:
    """Runs a graph piece by piece over batches that stay in memory.

    ::

        advance = Advance(graph, feeds, [["a"], ["b"]])
        for batch in advance.step(): ...     # {"a": ...} of every batch
        for batch in advance.step(): ...     # {"b": ...}; nodes before "a" do not run again

    Between two steps the constants of nodes that have not run may be changed.

    Args:
        graph: a sorted graph; its constants may change while it advances.
        feeds: {input name: array} of every batch.
        schedule: per step, the tensors of the outermost graph that are asked for.
        optimization: the runtime's level for every piece.
        threads: intra-op threads; 0: the runtime's choice.
    """

    def __init__(
        self,
        graph: Graph,
        feeds: Sequence[Mapping[str, Array]],
        schedule: Sequence[Sequence[str]],
        *,
        optimization: Optimization = "disabled",
        threads: int = 0,
    ) -> None:
        self._graph = graph
        self._schedule = [tuple(names) for names in schedule]
        self._optimization = optimization
        self._threads = threads
        self._next = 0
        self._done: set[int] = set()
        defaults = default_values(graph)
        self._states: list[dict[str, Array]] = []
        inputs = [t.name for t in graph.inputs]
        for given in feeds:
            known = {**defaults, **given}
            self._states.append({name: known[name] for name in inputs if known.get(name) is not None})
        self._stored = {name for state in self._states for name in state}
        self._producers: dict[str, gs.Node] = {}

    def held_bytes(self) -> int:
        """Bytes of all tensors that are held now."""
        return sum(value.nbytes for state in self._states for value in state.values())

    def shift(self, name: str, amount: NDArray[np.float64], axis: int) -> None:
        """Add one value a position along ``axis`` to tensor ``name``, where it is still needed."""
        for state in self._states:
            if name in state:
                value = state[name]
                shape = [-1 if i == axis % value.ndim else 1 for i in range(value.ndim)]
                state[name] = value + amount.astype(value.dtype).reshape(shape)

    def step(self) -> Iterator[dict[str, Array]]:
        """Run up to the next step of the schedule; yields what it asks for, batch by batch.

        Raises:
            ModelError: a value is no tensor of numbers.
        """
        wanted = self._schedule[self._next]
        self._next += 1
        self._producers = {t.name: node for node in self._graph.nodes for t in node.outputs if t.name}
        nodes, inputs = self._piece(wanted)
        self._done.update(id(node) for node in nodes if node.op not in _AGAIN)
        live = self._live()
        made = {t.name for node in nodes if node.op not in _AGAIN for t in node.outputs if t.name}
        fetch = list(dict.fromkeys([*(n for n in wanted if n not in self._stored), *sorted(live & made)]))
        session = self._session(nodes, inputs, fetch) if nodes else None
        self._stored = live & (self._stored | made)
        for state in self._states:
            values = session.run(state, fetch) if session is not None else {}
            for name, value in values.items():
                if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
                    raise ModelError(f"tensor {name!r} is no tensor of numbers; the model cannot be run in pieces")
            answer = {name: values[name] if name in values else state[name] for name in wanted}
            for name in [n for n in state if n not in live]:
                del state[name]
            state.update((name, values[name]) for name in live & made)
            yield answer

    def peek(self, wanted: Sequence[str]) -> Iterator[dict[str, Array]]:
        """Run from where the graph stands to tensors that steps to come ask for, and stay there.

        So the effect of other constants in nodes that have not run can be tried.
        """
        self._producers = {t.name: node for node in self._graph.nodes for t in node.outputs if t.name}
        nodes, inputs = self._piece(wanted)
        fetch = [name for name in dict.fromkeys(wanted) if name not in self._stored]
        session = self._session(nodes, inputs, fetch) if nodes else None
        for state in self._states:
            values = session.run(state, fetch) if session is not None else {}
            yield {name: values[name] if name in values else state[name] for name in wanted}

    def _reads(self, node: gs.Node) -> Iterator[str]:
        yield from (t.name for t in node.inputs if t.name and not isinstance(t, gs.Constant))
        for part in nested_graphs(node):
            for inner in walk_nodes(part):
                yield from (t.name for t in inner.inputs if t.name in self._producers or t.name in self._stored)
            for nested in walk_graphs(part):
                yield from (t.name for t in nested.outputs if t.name in self._producers or t.name in self._stored)

    def _piece(self, wanted: Sequence[str]) -> tuple[list[gs.Node], list[str]]:
        """Nodes that have to run for ``wanted``, in order, and the held tensors that they read."""
        nodes: dict[int, gs.Node] = {}
        inputs: dict[str, None] = {}
        stack = [name for name in wanted if name not in self._stored]
        seen: set[str] = set()
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self._stored:
                inputs[name] = None
                continue
            node = self._producers.get(name)
            if node is not None and id(node) not in nodes:
                nodes[id(node)] = node
                stack.extend(self._reads(node))
        return [node for node in self._graph.nodes if id(node) in nodes], sorted(inputs)

    def _live(self) -> set[str]:
        """Tensors that steps to come need and that are, or were, computed by now."""
        live: set[str] = set()
        seen: set[str] = set()
        stack = [name for names in self._schedule[self._next :] for name in names]
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            node = self._producers.get(name)
            if node is None or id(node) in self._done:
                live.add(name)
            else:
                stack.extend(self._reads(node))
        return live

    def _session(self, nodes: list[gs.Node], inputs: Sequence[str], fetch: Sequence[str]) -> Session:
        example = self._states[0]
        whole = self._graph
        tensors = {t.name: t for node in nodes for t in node.outputs if t.name}
        piece = gs.Graph(
            nodes=nodes,
            inputs=[gs.Variable(name, example[name].dtype, [None] * example[name].ndim) for name in inputs],
            outputs=[tensors[name] for name in fetch],
            name="piece",
            opset=whole.opset,
            import_domains=whole.import_domains,
            functions=list(whole.functions),
            ir_version=whole.ir_version,
        )
        piece.__dict__["onnxcompress_info"] = part_info(whole)
        sort_nodes(piece)
        # Between short runs spinning threads would only take the processor away from the matrices of the passes.
        config = {"session.intra_op.allow_spinning": "0"}
        return Session(piece, optimization=self._optimization, threads=self._threads, config=config)


# ----------------------------------------------------------------------------------------------------------------------
# Judging


class Judge:
    """The error of a student's outputs against the teacher's, over the same samples every time.

    Args:
        teacher: gives the outputs that are aimed at.
        data: read once for every student.
        threads: intra-op threads; 0 lets the runtime choose.
    """

    def __init__(self, teacher: Graph, data: Dataset, threads: int = 0) -> None:
        self._data = data
        self._threads = threads
        self._recorded: Recorded | None = None
        self._teacher: Session | None = Session(teacher, optimization="disabled", threads=threads)
        if is_large(teacher):
            with suppress(NotRecordableError):
                self._recorded = Recorded(self._teacher.run, data)
                self._teacher = None  # a large model is not held in memory beside its student

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._recorded is not None:
            self._recorded.close()

    def error(self, student: Graph) -> float:
        """Mean over the floating-point outputs of ||a - b||^2 / ||a||^2; infinite where one is not finite.

        As the graph is written, unless it is large: all weights would be dequantised before the first layer then.
        """
        level: Optimization = "disabled" if self._recorded is None else "extended"
        session = Session(student, optimization=level, threads=self._threads)
        found = compare(self._answers(), session.run, self._data)
        errors = [o.relative_l2**2 for o in found if o.equal_elements is None]
        return float(np.mean(errors)) if errors else 0.0

    def _answers(self) -> Callable[[Mapping[str, Array]], Mapping[str, Any]]:
        """What the teacher answers to one batch of the data after the other."""
        if self._recorded is None:
            assert self._teacher is not None
            return self._teacher.run
        recorded = iter(self._recorded)
        return lambda feeds: next(recorded)

    def sample_errors(self, student: Graph, levels: Sequence[Optimization] = ("disabled",)) -> SampleErrors:
        """The error of each sample, summed over runs at each of the runtime's ``levels`` of optimisation.

        Of an output that has no axis of samples the batch counts as one sample.
        """
        # of a large model one session at a time
        parts = [tuple(levels)] if self._recorded is None else [(level,) for level in levels]
        found = [self._errors_at(student, part) for part in parts]
        return SampleErrors(np.sum([f.errors for f in found], axis=0), np.sum([f.signals for f in found], axis=0))

    def _errors_at(self, student: Graph, levels: Sequence[Optimization]) -> SampleErrors:
        arena = self._recorded is None  # it would keep the memory of all weights that were dequantised
        sessions = [Session(student, optimization=level, threads=self._threads, arena=arena) for level in levels]
        answers = self._answers()
        errors: list[Floats] = []
        signals: list[Floats] = []
        for batch in self._data:
            error, signal = np.zeros((len(levels), batch.samples)), np.zeros(batch.samples)
            expected = answers(batch.feeds)
            for found, level_error in zip((session.run(batch.feeds) for session in sessions), error, strict=True):
                for name, wanted, rows in _rows(expected, batch.samples):
                    away = found[name].reshape(wanted.shape) - wanted
                    level_error += np.square(away).sum(axis=1) * rows / batch.samples
            for _, wanted, rows in _rows(expected, batch.samples):
                signal += np.square(wanted).sum(axis=1) * rows / batch.samples
            errors.append(error.sum(axis=0))
            signals.append(signal * len(levels))
        return SampleErrors(np.concatenate(errors), np.concatenate(signals))


def _rows(outputs: Mapping[str, Array], samples: int) -> Iterator[tuple[str, Floats, int]]:
    """(name, values as [rows, ...], rows) of the floating-point outputs; a row is a sample, or else the batch."""
    for name, value in outputs.items():
        if value.dtype.kind == "f":
            rows = samples if value.ndim and len(value) == samples else 1
            yield name, value.reshape(rows, -1).astype(np.float64), rows


@dataclass(frozen=True)
class SampleErrors:
    """Squared error and squared signal of the outputs, sample by sample."""

    errors: Floats
    signals: Floats

    @property
    def relative(self) -> float:
        """Of all samples together; infinite where one is not finite."""
        error, signal = float(self.errors.sum()), float(self.signals.sum())
        if not np.isfinite(error):
            return float("inf")
        return error / signal if signal > 0 else (0.0 if error == 0 else float("inf"))

    def rise(self, before: SampleErrors) -> tuple[float, float]:
        """(by how many dB the error of a sample rose on average since ``before``, that average's standard error).

        Decibels of each sample, since a few samples carry most of the sum of all, so that the sum says less.
        """
        least = 1e-12 * max(float(self.signals.mean()), np.finfo(np.float64).tiny)
        changes = 10 * np.log10((self.errors + least) / (before.errors + least))
        deviation = float(changes.std(ddof=1)) if len(changes) > 1 else float("inf")
        return float(changes.mean()), deviation / len(changes) ** 0.5


def decibels(error: float) -> float:
    """A relative squared error as a signal-to-noise ratio in dB; infinite where there is no error."""
    return float("inf") if error <= 0 else -10 * log10(error)
