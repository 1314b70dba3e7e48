"""Repair of a pruned network in closed form, without labels: each layer reproduces what the original has there.

The pruned network (student) and the original (teacher) advance side by side (:mod:`onnxcompress.lockstep`). At each
layer in graph order, with ``X`` the unfolded inputs of the *student*, every earlier repair in effect, weight ``W`` and
bias ``b`` are solved for ::

    || Y - W X - b ||^2  small,   Y = the teacher's tensor here, at the channels that are left

Where the layer's output only goes into an Add, ``Y`` is the teacher's sum less the student's other operand, so the
layer also repairs what drifted on the residual stream. Layers whose input is narrower make up for what was removed;
those whose input merely drifted (the producers of pruned channels, depthwise convolutions, the classifier) follow.
BatchNormalization that stays is a layer with one weight and one bias a channel. Where only a Relu or Clip reads what
is compared, values beyond its bounds are equal: their errors are taken out, and the solution is iterated (Zhang et al.,
"Accelerating Very Deep Convolutional Networks", TPAMI 2016).

Normal equations are float64 with a ridge that pulls towards the weights as they are. A layer keeps its new weights only
where its error falls on held-out samples, a sweep over all layers only where the error of the model's outputs falls.
Where samples are few, what was decided so is then solved once more from all of them: those held out are a third more
to learn from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxcompress.base import Progress, SilentProgress
from onnxcompress.graph import Graph, Names, copy_graph
from onnxcompress.lockstep import Advance, Samples, samples_that_fit, split_samples
from onnxcompress.patches import Moments, damped
from onnxcompress.pruning.mixing import MixingLayer, find_mixing_layers, wanted_rows
from onnxcompress.pruning.outputs import OutputJudge

if TYPE_CHECKING:
    from onnxcompress.data import Dataset

__all__ = ["Kept", "Recovered", "Recovery", "Step", "recover"]

Array = NDArray[Any]
Floats = NDArray[np.float64]
Feeds = dict[str, Array]
#: {tensor: {axis: positions that are left}}
Kept = Mapping[str, Mapping[int, NDArray[np.int64]]]
Method = Literal["weights", "bias"]

#: bytes that the columns of one layer may take, unless that were less than four rows a column
_ROW_BYTES = 192 * 2**20
#: a Gram matrix of more columns takes too long to solve; such a layer has its bias repaired
_MOST_COLUMNS = 8192
#: ridges that are tried, relative to the mean input power
_RIDGES = (1e-2, 1e-3)
_FEW_COLUMNS = 1200
#: repetitions of the solution where values beyond bounds do not matter
_BOUNDED = 4
#: with fewer samples to learn from, what held-out samples decided is done once more with all of them
_FEW_SAMPLES = 256
#: squared error relative to the signal below which there is nothing to repair
_NOTHING = 1e-9


@dataclass(frozen=True)
class Step:
    """What a layer got in one sweep, and its relative squared error on held-out samples.

    ``ridge`` is the one that did best; ``bounded`` where values beyond bounds did not matter to it.
    """

    node: str
    method: Method
    before: float
    after: float
    ridge: float = 0.0
    bounded: bool = False


@dataclass(frozen=True)
class Recovered:
    """The repaired graph, what was done to it and what not, and the error of its outputs over their signal."""

    graph: Graph
    steps: tuple[Step, ...]
    skipped: tuple[tuple[str, str], ...]
    before: float
    after: float
    #: sweeps that were kept
    sweeps: int
    train: int
    held_out: int
    #: True where there were too few samples to hold any out
    overlap: bool


@dataclass(frozen=True)
class Recovery:
    """How to repair.

    Attributes:
        samples: most samples used; memory may allow fewer.
        sweeps: passes over all layers.
        method: ``weights``, or ``bias`` for the cheap repair of means alone.
        augment: let the last sweep also learn from mirrored images, where inputs are images; kept where it helps on
            held-out samples that are not mirrored.
        seed: of the rows that are sampled.
        threads: of the runtime's sessions.
    """

    samples: int = 1024
    sweeps: int = 2
    method: Method = "weights"
    augment: bool = True
    seed: int = 0
    threads: int = 0
    progress: Progress = field(default_factory=SilentProgress)


def recover(student: Graph, teacher: Graph, kept: Kept, data: Dataset, options: Recovery | None = None) -> Recovered:
    """Repair ``student`` (not changed), which is ``teacher`` with all but the ``kept`` positions removed.

    Args:
        student: the pruned graph; tensors that survived carry the teacher's names.
        teacher: the graph that it was cut from.
        kept: for each tensor that lost positions, what is left of each axis.
        data: calibration samples.
        options: how.

    Raises:
        ModelError: the networks cannot be run in pieces.
    """
    options = options if options is not None else Recovery()
    layers, skipped = _plan(copy_graph(student), teacher)
    plans = _schedules(layers)
    limit = min(options.samples, samples_that_fit([(student, plans[0]), (teacher, plans[1])], data))
    samples = split_samples(data, options.seed, limit)
    judge = OutputJudge(teacher, samples.held_out, options.threads)
    before = error = judge.error(student)
    best, steps, kept_sweeps = student, [], 0
    taken: list[tuple[int, bool, list[Step]]] = []
    for sweep in range(options.sweeps):
        mirror = options.augment and sweep == options.sweeps - 1
        feeds = _feeds(samples, mirror)
        if feeds is None:
            continue
        candidate, done, more = _sweep(best, teacher, kept, feeds, options, sweep)
        skipped = skipped if sweep else [*skipped, *more]
        after = judge.error(candidate)
        if not after < error:
            continue
        best, error, kept_sweeps = candidate, after, kept_sweeps + 1
        steps.extend(done)
        taken.append((sweep, mirror, done))
    if not samples.overlap and samples.train.samples < _FEW_SAMPLES:
        for number, (sweep, mirror, done) in enumerate(taken):
            feeds = _feeds(samples, mirror, held_out=False)
            assert feeds is not None
            best, _, _ = _sweep(student if number == 0 else best, teacher, kept, feeds, options, sweep, done)
    counts = samples.train.samples, samples.held_out.samples
    return Recovered(best, tuple(steps), tuple(skipped), before, error, kept_sweeps, *counts, samples.overlap)


# ----------------------------------------------------------------------------------------------------------------------
# Which layers, and what they aim at


def _target(layer: MixingLayer) -> str:
    return str((layer.sum_output if layer.sum_output is not None else layer.output).name)


def _plan(student: Graph, teacher: Graph) -> tuple[list[MixingLayer], list[tuple[str, str]]]:
    """Layers of ``student`` whose aim the teacher has, and (node, reason) of the others."""
    known = {t.name for node in teacher.nodes for t in node.outputs if t.name}
    layers, skipped = [], []
    for layer in find_mixing_layers(student):
        if layer.sum_output is not None and layer.sum_output.name not in known:
            layer.shortcut = layer.sum_output = None
            layer.bounds = layer.own_bounds
        if _target(layer) in known:
            layers.append(layer)
        else:
            skipped.append((layer.name, f"the original has no tensor {_target(layer)!r} to compare with"))
    return layers, skipped


def _schedules(layers: Sequence[MixingLayer]) -> tuple[list[list[str]], list[list[str]]]:
    mine = [[layer.data, *((layer.shortcut.name,) if layer.shortcut is not None else ())] for layer in layers]
    return mine, [[_target(layer)] for layer in layers]


def _feeds(samples: Samples, mirror: bool, *, held_out: bool = True) -> list[tuple[Feeds, bool]] | None:
    """(feeds, held out?) of all batches; with ``mirror`` those to learn from a second time, mirrored.

    None where mirroring is asked for and the inputs are no images. Without ``held_out`` all are to learn from.
    """
    feeds = [(given, held and held_out) for given, held in samples.feeds()]
    if not mirror:
        return feeds
    axes = {name: _mirror_axis(value) for name, value in feeds[0][0].items()}
    if any(axis is None for axis in axes.values()):
        return None
    mirrored = [
        ({name: np.flip(value, axes[name]).copy() for name, value in given.items()}, held)
        for given, held in feeds
        if not held
    ]
    return [*feeds, *mirrored]


def _mirror_axis(value: Array) -> int | None:
    """The horizontal axis of a batch of images, [N, 1 or 3, H, W] or [N, H, W, 1 or 3]; None for anything else."""
    if value.ndim != 4 or value.dtype.kind not in "fu" or min(value.shape[1:]) not in (1, 3):
        return None
    if value.shape[1] in (1, 3):
        return 3
    return 2 if value.shape[3] in (1, 3) else None


# ----------------------------------------------------------------------------------------------------------------------
# One sweep


def _sweep(
    student: Graph,
    teacher: Graph,
    kept: Kept,
    batches: Sequence[tuple[Feeds, bool]],
    options: Recovery,
    sweep: int,
    decided: Sequence[Step] | None = None,
) -> tuple[Graph, list[Step], list[tuple[str, str]]]:
    """All layers, one after the other; ``decided``: only those, as it says, and nothing is held out."""
    student = copy_graph(student)
    chosen = None if decided is None else {step.node: step for step in decided}
    layers, _ = _plan(student, teacher)
    mine, theirs = _schedules(layers)
    feeds = [given for given, _ in batches]
    ahead = Advance(student, feeds, mine, optimization="all", threads=options.threads)
    beside = Advance(teacher, feeds, theirs, optimization="all", threads=options.threads)
    names = Names(student)
    learned = sum(_samples(given) for given, held in batches if not held)
    steps: list[Step] = []
    skipped: list[tuple[str, str]] = []
    description = f"repairing layers, sweep {sweep + 1}"
    for number, layer in enumerate(options.progress.track(layers, description, len(layers))):
        generator = np.random.default_rng([options.seed, sweep, number])
        rows = _Rows(layer, learned, generator)
        reason: str | None = None
        for found, expected, (_, held) in zip(ahead.step(), beside.step(), batches, strict=True):
            if reason is None:
                reason = rows.add(found, expected[theirs[number][0]], kept.get(theirs[number][0]), held)
        if reason is None:
            reason = rows.unlike()
        if reason is not None:
            skipped.append((layer.name, reason))
            continue
        if chosen is None:
            step = _repair(layer, rows, options.method, names)
        else:
            step = chosen.get(layer.name)
            if step is not None:
                _repeat(layer, rows, step, names)
        if step is not None:
            steps.append(step)
    return student, steps, skipped


def _samples(feeds: Mapping[str, Array]) -> int:
    return max((value.shape[0] for value in feeds.values() if value.ndim), default=1)


@dataclass(frozen=True)
class _Aims:
    """What a layer should give, ``[groups, filters, rows]``, and where anything beyond a bound is as good."""

    rows: Array
    #: ``rows``, but the bound where it lies beyond one
    bounded: Array
    below: NDArray[np.bool_] | None
    above: NDArray[np.bool_] | None

    @classmethod
    def of(cls, rows: Array, shift: Array | None, bounds: tuple[float, float]) -> _Aims:
        """Bounds hold for the sum of a layer's output and ``shift``."""
        if not np.isfinite(bounds).any():
            return cls(rows, rows, None, None)
        low, high = (np.float32(end) if shift is None else np.float32(end) - shift for end in bounds)
        below = rows <= low if np.isfinite(bounds[0]) else None
        above = rows >= high if np.isfinite(bounds[1]) else None
        return cls(rows, np.clip(rows, low, high), below, above)

    def errors(self, given: Array, bias: Array) -> Array:
        """What ``given + bias`` lacks; none where it makes no difference to whatever reads it. Uses up ``given``."""
        given += bias[:, :, None]
        away: Array = np.subtract(self.bounded, given, out=given)
        if self.below is not None:
            np.minimum(away, 0.0, out=away, where=self.below)
        if self.above is not None:
            np.maximum(away, 0.0, out=away, where=self.above)
        return away


class _Rows:
    """Rows of one layer: its columns and its aim, to learn from and to judge by."""

    def __init__(self, layer: MixingLayer, samples: int, generator: np.random.Generator) -> None:
        self.layer = layer
        self._generator = generator
        self._weight = layer.filters().astype(np.float32)
        self._bias = layer.bias().astype(np.float32)
        groups, _, columns = self._weight.shape
        most = min(wanted_rows(columns), _ROW_BYTES // (4 * groups * columns))
        self._share = max(most, 4 * columns) / max(samples, 1)
        self._positions: dict[tuple[int, ...], NDArray[np.int64]] = {}
        self.columns: dict[bool, list[Array]] = {False: [], True: []}
        self.aims: dict[bool, list[_Aims]] = {False: [], True: []}
        self.signal = {False: 0.0, True: 0.0}
        self.error = 0.0

    def add(
        self, found: Mapping[str, Array], aim: Array, left: Mapping[int, NDArray[np.int64]] | None, held: bool
    ) -> str | None:
        """Take rows of one batch; answers why they do not fit, or None."""
        layer = self.layer
        for axis, positions in (left or {}).items():
            if axis >= aim.ndim or (len(positions) and positions[-1] >= aim.shape[axis]):
                return f"the original's tensor is {list(aim.shape)}, from which no positions can be taken"
            aim = np.take(aim, positions, axis)
        if layer.shortcut is not None:
            shortcut = found[str(layer.shortcut.name)]
            if shortcut.shape != aim.shape:
                return f"its shortcut is {list(shortcut.shape)} where the original's sum is {list(aim.shape)}"
            aim = aim - shortcut
        inputs = found[layer.data]
        channels = aim.shape[1] if layer.axis == 1 and aim.ndim > 1 else aim.shape[-1] if aim.ndim else 0
        if channels != layer.channels or len(inputs) != len(aim):
            return f"its output has {layer.channels} channels where the original's tensor is {list(aim.shape)}"
        chosen = self._chosen(aim)
        try:
            columns = layer.columns(inputs, aim.shape[2:] if layer.axis == 1 else (), chosen)
            rows = layer.rows(aim, chosen)
        except (ValueError, IndexError) as error:
            return f"its shapes do not fit: {error}"
        if columns.shape[1:] != (self._weight.shape[2], rows.shape[2]):
            return "its shapes do not fit"
        shift = layer.rows(found[str(layer.shortcut.name)], chosen) if layer.shortcut is not None else None
        aims = _Aims.of(rows, shift, layer.bounds)
        self.columns[held].append(columns)
        self.aims[held].append(aims)
        whole = rows if shift is None else rows + shift
        self.signal[held] += float(np.einsum("gij,gij->", whole, whole, dtype=np.float64))
        if not held:
            away = aims.errors(self._weight @ columns, self._bias)
            self.error += float(np.einsum("gij,gij->", away, away, dtype=np.float64))
        return None

    def _chosen(self, aim: Array) -> NDArray[np.int64]:
        """Positions of the layer's output that are sampled: the same for all batches of one shape."""
        shape = aim.shape
        if shape not in self._positions:
            count = self.layer.positions(aim)
            many = self._share if self.layer.axis == 1 else self._share * shape[0]
            chosen = np.arange(count)
            if many < count:
                chosen = np.sort(self._generator.choice(count, max(1, int(np.ceil(many))), replace=False))
            self._positions[shape] = chosen
        return self._positions[shape]

    def unlike(self) -> str | None:
        """Why there is nothing to repair, or None."""
        if not (np.isfinite(self.error) and np.isfinite(self.signal[False])):
            return "values at its output are not finite"
        if self.signal[False] == 0.0 or self.error <= _NOTHING * self.signal[False]:
            return "its output is the original's"
        return None

    def held_error(self, weight: Floats, bias: Floats) -> float:
        """Relative squared error on the held-out rows."""
        w, b = weight.astype(np.float32), bias.astype(np.float32)
        error = 0.0
        for columns, aims in zip(self.columns[True], self.aims[True], strict=True):
            away = aims.errors(w @ columns, b)
            error += float(np.einsum("gij,gij->", away, away, dtype=np.float64))
        return error / self.signal[True] if self.signal[True] else error


# ----------------------------------------------------------------------------------------------------------------------
# One layer


def _repair(layer: MixingLayer, rows: _Rows, method: Method, names: Names) -> Step | None:
    """Give ``layer`` the weights that do its held-out rows best; None where it keeps what it has."""
    weight, bias = layer.filters(), layer.bias()
    before = rows.held_error(weight, bias)
    found: tuple[Step, Floats, Floats] | None = None
    candidates: Iterator[tuple[Method, float, bool, Floats, Floats]]
    if method == "weights" and weight.shape[2] <= _MOST_COLUMNS:
        candidates = _weights(layer, rows, weight, bias)
    else:
        candidates = iter([("bias", 0.0, False, weight, _shifted(rows, weight, bias))])
    for kind, ridge, bounded, new_weight, new_bias in candidates:
        after = rows.held_error(new_weight, new_bias)
        if after < (before if found is None else found[0].after):
            found = Step(layer.name, kind, before, after, ridge, bounded), new_weight, new_bias
    if found is None:
        return None
    step, new_weight, new_bias = found
    _set(layer, step.method, new_weight, new_bias, names)
    return step


def _repeat(layer: MixingLayer, rows: _Rows, step: Step, names: Names) -> None:
    """Repair ``layer`` from these rows the way that ``step`` found best on others."""
    weight, bias = layer.filters(), layer.bias()
    if step.method == "bias":
        _set(layer, "bias", weight, _shifted(rows, weight, bias), names)
        return
    for _, _, bounded, new_weight, new_bias in _weights(layer, rows, weight, bias, (step.ridge,)):
        if bounded == step.bounded:
            _set(layer, "weights", new_weight, new_bias, names)


def _set(layer: MixingLayer, method: Method, weight: Floats, bias: Floats, names: Names) -> None:
    if method == "weights":
        layer.set_filters(weight, names)
    if layer.bias_node is not None:
        layer.set_bias(bias, names)


def _shifted(rows: _Rows, weight: Floats, bias: Floats) -> Floats:
    """The bias that makes the mean error vanish."""
    if rows.layer.bias_node is None:
        return bias
    total, count = np.zeros(bias.shape), 0
    w, b = weight.astype(np.float32), bias.astype(np.float32)
    for columns, aims in zip(rows.columns[False], rows.aims[False], strict=True):
        total += aims.errors(w @ columns, b).sum(axis=2, dtype=np.float64)
        count += columns.shape[2]
    shifted: Floats = bias + total / max(count, 1)
    return shifted


def _weights(
    layer: MixingLayer, rows: _Rows, weight: Floats, bias: Floats, ridges: Sequence[float] | None = None
) -> Iterator[tuple[Method, float, bool, Floats, Floats]]:
    """Least squares with each ridge; then, from the better one, iterated where values beyond bounds do not matter.

    Yields method, ridge, whether it is iterated, weight and bias.
    """
    centred = layer.bias_node is not None
    moments = Moments(weight.astype(np.float32), bias.astype(np.float32))
    for columns, aims in zip(rows.columns[False], rows.aims[False], strict=True):
        moments.add(columns, aims.rows)
    gram, cross = moments.normal_equations(centred=centred)
    best: tuple[float, float, Floats, Floats, Floats] | None = None
    if ridges is None:
        # An inverse of many columns takes seconds, and the stronger ridge is the safer one.
        ridges = _RIDGES if weight.shape[2] <= _FEW_COLUMNS else _RIDGES[:1]
    for ridge in ridges:
        inverse: Floats = np.linalg.inv(damped(gram, ridge)).astype(np.float64, copy=False)
        change = cross @ inverse
        new_bias = bias + moments.best_shift(change) if centred else bias
        error = rows.held_error(weight + change, new_bias)
        if best is None or error < best[0]:
            best = error, ridge, inverse, weight + change, new_bias
    assert best is not None
    _, ridge, inverse, new_weight, new_bias = best
    yield "weights", ridge, False, new_weight, new_bias
    if not np.isfinite(layer.bounds).any():
        return
    mean = moments.inputs / moments.count
    for _ in range(_BOUNDED):
        cross, residual = _cross(rows, new_weight, new_bias)
        residual = residual / moments.count
        cross = cross / moments.count
        if centred:
            cross = cross - residual[:, :, None] * mean[:, None, :]
        change = cross @ inverse
        new_weight = new_weight + change
        if centred:
            new_bias = new_bias + residual - np.einsum("gij,gj->gi", change, mean)
    yield "weights", ridge, True, new_weight, new_bias


def _cross(rows: _Rows, weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
    """(D X', sum of D) of the errors that matter."""
    w, b = weight.astype(np.float32), bias.astype(np.float32)
    cross, residual = np.zeros(weight.shape), np.zeros(bias.shape)
    for columns, aims in zip(rows.columns[False], rows.aims[False], strict=True):
        away = aims.errors(w @ columns, b)
        cross += away @ columns.swapaxes(1, 2)
        residual += away.sum(axis=2, dtype=np.float64)
    return cross, residual
