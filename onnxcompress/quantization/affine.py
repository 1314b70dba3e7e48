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
    "quantize_weight",
    "weight_qparams",
]

#: Integer biases and the accumulators that they start from stay below this, half of what int32 holds.
MAX_BIAS = 2**30
#: elements that are quantised at once, so that a large table has no copies in other types
_AT_ONCE = 1 << 22


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


class LevelRange(Range):
    """A range whose 256 levels are the very values that the tensor takes, so that none is rounded."""


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
    method: Literal["max", "mse"] = "max",
) -> QParams:
    """Symmetric parameters for a weight, one scale per position along ``axis`` (None: one for all).

    ``method`` says what the largest integer stands for: the largest magnitude (``max``), or the share of it that leaves
    the smallest mean squared error (``mse``), found among 61 from 0.6 to 1.

    A channel of near-zero weights would get a scale so small that its bias, stored in units of ``input_scale * scale``,
    overflows int32: the scale is bounded from below so that ``|bias| / (input_scale * scale) <= MAX_BIAS``.
    """
    largest = scheme.limits[1]
    axis = None if axis is None else axis % weight.ndim
    others = tuple(i for i in range(weight.ndim) if i != axis)
    # not the largest of np.abs, which would be a copy of a table that may be large
    largest_of_all = np.maximum(weight.max(axis=others, initial=0), -weight.min(axis=others, initial=0))
    bound = np.asarray(largest_of_all, np.float64)
    scale = bound / largest
    if method == "mse":
        scale *= _best_shares(np.asarray(weight, np.float64), scale, largest, axis)
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
    """Scales from ``scale`` up with which no two integers of one sign sum to more than ``largest_pair``.

    Only the two largest weights of each sign in a channel matter, since rounding keeps the order. For every split k of
    the bound, a scale of at least ``first / (k + 0.5)`` and ``second / (largest_pair - k + 0.5)`` keeps to it. From the
    smallest to 12 % above it, the scale with the least squared rounding error is taken.
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
    least, error = found.copy(), _squared_errors(rows, found)
    for step in range(1, 25):  # the smallest scale rounds the largest weights worst, by half a step towards zero
        tried = (least * np.float32(1 + step / 200)).astype(np.float32)
        now = _squared_errors(rows, tried)
        fits = [np.rint(np.partition(signed, -2, axis=1)[:, -2:] / tried[:, None]) for signed in (rows, -rows)]
        better = (least > flat) & (now < error)
        for two in fits:
            better &= np.maximum(two, 0).sum(axis=1) <= largest_pair
        found[better], error[better] = tried[better], now[better]
    return found.reshape(scale.shape)


def _squared_errors(rows: NDArray[Any], scale: NDArray[np.float32]) -> NDArray[np.float64]:
    """What rounding to multiples of each row's scale costs the row."""
    exact = rows / scale[:, None]
    total: NDArray[np.float64] = np.square((np.rint(exact) - exact) * scale[:, None]).sum(axis=1, dtype=np.float64)
    return total


def _best_shares(
    weight: NDArray[np.float64], scale: NDArray[np.float64], largest: int, axis: int | None
) -> NDArray[np.float64]:
    """What to multiply each scale with for the smallest squared error; ties go to the larger."""
    axes = tuple(i for i in range(weight.ndim) if i != axis)
    along = (lambda values: values) if axis is None else (lambda values: np.expand_dims(values, axes))
    positive = np.where(scale > 0, scale, 1.0)
    shares = np.ones(scale.shape)
    least = np.full(scale.shape, np.inf)
    # Close to 1 nothing is cut off yet, and where the weights fall between the integers is what counts.
    for share in (*np.linspace(1, 0.94, 31).tolist(), *np.linspace(0.93, 0.6, 30).tolist()):
        step = along(positive * share)
        integers = np.rint(weight / step)
        np.clip(integers, -largest, largest, out=integers)
        integers *= step
        integers -= weight
        integers *= integers
        errors = integers.sum(axis=axes) if axis is not None else np.asarray(integers.sum())
        better = errors < least
        shares, least = np.where(better, share, shares), np.where(better, errors, least)
    return shares


def _parts(values: NDArray[Any]) -> list[Any]:
    """Indices of parts of ``values`` that have :data:`_AT_ONCE` elements or, as single rows, more."""
    if not values.ndim:
        return [()]
    rows = max(1, _AT_ONCE * len(values) // max(values.size, 1))
    return [slice(start, start + rows) for start in range(0, len(values), rows)]


def quantize(values: NDArray[Any], params: QParams) -> NDArray[Any]:
    """QuantizeLinear in numpy: float in, the integer type of ``params.zero_point`` out."""
    info = np.iinfo(params.zero_point.dtype)
    scale = np.broadcast_to(params._along(params.scale, values.ndim), values.shape)
    zero_point = np.broadcast_to(params._along(params.zero_point, values.ndim).astype(np.int64), values.shape)
    integers = np.empty(values.shape, params.zero_point.dtype)
    for part in _parts(values):
        scaled = np.rint(np.asarray(values[part]).astype(np.float32) / scale[part])
        integers[part] = np.clip(scaled.astype(np.float64) + zero_point[part], info.min, info.max)
    return integers


def quantize_weight(weight: NDArray[Any], params: QParams, scheme: QuantScheme) -> NDArray[Any]:
    """Integers of ``weight`` under ``params``, which :func:`weight_qparams` found for ``scheme``.

    Rounded to nearest, as :func:`quantize` does. Where ``scheme.largest_pair`` costs some weights a bit, rounding is
    chosen so that errors cancel: single weights go to their other neighbour until the errors of each spatial kernel,
    and then those of each output channel, sum to half a step at most. Neighbouring pixels, and channels behind a Relu,
    move together, so what is left of the error is mostly what cancels. The bound on pairs is kept.

    Source: C. Guo et al., "SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian Approximation", ICLR 2022.
    """
    nearest = quantize(weight, params)
    bound = scheme.largest_pair
    if bound is None or params.axis is None or weight.ndim < 2:
        return nearest
    ordered = np.moveaxis(nearest, params.axis, 0)
    if ordered[0].size < 2:
        return nearest
    scale = params._along(params.scale, weight.ndim).astype(np.float64)
    errors = np.moveaxis(nearest - np.asarray(weight, np.float64) / scale, params.axis, 0)
    kernels = (ordered.shape[0], ordered.shape[1], -1)  # output channel, input channel, position
    integers = ordered.astype(np.int64).reshape(kernels)
    errors = errors.reshape(kernels)

    def flip(surplus: NDArray[Any], gain: NDArray[Any], axis: int) -> NDArray[Any]:
        """Of each row along ``axis`` as many as ``surplus`` says, those of the largest gain first."""
        order = np.argsort(-gain, axis=axis, kind="stable")
        rank = np.argsort(order, axis=axis, kind="stable")
        chosen: NDArray[Any] = (rank < np.abs(surplus)) & (gain > 0)
        return chosen

    def grows(sign: int) -> NDArray[Any]:
        """Where one more step in the direction of ``sign`` keeps to the bound, whichever of them are taken."""
        sizes = integers * sign
        two = np.partition(sizes.reshape(len(sizes), -1), -2, axis=1)[:, -2:]
        second, first = (two[:, k].reshape(-1, 1, 1) for k in (0, 1))
        caps = np.where(sizes == first, bound - second - 1, np.maximum(second, bound - first - 1))
        kept: NDArray[Any] = (sizes < 0) | (sizes + 1 <= np.minimum(caps, scheme.limits[1]))
        return kept

    def allowed(step: NDArray[Any]) -> NDArray[Any]:
        """Where ``integers - step`` keeps to the bound."""
        return np.where(step > 0, grows(-1), grows(1))

    surplus = np.rint(errors.sum(axis=2, keepdims=True))
    step = np.sign(surplus).astype(np.int64)
    flipped = flip(surplus, np.where(allowed(step), errors * step, -1.0), 2)
    integers, errors = integers - flipped * step, errors - flipped * step
    surplus = np.rint(errors.sum(axis=(1, 2), keepdims=True))
    step = np.sign(surplus).astype(np.int64)
    gain = np.where(allowed(step) & ~flipped, errors * step, -1.0)
    best = gain == gain.max(axis=2, keepdims=True)
    best &= np.cumsum(best, axis=2) == 1  # one of each kernel
    again = best & flip(surplus, np.where(best, gain, -1.0).max(axis=2, keepdims=True), 1)
    integers = integers - again * step
    return np.ascontiguousarray(np.moveaxis(integers.reshape(ordered.shape), 0, params.axis)).astype(nearest.dtype)


def dequantize(integers: NDArray[Any], params: QParams) -> NDArray[np.float32]:
    """DequantizeLinear in numpy: integers in, float32 out."""
    scale = params._along(params.scale, integers.ndim)
    zero_point = params._along(params.zero_point, integers.ndim).astype(np.int32)
    floats: NDArray[np.float32] = ((integers.astype(np.int32) - zero_point) * scale).astype(np.float32)
    return floats


def fake_quantize(values: NDArray[Any], params: QParams) -> NDArray[np.float32]:
    """``dequantize(quantize(values))``: what a QuantizeLinear, DequantizeLinear pair computes."""
    return dequantize(quantize(values, params), params)
