"""A convolution as a matrix product: its input cut into columns, one row of products for each output position.

``W X + b`` with the weight as ``[groups, filters, columns]`` and the input as ``[groups, columns, rows]``: a column is
one weight of a filter, a row one output position of one sample. ConvTranspose is the same on an input that is spread
out by its strides, with its kernels turned around.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.graph import attribute

__all__ = ["Moments", "conv_pads", "damped", "output_sizes", "spread_out", "unfold"]

Array = NDArray[Any]
Floats = NDArray[np.float64]

#: error of the sums of float32 products, relative to the mean input power
_PRODUCT_ERROR = 1e-4


def conv_pads(
    node: gs.Node, spatial: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding before and after, per spatial axis, as the attributes of the Conv say (auto_pad included)."""
    rank = len(kernel)
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for size, k, s, d in zip(spatial, kernel, strides, dilations, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            less, more = total // 2, total - total // 2
            pads.append((less, more) if mode == "SAME_UPPER" else (more, less))
        return pads
    given = attribute(node, "pads", [0] * (2 * rank)) if mode == "NOTSET" else [0] * (2 * rank)
    return list(zip(given[:rank], given[rank:], strict=True))


def output_sizes(
    padded: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Spatial sizes of what a convolution makes of an input that is padded already."""
    return [(size - (k - 1) * d - 1) // s + 1 for size, k, s, d in zip(padded, kernel, strides, dilations, strict=True)]


def spread_out(
    node: gs.Node, inputs: Array, kernel: Sequence[int], sizes: Sequence[int]
) -> tuple[Array, list[int], list[int]]:
    """(input, strides, dilations) of the convolution that a ConvTranspose is; kernels are to be turned around.

    Args:
        node: the ConvTranspose.
        inputs: ``[N, C, *spatial]``.
        kernel: spatial sizes of the kernel.
        sizes: spatial sizes of its output, which say where ``auto_pad`` and ``output_shape`` put the padding.
    """
    rank = len(kernel)
    strides = list(attribute(node, "strides", [1] * rank))
    dilations = list(attribute(node, "dilations", [1] * rank))
    extra = list(attribute(node, "output_padding", [0] * rank))
    mode = attribute(node, "auto_pad", "NOTSET")
    given = list(attribute(node, "pads", [0] * (2 * rank)))
    stuffed = np.zeros(
        (*inputs.shape[:2], *((n - 1) * s + 1 for n, s in zip(inputs.shape[2:], strides, strict=True))), inputs.dtype
    )
    stuffed[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = inputs
    pads, crop = [(0, 0), (0, 0)], [slice(None), slice(None)]
    for axis in range(rank):
        reach = (kernel[axis] - 1) * dilations[axis]
        if mode == "NOTSET" and "output_shape" not in node.attrs:
            begin = given[axis]
        else:
            total = (inputs.shape[2 + axis] - 1) * strides[axis] + extra[axis] + reach + 1 - sizes[axis]
            begin = total // 2 if mode != "SAME_LOWER" else total - total // 2
            begin = max(begin, 0) if mode != "VALID" else 0
        before = reach - begin
        after = sizes[axis] + reach - before - stuffed.shape[2 + axis]
        pads.append((max(before, 0), max(after, 0)))
        crop.append(slice(max(-before, 0), None if after >= 0 else after))
    return np.pad(stuffed[tuple(crop)], pads), [1] * rank, dilations


def unfold(
    padded: Array,
    groups: int,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    positions: NDArray[np.int64],
) -> Array:
    """``[groups, columns, samples * positions]``: what the filters see at ``positions`` of every sample.

    Args:
        padded: ``[N, C, *spatial]``, the padding being part of it.
        groups: groups of the convolution.
        kernel: spatial sizes of the kernel.
        strides: of the convolution.
        dilations: of the convolution.
        positions: flat indices of output positions.
    """
    sizes = output_sizes(padded.shape[2:], kernel, strides, dilations)
    # Index of each tap of each position in the flattened padded image: [columns / channels, positions].
    where = np.zeros((1, len(positions)), np.int64)
    taps = np.unravel_index(positions, sizes)
    for axis, (k, d, s) in enumerate(zip(kernel, dilations, strides, strict=True)):
        along = taps[axis] * s + (np.arange(k) * d)[:, None]
        where = (where[:, None] * padded.shape[2 + axis] + along).reshape(-1, len(positions))
    batch, channels = padded.shape[:2]
    flat = np.ascontiguousarray(padded.reshape(batch, channels, prod(padded.shape[2:])).swapaxes(0, 1))
    cut = np.empty((channels, len(where), batch, len(positions)), padded.dtype)
    for tap, places in enumerate(where):  # one tap at a time: each is written where it stays
        cut[:, tap] = flat[:, :, places]
    return cut.reshape(groups, channels // groups * len(where), -1)


class Moments:
    """Sums over rows that say, for any change of the weights, what the layer's error becomes.

    They are kept about the student as it is: of the residual ``D`` between what the layer should give and what it
    gives, and of its inputs ``X``. So small errors are not found as differences of large numbers. Products of one batch
    are float32, sums over batches float64.

    Args:
        weight: of the student, float32 [groups, filters, columns].
        bias: float32 [groups, filters].
    """

    def __init__(self, weight: Array, bias: Array) -> None:
        self._weight, self._bias = weight, bias
        groups, filters, columns = self._weight.shape
        self.count = 0
        self.gram = np.zeros((groups, columns, columns))
        self.inputs = np.zeros((groups, columns))
        self.cross = np.zeros((groups, filters, columns))
        self.residual = np.zeros((groups, filters))
        self.squares = np.zeros((groups, filters))
        self.signal = 0.0

    def add(self, columns: Array, aim: Array) -> None:
        """Take in some rows: [groups, columns, rows] and [groups, filters, rows]."""
        residual = aim - self._weight @ columns - self._bias[:, :, None]
        self.count += columns.shape[2]
        self.gram += columns @ columns.swapaxes(1, 2)
        self.cross += residual @ columns.swapaxes(1, 2)
        self.inputs += columns.sum(axis=2, dtype=np.float64)
        self.residual += residual.sum(axis=2, dtype=np.float64)
        self.squares += np.einsum("gij,gij->gi", residual, residual, dtype=np.float64)
        self.signal += float(np.einsum("gij,gij->", aim, aim, dtype=np.float64))

    def normal_equations(self, *, centred: bool) -> tuple[Floats, Floats]:
        """(X X', D X') a row, about the means where the bias is free."""
        gram, cross = self.gram / self.count, self.cross / self.count
        if centred:
            inputs, residual = self.inputs / self.count, self.residual / self.count
            # Products are float32: where inputs hardly vary, what is left about their means is rounding error.
            noise = _PRODUCT_ERROR * np.trace(gram, axis1=1, axis2=2) / gram.shape[1]
            gram = gram + noise[:, None, None] * np.eye(gram.shape[1])
            gram = gram - inputs[:, :, None] * inputs[:, None, :]
            cross = cross - residual[:, :, None] * inputs[:, None, :]
        return gram, cross

    def best_shift(self, change: Floats) -> Floats:
        """The change of the bias, [groups, filters], that goes best with ``change`` of the weights."""
        shift: Floats = (self.residual - np.einsum("gij,gj->gi", change, self.inputs)) / self.count
        return shift

    def relative(self, change: Floats, shift: Floats | float) -> float:
        """Squared error over squared signal if weights were changed by ``change`` and biases by ``shift``."""
        error = self.squares - 2 * np.einsum("gij,gij->gi", change, self.cross)
        error = error + np.einsum("gij,gij->gi", change @ self.gram, change)
        error = error - 2 * shift * (self.residual - np.einsum("gij,gj->gi", change, self.inputs))
        error = error + self.count * np.square(shift)
        return max(float(error.sum()), 0.0) / self.signal


def damped(gram: Floats, ridge: float) -> Floats:
    """``gram`` with ``ridge`` times its mean diagonal on the diagonal, for each group."""
    power = np.trace(gram, axis1=1, axis2=2) / gram.shape[1]
    power = np.where(power > 0, power, 1.0)
    result: Floats = gram + (ridge * power)[:, None, None] * np.eye(gram.shape[1])
    return result
