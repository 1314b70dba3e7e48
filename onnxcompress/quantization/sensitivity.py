"""What each layer costs: the error at the model's outputs when it alone is quantised, and when it alone is not.

Both are measured, on a few samples of their own, in a :class:`~onnxcompress.quantization.simulation.Simulation`. The
first says how much a layer adds; roughly, such errors add up. The second, the gain when only this layer returns to
float, is what an exclusion would buy: little for a layer between integer neighbours, whose tensors stay rounded for
their sake.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from onnxcompress.quantization.gauge import Gauge, Reading
from onnxcompress.quantization.placement import Unit
from onnxcompress.quantization.simulation import Simulation, Switches
from onnxcompress.targets import Role

if TYPE_CHECKING:
    from onnxcompress.base import Progress

__all__ = [
    "LayerSensitivity",
    "Sensitivity",
    "affordable_samples",
    "measure_sensitivity",
    "read",
    "rounded",
    "total",
    "weighing_units",
]

#: multiply-accumulates that measuring all layers may take: some seconds' worth
_MACS = 2e11
#: samples that layers are measured on, at least and at most
_SAMPLES = (4, 32)


@dataclass(frozen=True)
class LayerSensitivity:
    """One integer layer. An SQNR is None where the outputs are equal to the original's.

    Attributes:
        node: its name.
        op: its operator.
        macs: multiply-accumulates a sample.
        sqnr_db: at the model's outputs when only this layer is quantised: its weight, what it reads and what it writes.
        error: the same as relative squared error.
        gain_db: by how much the quantised model's SQNR rises when only this layer returns to float.
    """

    node: str
    op: str
    macs: int
    sqnr_db: float | None
    error: float
    gain_db: float


@dataclass(frozen=True)
class Sensitivity:
    """All integer layers, the most sensitive first, and the SQNR of the whole quantised model on the same samples."""

    layers: tuple[LayerSensitivity, ...]
    sqnr_db: float | None
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)


def affordable_samples(variants: int, macs: int) -> int:
    """Samples on which so many variants of a model of ``macs`` multiply-accumulates can be run within seconds."""
    return max(_SAMPLES[0], min(_SAMPLES[1], int(_MACS / (max(variants, 1) * max(macs, 1)))))


def weighing_units(units: Iterable[Unit]) -> list[Unit]:
    """Integer units that round; those that only move values have nothing of their own to lose."""
    return [u for u in units if u.integer and u.rule is not None and u.rule.role in (Role.COMPUTE, Role.ARITHMETIC)]


def read(simulation: Simulation, gauge: Gauge, on: Switches) -> Reading:
    """What the gauge says about the model with the switches ``on``."""
    return gauge.read(lambda feeds: simulation.run(feeds, on))


def measure_sensitivity(simulation: Simulation, gauge: Gauge, progress: Progress | None = None) -> Sensitivity:
    """Measure every integer layer of ``simulation`` that rounds.

    Args:
        simulation: the quantised model.
        gauge: the samples; :func:`affordable_samples` says how many are reasonable for two variants a layer.
        progress: shows how far the work is.
    """
    variants = simulation.variants
    whole = read(simulation, gauge, simulation.of(simulation.placement))
    units = weighing_units(simulation.placement.units)
    steps = progress.track(units, "measuring layers", len(units)) if progress is not None else units
    found = []
    for unit in steps:
        alone = read(simulation, gauge, simulation.alone(unit))
        without = read(simulation, gauge, simulation.of(variants.placed([unit.node.name])))
        gain = without.decibels - whole.decibels
        found.append(
            LayerSensitivity(
                unit.node.name,
                unit.node.op,
                variants.macs.get(unit.node.name, 0),
                rounded(alone.decibels),
                alone.error,
                round(gain, 3) if isfinite(gain) else 0.0,
            )
        )
    found.sort(key=lambda layer: -layer.error)
    return Sensitivity(tuple(found), rounded(whole.decibels), gauge.samples)


def rounded(decibels: float) -> float | None:
    """For the report: infinite, which JSON lacks, becomes None."""
    return round(decibels, 2) if isfinite(decibels) else None


def total(macs: Mapping[str, int], names: Iterable[str]) -> int:
    """Multiply-accumulates of the nodes ``names``."""
    return sum(macs.get(name, 0) for name in names)
