"""Operators over whole axes: normalisation, softmax, reductions, sums and orders along an axis."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce as fold
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from onnxcompress.executor.spec import Kernel, Numbers, Operator, Spec, Table, Unsupported

__all__ = ["REDUCE"]


# ---- normalisation -----------------------------------------------------------------------------------------------


def _batch_normalization(spec: Spec) -> Kernel:
    epsilon = spec.attribute("epsilon", 1e-5)
    spec.attribute("momentum")  # of training mode
    if spec.attribute("spatial", 1) != 1:
        raise Unsupported("statistics of their own for each position (spatial 0) are not computed")
    if spec.attribute("training_mode", 0) or any(spec.wants(i) for i in range(1, 5)):
        raise Unsupported("it computes statistics of the batch (training mode)")

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)

    return run


def _instance_normalization(spec: Spec) -> Kernel:
    epsilon = spec.attribute("epsilon", 1e-5)
    return lambda x, scale, bias: _grouped(x, x.shape[1], scale, bias, epsilon)


def _grouped(x: Tensor, groups: int, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Normalise over groups of channels of each sample; also where a group has one element only."""
    flat = x.reshape(x.shape[0], groups, -1)
    centred = flat - flat.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    normal = (centred * torch.rsqrt(variance + epsilon)).reshape(x.shape)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    return normal * scale.reshape(shape) + bias.reshape(shape)


def _group_normalization(spec: Spec) -> Kernel:
    epsilon, groups = spec.attribute("epsilon", 1e-5), spec.attribute("num_groups")
    spec.attribute("stash_type")

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if spec.opset < 21:  # one value a group
            each = x.shape[1] // groups
            scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
        return _grouped(x, groups, scale, bias, epsilon)

    return run


def _layer_normalization(spec: Spec) -> Kernel:
    axis, epsilon = spec.attribute("axis", -1), spec.attribute("epsilon", 1e-5)
    spec.attribute("stash_type")  # computed in float32 or wider anyway
    statistics = spec.wants(1) or spec.wants(2)

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        shape = list(x.shape[axis % x.ndim :])
        if not statistics and list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
            return functional.layer_norm(x, shape, scale, bias, epsilon)
        axes = tuple(range(axis % x.ndim, x.ndim))
        mean = x.mean(axes, keepdim=True)
        inverse = torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + epsilon)
        normal = (x - mean) * inverse * scale
        normal = normal if bias is None else normal + bias
        return (normal, mean, inverse) if statistics else normal

    return run


def _rms_normalization(spec: Spec) -> Kernel:
    axis, epsilon = spec.attribute("axis", -1), spec.attribute("epsilon", 1e-5)
    spec.attribute("stash_type")

    def run(x: Tensor, scale: Tensor) -> Tensor:
        axes = tuple(range(axis % x.ndim, x.ndim))
        return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale

    return run


def _lp_normalization(spec: Spec) -> Kernel:
    axis, p = spec.attribute("axis", -1), spec.attribute("p", 2)

    def run(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, p, dim=axis, keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))

    return run


def _mean_variance_normalization(spec: Spec) -> Kernel:
    axes = spec.ints("axes") or [0, 2, 3]

    def run(x: Tensor) -> Tensor:
        centred = x - x.mean(axes, keepdim=True)
        return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)

    return run


def _lrn(spec: Spec) -> Kernel:
    alpha, beta, bias = spec.attribute("alpha", 1e-4), spec.attribute("beta", 0.75), spec.attribute("bias", 1.0)
    size = spec.attribute("size")

    def run(x: Tensor) -> Tensor:
        around = functional.pad(x.square(), [*[0] * (2 * (x.ndim - 2)), (size - 1) // 2, size // 2])
        sums = around.unfold(1, size, 1).sum(-1)
        return x / (bias + alpha / size * sums).pow(beta)

    return run


def _softmax(function: Callable[..., Tensor]) -> Callable[[Spec], Kernel]:
    def build(spec: Spec) -> Kernel:
        if spec.opset >= 13:
            axis = spec.attribute("axis", -1)
            return lambda x: function(x, axis)
        axis = spec.attribute("axis", 1)

        def flattened(x: Tensor) -> Tensor:
            rows = prod(x.shape[: axis % x.ndim if axis < 0 else axis])
            return function(x.reshape(rows, -1), 1).reshape(x.shape)

        return flattened

    return build


def _hard_max(x: Tensor, axis: int) -> Tensor:
    first = _arg_along(x, axis, largest=True, last=False)
    return torch.zeros_like(x).scatter(axis, first.unsqueeze(axis), 1)


# ---- reductions --------------------------------------------------------------------------------------------------

#: opset from which axes are an input and not an attribute
_AXES_INPUT = {"ReduceSum": 13}


def _reducer(op: str, function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Callable[[Spec], Kernel]:
    since = _AXES_INPUT.get(op, 18)

    def build(spec: Spec) -> Kernel:
        keep = bool(spec.attribute("keepdims", 1))
        idle = bool(spec.attribute("noop_with_empty_axes", 0)) if spec.opset >= since else False
        fixed = spec.ints("axes") if spec.opset < since else None

        def run(x: Tensor, given: Numbers | None = None) -> Tensor:
            axes = fixed if given is None else [int(a) for a in given.reshape(-1)]
            if not axes and idle:
                return function(x.unsqueeze(-1), (-1,), False) if op in _CHANGES_ONE else x
            dims = tuple(a % x.ndim for a in axes) if axes else tuple(range(x.ndim))
            return function(x, dims, keep) if x.ndim else function(x.unsqueeze(0), (0,), False)

        return run

    return build


#: reductions that change a single element, too
_CHANGES_ONE = ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum")


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    return torch.div(_sum(x, axes, keep), prod(x.shape[a] for a in axes), rounding_mode="trunc").to(x.dtype)


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    x = fold(lambda y, axis: y.prod(axis, keepdim=True, dtype=x.dtype), axes, x)
    return x if keep else x.reshape([d for axis, d in enumerate(x.shape) if axis not in axes])


def _extreme(largest: bool) -> Callable[[Tensor, tuple[int, ...], bool], Tensor]:
    def run(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if any(x.shape[a] == 0 for a in axes):
            raise Unsupported("the extreme of no values is not computed")
        given = x.dtype
        x = x.to(torch.uint8) if given == torch.bool else x
        return (x.amax(axes, keepdim=keep) if largest else x.amin(axes, keepdim=keep)).to(given)

    return run


def _l1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _l2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if not x.is_floating_point():
        return _sum((x.double() ** 2), axes, keep).sqrt().to(x.dtype)
    return torch.linalg.vector_norm(x, 2, dim=axes, keepdim=keep)


def _sum_square(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep)


def _log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x, axes, keep).log()


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep)


_REDUCTIONS = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceProd": _prod,
    "ReduceMax": _extreme(True),
    "ReduceMin": _extreme(False),
    "ReduceL1": _l1,
    "ReduceL2": _l2,
    "ReduceSumSquare": _sum_square,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
}


# ---- along one axis ----------------------------------------------------------------------------------------------


def _arg_along(x: Tensor, axis: int, largest: bool, last: bool) -> Tensor:
    """Position of the extreme along ``axis``, the first or last of several; the axis is gone."""
    x = x.flip(axis) if last else x
    ordered = torch.sort(x, dim=axis, descending=largest, stable=True)[1]
    found = ordered.select(axis, 0)
    return x.shape[axis] - 1 - found if last else found


def _arg(largest: bool) -> Callable[[Spec], Kernel]:
    def build(spec: Spec) -> Kernel:
        axis, keep = spec.attribute("axis", 0), spec.attribute("keepdims", 1)
        last = bool(spec.attribute("select_last_index", 0))

        def run(x: Tensor) -> Tensor:
            found = _arg_along(x, axis, largest, last)
            return found.unsqueeze(axis % x.ndim) if keep else found

        return run

    return build


def _top_k(spec: Spec) -> Kernel:
    axis, largest = spec.attribute("axis", -1), bool(spec.attribute("largest", 1))
    spec.attribute("sorted")  # an order is always an order
    fixed = spec.attribute("k") if spec.opset < 10 else None

    def run(x: Tensor, k: Numbers | None = None) -> tuple[Tensor, Tensor]:
        count = int((fixed or 1) if k is None else k.reshape(-1)[0])
        values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, count), places.narrow(axis, 0, count)

    return run


def _cumulative_sum(spec: Spec) -> Kernel:
    exclusive, reverse = spec.attribute("exclusive", 0), spec.attribute("reverse", 0)

    def run(x: Tensor, axis: Numbers) -> Tensor:
        along = int(axis.reshape(-1)[0]) % x.ndim
        x = x.flip(along) if reverse else x
        if exclusive:
            first = torch.zeros_like(x.narrow(along, 0, 1))
            x = torch.cat([first, x.narrow(along, 0, x.shape[along] - 1)], along)
        result = torch.cumsum(x, along, dtype=x.dtype)
        return result.flip(along) if reverse else result

    return run


REDUCE: Table = MappingProxyType(
    {
        "BatchNormalization": Operator(_batch_normalization, weights=(1, 2)),
        "InstanceNormalization": Operator(_instance_normalization, weights=(1, 2)),
        "GroupNormalization": Operator(_group_normalization, weights=(1, 2)),
        "LayerNormalization": Operator(_layer_normalization, weights=(1, 2)),
        "RMSNormalization": Operator(_rms_normalization, weights=(1,)),
        "LpNormalization": Operator(_lp_normalization),
        "MeanVarianceNormalization": Operator(_mean_variance_normalization),
        "LRN": Operator(_lrn),
        "Softmax": Operator(_softmax(torch.softmax)),
        "LogSoftmax": Operator(_softmax(torch.log_softmax)),
        "Hardmax": Operator(_softmax(_hard_max)),
        **{op: Operator(_reducer(op, function), numbers=(1,)) for op, function in _REDUCTIONS.items()},
        "ArgMax": Operator(_arg(True)),
        "ArgMin": Operator(_arg(False)),
        "TopK": Operator(_top_k, numbers=(1,)),
        "CumSum": Operator(_cumulative_sum, numbers=(1,)),
    }
)
