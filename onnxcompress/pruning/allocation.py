"""How many channels each coupling group loses: one budget, shared out by what the model's outputs lose.

An importance criterion says what a group's readers lose with each removed channel. Comparing these numbers across the
network misleads: the same relative error costs the outputs little in one place and much in another. So a few removals
of each group are tried on some samples, with its readers mended, and the error of the outputs is measured
(:func:`output_effects`); in between it follows the criterion. The budget (multiply-accumulates, parameters or time that
remain) is then spent greedily, where an output error buys the most (:func:`allocate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log10
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxcompress.base import Progress, SilentProgress
from onnxcompress.errors import UsageError
from onnxcompress.graph import Graph, Names
from onnxcompress.lockstep import Advance
from onnxcompress.pruning.costs import ChannelCosts
from onnxcompress.pruning.importance import Removal
from onnxcompress.pruning.outputs import OutputError, judged_outputs

__all__ = [
    "TIME_WEIGHTS",
    "TIME_WEIGHTS_OF_CHANCES",
    "TIME_WORTH",
    "Budget",
    "Curve",
    "Size",
    "allocate",
    "output_effects",
    "uniform",
]

Array = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: choices of how many channels of one group go that are compared, at most
_CHOICES = 96
#: error of an output that is measured as none
_TINY = 1e-12
#: decibels of output error that count as much as a doubling of speed. From training images alone: of 2,000 that
#: calibration had not seen, a ResNet-56 at half of its multiply-accumulates got 98.75, 98.65 and 98.70 % right (99.95 %
#: whole) with 10, 12 and 15 dB, while its predicted time fell by 8 %
TIME_WORTH = 15.0
#: weights of the time against the cost that are tried
TIME_WEIGHTS = (0.0, 0.25, 0.5, 0.75)
#: where errors are divergences of probabilities, whose sum over groups says too little of what they do together: of a
#: SqueezeNet at 0.72 of its multiply-accumulates a weight of 0.25 raised the sum by 2 % and the divergence by 10 %, for
#: 4 % of the time (cross-validated on calibration images). Widths that pay are kept all the same
TIME_WEIGHTS_OF_CHANCES = (0.0,)
#: weights of the size, and the most that time and size may have together
_SIZE_WEIGHTS = (0.0, 0.25, 0.5)
_MOST_WEIGHT = 0.8
#: how much larger the error may become by whole branches in all
_MOST_ERROR = 1.5


@dataclass(frozen=True, eq=False)
class Curve:
    """What the model's outputs lose: ``error[k]`` for ``k`` removed channels, and the numbers ``allowed``, 0 first."""

    error: Floats
    allowed: Ints
    #: time that is saved by ``k`` removed channels, as a share of the model's; None where it was not measured
    saved: Floats | None = None


class Budget(Protocol):
    """What may remain: the share of the model's whole cost that ``counts`` kept channels leave."""

    def remaining(self, counts: Mapping[str, int]) -> float:
        """Share of the cost that remains; the goal is met at or below the target."""
        ...

    def slopes(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        """Share of the cost that one channel less of each group saves."""
        ...


@dataclass(frozen=True)
class CostBudget:
    """Multiply-accumulates or parameters."""

    costs: ChannelCosts
    kind: str = "macs"

    def remaining(self, counts: Mapping[str, int]) -> float:
        """See :class:`Budget`."""
        count = self.costs.macs if self.kind == "macs" else self.costs.parameters
        return count(counts) / max(count(), 1)

    def slopes(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        """See :class:`Budget`."""
        macs = self.kind == "macs"
        slopes = self.costs.macs_per_channel(counts) if macs else self.costs.parameters_per_channel(counts)
        whole = max(self.costs.macs() if macs else self.costs.parameters(), 1)
        return {name: slope / whole for name, slope in slopes.items()}


@dataclass(frozen=True)
class Size:
    """What a smaller model is worth: so many decibels of output error count as much as half the parameters."""

    budget: Budget
    decibels: float


def _power(decibels: float) -> float:
    """What is worth so many decibels when it halves counts like an error, to this power."""
    return decibels / (10 * log10(2))


# ----------------------------------------------------------------------------------------------------------------------
# From what readers lose to what the outputs lose


def output_effects(
    graph: Graph,
    removals: Sequence[Removal],
    feeds: Sequence[Mapping[str, Array]],
    *,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, Floats]:
    """{group: error of the outputs (:class:`OutputError`) for 0, 1, ... removed channels}, ``[channels + 1]``.

    Measured where ``removals`` hold mended weights, the other channels staying whole; in between the ratio of output
    error to the criterion's is interpolated. Groups without mended weights are left out.

    Args:
        graph: sorted; its weights are changed on the way and put back.
        removals: of groups of ``graph``, their layers being nodes of it.
        feeds: few samples; they stay in memory.
        threads: of the runtime.
        progress: where to report to.
    """
    progress = progress if progress is not None else SilentProgress()
    place = {id(node): i for i, node in enumerate(graph.nodes)}
    probed = [removal for removal in removals if removal.mended]
    firsts = []
    for removal in probed:
        layers = [layer for layer, _, _ in next(iter(removal.mended.values()))]
        firsts.append(min(layers, key=lambda layer: place[id(layer.node)]))
    order = sorted(range(len(probed)), key=lambda i: place[id(firsts[i].node)])
    judged = judged_outputs(graph)
    outputs = list(judged)
    schedule = [*([firsts[i].data] for i in order), outputs]
    advance = Advance(graph, feeds, schedule, optimization="all", threads=threads)
    expected = list(Advance(graph, feeds, [outputs], optimization="all", threads=threads).step())
    names = Names(graph)
    effects: dict[str, Floats] = {}
    for number in progress.track(order, "measuring effects on the outputs", len(order)):
        for _ in advance.step():
            pass
        removal = probed[number]
        measured = {}
        for removed, mended in sorted(removal.mended.items()):
            before = [(layer, layer.filters(), layer.bias()) for layer, _, _ in mended]
            _write(mended, names)
            errors = OutputError(judged)
            for right, found in zip(expected, advance.peek(outputs), strict=True):
                errors.add(right, found)
            measured[removed] = errors.relative()
            _write(before, names)
        effects[removal.group] = _interpolated(removal, measured)
    return effects


def _write(layers: Sequence[tuple[Any, Floats, Floats]], names: Names) -> None:
    for layer, weights, bias in layers:
        layer.set_filters(weights, names)
        if layer.bias_node is not None:
            layer.set_bias(bias, names)


def _interpolated(removal: Removal, measured: Mapping[int, float]) -> Floats:
    """The criterion's curve scaled to what was measured, never falling."""
    counts = np.array(sorted(measured))
    own = np.maximum(removal.error, _TINY)
    ratios = np.log(np.maximum([measured[int(c)] for c in counts], _TINY) / own[counts - 1])
    every = np.arange(1, removal.channels + 1)
    curve = own * np.exp(np.interp(every, counts, ratios))
    return np.concatenate([[0.0], np.maximum.accumulate(curve)])


# ----------------------------------------------------------------------------------------------------------------------
# Sharing out


def allocate(
    budget: Budget,
    curves: Mapping[str, Curve],
    target: float,
    channels: Mapping[str, int],
    *,
    time_weights: Sequence[float] = TIME_WEIGHTS,
    time_worth: float = TIME_WORTH,
    size: Size | None = None,
) -> dict[str, int]:
    """{group: channels that stay} with ``budget`` at or below ``target`` at the least sum of output errors (greedily).

    Where curves know the time that channels save, or ``size`` is worth something, a step is judged by all of them: a
    weight of the time saved, one of the size saved, and the rest of the cost saved. Each pair of weights is tried, and
    the choice is taken whose error, time and size are the best together: ``time_worth`` decibels of error count as much
    as a doubling of speed, and ``size`` says what halving the size counts.

    Args:
        budget: what is to be saved.
        curves: the groups that may be cut.
        target: share of the cost that may remain.
        channels: of every group.
        time_weights: between 0 and 1.
        time_worth: decibels of error that a doubling of speed is worth.
        size: what a smaller model is worth; None: nothing.

    Raises:
        UsageError: the target is out of reach.
    """
    timed = any(curve.saved is not None for curve in curves.values())
    found = []
    for by_time in time_weights if timed else (0.0,):
        for by_size in _SIZE_WEIGHTS if size is not None else (0.0,):
            if by_time + by_size > _MOST_WEIGHT:
                continue
            sharing = _Sharing(budget, curves, target, channels, by_time, by_size, time_worth, size)
            kept = sharing.spent()
            if timed:
                sharing.let_go(kept)
            found.append((sharing.balance(kept)[0], kept))
    best = min(found, key=lambda each: each[0])[1]
    return {name: best[name] for name in curves}


@dataclass(frozen=True)
class _Sharing:
    """One way to share ``budget`` out: with one weight of the time and one of the size."""

    budget: Budget
    curves: Mapping[str, Curve]
    target: float
    channels: Mapping[str, int]
    by_time: float = 0.0
    by_size: float = 0.0
    time_worth: float = TIME_WORTH
    size: Size | None = None

    def spent(self) -> dict[str, int]:
        """Channels that stay, of all groups."""
        curves, channels = self.curves, self.channels
        removed = {name: int(curve.allowed[0]) for name, curve in curves.items()}
        kept = {**channels, **{name: channels[name] - gone for name, gone in removed.items()}}
        choices = {name: _thinned(curve.allowed) for name, curve in curves.items()}
        remaining = self.budget.remaining(kept)
        while remaining > self.target:
            slopes = self.budget.slopes(kept)
            gains = self._gains(kept, slopes)
            best: tuple[float, str, int] | None = None
            for name, curve in curves.items():
                now = removed[name]
                ahead = choices[name][choices[name] > now]
                if not len(ahead) or slopes.get(name, 0.0) <= 0.0:
                    continue
                gain = gains[name] * (ahead - now)
                if curve.saved is not None and self.by_time:
                    gain = gain + self.by_time * np.maximum(curve.saved[ahead] - curve.saved[now], 0.0)
                rates = (curve.error[ahead] - curve.error[now] + _TINY) / np.maximum(gain, 1e-300)
                pick = int(np.argmin(rates))
                if best is None or rates[pick] < best[0]:
                    best = float(rates[pick]), name, int(ahead[pick])
            if best is None:
                raise UsageError(
                    f"{remaining:.1%} of the cost remain with everything removed that may be, more than the "
                    f"{self.target:.1%} asked for; raise the target, or exclude less"
                )
            _, name, goal = best
            for step in curves[name].allowed[curves[name].allowed > removed[name]]:
                removed[name] = int(step)
                kept[name] = channels[name] - int(step)
                remaining = self.budget.remaining(kept)
                if step >= goal or remaining <= self.target:
                    break
        self._give_back(kept)
        return kept

    def balance(self, kept: Mapping[str, int]) -> tuple[float, float]:
        """Logarithms of what is to be small: the outputs' error times powers of time and size, and the error alone."""
        error, saved = 0.0, 0.0
        for name, curve in self.curves.items():
            gone = self.channels[name] - kept[name]
            error += float(curve.error[gone])
            saved += float(curve.saved[gone]) if curve.saved is not None else 0.0
        log = float(np.log(max(error, _TINY)))
        value = log + _power(self.time_worth) * float(np.log(max(1 - saved, 0.05)))
        if self.size is not None:
            value += _power(self.size.decibels) * float(np.log(max(self.size.budget.remaining(kept), _TINY)))
        return value, log

    def let_go(self, kept: dict[str, int]) -> None:
        """Let whole groups go, one at a time, while what they leave room for and what they save outweigh them."""
        best, error = self.balance(kept)
        most = error + float(np.log(_MOST_ERROR))
        while True:
            found: tuple[float, dict[str, int]] | None = None
            for name, curve in self.curves.items():
                if kept[name] == 0 or curve.allowed[-1] != self.channels[name]:
                    continue
                trial = {**kept, name: 0}
                replace(self, curves={n: c for n, c in self.curves.items() if n != name})._give_back(trial)
                value, error = self.balance(trial)
                if error <= most and value < (best if found is None else found[0]):
                    found = value, trial
            if found is None:
                return
            best = found[0]
            kept.update(found[1])

    def _gains(self, kept: Mapping[str, int], slopes: Mapping[str, float]) -> dict[str, float]:
        """What one channel less of each group saves, the time aside."""
        sizes = self.size.budget.slopes(kept) if self.size is not None and self.by_size else {}
        rest = 1 - self.by_time - self.by_size
        return {n: rest * slopes.get(n, 0.0) + self.by_size * sizes.get(n, 0.0) for n in self.curves}

    def _give_back(self, kept: dict[str, int]) -> None:
        """Restore channels where they are worth most for what they cost, as far as the target leaves room."""
        channels = self.channels
        room = self.target - self.budget.remaining(kept)
        slopes = self.budget.slopes(kept)
        gains = self._gains(kept, slopes)
        closed: set[str] = set()
        while room > 0:
            best: tuple[float, str, int] | None = None
            for name, curve in self.curves.items():
                gone = channels[name] - kept[name]
                if name in closed or kept[name] == 0:
                    continue
                fewer = curve.allowed[curve.allowed < gone]
                cost = slopes.get(name, 0.0) * (gone - fewer)
                fewer = fewer[cost <= room]
                if not len(fewer):
                    continue
                spent = gains[name] * (gone - fewer)
                if curve.saved is not None and self.by_time:
                    spent = spent + self.by_time * (curve.saved[gone] - curve.saved[fewer])
                rates = (curve.error[gone] - curve.error[fewer]) / np.maximum(spent, 1e-9)
                pick = int(np.argmax(rates))
                if rates[pick] > 0 and (best is None or rates[pick] > best[0]):
                    best = float(rates[pick]), name, channels[name] - int(fewer[pick])
            if best is None:
                return
            name, count = best[1:]
            # Groups on both sides of one product cost more than the slope says: then this one is left as it is.
            trial = {**kept, name: count}
            remaining = self.budget.remaining(trial)
            if remaining <= self.target:
                kept[name] = count
                room, slopes = self.target - remaining, self.budget.slopes(kept)
                gains = self._gains(kept, slopes)
            else:
                closed.add(name)


def _thinned(allowed: Ints) -> Ints:
    if len(allowed) <= _CHOICES:
        return allowed
    places = np.unique(np.linspace(0, len(allowed) - 1, _CHOICES).round().astype(np.int64))
    return np.asarray(allowed[places])


def uniform(budget: Budget, curves: Mapping[str, Curve], target: float, channels: Mapping[str, int]) -> dict[str, int]:
    """The same share of every group, as large as the target allows; {group: channels that stay}.

    Raises:
        UsageError: the target is out of reach.
    """

    def at(share: float) -> dict[str, int]:
        kept = dict(channels)
        for name, curve in curves.items():
            wanted = (1 - share) * channels[name]
            kept[name] = channels[name] - int(curve.allowed[np.abs(curve.allowed - wanted).argmin()])
        return kept

    if budget.remaining(at(0.0)) > target:
        raise UsageError(
            f"{budget.remaining(at(0.0)):.1%} of the cost remain with everything removed that may be, more than the "
            f"{target:.1%} asked for; raise the target, or exclude less"
        )
    low, high = 0.0, 1.0
    if budget.remaining(at(1.0)) <= target:
        return {name: channels[name] for name in curves}
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if budget.remaining(at(middle)) <= target else (low, middle)
    found = at(low)
    return {name: found[name] for name in curves}
