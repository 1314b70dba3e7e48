"""Operators that compute each element by itself: arithmetic, activations, comparison, logic, casts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional

from onnxcompress.executor.spec import Kernel, Numbers, Operator, Spec, Table, Unsupported, torch_type

__all__ = ["ELEMENTWISE"]


def _plain(function: Callable[..., Tensor]) -> Callable[[Spec], Kernel]:
    """A builder for an operator without attributes."""
    return lambda spec: function


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Spec], Kernel]:
    """A builder for an operator that combines any number of inputs."""
    return lambda spec: lambda *tensors: reduce(function, tensors)


# ---- activations -------------------------------------------------------------------------------------------------


def _leaky_relu(spec: Spec) -> Kernel:
    alpha = spec.attribute("alpha", 0.01)
    return lambda x: functional.leaky_relu(x, alpha)


def _elu(spec: Spec) -> Kernel:
    alpha = spec.attribute("alpha", 1.0)
    return lambda x: functional.elu(x, alpha)


def _celu(spec: Spec) -> Kernel:
    alpha = spec.attribute("alpha", 1.0)
    return lambda x: functional.celu(x, alpha)


def _selu(spec: Spec) -> Kernel:
    alpha = spec.attribute("alpha", 1.67326319217681884765625)
    gamma = spec.attribute("gamma", 1.05070102214813232421875)
    return lambda x: gamma * functional.elu(x, alpha)


def _thresholded_relu(spec: Spec) -> Kernel:
    alpha = spec.attribute("alpha", 1.0)
    return lambda x: torch.where(x > alpha, x, torch.zeros_like(x))


def _hard_sigmoid(spec: Spec) -> Kernel:
    alpha, beta = spec.attribute("alpha", 0.2), spec.attribute("beta", 0.5)
    return lambda x: _clamped(alpha * x + beta, 0.0, 1.0)


def _gelu(spec: Spec) -> Kernel:
    approximate = spec.attribute("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise Unsupported(f"approximate is {approximate!r}")
    return lambda x: functional.gelu(x, approximate=approximate)


def _swish(spec: Spec) -> Kernel:
    alpha = spec.attribute("alpha", 1.0)
    return lambda x: x * torch.sigmoid(alpha * x)


def _shrink(spec: Spec) -> Kernel:
    bias, threshold = spec.attribute("bias", 0.0), spec.attribute("lambd", 0.5)

    def run(x: Tensor) -> Tensor:
        zero = torch.zeros_like(x)
        return torch.where(x < -threshold, x + bias, torch.where(x > threshold, x - bias, zero)).to(x.dtype)

    return run


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _softplus(x: Tensor) -> Tensor:
    return functional.softplus(x, threshold=math.inf) if x.dtype == torch.float64 else functional.softplus(x)


def _clip(spec: Spec) -> Kernel:
    if spec.opset < 11:
        low, high = spec.attribute("min"), spec.attribute("max")
        return lambda x: _clamped(x, low, high)

    def run(x: Tensor, low: Numbers | None = None, high: Numbers | None = None) -> Tensor:
        bounds = [None if bound is None else bound.reshape(()).item() for bound in (low, high)]
        return _clamped(x, *bounds)

    return run


def _clamped(x: Tensor, low: float | None, high: float | None) -> Tensor:
    if low is None and high is None:
        return x
    if low is not None and high is not None and low < high and x.is_floating_point():
        return functional.hardtanh(x, low, high)  # its gradient is several times as fast as that of clamp
    return torch.clamp(x, low, high)


def _dropout(spec: Spec) -> Kernel:
    spec.attribute("seed"), spec.attribute("ratio")
    if spec.has(2):
        training = spec.constant(2)
        if training is None or bool(training.reshape(()).item()):
            raise Unsupported("it drops values at random (training_mode)")
    masked = spec.wants(1)

    def run(x: Tensor, *_: Any) -> Any:
        return (x, torch.ones_like(x, dtype=torch.bool)) if masked else x

    return run


# ---- arithmetic --------------------------------------------------------------------------------------------------


def _div(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc").to(a.dtype)


def _pow(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point() == b.is_floating_point():
        return torch.pow(a, b).to(a.dtype)
    return torch.pow(a.double(), b.double()).to(a.dtype) if not a.is_floating_point() else torch.pow(a, b)


def _power(spec: Spec) -> Kernel:
    exponent = spec.constant(1)
    if exponent is not None and exponent.size == 1 and exponent.ndim <= 1 and exponent.dtype.kind == "f":
        number = exponent.reshape(()).item()
        rank = exponent.ndim
        # A number has a gradient of its own that is cheaper than that of a tensor.
        return lambda a, b: torch.pow(a, number) if a.is_floating_point() and a.ndim >= rank else _pow(a, b)
    return _pow


def _mod(spec: Spec) -> Kernel:
    kernel: Kernel = torch.fmod if spec.attribute("fmod", 0) else torch.remainder
    return kernel


def _mean(*tensors: Tensor) -> Tensor:
    return reduce(torch.add, tensors) / len(tensors)


def _bit_shift(spec: Spec) -> Kernel:
    direction = spec.attribute("direction")
    if direction not in ("LEFT", "RIGHT"):
        raise Unsupported(f"direction is {direction!r}")
    kernel: Kernel = torch.bitwise_left_shift if direction == "LEFT" else torch.bitwise_right_shift
    return kernel


def _is_inf(spec: Spec) -> Kernel:
    positive, negative = spec.attribute("detect_positive", 1), spec.attribute("detect_negative", 1)

    def run(x: Tensor) -> Tensor:
        found = torch.zeros_like(x, dtype=torch.bool)
        if positive:
            found = found | (x == math.inf)
        return found | (x == -math.inf) if negative else found

    return run


# ---- types -------------------------------------------------------------------------------------------------------

_HALVES: Mapping[int, Any] = {onnx.TensorProto.FLOAT16: torch.float16, onnx.TensorProto.BFLOAT16: torch.bfloat16}


def _caster(number: int) -> Kernel:
    """A cast to the type with ONNX's ``number``; halves are rounded and then carried as float32."""
    kind = torch_type(number)
    half = _HALVES.get(number)
    if half is not None:
        return lambda x: x.to(half).to(kind)
    return lambda x: x.to(kind)


def _cast(spec: Spec) -> Kernel:
    spec.attribute("saturate"), spec.attribute("round_mode")  # of the eight-bit floats, which are unsupported
    to = spec.attribute("to")
    number = int(to) if isinstance(to, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(to)))
    return _caster(number)


def _cast_like(spec: Spec) -> Kernel:
    spec.attribute("saturate"), spec.attribute("round_mode")
    dtype = spec.node.inputs[1].dtype
    if dtype is None:
        raise Unsupported("the type of its second input is not declared")
    number = dtype if isinstance(dtype, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    cast = _caster(number)
    return lambda x, like: cast(x)


_UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": functional.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": functional.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "BitwiseNot": torch.bitwise_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": _softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}

_BINARY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Div": _div,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}

ELEMENTWISE: Table = MappingProxyType(
    {
        **{op: Operator(_plain(function)) for op, function in _UNARY.items()},
        **{op: Operator(_plain(function)) for op, function in _BINARY.items()},
        "Add": Operator(_plain(torch.add), weights=(0, 1)),
        "Sub": Operator(_plain(torch.sub), weights=(0, 1)),
        "Mul": Operator(_plain(torch.mul), weights=(0, 1)),
        "Pow": Operator(_power),
        "Mod": Operator(_mod),
        "Max": Operator(_fold(torch.maximum)),
        "Min": Operator(_fold(torch.minimum)),
        "Sum": Operator(_fold(torch.add)),
        "Mean": Operator(_plain(_mean)),
        "BitShift": Operator(_bit_shift),
        "IsInf": Operator(_is_inf),
        "LeakyRelu": Operator(_leaky_relu),
        "Elu": Operator(_elu),
        "Celu": Operator(_celu),
        "Selu": Operator(_selu),
        "ThresholdedRelu": Operator(_thresholded_relu),
        "HardSigmoid": Operator(_hard_sigmoid),
        "Gelu": Operator(_gelu),
        "Swish": Operator(_swish),
        "Shrink": Operator(_shrink),
        "PRelu": Operator(_plain(_prelu), weights=(1,)),
        "Clip": Operator(_clip, numbers=(1, 2)),
        "Dropout": Operator(_dropout, numbers=(1, 2), moves=True),
        "Where": Operator(_plain(torch.where), moves=True),
        "Identity": Operator(_plain(lambda x: x), weights=(0,), moves=True),
        "Cast": Operator(_cast),
        "CastLike": Operator(_cast_like),
    }
)
