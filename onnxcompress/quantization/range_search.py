"""Ranges of activations judged by the error at the model's outputs.

What is best for one tensor alone misleads. The errors of rounding are independent of each other and average out on
their way to the outputs; those of clipping all point the same way and add up. So every tensor gets a ladder of ranges,
from the smallest mean squared error over ones that weigh clipping more and more to minimum and maximum, which clip
nothing, and the quantised model itself says how high to climb: all tensors together first, then halves, quarters and
so on of the model in its order, as far as the number of evaluations goes.

The ranges of the rungs come from samples that do not judge them (:func:`set_apart`); the rungs that were chosen are
then taken from all samples. The output error of one candidate varies from sample to sample by more than most moves
gain. A move is therefore made only where the error falls on one part of the samples by clearly more than chance, and on
another part as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log10, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxcompress.errors import DataError
from onnxcompress.graph import Graph
from onnxcompress.quantization.affine import Range
from onnxcompress.quantization.observers import CLIPPING_WEIGHT, WeightedMseObserver
from onnxcompress.session import Session

if TYPE_CHECKING:
    from onnxcompress.base import Progress
    from onnxcompress.data import Dataset

__all__ = ["LADDER", "RangeSearch", "default_evaluations", "ladder", "search_ranges"]

#: how much more clipping counts than rounding, rung by rung; infinite: nothing is clipped
LADDER = (1.0, 4.0, 16.0, inf)
_TOP = len(LADDER) - 1
#: where all tensors begin: at the first of these rungs that is not worse than the top on either part. A weight of 4
#: is among the best on every model that was tried, so it need not prove more.
_STARTS = (1, 0, 2)
#: samples of each of the two parts
_SAMPLES = 64
#: candidates that are run at most, and how many multiply-accumulates all of them together may take
_EVALUATIONS = 32
_MACS = 7e11
#: a move is made where the mean gain is this many standard errors above zero, on the part that searches
_SURE = 2.0
#: and on the part that confirms
_CONFIRMED = 1.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RangeSearch:
    """What was chosen, and what it gains over minimum and maximum.

    Attributes:
        ranges: by the keys of the rungs that were given.
        clipping: by the same keys, how much more clipping counts than rounding; infinite: nothing is clipped.
        evaluations: candidates that were run.
        samples: (searching, confirming).
        searched: error at the outputs of the samples that searched, (minimum and maximum, chosen), relative to the
            outputs' power.
        confirmed: the same of the samples that confirmed.
    """

    ranges: dict[str, Range]
    clipping: dict[str, float]
    evaluations: int
    samples: tuple[int, int]
    searched: tuple[float, float]
    confirmed: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for the report; errors as signal-to-noise ratios in dB."""
        counts = {_label(c): sum(value == c for value in self.clipping.values()) for c in LADDER}
        return {
            "tensors_by_clipping_weight": {label: count for label, count in counts.items() if count},
            "evaluations": self.evaluations,
            "samples": list(self.samples),
            "search_sqnr_db": {"min_max": _decibel(self.searched[0]), "chosen": _decibel(self.searched[1])},
            "confirm_sqnr_db": {"min_max": _decibel(self.confirmed[0]), "chosen": _decibel(self.confirmed[1])},
        }


def _label(clipping: float) -> str:
    return "min_max" if clipping == inf else f"{clipping:g}"


def _decibel(error: float) -> float | None:
    return round(-10 * log10(error), 3) if error > 0 else None


def at_rung(observer: WeightedMseObserver, clipping: float) -> Range:
    """The range of the rung ``clipping`` of :data:`LADDER` for what ``observer`` saw.

    Where clipping counts more than usual for the observer, it does so on every rung.
    """
    if clipping == inf:
        return observer.min_max()
    return observer.with_clipping(clipping * observer.clipping / CLIPPING_WEIGHT).range()


def ladder(observer: WeightedMseObserver) -> list[Range]:
    """The range of each rung of :data:`LADDER` for what ``observer`` saw."""
    return [at_rung(observer, clipping) for clipping in LADDER]


def set_apart(data: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """(rest, samples to judge by): the rungs are made from the rest alone.

    A range that holds all of what it is judged by would look better than it is on samples that come later.

    Raises:
        DataError: there are fewer than four samples.
    """
    if data.samples < 4:
        samples = "1 sample" if data.samples == 1 else f"{data.samples} samples"
        raise DataError(f"ranges cannot be searched with {samples}; give four or more or another observer than auto")
    return data.split(min(2 * _SAMPLES / data.samples, 0.5), seed)


def default_evaluations(macs: int) -> int:
    """How many candidates to run for a model of ``macs`` multiply-accumulates a sample: some seconds' worth."""
    return max(4, min(_EVALUATIONS, int(_MACS / (2 * _SAMPLES * max(macs, 1)))))


def search_ranges(
    reference: Graph,
    write: Callable[[Mapping[str, Range]], Graph],
    rungs: Mapping[str, Sequence[Range]],
    data: Dataset,
    *,
    evaluations: int,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> RangeSearch:
    """Choose a rung for every tensor by the error at the outputs of the quantised model.

    The answer depends on the arguments alone, not on how fast the machine is.

    Args:
        reference: the float model.
        write: makes the quantised model from ranges by the keys of ``rungs``.
        rungs: one range per entry of :data:`LADDER`, by tensor or class of tensors, in the model's order.
        data: calibration samples; at most 64 search and as many others confirm.
        evaluations: candidates that may be run, two of which are needed at least.
        seed: says which samples search and which confirm.
        threads: intra-op threads of the runtime; 0: its choice.
        progress: shows how far the work is.

    Raises:
        DataError: there are fewer than two samples, or the model has no float output with a signal.
    """
    parts = _parts(data, seed)
    judges = [_Judge(reference, part, threads) for part in parts]
    search = _Search(write, rungs, judges, threads)
    steps = search.run(max(2, evaluations))
    for _ in progress.track(steps, "searching ranges", total=max(2, evaluations)) if progress else steps:
        pass
    return RangeSearch(
        search.ranges(search.rung),
        {name: LADDER[rung] for name, rung in search.rung.items()},
        search.evaluations,
        (parts[0].samples, parts[1].samples),
        (float(search.top[0].mean()), float(search.errors[0].mean())),
        (float(search.top[1].mean()), float(search.errors[1].mean())),
    )


def _parts(data: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Samples to search with and others to confirm with, both spread over all the data."""
    each = min(_SAMPLES, data.samples // 2)
    if each == 0:
        raise DataError("ranges cannot be searched with one sample; give more or another observer than auto")
    rest, first = data.split(min(each / data.samples, 0.5), seed)
    if rest.samples <= each:
        return first, rest
    return first, rest.split(each / rest.samples, seed + 1)[1]


class _Judge:
    """Some samples with the outputs of the float model."""

    def __init__(self, reference: Graph, data: Dataset, threads: int) -> None:
        session = Session(reference, threads=threads)
        self._batches = list(data)
        self._expected = [session.run(batch.feeds) for batch in self._batches]
        power: dict[str, float] = {}
        for outputs in self._expected:
            for name, value in outputs.items():
                if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                    power[name] = power.get(name, 0.0) + float((value.astype(np.float64) ** 2).sum())
        self._power = {name: value for name, value in power.items() if value > 0 and np.isfinite(value)}
        if not self._power:
            raise DataError(
                "ranges cannot be searched, because no float output of the model is finite and other than zero; "
                "use another observer than auto"
            )
        self._units = sum(self._count(batch, outputs) for batch, outputs in self._pairs())

    def _pairs(self) -> Iterator[tuple[Any, dict[str, NDArray[Any]]]]:
        return zip(self._batches, self._expected, strict=True)

    def _count(self, batch: Any, outputs: Mapping[str, NDArray[Any]]) -> int:
        """Samples in a batch, or 1 where the outputs do not tell them apart."""
        lengths = {outputs[name].shape[:1] for name in self._power}
        return int(batch.samples) if lengths == {(batch.samples,)} else 1

    def errors(self, session: Session) -> Floats:
        """Error by sample; its mean is the error relative to each output's power, averaged over the outputs."""
        found = []
        for batch, expected in self._pairs():
            count = self._count(batch, expected)
            total = np.zeros(count)
            actual = session.run(batch.feeds, list(self._power))
            for name, power in self._power.items():
                difference = actual[name].astype(np.float64) - expected[name]
                total += (difference**2).reshape(count, -1).sum(axis=1) / power
            found.append(total)
        errors: Floats = np.concatenate(found) * self._units / len(self._power)
        return errors


class _Search:
    def __init__(
        self,
        write: Callable[[Mapping[str, Range]], Graph],
        rungs: Mapping[str, Sequence[Range]],
        judges: Sequence[_Judge],
        threads: int,
    ) -> None:
        self._write = write
        self._rungs = rungs
        self._judges = judges
        self._threads = threads
        self.evaluations = 0
        self.rung = dict.fromkeys(rungs, _TOP)
        self.top = self._evaluate(self.rung)
        self.errors = self.top

    def ranges(self, rung: Mapping[str, int]) -> dict[str, Range]:
        return {name: self._rungs[name][number] for name, number in rung.items()}

    def _evaluate(self, rung: Mapping[str, int]) -> list[Floats]:
        self.evaluations += 1
        session = Session(self._write(self.ranges(rung)), threads=self._threads)
        return [judge.errors(session) for judge in self._judges]

    def run(self, evaluations: int) -> Iterator[int]:
        """Search, one evaluation per step."""
        yield self.evaluations
        for number in _STARTS:
            if self.evaluations >= evaluations:
                return
            start = dict.fromkeys(self._rungs, number)
            errors = self._evaluate(start)
            accepted = all(found.mean() <= before.mean() for found, before in zip(errors, self.top, strict=True))
            if accepted:
                self.rung, self.errors = start, errors
            yield self.evaluations
            if accepted:
                break
        names = list(self._rungs)
        groups = 1
        while groups < 2 * len(names):
            for part in np.array_split(np.arange(len(names)), min(groups, len(names))):
                for step in (-1, 1):
                    moved = self._moved([names[i] for i in part], step)
                    if moved is None:
                        continue
                    if self.evaluations >= evaluations:
                        return
                    errors = self._evaluate(moved)
                    accepted = self._better(errors)
                    if accepted:
                        self.rung, self.errors = moved, errors
                    yield self.evaluations
                    if accepted:
                        break
            groups *= 2

    def _moved(self, names: Sequence[str], step: int) -> dict[str, int] | None:
        """The rungs with those of ``names`` moved; None where that changes no range."""
        moved = dict(self.rung)
        for name in names:
            moved[name] = min(max(moved[name] + step, 0), _TOP)
        return None if self.ranges(moved) == self.ranges(self.rung) else moved

    def _better(self, errors: Sequence[Floats]) -> bool:
        gains = [before - after for before, after in zip(self.errors, errors, strict=True)]
        return all(
            gain.mean() > 0 and gain.mean() >= sure * gain.std() / sqrt(gain.size)
            for gain, sure in zip(gains, (_SURE, _CONFIRMED), strict=True)
        )
