"""QuantizeLinear and DequantizeLinear, through which gradients go straight.

A quantised tensor is carried as floating-point numbers that are whole, so that a gradient can pass: rounding counts as
the identity, clipping as what it is. Integer weights are trained as real numbers, see :class:`MasterWeight`.

Source: Y. Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnxcompress.executor.spec import Kernel, Operator, Spec, Table, Unsupported
from onnxcompress.graph import constant_value

__all__ = ["QUANTIZE", "MasterWeight", "fake_quantizer", "quantizes"]

#: smallest and largest number of a type that values can be quantised to
_LIMITS: Mapping[str, tuple[int, int]] = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-(2**15), 2**15 - 1),
    "uint16": (0, 2**16 - 1),
}


def quantizes(op: str) -> bool:
    """True where the output of operator ``op`` is a quantised tensor."""
    return op == "QuantizeLinear"


class _Quantize(torch.autograd.Function):  # type: ignore[misc] # torch is optional
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: float, high: float) -> Tensor:
        rounded = (x / scale).round_().add_(zero)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((rounded >= low) & (rounded <= high), scale)
        return rounded.clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        inside, scale = ctx.saved_tensors
        return gradient * inside / scale, None, None, None, None


class _FakeQuantize(torch.autograd.Function):  # type: ignore[misc]
    """Both ways in one, for a scale that is a number; ``low`` and ``high`` are counted from the zero point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = (low - 0.5) * scale, (high + 0.5) * scale
        return (x / scale).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        # The gradient of hardtanh is that of clipping, and quick.
        return torch.ops.aten.hardtanh_backward(gradient, x, *ctx.bounds), None, None, None


class _Round(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        rounded = x.round()
        ctx.save_for_backward((rounded >= low) & (rounded <= high))
        return rounded.clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


def _along(parameter: Tensor, shape: tuple[int, ...], axis: int, block: int) -> Tensor:
    """Scale or zero point in a shape that goes with a tensor of ``shape``."""
    if parameter.ndim == 0:
        return parameter
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])
    if parameter.ndim != 1:
        raise Unsupported("its scale has several axes and no block_size")
    if parameter.shape[0] == 1 or not shape:
        return parameter.reshape(())
    return parameter.reshape([-1 if a == axis % len(shape) else 1 for a in range(len(shape))])


def _placement(spec: Spec) -> tuple[int, int]:
    return spec.attribute("axis", 1), spec.attribute("block_size", 0) or 0


def _quantize(spec: Spec) -> Kernel:
    axis, block = _placement(spec)
    spec.attribute("saturate"), spec.attribute("precision")  # of eight-bit floats; of the division, in float32 here
    low, high = _LIMITS[quantized_type(spec)]

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        shape = tuple(x.shape)
        x = x if x.is_floating_point() else x.to(scale.dtype)
        factor = _along(scale, shape, axis, block).to(x.dtype)
        offset = torch.zeros((), dtype=x.dtype, device=x.device)
        if zero is not None:
            offset = _along(zero, shape, axis, block).to(x.dtype)
        return _Quantize.apply(x, factor, offset, low, high)

    return run


def quantized_type(spec: Spec) -> str:
    """Name of the type that a QuantizeLinear quantises to."""
    dtype = spec.node.inputs[2].dtype if spec.has(2) else None
    number = spec.attribute("output_dtype", 0)
    if dtype is None:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(number) if number else np.dtype(np.uint8)
    if isinstance(dtype, int):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    name = str(np.dtype(dtype).name)
    if name not in _LIMITS:
        raise Unsupported(f"values of type {name} are not quantised to")
    return name


def _dequantize(spec: Spec) -> Kernel:
    axis, block = _placement(spec)
    number = spec.attribute("output_dtype", 0)
    if number not in (0, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
        raise Unsupported("its output is no float")

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        shape = tuple(x.shape)
        factor, values = _along(scale, shape, axis, block), x.to(scale.dtype)
        if zero is not None:
            values = values - _along(zero, shape, axis, block).to(scale.dtype)
        return values * factor

    return run


def fake_quantizer(quantizer: gs.Node, dequantizer: gs.Node) -> Kernel | None:
    """One kernel for a pair of nodes with the same constant parameters for the whole tensor; None for another pair.

    It takes the pair's input, and is about twice as fast as the two.
    """
    if quantizer.op != "QuantizeLinear" or dequantizer.op != "DequantizeLinear":
        return None
    pairs = [[constant_value(t) if t.name else None for t in node.inputs[1:]] for node in (quantizer, dequantizer)]
    (scale, *zero), (other, *also) = ([v.reshape(-1) if v is not None else None for v in pair] for pair in pairs)
    if scale is None or other is None or scale.size != 1 or scale.dtype != np.float32 or scale != other:
        return None
    if len(zero) != 1 or len(also) != 1 or zero[0] is None or also[0] is None or zero[0].size != 1:
        return None
    if zero[0].dtype != also[0].dtype or zero[0] != also[0] or zero[0].dtype.name not in _LIMITS:
        return None
    if set(quantizer.attrs) - {"axis"} or set(dequantizer.attrs) - {"axis"}:
        return None
    low, high = _LIMITS[zero[0].dtype.name]
    factor, offset = float(scale[0]), int(zero[0][0])

    return lambda x: _FakeQuantize.apply(x, factor, low - offset, high - offset)


@dataclass
class MasterWeight:
    """An integer weight behind a DequantizeLinear as a real number that is rounded when it is used.

    The parameter is what the integers stand for, ``(q - zero_point) * scale``, and learns at the pace of a float
    weight; :meth:`integers` gives what is written back. It starts on the very integers of the file and never leaves
    ``low`` to ``high``: a weight without the type's smallest number stays so, because kernels rely on symmetry.
    """

    start: NDArray[Any]
    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, spec: Spec, integers: NDArray[Any]) -> MasterWeight:
        """The weight of a DequantizeLinear whose scale and zero point are constants."""
        axis, block = _placement(spec)
        scale, zero = spec.constant(1), spec.constant(2)
        if scale is None or (spec.has(2) and zero is None):
            raise Unsupported("its scale or zero point is no constant")
        shape = tuple(integers.shape)
        # int32 needs more digits than float32 has
        kind = torch.float64 if integers.dtype == np.int32 else torch.float32
        factor = _along(torch.from_numpy(scale.astype(np.float32)), shape, axis, block).to(kind)
        offset = torch.zeros((), dtype=kind)
        if zero is not None:
            offset = _along(torch.from_numpy(zero.astype(np.float64)), shape, axis, block).to(kind)
        limits = np.iinfo(integers.dtype)
        least = int(limits.min)
        if integers.dtype.kind == "i" and integers.size and int(integers.min()) > least:
            least += 1
        low, high = (torch.tensor(float(v), dtype=kind) - offset for v in (least, int(limits.max)))
        return cls(integers, factor, offset, low, high)

    def bound(self, low: NDArray[Any], high: NDArray[Any]) -> None:
        """Allow only integers from ``low`` to ``high`` at each place."""
        kind = self.scale.dtype
        self.low = torch.maximum(self.low, torch.from_numpy(np.array(low)).to(kind) - self.zero)
        self.high = torch.minimum(self.high, torch.from_numpy(np.array(high)).to(kind) - self.zero)

    def initial(self) -> Tensor:
        """The real numbers to start from."""
        return (torch.from_numpy(self.start.astype(np.float64)).to(self.scale.dtype) - self.zero) * self.scale

    def to(self, device: Any) -> None:
        """Move to a device."""
        self.scale, self.zero = self.scale.to(device), self.zero.to(device)
        self.low, self.high = self.low.to(device), self.high.to(device)

    def kernel(self, kind: Any) -> Kernel:
        """What replaces the DequantizeLinear: a function of the parameter, with a result of type ``kind``."""

        def run(parameter: Tensor, *_: Any) -> Tensor:
            rounded = _Round.apply(parameter / self.scale, self.low, self.high)
            return rounded.to(kind) * self.scale.to(kind)

        return run

    def integers(self, parameter: Tensor) -> NDArray[Any]:
        """What ``parameter`` is rounded to, in the type of the file."""
        rounded = torch.clamp((parameter.detach() / self.scale).round(), self.low, self.high) + self.zero
        values = rounded.to("cpu", torch.float64).numpy()
        whole: NDArray[Any] = np.rint(values).astype(self.start.dtype).reshape(self.start.shape)
        return whole


QUANTIZE: Table = MappingProxyType(
    {
        "QuantizeLinear": Operator(_quantize),
        "DequantizeLinear": Operator(_dequantize, weights=(0,)),
    }
)
