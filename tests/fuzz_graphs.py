"""A hypothesis strategy of small valid models: what exporters write, what they rarely write, what the rules allow.

:func:`models` draws a float type, an opset from 11 to the newest, and a few steps; each adds an operator or a wiring:
convolutions of every kind, matrix products, normalisation, shape arithmetic, If and Loop with weights of their own,
local functions, shared and overridable weights, residuals, Concat, Constant nodes, dead nodes, outputs in the middle.
Names are plain or as unusual as ONNX permits. Values stay near one, so that rounding stays small.

Models are drawn with ``N`` as a symbol; they compute for every N >= 1. Hypothesis shrinks to few steps and plain
choices: in every list of alternatives the simplest stands first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from models import BF16, BOOL, F16, F32, F64, I64, Net
from onnx import helper, numpy_helper

__all__ = ["NEWEST_OPSET", "OLDEST_OPSET", "models", "rename"]

OLDEST_OPSET, NEWEST_OPSET = 11, onnx.defs.onnx_opset_version()

Shape = tuple[int | str, ...]  # the first is "N" but for what does not depend on the batch
Draw = Callable[[st.SearchStrategy[Any]], Any]

#: opsets at which something changed come more often than those in between
_OPSETS = (17, 13, 11, 12, 14, 15, 16, 18, 19, 20, 21, 22, 23, 24, 25, 26, NEWEST_OPSET)
_TYPES = (*[F32] * 9, F64, F16, BF16)


class Builder(Net):
    """A :class:`models.Net` whose choices are drawn."""

    def __init__(self, draw: Draw, opset: int, dtype: int, seed: int) -> None:
        super().__init__(opset, seed=seed, dtype=dtype)
        self.draw = draw
        self.values: list[tuple[str, Shape]] = []
        self.shared: dict[tuple[int, ...], str] = {}
        self.depth = 0
        #: of names in a graph within a graph
        self.prefix = ""

    def _name(self, stem: str) -> str:
        return self.prefix + super()._name(stem)

    # -- drawing ------------------------------------------------------------------------------------------------------

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[self.draw(st.integers(0, len(choices) - 1))]

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def value(self, *ranks: int, fixed: bool = False) -> tuple[str, Shape] | None:
        """One of the values of these ranks, recent ones first; None where there is none."""
        found = [v for v in reversed(self.values) if not ranks or len(v[1]) in ranks]
        found = [v for v in found if "N" in v[1][:1] or fixed]
        return self.pick(found[:4]) if found else None

    def put(self, name: str, shape: Shape) -> None:
        if np.prod([d for d in shape if isinstance(d, int)]) <= 2048:
            self.values.append((name, shape))

    def axis(self, positive: int, rank: int) -> int:
        """The axis, counted from either end."""
        return self.pick((positive, positive - rank))

    def weight(self, *shape: int) -> str:
        """New weights, or those of another node of the same shape."""
        if shape in self.shared and self.pick((False, False, True)):
            return self.shared[shape]
        kind = self.pick(("initializer", "initializer", "initializer", "node", "identity", "zeros"))
        name = self.random(*shape)
        if kind == "zeros":  # a channel that is nothing
            array = numpy_helper.to_array(self.initializers[-1]).copy()
            array[:1] = 0
            self.initializers[-1].CopyFrom(numpy_helper.from_array(array, name))
        if kind == "node":
            proto = self.initializers.pop()
            self.add("Constant", to=name, value=proto)
        if kind == "identity":
            name = self.add("Identity", name)
        self.shared[shape] = name
        return name

    def vector(self, size: int, *, positive: bool = False) -> str:
        if positive:
            return self.floats(self.rng.uniform(0.5, 1.5, size))
        return self.floats(self.rng.standard_normal(size) * 0.5)

    # -- images -------------------------------------------------------------------------------------------------------

    def conv_step(self) -> None:
        found = self.value(4)
        if found is None:
            return
        x, (n, channels, height, width) = found
        kind = self.pick(("dense", "pointwise", "depthwise", "grouped", "strided", "same", "dilated"))
        group = {"depthwise": channels, "grouped": 2 if channels % 2 == 0 else 1}.get(kind, 1)
        out = channels if kind == "depthwise" else self.pick((4, 6))
        size = 1 if kind == "pointwise" else 3
        attributes: dict[str, Any] = {"group": group}
        if group == 1 and self.flag():
            attributes.pop("group")
        stride = 1
        if kind == "strided":
            attributes |= {"strides": [2, 2], "pads": [1, 1, 1, 1]}
            stride = 2
        elif kind == "same":
            attributes["auto_pad"] = self.pick(("SAME_UPPER", "SAME_LOWER"))
        elif kind == "dilated":
            attributes |= {"dilations": [2, 2], "pads": [2, 2, 2, 2]}
        else:
            attributes["pads"] = [size // 2] * 4
        bias = self.pick(([], [self.vector(out)], [""]))
        y = self.add("Conv", x, self.weight(out, channels // group, size, size), *bias, **attributes)
        self.put(y, (n, out, -(-height // stride), -(-width // stride)))

    def conv_transpose_step(self) -> None:
        found = self.value(4)
        if found is None or found[1][2] > 6:
            return
        x, (n, channels, height, width) = found
        group = self.pick((1, 2)) if channels % 2 == 0 else 1
        bias = self.pick(([], [self.vector(2 * group)]))
        y = self.add("ConvTranspose", x, self.weight(channels, 2, 2, 2), *bias, strides=[2, 2], group=group)
        self.put(y, (n, 2 * group, height * 2, width * 2))

    def batch_norm_step(self) -> None:
        found = self.value(4, 3, 2)
        if found is None:
            return
        x, shape = found
        attributes = self.pick(({}, {"epsilon": 1e-3}, {"momentum": 0.5}))
        if self.dtype in (F16, BF16):
            return  # the statistics have a type of their own from opset 14 on; below, exporters do not write it
        self.put(self.batch_norm(x, shape[1], **attributes), shape)

    def pool_step(self) -> None:
        found = self.value(4)
        if found is None:
            return
        x, (n, channels, height, width) = found
        kind = self.pick(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"))
        if kind.startswith("Global"):
            self.put(self.add(kind, x), (n, channels, 1, 1))
        elif min(height, width) >= 2:
            y = self.add(kind, x, kernel_shape=[2, 2], strides=[2, 2])
            self.put(y, (n, channels, height // 2, width // 2))

    def mean_step(self) -> None:
        """A pointwise convolution that pads, as SqueezeNet's last one does, up to the mean over all positions."""
        found = self.value(4)
        if found is None:
            return
        x, (n, channels, height, width) = found
        pads = self.pick(([1, 1, 1, 1], [0, 1, 2, 0], [0, 0, 0, 0]))
        bias = self.pick(([], [self.vector(6)]))
        y = self.add("Conv", x, self.weight(6, channels, 1, 1), *bias, pads=pads)
        for op in self.pick((("Relu",), (), ("LeakyRelu", "Identity"), ("Sigmoid",))):
            y = self.add(op, y)
        if self.flag():
            y = self.add("GlobalAveragePool", y)
        elif self.opset < 18:
            y = self.add("ReduceMean", y, axes=[2, 3], keepdims=1)
        else:
            y = self.add("AveragePool", y, kernel_shape=[height + pads[0] + pads[2], width + pads[1] + pads[3]])
        self.put(y, (n, 6, 1, 1))

    def channels_step(self) -> None:
        """Move channels about: pad, slice, gather, split, shuffle, depth to space."""
        found = self.value(4)
        if found is None:
            return
        x, (n, channels, height, width) = found
        kind = self.pick(("slice", "pad", "gather", "split", "shuffle", "depth", "transpose", "resize", "flip"))
        if kind == "slice" and channels > 2:
            axis = self.ints(self.axis(1, 4))
            inputs = [self.ints(1), self.ints(self.pick((channels, 1 << 30))), axis, *self.pick(([], [self.ints(1)]))]
            self.put(self.add("Slice", x, *inputs), (n, channels - 1, height, width))
        elif kind == "flip":
            inputs = [self.ints(-1), self.ints(-(1 << 30)), self.ints(self.axis(3, 4)), self.ints(-1)]
            self.put(self.add("Slice", x, *inputs), (n, channels, height, width))
        elif kind == "pad":
            amount = [self.floats(0.5)] if self.flag() else []
            y = self.add("Pad", x, self.ints(0, 1, 0, 0, 0, 1, 0, 0), *amount)
            self.put(y, (n, channels + 2, height, width))
        elif kind == "gather":
            picked = [0, channels - 1, -1]
            self.put(self.add("Gather", x, self.ints(*picked), axis=self.axis(1, 4)), (n, 3, height, width))
        elif kind == "split" and channels >= 2:
            sizes = (1, channels - 1)
            names = [self._name("part"), self._name("part")]
            if self.opset >= 13:
                self.add("Split", x, self.ints(*sizes), to=names, axis=self.axis(1, 4))
            else:
                self.add("Split", x, to=names, axis=self.axis(1, 4), split=list(sizes))
            for name, size in zip(names, sizes, strict=True):
                self.put(name, (n, size, height, width))
        elif kind == "shuffle" and channels % 2 == 0:
            y = self.add("Reshape", x, self.ints(0, 2, channels // 2, height, width))
            y = self.add("Transpose", y, perm=[0, 2, 1, 3, 4])
            self.put(self.add("Reshape", y, self.ints(0, -1, height, width)), (n, channels, height, width))
        elif kind == "depth" and channels % 4 == 0:
            y = self.add("DepthToSpace", x, blocksize=2)
            self.put(y, (n, channels // 4, height * 2, width * 2))
        elif kind == "transpose":
            self.put(self.add("Transpose", x, perm=[0, 1, 3, 2]), (n, channels, width, height))
        elif kind == "resize" and self.dtype == F32:
            scales = self.const([1, 1, 2, 2], np.float32)
            roi = "" if self.opset >= 13 else self.const([], np.float32)
            y = self.add("Resize", x, roi, scales, mode="nearest")
            self.put(y, (n, channels, height * 2, width * 2))

    def flatten_step(self) -> None:
        found = self.value(4)
        if found is None:
            return
        x, (n, channels, height, width) = found
        size = channels * height * width
        if size > 256:
            return
        kind = self.pick(("flatten", "reshape", "dynamic", "squeeze"))
        if kind == "flatten":
            y = self.add("Flatten", x, axis=self.axis(1, 4))
        elif kind == "reshape":
            y = self.add("Reshape", x, self.ints(*self.pick(((0, -1), (-1, size)))))
        elif kind == "dynamic":
            batch = self.add("Gather", self.add("Shape", x), self.ints(0), axis=0)
            y = self.add("Reshape", x, self.add("Concat", batch, self.ints(-1), axis=0))
        elif height == width == 1:
            y = self.squeeze(x, [2, 3], 4)
        else:
            return
        self.put(y, (n, size))

    def squeeze(self, x: str, axes: list[int], rank: int) -> str:
        axes = [self.axis(a, rank) for a in axes]
        if self.opset >= 13:
            return self.add("Squeeze", x, self.ints(*axes))
        return self.add("Squeeze", x, axes=axes)

    def unsqueeze(self, x: str, axes: list[int], rank: int) -> str:
        axes = [self.axis(a, rank) for a in axes]
        if self.opset >= 13:
            return self.add("Unsqueeze", x, self.ints(*axes))
        return self.add("Unsqueeze", x, axes=axes)

    def block_step(self) -> None:
        """Conv, BatchNormalization and activation as networks have them, with a residual where it fits."""
        found = self.value(4)
        if found is None:
            return
        x, (n, channels, height, width) = found
        residual = self.pick((False, False, True))
        y, inner = x, channels
        for last in (False, True) if residual else (True,):
            out = channels if residual and last else self.pick((4, 6, 8))
            bias = [] if self.flag() else [self.vector(out)]
            y = self.add("Conv", y, self.weight(out, inner, 3, 3), *bias, pads=[1, 1, 1, 1])
            if self.dtype not in (F16, BF16) and self.flag():
                y = self.batch_norm(y, out)
            if not last:
                y = self.add(self.pick(("Relu", "LeakyRelu", "Sigmoid")), y)
            inner = out
        if residual:
            y = self.add("Add", y, x)
        self.put(self.add("Relu", y), (n, inner, height, width))

    def perceptron_step(self) -> None:
        """Two matrix products with an activation in between, with a residual where it fits."""
        found = self.value(2, 3)
        if found is None:
            return
        x, shape = found
        size, hidden = int(shape[-1]), self.pick((8, 6))
        out = size if self.flag() else 5
        gemm = len(shape) == 2 and self.flag()
        y = x
        for inner, outer in ((size, hidden), (hidden, out)):
            if gemm:
                y = self.add("Gemm", y, self.weight(outer, inner), self.vector(outer), transB=1)
            else:
                y = self.add("Add", self.add("MatMul", y, self.weight(inner, outer)), self.vector(outer))
            if inner == size:
                y = self.add(self.pick(("Relu", "Tanh", "Elu")), y)
        if out == size:
            y = self.add("Add", x, y)
        self.put(y, (*shape[:-1], out))

    # -- matrices -----------------------------------------------------------------------------------------------------

    def matmul_step(self) -> None:
        found = self.value(2, 3)
        if found is None:
            return
        x, shape = found
        size, out = int(shape[-1]), self.pick((5, 8))
        kind = (
            self.pick(("matmul", "bias", "gemm", "left", "vector"))
            if len(shape) == 2
            else self.pick(("matmul", "bias"))
        )
        if kind == "gemm":
            attributes = self.pick(({}, {"alpha": 0.5}, {"beta": 2.0}, {"alpha": 0.5, "beta": 0.25}))
            turned = self.flag()
            weight = self.weight(out, size) if turned else self.weight(size, out)
            bias = self.pick(
                ([], [self.vector(out)], [self.floats(self.rng.standard_normal((1, out)))], [self.floats(0.5)])
            )
            y = self.add("Gemm", x, weight, *bias, **attributes, **({"transB": 1} if turned else {}))
        elif kind == "left":
            y = self.add("Transpose", x, perm=[1, 0])
            y = self.add("MatMul", self.weight(out, size), y)
            y = self.add("Transpose", y, perm=[1, 0])
        elif kind == "vector":
            y = self.add("MatMul", x, self.vector(size))
            y, out = self.unsqueeze(y, [1], 2), 1
        else:
            y = self.add("MatMul", x, self.weight(size, out))
            if kind == "bias":
                sides = [y, self.vector(out)]
                y = self.add("Add", *(sides if self.flag() else sides[::-1]))
        self.put(y, (*shape[:-1], out))

    def normalise_step(self) -> None:
        found = self.value(2, 3)
        if found is None:
            return
        x, shape = found
        size, rank = int(shape[-1]), len(shape)
        kind = self.pick(("softmax", "layer", "written", "mean"))
        if kind == "softmax":
            axis = self.axis(rank - 1, rank)
            self.put(self.add(self.pick(("Softmax", "LogSoftmax")), x, axis=axis), shape)
        elif kind == "layer" and self.opset >= 17:
            bias = self.pick(([], [self.vector(size)]))
            scale = self.vector(size, positive=True)
            y = self.add("LayerNormalization", x, scale, *bias, axis=self.axis(rank - 1, rank), epsilon=0.1)
            self.put(y, shape)
        elif kind == "written":
            centred = self.add("Sub", x, self.reduce("ReduceMean", x, rank))
            power = self.reduce("ReduceMean", self.add("Mul", centred, centred), rank)
            deviation = self.add("Sqrt", self.add("Add", power, self.floats(0.1)))
            y = self.add("Mul", self.add("Div", centred, deviation), self.vector(size, positive=True))
            self.put(self.add("Add", y, self.vector(size)), shape)
        elif kind == "mean":
            self.put(self.reduce(self.pick(("ReduceMean", "ReduceMax", "ReduceSum")), x, rank), (*shape[:-1], 1))

    def reduce(self, op: str, x: str, rank: int) -> str:
        axes = [self.axis(rank - 1, rank)]
        if self.opset >= (13 if op == "ReduceSum" else 18):
            return self.add(op, x, self.ints(*axes), keepdims=1)
        return self.add(op, x, axes=axes, keepdims=1)

    def attention_step(self) -> None:
        found = self.value(3)
        if found is None:
            return
        x, (n, length, size) = found
        query, key, value = (self.add("MatMul", x, self.weight(int(size), 4)) for _ in range(3))
        heads = [self.add("Reshape", t, self.ints(0, 0, 2, 2)) for t in (query, key, value)]
        q, k, v = (
            self.add("Transpose", t, perm=perm)
            for t, perm in zip(heads, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
        )
        scores = self.add("Softmax", self.add("Mul", self.add("MatMul", q, k), self.floats(0.5)), axis=-1)
        y = self.add("Transpose", self.add("MatMul", scores, v), perm=[0, 2, 1, 3])
        self.put(self.add("Reshape", y, self.ints(0, 0, 4)), (n, length, 4))

    def embedding_step(self) -> None:
        """A table that token numbers pick from, as sequences [N, 4, size]."""
        if not any(v.name == "ids" for v in self.inputs):
            self.input("ids", ["N", 4], I64)
        size = self.pick((4, 8))
        self.put(self.add("Gather", self.weight(5, size), "ids", axis=0), ("N", 4, size))

    # -- anything -----------------------------------------------------------------------------------------------------

    def activation_step(self) -> None:
        found = self.value()
        if found is None:
            return
        x, shape = found
        kinds = [
            "Relu",
            "Sigmoid",
            "Tanh",
            "LeakyRelu",
            "Elu",
            "Neg",
            "Abs",
            "Softplus",
            "Clip",
            "PRelu",
            "Gelu",
            "SiLU",
        ]
        kind = self.pick([*kinds, "HardSwish"] if self.opset >= 14 else kinds)
        if kind == "Clip":
            limits = self.pick((["", self.floats(0.5)], [self.floats(0.0), self.floats(6.0)], [self.floats(0.0)], []))
            self.put(self.add("Clip", x, *limits), shape)
        elif kind == "PRelu":
            slope = self.floats(0.25) if len(shape) < 4 else self.floats(np.full((shape[1], 1, 1), 0.25))
            self.put(self.add("PRelu", x, slope), shape)
        elif kind == "Gelu":
            if self.opset >= 20 and self.flag():
                y = self.add("Gelu", x, **self.pick(({}, {"approximate": "tanh"})))
            else:
                y = self.add("Erf", self.add("Div", x, self.floats(2**0.5)))
                y = self.add("Mul", self.add("Mul", x, self.add("Add", y, self.floats(1.0))), self.floats(0.5))
            self.put(y, shape)
        elif kind == "SiLU":
            self.put(self.add("Mul", x, self.add("Sigmoid", x)), shape)
        else:
            self.put(self.add(kind, x), shape)

    def affine_step(self) -> None:
        """Add or multiply by a constant, of one number, one a channel, or everywhere."""
        found = self.value()
        if found is None:
            return
        x, shape = found
        sizes = [(), (1,), (int(shape[-1]),) if shape[-1] != "N" else (), tuple(d for d in shape[1:] if d != "N")]
        if len(shape) == 4:
            sizes.append((int(shape[1]), 1, 1))
        size = self.pick(sizes)
        operand = self.floats(self.rng.uniform(0.5, 1.5, size) * self.rng.choice([-1, 1], size))
        sides = [x, operand]
        op = self.pick(("Add", "Mul", "Sub", "Div"))
        if op == "Add" and self.flag():
            sides.reverse()
        self.put(self.add(op, *sides), shape)

    def join_step(self) -> None:
        """Residuals, products, concatenations, selections of two values that fit."""
        found = self.value()
        if found is None:
            return
        x, shape = found
        same = [v for v in reversed(self.values) if v[1] == shape]
        fitting = [
            v
            for v in reversed(self.values)
            if len(v[1]) == len(shape) > 1 and v[1][:1] + v[1][2:] == shape[:1] + shape[2:]
        ]
        kind = self.pick(("Add", "Concat", "Mul", "Sum", "Where", "Max"))
        if kind == "Concat":
            other = self.pick(fitting[:4]) if fitting else found
            if len(shape) < 2 or (not fitting):
                return
            y = self.add("Concat", x, other[0], axis=self.axis(1, len(shape)))
            self.put(y, (shape[0], shape[1] + other[1][1], *shape[2:]))  # type: ignore[operator]
            return
        other = self.pick(same[:4])
        if kind == "Where":
            chosen = self.add("Greater", x, self.floats(0.0))
            self.put(self.add("Where", chosen, x, other[0]), shape)
        elif kind == "Sum":
            self.put(self.add("Sum", x, other[0], *self.pick(([], [x]))), shape)
        else:
            self.put(self.add(kind, x, other[0]), shape)

    def no_op_step(self) -> None:
        """What leaves a value as it is."""
        found = self.value()
        if found is None:
            return
        x, shape = found
        rank = len(shape)
        kind = self.pick(
            ("Identity", "Dropout", "Cast", "Transpose", "Unsqueeze", "Expand", "Slice", "Concat", "Pow", "Mul")
        )
        if kind == "Dropout":
            if self.opset >= 12:
                y = self.add("Dropout", x, *self.pick(([], [self.const(0.3, np.float32)], ["", ""])))
            else:
                y = self.add("Dropout", x, ratio=0.3)
        elif kind == "Cast":
            wide = self.add("Cast", x, to_=F64 if self.dtype == F32 else F32)
            y = self.add("Cast", wide, to_=self.dtype)
        elif kind == "Transpose":
            y = self.add("Transpose", x, perm=list(range(rank)))
        elif kind == "Unsqueeze":
            y = self.squeeze(self.unsqueeze(x, [1], rank + 1), [1], rank + 1)
        elif kind == "Expand":
            y = self.add("Expand", x, self.add("Shape", x))
        elif kind == "Slice":
            y = self.add("Slice", x, self.ints(0), self.ints(1 << 30), self.ints(self.axis(0, rank)))
        elif kind == "Concat":
            y = self.add("Concat", x, axis=self.axis(rank - 1, rank))
        elif kind == "Pow":
            y = self.add("Pow", x, self.floats(1.0))
        elif kind == "Mul":
            y = self.add("Mul", x, self.floats(1.0))
        else:
            y = self.add("Identity", x)
        self.put(y, shape)

    def constants_step(self) -> None:
        """A value that is known without running: constants, their arithmetic, shapes."""
        found = self.value()
        if found is None:
            return
        x, shape = found
        kind = self.pick(("sum", "cast", "shape", "fill", "nodes"))
        if kind == "sum":
            c = self.add("Mul", self.floats(0.5), self.floats([0.5]))
        elif kind == "cast":
            c = self.add("Cast", self.const(0.25, np.float32), to_=self.dtype)
        elif kind == "shape":  # the size of a known axis
            size = self.add("Gather", self.add("Shape", x), self.const(len(shape) - 1, np.int64))
            c = self.add("Reciprocal", self.add("Cast", size, to_=self.dtype))
        elif kind == "fill":
            filling = helper.make_tensor("value", self.dtype, [1], [0.5])
            c = self.add("ConstantOfShape", self.ints(1), value=filling)
        else:
            first = self.add("Constant", value=helper.make_tensor("value", self.dtype, [1], [0.5]))
            c = self.add("Sqrt", self.add("Constant", value=helper.make_tensor("value", self.dtype, [], [0.25])))
            c = self.add("Add", first, c)
        self.put(self.add("Add", x, c), shape)

    # -- graphs in graphs ---------------------------------------------------------------------------------------------

    def inner(self, name: str, x: str, shape: Shape) -> Builder:
        """The body of a node in an If or a Loop, which reads ``x`` and weights from outside, or of its own."""
        body = Builder(self.draw, self.opset, self.dtype, seed=0)
        body.rng, body.depth = self.rng, self.depth + 1
        body.prefix = self._name(name) + "_"
        body.shared = dict(self.shared)
        body.values = [(x, shape)]
        return body

    def shaped(self, steps: int, shape: Shape) -> str:
        """After some steps a value of ``shape`` that the graph itself makes."""
        allowed = [self.activation_step, self.affine_step, self.no_op_step, self.constants_step, self.square_step]
        if self.depth < 2:
            allowed.append(self.if_step)
        for _ in range(steps):
            self.pick(allowed)()
        name = next(name for name, found in reversed(self.values) if found == shape)
        return self.add("Identity", name)

    def square_step(self) -> None:
        found = self.value(2, 3)
        if found is not None:
            x, shape = found
            self.put(self.add("MatMul", x, self.weight(int(shape[-1]), int(shape[-1]))), shape)

    def if_step(self) -> None:
        found = self.value()
        if found is None:
            return
        x, shape = found
        kind = self.pick(("input", "true", "false", "shape"))
        if kind == "input":
            condition = "flag"
            if self.depth == 0 and not any(v.name == "flag" for v in self.inputs):
                self.input("flag", [], BOOL)
            elif self.depth:
                condition = self.const(True)
        elif kind == "shape":
            size = self.add("Size", self.add("Shape", x))
            condition = self.add("Equal", size, self.const(len(shape), np.int64))
        else:
            condition = self.const(kind == "true")
        branches = []
        for name in ("then", "else"):
            body = self.inner(name, x, shape)
            result = body.shaped(self.pick((1, 2)), shape)
            body.output(result, list(shape))
            branches.append(body.body(name))
        self.put(self.add("If", condition, then_branch=branches[0], else_branch=branches[1]), shape)

    def loop_step(self) -> None:
        found = self.value()
        if found is None or self.depth:
            return
        x, shape = found
        state = self._name("state")
        body = self.inner("body", state, shape)
        turn, going = body._name("turn"), body._name("going")
        body.input(turn, [], I64)
        body.input(going, [], BOOL)
        body.input(state, list(shape))
        result = body.shaped(self.pick((1, 2)), shape)
        goes_on = body.add("Identity", going)
        body.output(goes_on, [], BOOL)
        body.output(result, list(shape))
        count = self.const(self.pick((2, 1, 0)), np.int64)
        self.put(self.add("Loop", count, self.const(True), x, body=body.body("body")), shape)

    def function_step(self) -> None:
        """A call of a function that the model brings."""
        found = self.value()
        if found is None or self.dtype == BF16:
            return
        x, shape = found
        name = f"Scaled{len(self.functions)}"
        nodes = [
            helper.make_node("Sigmoid", ["a"], ["s"], name="inner"),
            helper.make_node("Mul", ["s", "b"], ["y"], name="product"),
        ]
        imports = [helper.make_opsetid("", self.opset)]
        self.functions.append(helper.make_function("tests.functions", name, ["a", "b"], ["y"], nodes, imports))
        self.domains["tests.functions"] = 1
        self.ir_version = max(self.ir_version, 8)
        self.put(self.add(name, x, self.pick((x, self.floats(0.5))), domain="tests.functions"), shape)

    def dead_step(self) -> None:
        """What nothing reads."""
        kind = self.pick(("node", "weight", "constant"))
        found = self.value()
        if kind == "weight" or found is None:
            self.random(3)
        elif kind == "constant":
            self.add("Constant", value=helper.make_tensor("value", self.dtype, [1], [0.5]))
        else:
            self.add("Relu", found[0])

    def model_of(self) -> onnx.ModelProto:
        """The steps, then the outputs."""
        steps: tuple[Callable[[], None], ...] = (
            self.activation_step,
            self.conv_step,
            self.matmul_step,
            self.flatten_step,
            self.join_step,
            self.batch_norm_step,
            self.affine_step,
            self.no_op_step,
            self.constants_step,
            self.channels_step,
            self.normalise_step,
            self.pool_step,
            self.mean_step,
            self.mean_step,
            self.block_step,
            self.block_step,
            self.perceptron_step,
            self.perceptron_step,
            self.batch_norm_step,
            self.batch_norm_step,
            self.attention_step,
            self.embedding_step,
            self.if_step,
            self.loop_step,
            self.function_step,
            self.conv_transpose_step,
            self.dead_step,
        )
        kind = self.pick(("image", "image", "rows", "sequence"))
        shape = {"image": ("N", 4, 4, 4), "rows": ("N", 6), "sequence": ("N", 3, 6)}[kind]
        self.put(self.input("x", list(shape)), shape)
        for _ in range(self.draw(st.integers(1, 9))):
            self.pick(steps)()
        made = {name for node in self.nodes for name in node.output}
        candidates = [v for v in self.values if v[0] in made and "N" in v[1][:1]]
        if not candidates:
            candidates = [(self.add("Identity", "x"), shape)]
        chosen = [candidates[-1]]
        if len(candidates) > 1 and self.flag():
            chosen.append(self.pick(candidates[:-1]))
        if self.pick((False, False, False, False, True)):
            chosen.append(self.pick((chosen[-1], ("x", shape))))  # one twice, or an input as it is
        told: dict[str, list[int | str | None]] = {}
        for name, found in chosen:
            told.setdefault(name, list(found) if self.flag() else [None] * len(found))
            self.output(name, told[name])
        if self.pick((False, False, True)) and self.initializers:
            weight = self.pick(self.initializers)  # one that the caller may replace
            self.inputs.append(helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims)))
        return self.model()


def rename(model: onnx.ModelProto, style: str) -> None:
    """Rename every tensor and node of ``model``, functions aside: ``plain`` leaves all as it is."""
    if style == "plain":
        return
    tensors: dict[str, str] = {}

    def tensor(name: str) -> str:
        if not name:
            return name
        if name not in tensors:
            number = len(tensors)
            tensors[name] = {
                "numbers": str(number),
                "unicode": f"größe/层·{number} 🙂",
                "paths": f"/model/layer.{number}/../out:0",
                "markup": f"[red]%s{{0}}\\n\"'{number}",
                "long": "x" * 300 + str(number),
                "quiet": f"c{number}",
            }[style]
        return tensors[name]

    def walk(graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.name = tensor(value.name)
        for node in graph.node:
            node.input[:] = [tensor(name) for name in node.input]
            node.output[:] = [tensor(name) for name in node.output]
            if style == "numbers":
                node.name = ""
            elif style == "quiet":
                node.name = "same"
            elif node.name:
                node.name = tensor(next(name for name in node.output if name))
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g)

    walk(model.graph)


STYLES = ("plain", "plain", "plain", "numbers", "unicode", "paths", "markup", "long", "quiet")


@st.composite
def models(draw: Draw, *, dtypes: Sequence[int] = _TYPES, opsets: Sequence[int] = _OPSETS) -> onnx.ModelProto:
    """A valid model: the full checker passes. Inputs are ``x``, and ``ids`` or ``flag`` where something needs them."""
    dtype = dtypes[draw(st.integers(0, len(dtypes) - 1))]
    opset = opsets[draw(st.integers(0, len(opsets) - 1))]
    if dtype == BF16:
        opset = max(opset, 22)  # Conv and the like take it from there on
    builder = Builder(draw, opset, dtype, seed=draw(st.integers(0, 3)))
    model = builder.model_of()
    rename(model, STYLES[draw(st.integers(0, len(STYLES) - 1))])
    onnx.checker.check_model(model, full_check=True)
    return model
