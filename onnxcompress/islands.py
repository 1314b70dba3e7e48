"""Integer islands that cost more time than they save, found by timing the model with and without them.

Where integers and floats alternate, as around SiLU, HardSwish or LayerNormalization, an integer region between two
conversions may cost more than it saves; how much depends on the machine and on what the runtime would fuse in floats.
The static estimate that places quantisers is wrong by a factor at most, so only islands that it calls doubtful are
timed: all of them at once against none, in pairs, and then halves, quarters and so on of what was not slower together.
A model that is integer as a whole has no such islands and pays nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from onnxcompress.base import Progress
from onnxcompress.benchmark import benchmark
from onnxcompress.data import Dataset
from onnxcompress.quantization.placement import Island, Placement, find_islands
from onnxcompress.quantization.variants import Variants
from onnxcompress.session import Session
from onnxcompress.shapes import TensorType, infer_shapes, node_macs

__all__ = ["TimedIslands", "doubtful_islands", "real_types", "time_islands"]

#: an island is doubtful where its operators are estimated to save less than this many times its conversions
_DOUBTFUL = 4.0
#: seconds that all timing together may take, and one comparison
_SECONDS = 5.0
_COMPARISON_SECONDS = 0.7
#: sessions of one comparison, of each of both models
_SESSIONS = 6
#: comparisons at most
_COMPARISONS = 8


@dataclass(frozen=True)
class TimedIslands:
    """One comparison.

    Attributes:
        nodes: integer operators that were float in one of both models.
        ratio: time with them as integers over time with them as floats; above 1: they cost time.
        low: of its 95 % interval.
        high: of its 95 % interval.
        returned: they returned to float.
    """

    nodes: tuple[str, ...]
    ratio: float
    low: float
    high: float
    returned: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain types for the report."""
        return asdict(self)


def real_types(variants: Variants, data: Dataset) -> dict[str, TensorType]:
    """Types and shapes for one sample as the data has it: symbolic sizes are as long as they are in fact."""
    feeds = data.rebatch(1).first().feeds
    return infer_shapes(variants.graph, {name: tuple(value.shape) for name, value in feeds.items()})


def doubtful_islands(placement: Placement, types: Mapping[str, TensorType], macs: Mapping[str, int]) -> list[Island]:
    """Islands whose worth the static estimate cannot vouch for, the least worthwhile first."""
    islands = find_islands(replace(placement, types=types), macs)
    doubtful = [island for island in islands if island.gain < _DOUBTFUL * island.conversions]
    return sorted(doubtful, key=lambda island: island.gain / max(island.conversions, 1.0))


def time_islands(
    variants: Variants,
    exclude: Sequence[str],
    data: Dataset,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[TimedIslands]:
    """Time the doubtful islands of the variant that leaves ``exclude`` float; empty where there are none.

    Args:
        variants: the quantised model.
        exclude: node names that are float already.
        data: samples, one of which is run at a time.
        seed: of the order of pairs.
        progress: shows how far the work is.
    """
    types = real_types(variants, data)
    placement = variants.placed(exclude)
    islands = doubtful_islands(placement, types, node_macs(variants.graph, types))
    if not islands:
        return []
    begin = time.perf_counter()
    current = variants.written(exclude)
    Session(current, threads=1)
    creation = time.perf_counter() - begin
    if 2 * _SESSIONS * creation > _SECONDS:
        return []  # creating the sessions of one comparison would take longer than all timing may
    returned: list[str] = []
    found: list[TimedIslands] = []
    queue = [islands]
    while queue and len(found) < _COMPARISONS and time.perf_counter() - begin < _SECONDS:
        group = queue.pop(0)
        names = _names(group)
        candidate = variants.written([*exclude, *returned, *names])
        timing = benchmark(
            current,
            candidate,
            data,
            seconds=_COMPARISON_SECONDS,
            sessions=_SESSIONS,
            seed=seed,
            progress=progress,
        )
        costs = timing.low > 1.0
        found.append(TimedIslands(names, timing.ratio, timing.low, timing.high, costs))
        if costs:
            current = candidate
            returned += names
        elif len(group) > 1:
            half = len(group) // 2
            queue += [group[:half], group[half:]]
    return found


def _names(islands: Sequence[Island]) -> tuple[str, ...]:
    """The operators that have to be excluded; what only moves values follows its neighbours."""
    return tuple(unit.node.name for island in islands for unit in island.units if not unit.moves)
