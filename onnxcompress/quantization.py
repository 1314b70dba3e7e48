"""Affine quantisation: schemes, parameters, and the numpy arithmetic that QuantizeLinear stands for.

``x ≈ (q - zero_point) * scale`` with ``q = saturate(round_half_even(x / scale) + zero_point)``, as the ONNX operator
specification of QuantizeLinear defines it. The functions here are the oracle that QDQ graphs are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "QParams",
    "QuantScheme",
    "Range",
    "activation_qparams",
    "bounded_pairs",
    "dequantize",
    "fake_quantize",
    "quantize",
    "weight_qparams",
]

#: Integer biases and the accumulators that they start from stay below this, half of what int32 holds.
MAX_BIAS = 2**30


@dataclass(frozen=True)
class Range:
    """The closed interval of values that a tensor takes, both ends finite."""

    low: float
    high: float

    def union(self, other: Range) -> Range:
        """The smallest interval that holds both."""
        return Range(min(self.low, other.low), max(self.high, other.high))

    def clipped(self, low: float, high: float) -> Range:
        """This interval cut to [low, high]."""
        return Range(min(max(self.low, low), high), max(min(self.high, high), low))


@dataclass(frozen=True)
class QuantScheme:
    """An integer type and how it is used.

    ``symmetric`` puts the zero point in the middle of the type (0 for int8) and, for int8, leaves -128 out.
    ``largest_pair`` bounds the sum of any two integers of one sign that share a scale; None: no bound.
    """

    dtype: Literal["uint8", "int8"]
    symmetric: bool
    bits: int = 8
    largest_pair: int | None = None

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The storage type."""
        return np.dtype(self.dtype)

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer used."""
        if self.dtype == "uint8":
            return 0, 2**self.bits - 1
        half = 2 ** (self.bits - 1)
        return (-(half - 1) if self.symmetric else -half), half - 1


@dataclass(frozen=True)
class QParams:
    """Scale (float32) and zero point (the integer type), scalars or one per position along ``axis``."""

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]
    axis: int | None = None

    def _along(self, values: NDArray[Any], rank: int) -> NDArray[Any]:
        if self.axis is None:
            return values
        return values.reshape([-1 if i == self.axis % rank else 1 for i in range(rank)])


def activation_qparams(interval: Range, scheme: QuantScheme) -> QParams:
    """Parameters for a tensor with values in ``interval``.

    The interval is widened to hold zero, which the integers then represent exactly: padding and Relu stay exact. A
    lower end of zero gives the smallest integer as zero point, so that a Relu before the quantiser changes nothing.
    """
    low, high = min(interval.low, 0.0), max(interval.high, 0.0)
    smallest, largest = scheme.limits
    if scheme.symmetric:
        bound = max(-low, high)
        middle = 0 if scheme.dtype == "int8" else (largest + 1) // 2
        scale = np.float32(bound / (largest - middle)) if bound > 0 else np.float32(1)
        zero_point = middle
    else:
        scale = np.float32((high - low) / (largest - smallest))
        if scale <= 0:
            scale = np.float32(1)
        zero_point = int(np.clip(np.rint(smallest - low / float(scale)), smallest, largest))
    scale = max(scale, np.finfo(np.float32).tiny)
    return QParams(np.array(scale, np.float32), np.array(zero_point, scheme.numpy_dtype))


def weight_qparams(
    weight: NDArray[Any],
    scheme: QuantScheme,
    axis: int | None,
    *,
    bias: NDArray[Any] | None = None,
    input_scale: float = 1.0,
) -> QParams:
    """Symmetric parameters for a weight, one scale per position along ``axis`` (None: one for all).

    A channel of near-zero weights would get a scale so small that its bias, stored in units of ``input_scale * scale``,
    overflows int32: the scale is bounded from below so that ``|bias| / (input_scale * scale) <= MAX_BIAS``.
    """
    largest = scheme.limits[1]
    magnitude = np.abs(np.asarray(weight, np.float64))
    if axis is None:
        bound = np.array(magnitude.max(initial=0.0))
    else:
        axis = axis % weight.ndim
        bound = magnitude.max(axis=tuple(i for i in range(weight.ndim) if i != axis), initial=0.0)
    scale = bound / largest
    if bias is not None and input_scale > 0:
        needed = np.abs(np.asarray(bias, np.float64)) / (input_scale * MAX_BIAS)
        scale = np.maximum(scale, needed.reshape(scale.shape) if axis is not None else needed.max(initial=0.0))
    scale = np.where(scale > np.finfo(np.float32).tiny, scale, 1.0)  # an all-zero channel: any scale will do
    found = scale.astype(np.float32)
    if scheme.largest_pair is not None:
        found = bounded_pairs(weight, found, axis, scheme.largest_pair)
    return QParams(found, np.zeros(scale.shape, scheme.numpy_dtype), axis)


def bounded_pairs(
    weight: NDArray[Any], scale: NDArray[np.float32], axis: int | None, largest_pair: int
) -> NDArray[np.float32]:
    """The smallest scales from ``scale`` up with which no two integers of one sign sum to more than ``largest_pair``.

    Only the two largest weights of each sign in a channel matter, since rounding keeps the order. For every split k of
    the bound, a scale of at least ``first / (k + 0.5)`` and ``second / (largest_pair - k + 0.5)`` keeps to it.
    """
    values = np.asarray(weight, np.float32)
    rows = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    flat = scale.reshape(-1)
    if rows.shape[1] < 2:
        return scale
    found = flat.copy()
    splits = np.arange(0, largest_pair + 1) + 0.5
    for signed in (rows, -rows):
        two = np.maximum(np.partition(signed, rows.shape[1] - 2, axis=1)[:, -2:], 0)  # second, first
        limits = np.maximum(two[:, 1:] / splits, two[:, :1] / (largest_pair + 1 - splits)).astype(np.float64)
        needed = limits.min(axis=1)
        broken = np.rint(two / found[:, None]).sum(axis=1) > largest_pair
        found[broken] = np.maximum(found, needed.astype(np.float32))[broken]
        # Ties and the rounding of the scale itself are settled with the arithmetic of QuantizeLinear.
        while (broken := np.rint(two / found[:, None]).sum(axis=1) > largest_pair).any():
            found[broken] = np.nextafter(found[broken], np.float32(np.inf))
    return found.reshape(scale.shape)


def quantize(values: NDArray[Any], params: QParams) -> NDArray[Any]:
    """QuantizeLinear in numpy: float in, the integer type of ``params.zero_point`` out."""
    info = np.iinfo(params.zero_point.dtype)
    scale = params._along(params.scale, values.ndim)
    zero_point = params._along(params.zero_point, values.ndim).astype(np.int64)
    scaled = np.rint(np.asarray(values).astype(np.float32) / scale)
    integers: NDArray[Any] = np.clip(scaled.astype(np.float64) + zero_point, info.min, info.max)
    return np.asarray(integers).astype(params.zero_point.dtype)


def dequantize(integers: NDArray[Any], params: QParams) -> NDArray[np.float32]:
    """DequantizeLinear in numpy: integers in, float32 out."""
    scale = params._along(params.scale, integers.ndim)
    zero_point = params._along(params.zero_point, integers.ndim).astype(np.int32)
    floats: NDArray[np.float32] = ((integers.astype(np.int32) - zero_point) * scale).astype(np.float32)
    return floats


def fake_quantize(values: NDArray[Any], params: QParams) -> NDArray[np.float32]:
    """``dequantize(quantize(values))``: what a QuantizeLinear, DequantizeLinear pair computes."""
    return dequantize(quantize(values, params), params)
