"""Resize and Upsample: one axis after the other, each output a weighted sum of a few inputs.

Source: the operator's specification; its coordinate transformations, filters and rounding are followed literally.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnxcompress.executor.spec import Kernel, Numbers, Operator, Spec, Table, Unsupported

__all__ = ["RESIZE"]

Floats = NDArray[np.float64]

_COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_half_pixel_for_nn",
    "tf_crop_and_resize",
)
_ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


@dataclass(frozen=True)
class _Filter:
    """How one axis is resampled."""

    mode: str
    coordinates: str
    rounding: str
    cubic: float
    exclude_outside: bool
    antialias: bool
    extrapolation: float

    def taps(self, size: int, out: int, scale: float, roi: tuple[float, float]) -> tuple[NDArray[np.int64], Floats]:
        """(places, weights), both [outputs, taps]; a row of NaN weights lies outside of the input."""
        where = self._places(size, out, scale, roi)
        if self.mode == "nearest":
            places = self._nearest(where).clip(0, size - 1)[:, None]
            weights = np.ones(places.shape)
        else:
            places, weights = self._weighted(where, size, scale)
        if self.coordinates == "tf_crop_and_resize":
            weights[(where < 0) | (where > size - 1)] = np.nan
        return places, weights

    def _places(self, size: int, out: int, scale: float, roi: tuple[float, float]) -> Floats:
        """Where each output lies in the input."""
        x = np.arange(out, dtype=np.float64)
        match self.coordinates:
            case "half_pixel":
                return (x + 0.5) / scale - 0.5
            case "half_pixel_symmetric":
                adjustment = out / (scale * size)
                centre = size / 2
                return centre * (1 - adjustment) + (x + 0.5) / scale - 0.5
            case "pytorch_half_pixel":
                return (x + 0.5) / scale - 0.5 if out > 1 else np.zeros(out)
            case "align_corners":
                return x * (size - 1) / (out - 1) if out > 1 else np.zeros(out)
            case "tf_half_pixel_for_nn":
                return (x + 0.5) / scale
            case "tf_crop_and_resize":
                start, end = roi
                if out > 1:
                    return start * (size - 1) + x * (end - start) * (size - 1) / (out - 1)
                return np.full(out, 0.5 * (start + end) * (size - 1))
        return x / scale

    def _nearest(self, where: Floats) -> NDArray[np.int64]:
        match self.rounding:
            case "round_prefer_floor":
                rounded = np.ceil(where - 0.5)
            case "round_prefer_ceil":
                rounded = np.floor(where + 0.5)
            case "floor":
                rounded = np.floor(where)
            case _:
                rounded = np.ceil(where)
        return rounded.astype(np.int64)

    def _weighted(self, where: Floats, size: int, scale: float) -> tuple[NDArray[np.int64], Floats]:
        shrink = min(scale, 1.0) if self.antialias else 1.0
        reach = (1.0 if self.mode == "linear" else 2.0) / shrink
        taps = 2 * int(np.ceil(reach)) + (1 if shrink < 1 else 0)
        first = np.floor(where).astype(np.int64) - (int(np.ceil(reach)) - 1)
        if shrink < 1:
            first -= 1
            taps += 1
        places = first[:, None] + np.arange(taps)
        distance = np.abs(where[:, None] - places) * shrink
        weights = np.maximum(1 - distance, 0) if self.mode == "linear" else self._cubic(distance)
        if self.exclude_outside:
            weights = weights * ((places >= 0) & (places < size))
        total = weights.sum(axis=1, keepdims=True)
        if self.exclude_outside or shrink < 1:
            weights = weights / total
        return places.clip(0, size - 1), weights

    def _cubic(self, x: Floats) -> Floats:
        a = self.cubic
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _resize(spec: Spec) -> Kernel:
    names = ("coordinate_transformation_mode", "nearest_mode", "mode", "keep_aspect_ratio_policy")
    coordinates = spec.attribute(names[0], "asymmetric" if spec.opset < 11 else "half_pixel")
    rounding = spec.attribute(names[1], "floor" if spec.opset < 11 else "round_prefer_floor")
    mode, policy = spec.attribute(names[2], "nearest"), spec.attribute(names[3], "stretch")
    for value, known in (
        (coordinates, _COORDINATES),
        (rounding, _ROUNDINGS),
        (mode, ("nearest", "linear", "cubic")),
        (policy, ("stretch", "not_larger", "not_smaller")),
    ):
        if value not in known:
            raise Unsupported(f"mode {value!r} is not computed")
    fixed = spec.ints("axes")
    resampler = _Filter(
        mode,
        coordinates,
        rounding,
        spec.attribute("cubic_coeff_a", -0.75),
        bool(spec.attribute("exclude_outside", 0)),
        bool(spec.attribute("antialias", 0)),
        spec.attribute("extrapolation_value", 0.0),
    )

    def run(
        x: Tensor, roi: Numbers | None = None, scales: Numbers | None = None, sizes: Numbers | None = None
    ) -> Tensor:
        axes = [a % x.ndim for a in fixed] if fixed is not None else list(range(x.ndim))
        shape = list(x.shape)
        if sizes is not None and sizes.size:
            wanted = [int(v) for v in sizes.reshape(-1)]
            factors = [out / shape[axis] for out, axis in zip(wanted, axes, strict=True)]
            if policy != "stretch":
                factor = min(factors) if policy == "not_larger" else max(factors)
                factors = [factor] * len(axes)
                wanted = [int(np.floor(factor * shape[axis] + 0.5)) for axis in axes]
        elif scales is not None and scales.size:
            factors = [float(v) for v in scales.reshape(-1)]
            wanted = [int(np.floor(shape[axis] * f)) for f, axis in zip(factors, axes, strict=True)]
        else:
            raise Unsupported("it has neither scales nor sizes")
        region = [0.0] * len(axes) + [1.0] * len(axes)
        if coordinates == "tf_crop_and_resize" and roi is not None and roi.size:
            region = [float(v) for v in roi.reshape(-1)]
        return _resample(x, resampler, axes, wanted, factors, region)

    return run


def _resample(
    x: Tensor,
    resampler: _Filter,
    axes: Sequence[int],
    wanted: Sequence[int],
    factors: Sequence[float],
    region: Sequence[float],
) -> Tensor:
    given = x.dtype
    outside = []
    for number, axis in enumerate(axes):
        size, out, scale = x.shape[axis], wanted[number], factors[number]
        roi = (region[number], region[number + len(axes)])
        if size == out and scale == 1.0 and (roi == (0.0, 1.0)):
            continue
        places, weights = resampler.taps(size, out, scale, roi)
        lost = np.isnan(weights).any(axis=1)
        if lost.any():
            outside.append((axis, lost))
            weights = np.nan_to_num(weights)
        columns = torch.from_numpy(np.ascontiguousarray(places.T)).to(x.device)
        if resampler.mode == "nearest":
            x = x.index_select(axis, columns[0])
            continue
        x = x if x.is_floating_point() else x.to(torch.float32)
        factor = torch.from_numpy(weights.T.copy()).to(x.device, x.dtype)
        spread = [-1 if a == axis else 1 for a in range(x.ndim)]
        x = sum(
            (x.index_select(axis, columns[k]) * factor[k].reshape(spread) for k in range(len(columns))),
            start=torch.zeros((), dtype=x.dtype, device=x.device),
        )
    for axis, lost in outside:
        mask = torch.from_numpy(lost).to(x.device).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        x = torch.where(mask, torch.full_like(x, resampler.extrapolation), x)
    return x.to(given) if given.is_floating_point or given == x.dtype else x.round().to(given)


def _upsample(spec: Spec) -> Kernel:
    mode = spec.attribute("mode", "nearest")
    if mode not in ("nearest", "linear"):
        raise Unsupported(f"mode {mode!r} is not computed")
    fixed = spec.attribute("scales") if spec.opset < 9 else None
    resampler = _Filter(mode, "asymmetric", "floor", -0.75, False, False, 0.0)

    def run(x: Tensor, scales: Numbers | None = None) -> Tensor:
        factors = [float(v) for v in (fixed or [] if scales is None else scales.reshape(-1))]
        wanted = [int(np.floor(size * factor)) for size, factor in zip(x.shape, factors, strict=True)]
        axes = list(range(x.ndim))
        return _resample(x, resampler, axes, wanted, factors, [0.0] * x.ndim + [1.0] * x.ndim)

    return run


RESIZE: Table = MappingProxyType(
    {
        "Resize": Operator(_resize, numbers=(1, 2, 3), moves=True),
        "Upsample": Operator(_upsample, numbers=(1,), moves=True),
    }
)
