"""Integer regions that cost more time than they save, found by timing the model with and without them.

Where integers and floats alternate, as around HardSwish or LayerNormalization, an integer region between two
conversions may cost more than it saves, and so may element-wise functions on integers, as gates; how much
depends on the machine and on what the runtime would fuse in floats. The static estimate that places quantisers cannot
know. So regions that it calls doubtful are timed: all of them at once against none, in pairs, and then halves, quarters
and so on of what was not slower together; and what returned to float as a whole may become integer again, part by part,
where that is faster. A convolutional network that is integer as a whole has no such regions and pays nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, replace
from typing import Any

from onnxcompress.base import Progress, SilentProgress
from onnxcompress.benchmark import benchmark
from onnxcompress.data import Dataset
from onnxcompress.quantization.placement import Island, Placement, Unit, find_islands
from onnxcompress.quantization.variants import Variants
from onnxcompress.session import Session
from onnxcompress.shapes import TensorType, infer_shapes, node_macs

__all__ = ["Comparison", "TimedIslands", "doubtful_islands", "doubtful_regions", "real_types", "time_islands"]

#: an island is doubtful where its operators are estimated to save less than this many times its conversions
_DOUBTFUL = 4.0
#: seconds that all timing together may take, and one comparison
_SECONDS = 5.0
_COMPARISON_SECONDS = 0.7
#: sessions of one comparison, of each of both models
_SESSIONS = 6
#: comparisons at most
_COMPARISONS = 8
#: element-wise functions, whose integer form is a table or as many steps as the float one
_FUNCTIONS = ("LeakyRelu", "Mul", "Sigmoid", "Where")
#: parts of an island that are timed apart
_PARTS = 4


@dataclass(frozen=True)
class Comparison:
    """One region, timed as integers and as floats, with everything else the same.

    Attributes:
        nodes: operators of the region.
        ratio: time with them as integers over time with them as floats; above 1: they cost time.
        low: of its 95 % interval.
        high: of its 95 % interval.
    """

    nodes: tuple[str, ...]
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class TimedIslands:
    """Everything that was timed, and the operators that return to float by it."""

    comparisons: tuple[Comparison, ...] = ()
    returned: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types for the report."""
        return asdict(self)


def real_types(variants: Variants, data: Dataset) -> dict[str, TensorType]:
    """Types and shapes for one sample as the data has it: symbolic sizes are as long as they are in fact."""
    return infer_shapes(variants.graph, data.sample_shapes())


def doubtful_islands(placement: Placement, types: Mapping[str, TensorType], macs: Mapping[str, int]) -> list[Island]:
    """Islands whose worth the static estimate cannot vouch for, the least worthwhile first."""
    islands = find_islands(replace(placement, sizes=types), macs)
    doubtful = [island for island in islands if island.gain < _DOUBTFUL * island.conversions]
    return sorted(doubtful, key=lambda island: island.gain / max(island.conversions, 1.0))


def doubtful_regions(
    placement: Placement, types: Mapping[str, TensorType], macs: Mapping[str, int]
) -> list[tuple[str, ...]]:
    """Names of the operators of each region that has to be timed, the least worthwhile region first.

    Doubtful islands; and where element-wise functions run on integers, all that is integer, an island of many layers in
    parts of as many multiply-accumulates.
    """
    if not any(unit.node.op in _FUNCTIONS for unit in placement.integer_units):
        return [_names(island.units) for island in doubtful_islands(placement, types, macs)]
    regions = []
    for island in find_islands(replace(placement, sizes=types), macs):
        whole = max(sum(macs.get(unit.node.name, 0) for unit in island.units), 1)
        parts: list[list[Unit]] = [[] for _ in range(_PARTS)]
        done = 0
        for unit in island.units:
            parts[min(_PARTS * done // whole, _PARTS - 1)].append(unit)
            done += macs.get(unit.node.name, 0)
        regions += [_names(part) for part in parts]
    return [region for region in regions if region]


def time_islands(
    variants: Variants,
    data: Dataset,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> TimedIslands:
    """Time the doubtful regions of a quantised model, and whether several regions together are worth it at all.

    Where they are not, none is believed to be. Nothing is timed where all that is integer is one region without doubt.

    Args:
        variants: the quantised model.
        data: samples, one of which is run at a time.
        seed: of the order of pairs.
        progress: shows how far the work is.
    """
    types = real_types(variants, data)
    macs = node_macs(variants.graph, types)
    regions = doubtful_regions(variants.placement, types, macs)
    islands = [_names(island.units) for island in find_islands(replace(variants.placement, sizes=types), macs)]
    vouched = len(islands) > 1 and {n for names in islands for n in names} > {n for names in regions for n in names}
    if not regions and not vouched:
        return TimedIslands()
    shown = progress if progress is not None else SilentProgress()
    for watch in shown.track((_Watch(variants, data, seed, shown),), "timing integer regions, some seconds", 1):
        returned = _slow(watch, islands if vouched and watch.slower_in_all(islands) else regions)
    return TimedIslands(tuple(watch.comparisons), watch.ordered(returned))


def _slow(watch: _Watch, regions: Sequence[tuple[str, ...]]) -> frozenset[str]:
    """Operators of ``regions`` that are faster in floats."""
    functions = watch.functions()
    returned: frozenset[str] = frozenset()
    if functions and watch.running() and watch.compare(functions, returned).low > 1.0:
        returned = functions
    queue: list[Sequence[tuple[str, ...]]] = [regions]
    back: list[Sequence[tuple[str, ...]]] = []
    while queue and watch.running():
        group = queue.pop(0)
        names = frozenset(name for region in group for name in region) - returned
        if names and watch.compare(names, returned).low > 1.0:
            returned |= names
            back += _halves(group)
        else:
            queue += _halves(group)
    while back and watch.running():
        group = back.pop(0)
        names = (frozenset(name for region in group for name in region) & returned) - functions
        if names and watch.compare(names, returned - names).high < 1.0:
            returned -= names
        else:
            back += _halves(group)
    return returned


def _halves(group: Sequence[tuple[str, ...]]) -> list[Sequence[tuple[str, ...]]]:
    half = len(group) // 2
    return [group[:half], group[half:]] if half else []


def _names(units: Iterable[Unit]) -> tuple[str, ...]:
    """The operators that have to be excluded; what only moves values follows its neighbours."""
    return tuple(unit.node.name for unit in units if not unit.moves)


class _Watch:
    """Times variants of one model, as long as time and comparisons last."""

    def __init__(self, variants: Variants, data: Dataset, seed: int, progress: Progress) -> None:
        self._variants = variants
        self._data = data
        self._seed = seed
        self._progress = progress
        self._begin = time.perf_counter()
        self.comparisons: list[Comparison] = []
        Session(variants.written(), threads=1)
        # Where creating the sessions of one comparison takes longer than all timing may, nothing is timed.
        self._possible = 2 * _SESSIONS * (time.perf_counter() - self._begin) < _SECONDS

    def functions(self) -> frozenset[str]:
        """Element-wise functions on integers."""
        return frozenset(u.node.name for u in self._variants.placement.integer_units if u.node.op in _FUNCTIONS)

    def running(self) -> bool:
        """True where another comparison may be made."""
        spent = time.perf_counter() - self._begin
        return self._possible and len(self.comparisons) < _COMPARISONS and spent < _SECONDS

    def slower_in_all(self, islands: Sequence[tuple[str, ...]]) -> bool:
        """True where the network loses time by integers as a whole, so that no estimate can be believed."""
        names = frozenset(name for island in islands for name in island)
        return self.running() and self.compare(names, frozenset()).low > 1.0

    def ordered(self, names: AbstractSet[str]) -> tuple[str, ...]:
        """``names`` in graph order."""
        return tuple(u.node.name for u in self._variants.placement.integer_units if u.node.name in names)

    def compare(self, names: AbstractSet[str], floats: AbstractSet[str]) -> Comparison:
        """Time ``names`` as integers and as floats, where ``floats`` are float as well."""
        found = benchmark(
            self._variants.written(self.ordered(floats)),
            self._variants.written(self.ordered(floats | names)),
            self._data,
            seconds=_COMPARISON_SECONDS,
            sessions=_SESSIONS,
            seed=self._seed,
            progress=self._progress,
        )
        self.comparisons.append(Comparison(self.ordered(names), found.ratio, found.low, found.high))
        return self.comparisons[-1]
