"""A multiplication in front of a quantiser, where no neighbour can take the scales of channels in.

::

    x -> MatMul(W)        x -> Mul(1 / s) -> MatMul(s * W)

Behind LayerNormalization a residual stream goes on reading ``x``, and Gelu does not commute with scaling: the weights
in front of them cannot make the channels of ``x`` even. One multiplication by a constant can, for all matrix products
that read ``x``; everything else reads ``x`` as before. It costs about a microsecond for each of 5,000 values, and the
outliers of transformers, one channel twenty times as large as the others, no longer take the resolution of all.

Only tensors that a quantiser would be placed on, behind a float operator, are considered: among integers a
multiplication would be one more rounding. ``s = (r / max r) ** strength`` as in ``equalize_layers``, with the strength
for which the sum of the noise from the activation's and from the weights' rounding is predicted to be the least.

Source of the idea: G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", ICML 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import log10

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    change_own_constant,
    constant_value,
    normal_domain,
    release,
)
from onnxcompress.quantization.channel_statistics import ChannelStatistics
from onnxcompress.quantization.placement import place
from onnxcompress.shapes import TensorType
from onnxcompress.targets import Target

__all__ = ["Border", "find_borders", "insert_scales"]

#: a channel is magnified at most by the inverse of this, for what is hardly ever active says little about its range
_FLOOR = 0.01
#: strengths that are tried. Above, no channel would have headroom for what calibration did not see.
_STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8)
#: dB of noise that a multiplication has to save at its readers to be worth its time
_LEAST_GAIN = 2.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Border:
    """A float tensor that only matrix products read as integers, and those.

    ``axis`` counts its channels, ``rank`` its axes.
    """

    tensor: gs.Tensor
    readers: tuple[gs.Node, ...]
    axis: int
    rank: int


def find_borders(graph: Graph, target: Target, types: Mapping[str, TensorType]) -> list[Border]:
    """Tensors at which floats become integers for matrix products with weights alone, in graph order."""
    placement = place(graph, target, types=types)
    borders = []
    for name, tensor in placement.quantized.items():
        known = types.get(name)
        if not placement.writes_float(name) or known is None or known.shape is None or len(known.shape) < 2:
            continue
        readers = [unit.node for unit in placement.consumers.get(name, []) if unit.integer]
        if readers and all(_multiplies(node, tensor) for node in readers):
            rank = len(known.shape)
            borders.append(Border(tensor, tuple(readers), rank - 1, rank))
    return borders


def _multiplies(node: gs.Node, tensor: gs.Tensor) -> bool:
    """True for a MatMul or Gemm of ``tensor`` with a weight that nothing else reads."""
    if node.op not in ("MatMul", "Gemm") or normal_domain(node) != "" or attribute(node, "transA", 0):
        return False
    if node.inputs[0] is not tensor or node.inputs[1] is tensor:
        return False
    weight = constant_value(node.inputs[1])
    return weight is not None and weight.ndim == 2 and len(node.inputs[1].outputs) == 1


def insert_scales(
    graph: Graph, borders: list[Border], statistics: Mapping[str, ChannelStatistics]
) -> Iterator[tuple[gs.Node, float]]:
    """Insert a multiplication at each of ``borders`` where it is worth it; yields (node, dB of noise saved).

    Args:
        graph: changed in place; it has to be sorted afterwards.
        borders: from :func:`find_borders` on this graph.
        statistics: of the tensors of ``borders``, by name; those without are left alone.
    """
    names = Names(graph)
    for border in borders:
        measured = statistics.get(border.tensor.name)
        if measured is None:
            continue
        weights = [_rows(node) for node in border.readers]
        if any(weight.shape[0] != measured.magnitude.size for weight in weights):
            continue
        scale, gain = _best_scale(measured, weights)
        if gain < _LEAST_GAIN:
            continue
        scale = scale.astype(np.float32).astype(np.float64)
        name = border.tensor.name
        factors = gs.Constant(names.free(f"{name}_factors"), (1 / scale).astype(np.float32))
        even = gs.Variable(names.free(f"{name}_even"), np.dtype(np.float32), border.tensor.shape)
        made = gs.Node("Mul", names.free(f"{name}_equalize"), {}, [border.tensor, factors], [even])
        graph.nodes.append(made)
        for node, weight in zip(border.readers, weights, strict=True):
            node.inputs[0] = even
            scaled = weight * scale[:, None]
            stored = scaled.T if node.op == "Gemm" and attribute(node, "transB", 0) else scaled
            change_own_constant(node, 1, np.ascontiguousarray(stored, dtype=np.float32), names)
        yield made, gain


def _rows(node: gs.Node) -> Floats:
    """The weight as float64 [inputs, outputs]."""
    value = constant_value(node.inputs[1])
    assert value is not None
    weight = value.astype(np.float64)
    release(value)
    return weight.T if node.op == "Gemm" and attribute(node, "transB", 0) else weight


def _best_scale(measured: ChannelStatistics, weights: list[Floats]) -> tuple[Floats, float]:
    """The scale of each channel with the least noise predicted, and how many dB that saves."""
    largest = float(measured.magnitude.max(initial=0.0))
    ones = np.ones(measured.magnitude.size)
    if largest <= 0:
        return ones, 0.0
    relative = np.maximum(measured.magnitude / largest, _FLOOR)
    before = _noise(measured, weights, ones)
    candidates = [(relative**strength) for strength in _STRENGTHS]
    noise = [_noise(measured, weights, scale) for scale in candidates]
    best = int(np.argmin(noise))
    if not (noise[best] > 0 and before > 0):
        return ones, 0.0
    return candidates[best], 10 * log10(before / noise[best])


def _noise(measured: ChannelStatistics, weights: list[Floats], scale: Floats) -> float:
    """Predicted squared error at all outputs together, for each row of the input; see ``equalize_layers``."""
    power = float((measured.mean_square / np.square(scale)).sum())
    step = float((measured.magnitude / scale).max()) / 255
    noise = 0.0
    for weight in weights:
        scaled = np.abs(weight) * scale[:, None]
        noise += step * step / 12 * float(np.square(scaled).sum())
        noise += float(np.square(scaled.max(axis=0) / 127).sum()) * power / 12
    return noise
