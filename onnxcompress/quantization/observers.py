"""Observers: what is remembered of a tensor's values, and the range that follows from it.

All observers stream: what they keep does not depend on how many values they saw, in which batches and in which order.
Those that look at the distribution share one :class:`Histogram`, whose bins have a power of two as width and start at
multiples of it. So zero is always an edge, a scaled value falls into a bin without rounding, and where the range
doubles two neighbouring bins become one: the counts are always those of the final bins over all values.

Sources: S. Migacz, "8-bit inference with TensorRT", GTC 2017 (entropy); R. Banner et al., "Post training 4-bit
quantization of convolutional networks", NeurIPS 2019 (rounding and clipping errors).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, frexp, ldexp
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxcompress.errors import UsageError
from onnxcompress.quantization.affine import QuantScheme, Range, activation_qparams

__all__ = [
    "OBSERVERS",
    "EntropyObserver",
    "Histogram",
    "HistogramObserver",
    "MinMaxObserver",
    "MseObserver",
    "Observer",
    "PercentileObserver",
    "Tail",
    "Watcher",
    "WeightedMseObserver",
    "make_observer",
]

Floats = NDArray[np.float64]

#: what activations become where nobody says
UINT8 = QuantScheme("uint8", symmetric=False)
#: values cut off by the percentile observer: 0.005 % on each side
DEFAULT_PERCENTILE = 99.99
#: how much more clipping counts than rounding for the observer weighted_mse
CLIPPING_WEIGHT = 4.0
#: and where the largest values alone decide, as in front of the Softmax at the end of a classifier: two classes that
#: are both cut off become one
PEAK_CLIPPING_WEIGHT = 16.0
#: bins between zero and the power of two above the largest magnitude; at least half of them are in use on that side
_HALF = 4096
#: values binned at a time, so that the steps work in the processor's cache
_BLOCK = 1 << 16
#: the finest bins are 2**_LEAST / _HALF wide, so that the reciprocal of their width is a float32
_LEAST = -100


class Histogram:
    """Counts of all values seen, in equal bins whose width is a power of two.

    The bins cover [-2**e, 2**e) with the smallest e for which that holds every value; there are 8192 of them. A zero
    is counted apart from its bin: every 8-bit scheme stands for it exactly.
    """

    def __init__(self) -> None:
        self.low = np.inf
        self.high = -np.inf
        #: how often zero was seen
        self.zeros = 0
        self._counts = np.zeros(2 * _HALF, np.int64)
        self._exponent: int | None = None

    @property
    def width(self) -> float:
        """The width of a bin; 0 before a value other than zero was seen."""
        return 0.0 if self._exponent is None else ldexp(1.0, self._exponent) / _HALF

    @property
    def total(self) -> int:
        """How many values were seen."""
        return self.zeros + int(self._counts.sum())

    @property
    def finite(self) -> bool:
        """False where there was no value yet, or one that is infinite or no number."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    def add(self, values: NDArray[Any]) -> None:
        """Count ``values``: any shape; floats. Values that are not finite are not counted but end in low and high."""
        flat = np.asarray(values, np.float32).reshape(-1)
        size = min(flat.size, _BLOCK)
        scaled, bins, zero = np.empty(size, np.float32), np.empty(size, np.int64), np.empty(size, np.bool_)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            self._add_block(block, scaled[: block.size], bins[: block.size], zero[: block.size])

    def _add_block(
        self, block: NDArray[np.float32], scaled: NDArray[np.float32], bins: NDArray[np.int64], zero: NDArray[np.bool_]
    ) -> None:
        low, high = float(block.min()), float(block.max())
        # numpy's minimum and maximum hand on what is no number; Python's do not.
        self.low, self.high = float(np.minimum(self.low, low)), float(np.maximum(self.high, high))
        if not (np.isfinite(low) and np.isfinite(high)):
            return
        magnitude = max(-low, high)
        if magnitude == 0:
            self.zeros += block.size
            return
        self._grow(max(frexp(magnitude)[1], _LEAST))
        assert self._exponent is not None
        zeros = int(np.count_nonzero(np.equal(block, 0, out=zero)))
        if low < 0 and self._exponent > _HALF.bit_length():  # a negative value could become -0 and change its bin
            scaled[:] = np.floor(block * np.float64(1 / self.width))
        else:
            np.multiply(block, np.float32(1 / self.width), out=scaled)
            np.floor(scaled, out=scaled)
        scaled += _HALF  # whole numbers, so exact
        np.copyto(bins, scaled, casting="unsafe")
        self._counts += np.bincount(bins, minlength=2 * _HALF)
        self._counts[_HALF] -= zeros
        self.zeros += zeros

    def _grow(self, exponent: int) -> None:
        """Let the bins reach to 2**exponent; they never shrink."""
        if self._exponent is None:
            self._exponent = exponent
        for _ in range(exponent - self._exponent):
            pairs = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.zeros_like(self._counts)
            self._counts[_HALF // 2 : _HALF + _HALF // 2] = pairs
        self._exponent = max(self._exponent, exponent)

    def smallest_of(self, many: int) -> float:
        """The value that the ``many`` largest values exceed, right to one bin's width."""
        return self.percentile(100 * (1 - many / self.total))

    def mean_excess(self, many: int) -> float:
        """How far the ``many`` largest values exceed what they all exceed, and zero, on average; 0 for none."""
        if many < 1 or self.width == 0:
            return 0.0
        start = max(self.smallest_of(many), 0.0)
        counts, edges = self.occupied()
        taken = np.diff(np.minimum(np.cumsum(counts[::-1]), many), prepend=0)[::-1]
        return float(taken @ np.maximum(edges + self.width / 2 - start, 0.0)) / many

    def occupied(self) -> tuple[NDArray[np.int64], Floats]:
        """(counts, lower edges) of the bins from the first to the last that hold a value; zeros are left out."""
        used = np.flatnonzero(self._counts)
        if not used.size:
            return np.empty(0, np.int64), np.empty(0, np.float64)
        first, end = int(used[0]), int(used[-1]) + 1
        return self._counts[first:end], np.arange(first - _HALF, end - _HALF).astype(np.float64) * self.width

    def percentile(self, percent: float) -> float:
        """The value below which ``percent`` of the values lie, linear within a bin, so right to one bin's width."""
        counts, edges = self.occupied()
        rank = percent / 100 * self.total
        # Zeros sit between the negative and the positive bins, and have no width.
        split = int(np.searchsorted(edges, 0.0))
        steps = np.insert(counts, split, self.zeros)
        lower = np.insert(edges, split, 0.0)
        widths = np.insert(np.full(counts.size, self.width), split, 0.0)
        before = np.concatenate([[0], np.cumsum(steps)])
        index = min(int(np.searchsorted(before[1:], rank)), steps.size - 1)
        inside = (rank - before[index]) / steps[index] if steps[index] else 0.0
        return float(np.clip(lower[index] + widths[index] * inside, self.low, self.high))


@dataclass(frozen=True)
class Tail:
    """From ``start`` on, values become rarer by a factor of e every ``scale``."""

    start: float
    scale: float


class Watcher(ABC):
    """Is shown one tensor, or several that share their parameters, batch by batch."""

    #: Operators without attributes that the runtime applies to the tensor before it hands over the values. Empty: the
    #: observer gets the whole tensor. Reducing inside the runtime saves copying every activation out of it.
    reductions: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def update(self, *values: NDArray[Any]) -> None:
        """Take in one batch: the tensor, or one scalar per entry of ``reductions``."""


class Observer(Watcher):
    """Watches over all batches and answers with the range."""

    @abstractmethod
    def range(self) -> Range:
        """The range after all batches; its ends are not finite where a value was not."""


class MinMaxObserver(Observer):
    """The smallest and the largest value seen."""

    reductions = ("ReduceMin", "ReduceMax")

    def __init__(self) -> None:
        self._low = np.inf
        self._high = -np.inf

    def update(self, *values: NDArray[Any]) -> None:
        """Take in the minimum and the maximum of one batch."""
        low, high = values
        self._low = min(self._low, float(low))
        self._high = max(self._high, float(high))

    def range(self) -> Range:
        """[minimum, maximum]."""
        return Range(self._low, self._high)


class HistogramObserver(Observer):
    """Keeps a histogram of all values; :meth:`best` reads the range from it."""

    def __init__(self, scheme: QuantScheme = UINT8) -> None:
        self.histogram = Histogram()
        self.scheme = scheme

    def update(self, *values: NDArray[Any]) -> None:
        """Count the values of one batch."""
        self.histogram.add(values[0])

    def range(self) -> Range:
        """The range that :meth:`best` finds; minimum and maximum where there is nothing to choose."""
        histogram = self.histogram
        if not histogram.finite or histogram.width == 0:
            return self.min_max()
        return self.best()

    def min_max(self) -> Range:
        """The smallest and the largest value seen."""
        return Range(self.histogram.low, self.histogram.high)

    @abstractmethod
    def best(self) -> Range:
        """The range, given at least one value that is not zero, and none that is not finite."""


class PercentileObserver(HistogramObserver):
    """Cuts off the same small share of the values on either side.

    Args:
        scheme: what the values become.
        percentile: the share that is kept, in percent; half of the rest is cut off on each side.
    """

    def __init__(self, scheme: QuantScheme = UINT8, percentile: float = DEFAULT_PERCENTILE) -> None:
        super().__init__(scheme)
        if not 50 <= percentile <= 100:
            raise UsageError(f"a percentile of {percentile} is not possible; expected 50 to 100, such as 99.99")
        self._percentile = percentile

    def best(self) -> Range:
        """Between the two percentiles."""
        cut = (100 - self._percentile) / 2
        return Range(self.histogram.percentile(cut), self.histogram.percentile(100 - cut))


class _SearchingObserver(HistogramObserver):
    """Tries many pairs of thresholds and takes the one of least loss.

    Each end is searched in turn, first over the whole way from zero to the extreme value, then ever closer around the
    best so far, while the other end is held.
    """

    _COARSE = 40
    _FINE = 12
    _ZOOMS = 2
    _ROUNDS = 2
    #: the closest to zero that a threshold comes, as a share of the extreme value
    _CLOSEST = 0.02

    @abstractmethod
    def losses(self, low: Floats, high: Floats) -> Floats:
        """The loss of each range [low, high]; both of the same length."""

    def best(self) -> Range:
        """The range of least loss among those tried; ties go to the wider."""
        ends = list(self.widest())
        best = list(ends)
        loss = float(self.losses(np.array([best[0]]), np.array([best[1]]))[0])
        sides = [side for side in (0, 1) if ends[side] != 0]
        rounds = self._ROUNDS if len(sides) > 1 else 1
        for number in range(rounds):
            for side in sides:
                step = (1 - self._CLOSEST) / self._COARSE
                shares = np.linspace(1, self._CLOSEST, self._COARSE + 1)
                if number > 0:
                    share = best[side] / ends[side]
                    shares = _around(share, 4 * step, self._FINE, self._CLOSEST)
                for zoom in range(self._ZOOMS + 1):
                    tried = shares * ends[side]
                    other = np.full(tried.shape, best[1 - side])
                    found = self.losses(tried, other) if side == 0 else self.losses(other, tried)
                    least = int(np.argmin(found))
                    if found[least] < loss - 1e-9 * abs(loss):
                        best[side], loss = float(tried[least]), float(found[least])
                    if zoom < self._ZOOMS:
                        shares = _around(best[side] / ends[side], step, self._FINE, self._CLOSEST)
                        step *= 2 / self._FINE
        return Range(*best)

    def widest(self) -> tuple[float, float]:
        """The widest range that is tried; each end is zero or beyond it."""
        return min(self.histogram.low, 0.0), max(self.histogram.high, 0.0)

    def levels(self, low: float, high: float, values: Floats) -> tuple[NDArray[np.int64], Floats]:
        """(integers, counted from the smallest; what these stand for) of ``values`` under the range [low, high]."""
        params = activation_qparams(Range(low, high), self.scheme)
        scale, zero_point = float(params.scale), int(params.zero_point)
        smallest, largest = self.scheme.limits
        integers = np.clip(np.rint(values / scale) + zero_point, smallest, largest)
        return (integers - smallest).astype(np.int64), (integers - zero_point) * scale


def _around(share: float, reach: float, count: int, closest: float) -> Floats:
    """``count + 1`` shares from ``share + reach`` down to ``share - reach``, within [closest, 1]."""
    return np.unique(np.linspace(share + reach, share - reach, count + 1).clip(closest, 1))[::-1]


class MseObserver(_SearchingObserver):
    """The range for which the integers are closest to the values in the mean square.

    Rounding, clipping and the zero point are those of the scheme. Within a bin the values are taken as uniform, which
    adds the same to the loss of every range; zeros cost nothing.

    Args:
        scheme: what the values become.
        clipping: how much more an error by clipping counts than one by rounding. Rounding errors are independent of
            each other and average out in the layers that follow; those of clipping all point the same way and add up.
    """

    def __init__(self, scheme: QuantScheme = UINT8, clipping: float = 1.0) -> None:
        super().__init__(scheme)
        self.clipping = clipping

    def losses(self, low: Floats, high: Floats) -> Floats:
        """The weighted sum of squared errors over all values, seen at the middle of their bins."""
        counts, edges = self.histogram.occupied()
        centres = edges + self.histogram.width / 2
        found = np.empty(low.shape)
        for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
            _, errors = self.levels(a, b, centres)
            errors -= centres
            errors *= errors
            errors *= counts
            first, end = np.searchsorted(centres, (a, b)).tolist()
            clipped = float(errors[:first].sum() + errors[end:].sum())
            found[i] = float(errors.sum()) + (self.clipping - 1) * clipped
        return found


class WeightedMseObserver(MseObserver):
    """As :class:`MseObserver` with more weight on clipping, and for samples that calibration did not see.

    Few samples do not show how large values get: the next ones exceed the largest seen so far now and then, and what
    that costs is not in the histogram. So the largest value of each sample is kept, too (samples are counted along the
    first axis). How far the largest of these exceed their quarter's end says how fast values become rare; from the
    eighth largest on, what clipping costs is taken to fall off at that rate, exponentially, instead of being what the
    few values up there say, and thresholds beyond the largest value seen are tried. The same below.

    Source: J. Pickands, "Statistical Inference Using Extreme Order Statistics", Annals of Statistics 1975; of its
    distributions of excesses the exponential one is that of light tails.
    """

    #: values of one sample that are counted at most, evenly spaced; its extremes are those of all
    _COUNTED = 1 << 15
    #: the share of the samples, and how many at least, whose extremes say how fast values become rare
    _TAIL_SHARE = 0.25
    _TAIL_LEAST = 8
    #: this many samples' extremes lie where the histogram is not believed
    _START = 8
    #: how many times the tail's scale thresholds may lie beyond the largest value seen
    _REACH = 4.0

    def __init__(self, scheme: QuantScheme = UINT8, clipping: float = CLIPPING_WEIGHT) -> None:
        super().__init__(scheme, clipping)
        #: the largest value of each sample, and of its negated values
        self.above = Histogram()
        self.below = Histogram()

    def update(self, *values: NDArray[Any]) -> None:
        """Count the values of one batch, and the extremes of each of its samples."""
        if not values[0].size:
            return
        samples = values[0].reshape(values[0].shape[0] if values[0].ndim else 1, -1)
        self.above.add(samples.max(axis=1))
        self.below.add(-samples.min(axis=1))
        self.histogram.add(samples[:, :: -(-samples.shape[1] // self._COUNTED)])

    def range(self) -> Range:
        """The range that :meth:`best` finds; minimum and maximum where there is nothing to choose."""
        if not (self.above.finite and self.below.finite) or self.histogram.width == 0:
            return self.min_max()
        return self.best()

    def min_max(self) -> Range:
        """The smallest and the largest value seen, counted or not."""
        return Range(-self.below.high, self.above.high)

    def with_clipping(self, clipping: float) -> WeightedMseObserver:
        """The same values seen, with another weight of clipping."""
        other = WeightedMseObserver(self.scheme, clipping)
        other.histogram, other.above, other.below = self.histogram, self.above, self.below
        return other

    def tails(self) -> tuple[Tail | None, Tail | None]:
        """(of the negated values, of the values); None where nothing lies beyond zero or no tail can be told."""
        below, above = (self._tail(seen) if seen.high > 0 else None for seen in (self.below, self.above))
        return below, above

    def _tail(self, seen: Histogram) -> Tail | None:
        count = seen.total
        many = min(max(self._TAIL_LEAST, int(count * self._TAIL_SHARE)), count - 1)
        scale = seen.mean_excess(many)
        if scale <= seen.width:  # all samples end at the same value, as behind a Clip
            return None
        return Tail(max(seen.smallest_of(min(self._START, many)), 0.0), scale)

    def widest(self) -> tuple[float, float]:
        """The extremes seen, and as far beyond as their tails reach."""
        low, high = min(-self.below.high, 0.0), max(self.above.high, 0.0)
        below, above = self.tails()
        return (
            low if below is None else low - self._REACH * below.scale,
            high if above is None else high + self._REACH * above.scale,
        )

    def losses(self, low: Floats, high: Floats) -> Floats:
        """The weighted sum of squared errors that as many values as were seen are expected to have."""
        counts, edges = self.histogram.occupied()
        centres = edges + self.histogram.width / 2
        below, above = self.tails()
        energies = [_energy(counts, sign * centres, tail) for sign, tail in ((-1, below), (1, above))]
        found = np.empty(low.shape)
        for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
            _, errors = self.levels(a, b, centres)
            errors -= centres
            errors *= errors
            errors *= counts
            first, end = np.searchsorted(centres, (a, b)).tolist()
            clipped = 0.0
            for seen, end_value, tail, energy in (
                (errors[:first], -a, below, energies[0]),
                (errors[end:], b, above, energies[1]),
            ):
                if tail is None or end_value <= tail.start:
                    clipped += float(seen.sum())
                else:
                    clipped += energy * exp((tail.start - end_value) / tail.scale)
            found[i] = float(errors[first:end].sum()) + self.clipping * clipped
        return found


def _energy(counts: NDArray[np.int64], values: Floats, tail: Tail | None) -> float:
    """Squared distance of all values above the tail's start from it."""
    return 0.0 if tail is None else float(counts @ np.square(np.maximum(values - tail.start, 0.0)))


class EntropyObserver(_SearchingObserver):
    """The range for which the integers tell most about the distribution of the values (Kullback-Leibler divergence).

    P is the distribution over the bins with everything outside of the range moved to its ends; Q spreads what each
    integer holds from inside of the range evenly over those of its bins that hold anything. Q lacks what was cut off,
    so the divergence is the one for sums that differ, sum(P log(P / Q)) - sum(P) + sum(Q): with Q scaled up to 1, as
    others do, a single bin would be a perfect range.
    """

    def losses(self, low: Floats, high: Floats) -> Floats:
        """The divergence of Q from P in nats; zeros are in neither, for they are exact."""
        counts, edges = self.histogram.occupied()
        centres = edges + self.histogram.width / 2
        filled = counts > 0
        counts, centres = counts[filled] / counts.sum(), centres[filled]
        smallest, largest = self.scheme.limits
        integers = largest - smallest + 1
        found = np.full(low.shape, np.inf)
        for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
            first = 0 if a <= self.histogram.low else int(np.searchsorted(centres, a))
            end = counts.size if b >= self.histogram.high else int(np.searchsorted(centres, b, side="right"))
            if end == first:
                continue
            inside = counts[first:end]
            levels, _ = self.levels(a, b, centres[first:end])
            held = np.bincount(levels, inside, integers)
            bins = np.bincount(levels, minlength=integers)
            q = (held / np.maximum(bins, 1))[levels]
            p = inside.copy()
            p[0] += counts[:first].sum()
            p[-1] += counts[end:].sum()
            found[i] = float(p @ np.log(p / q)) - p.sum() + q.sum()
        return found


#: Observers by name, made from the scheme of the activations.
OBSERVERS: dict[str, Callable[[QuantScheme], Observer]] = {
    "min_max": lambda scheme: MinMaxObserver(),
    "percentile": PercentileObserver,
    "entropy": EntropyObserver,
    "mse": MseObserver,
    "weighted_mse": WeightedMseObserver,
}


def make_observer(name: str, scheme: QuantScheme = UINT8, *, percentile: float = DEFAULT_PERCENTILE) -> Observer:
    """A new observer.

    Args:
        name: a key of :data:`OBSERVERS`.
        scheme: what the values become.
        percentile: for ``percentile``, the share of the values that is kept, in percent.

    Raises:
        UsageError: unknown observer, or a percentile that is not possible.
    """
    if name not in OBSERVERS:
        raise UsageError(f"unknown observer {name!r}; expected one of {', '.join(OBSERVERS)}")
    if name == "percentile":
        return PercentileObserver(scheme, percentile)
    return OBSERVERS[name](scheme)
