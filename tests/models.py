"""One tiny real model per hazard: what a pass may stumble over. Weights are seeded, so a builder repeats its bytes.

:data:`HAZARDS` lists them; :func:`make_feeds` makes inputs that fit. ``runnable`` is False where onnxruntime's CPU
provider has no kernel. :class:`Net` is the shorthand that the builders are written in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["BY_NAME", "HAZARDS", "OPSETS", "Hazard", "Net", "make_feeds"]

F32, F16, F64, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16
I64, I32, U8, BOOL = TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8, TensorProto.BOOL

Shape = Sequence[int | str | None]

#: opsets of the default domain at which operators of interest changed, up to what onnxruntime reads
OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)


class Net:
    """Builds a model node by node; every call returns the names of the outputs."""

    def __init__(self, opset: int = 17, *, ir_version: int = 8, seed: int = 0, dtype: int = F32) -> None:
        self.opset, self.ir_version, self.dtype = opset, ir_version, dtype
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.domains: dict[str, int] = {}
        self.count = 0

    def input(self, name: str, shape: Shape | None, dtype: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, self.dtype if dtype is None else dtype, shape))
        return name

    def output(self, name: str, shape: Shape | None, dtype: int | None = None) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, self.dtype if dtype is None else dtype, shape))
        return name

    def const(self, value: Any, dtype: DTypeLike | None = None, name: str | None = None) -> str:
        name = name or self._name("const")
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def floats(self, value: Any, name: str | None = None) -> str:
        """An initializer of the float type of this net."""
        return self.const(value, helper.tensor_dtype_to_np_dtype(self.dtype), name)

    def ints(self, *values: int) -> str:
        return self.const(list(values), np.int64)

    def random(self, *shape: int, name: str | None = None) -> str:
        """Weights whose scale keeps activations near one."""
        fan = max(1, int(np.prod(shape[1:])))
        return self.floats(self.rng.standard_normal(shape) / np.sqrt(fan), name or self._name("weight"))

    def add(self, op: str, *inputs: str, to: str | Sequence[str] | None = None, **attributes: Any) -> str:
        """Append a node; returns the name of its first output."""
        outputs = [self._name(op.lower())] if to is None else [to] if isinstance(to, str) else list(to)
        domain = attributes.pop("domain", "")
        if "to_" in attributes:  # the attribute of Cast; the output is called `to` here
            attributes["to"] = attributes.pop("to_")
        node = helper.make_node(op, inputs, outputs, name=f"n{len(self.nodes)}_{op}", domain=domain, **attributes)
        self.nodes.append(node)
        return outputs[0]

    def conv(self, x: str, channels: int, out: int, kernel: Sequence[int] = (3, 3), **attributes: Any) -> str:
        group = attributes.get("group", 1)
        attributes.setdefault("pads", [k // 2 for k in kernel] * 2)
        to = attributes.pop("to", None)
        bias = [self.random(out)] if attributes.pop("bias", False) else []
        weight = self.random(out, channels // group, *kernel)
        return self.add("Conv", x, weight, *bias, to=to, kernel_shape=list(kernel), **attributes)

    def batch_norm(self, x: str, channels: int, to: str | Sequence[str] | None = None, **attributes: Any) -> str:
        parameters = (
            self.floats(self.rng.uniform(0.5, 1.5, channels), self._name("gamma")),
            self.floats(self.rng.standard_normal(channels), self._name("beta")),
            self.floats(self.rng.standard_normal(channels), self._name("mean")),
            self.floats(self.rng.uniform(0.2, 2.0, channels), self._name("variance")),
        )
        return self.add("BatchNormalization", x, *parameters, to=to, **attributes)

    def body(self, name: str) -> onnx.GraphProto:
        """What was built, as the body of a control-flow node."""
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)

    def model(self) -> onnx.ModelProto:
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(domain, version) for domain, version in self.domains.items()]
        model = helper.make_model(
            self.body("net"), opset_imports=opsets, functions=self.functions, producer_name="tests"
        )
        model.ir_version = max(self.ir_version, helper.find_min_ir_version_for(opsets, ignore_unknown=True))
        return model

    def _name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}_{self.count}"


def image(net: Net, channels: int = 3, size: int | str = 8, batch: int | str = "N", rank: int = 4) -> str:
    return net.input("x", [batch, channels, *[size] * (rank - 2)])


# ---- convolutions ------------------------------------------------------------------------------------------------


def conv_bn_relu(opset: int = 17, dtype: int = F32) -> onnx.ModelProto:
    net = Net(opset, dtype=dtype)
    y = net.batch_norm(net.conv(image(net), 3, 4), 4, epsilon=1e-3)
    net.add("Relu", y, to="y")
    net.output("y", ["N", 4, 8, 8])
    return net.model()


def conv_nd(rank: int) -> onnx.ModelProto:
    net = Net()
    y = net.conv(image(net, 2, 6, rank=rank), 2, 4, [3] * (rank - 2), bias=True)
    net.add("Relu", net.batch_norm(y, 4), to="y")
    net.output("y", ["N", 4, *[6] * (rank - 2)])
    return net.model()


def conv_grouped() -> onnx.ModelProto:
    net = Net()
    y = net.batch_norm(net.conv(image(net, 4), 4, 8, group=2), 8)
    y = net.batch_norm(net.conv(net.add("Relu", y), 8, 8, group=8, strides=[2, 2]), 8)  # depthwise
    net.add("Clip", y, net.floats(0.0), net.floats(6.0), to="y")
    net.output("y", ["N", 8, 4, 4])
    return net.model()


def conv_transpose_grouped() -> onnx.ModelProto:
    net = Net()
    y = net.add("ConvTranspose", image(net, 4), net.random(4, 3, 2, 2), group=2, strides=[2, 2])
    net.add("Relu", net.batch_norm(y, 6), to="y")
    net.output("y", ["N", 6, 16, 16])
    return net.model()


def conv_affine_chain() -> onnx.ModelProto:
    net = Net()
    y = net.batch_norm(net.conv(image(net), 3, 4), 4)
    y = net.add("Mul", y, net.random(4, 1, 1))
    y = net.add("Add", net.random(1, 4, 1, 1), y)
    y = net.add("Sub", net.floats(1.5), y)
    net.add("Div", y, net.floats([0.5]), to="y")
    net.output("y", ["N", 4, 8, 8])
    return net.model()


def bn_before_conv() -> onnx.ModelProto:
    net = Net()
    y = net.conv(net.batch_norm(image(net, 4), 4), 4, 4, pads=[0, 0, 0, 0], group=2)
    y = net.add("Mul", net.add("Relu", y), net.random(4, 1, 1))  # no shift: may pass the padding
    y = net.add("Relu", net.conv(y, 4, 6))
    y = net.batch_norm(y, 6)  # its shift may not
    net.conv(y, 6, 2, to="y")
    net.output("y", ["N", 2, 6, 6])
    return net.model()


def pre_activation() -> onnx.ModelProto:
    net = Net()
    x = net.conv(image(net), 3, 4)
    y = net.conv(net.add("Relu", net.batch_norm(x, 4)), 4, 4)
    net.add("Add", x, y, to="y")
    net.output("y", ["N", 4, 8, 8])
    return net.model()


def weak_channels() -> onnx.ModelProto:
    net = Net()
    weight = net.rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    weight[1] *= 1e-20
    weight[2] = 0
    y = net.add("Conv", image(net), net.floats(weight), pads=[1, 1, 1, 1])
    y = net.add("Mul", net.batch_norm(y, 4), net.floats([[[1.0]], [[0.0]], [[2.0]], [[1e-3]]]))
    net.add("Relu", y, to="y")
    net.output("y", ["N", 4, 8, 8])
    return net.model()


# ---- matrices ----------------------------------------------------------------------------------------------------


def gemm(
    alpha: float, beta: float, trans_a: int, trans_b: int, bias: Sequence[int] | None, dtype: int = F32
) -> onnx.ModelProto:
    net = Net(opset=13, dtype=dtype)
    x = net.input("x", [5, 3] if trans_a else ["N", 5])
    rows: int | str = 3 if trans_a else "N"
    weight = net.random(4, 5) if trans_b else net.random(5, 4)
    biases = [] if bias is None else [net.random(*bias)]
    y = net.add("Gemm", x, weight, *biases, alpha=alpha, beta=beta, transA=trans_a, transB=trans_b)
    net.add("Relu", net.batch_norm(y, 4), to="y")
    net.output("y", [rows, 4])
    return net.model()


def matmul_bias() -> onnx.ModelProto:
    net = Net()
    y = net.add("Add", net.add("MatMul", net.input("x", ["N", 6, 5]), net.random(5, 4)), net.random(4))
    y = net.add("Mul", net.add("MatMul", net.add("Relu", y), net.random(4, 3)), net.floats(0.5))
    net.add("Add", y, net.random(1, 3), to="y")
    net.output("y", ["N", 6, 3])
    return net.model()


def matmul_bn() -> onnx.ModelProto:
    net = Net()
    y = net.batch_norm(net.add("MatMul", net.input("x", ["N", 5]), net.random(5, 4)), 4)
    net.add("MatMul", net.add("Tanh", y), net.random(4, 2), to="y")
    net.output("y", ["N", 2])
    return net.model()


def matmul_left() -> onnx.ModelProto:
    net = Net()
    y = net.add("MatMul", net.random(4, 6), net.input("x", ["N", 6, 5]))
    net.add("Relu", net.batch_norm(y, 4), to="y")
    net.output("y", ["N", 4, 5])
    return net.model()


# ---- shapes of whole networks ------------------------------------------------------------------------------------


def residual() -> onnx.ModelProto:
    net = Net()
    x = net.add("Relu", net.batch_norm(net.conv(image(net), 3, 4), 4))
    y = net.add("Relu", net.batch_norm(net.conv(x, 4, 4), 4))
    y = net.add("Relu", net.add("Add", net.batch_norm(net.conv(y, 4, 4), 4), x))
    y = net.add("Flatten", net.add("GlobalAveragePool", y))
    net.add("Gemm", y, net.random(4, 10), net.random(10), to="y")
    net.output("y", ["N", 10])
    return net.model()


def concat_ranges() -> onnx.ModelProto:
    net = Net()
    x = net.add("Relu", net.conv(image(net), 3, 4))
    wide = net.add("Relu", net.add("Mul", net.conv(x, 4, 4), net.floats(100.0)))
    narrow = net.add("Sigmoid", net.conv(x, 4, 2))
    net.conv(net.add("Concat", wide, narrow, axis=1), 6, 2, (1, 1), to="y")
    net.output("y", ["N", 2, 8, 8])
    return net.model()


def slice_pad_shortcut() -> onnx.ModelProto:
    """The parameter-free shortcut of CIFAR ResNets as torch exports it: its Pad vector is computed."""
    net = Net()
    x = net.add("Relu", net.batch_norm(net.conv(image(net), 3, 4), 4))
    y = net.batch_norm(net.conv(x, 4, 8, strides=[2, 2]), 8)
    start, end, two = net.const(0, np.int64), net.const(2**63 - 1, np.int64), net.const(2, np.int64)
    zero = net.ints(0)
    for axis in (2, 3):
        bounds = [net.add("Unsqueeze", t, zero) for t in (start, end, net.const(axis, np.int64), two)]
        x = net.add("Slice", x, *bounds)
    pads = net.add("Constant", value=numpy_helper.from_array(np.array([0, 0, 0, 0, 2, 2], np.int64)))
    length = net.add("Gather", net.add("Shape", pads), zero)
    rest = net.add("Sub", net.add("Mul", net.const(4, np.int64), two), length)
    fill = net.add("ConstantOfShape", rest, value=numpy_helper.from_array(np.array([0], np.int64)))
    pairs = net.add("Reshape", net.add("Concat", pads, fill, axis=0), net.ints(-1, 2))
    pairs = net.add("Slice", pairs, net.ints(-1), net.ints(-(2**63) + 1), zero, net.ints(-1))
    vector = net.add("Cast", net.add("Reshape", net.add("Transpose", pairs, perm=[1, 0]), net.ints(-1)), to_=I64)
    x = net.add("Pad", x, vector, net.floats(0.0))
    y = net.add("AveragePool", net.add("Relu", net.add("Add", y, x)), kernel_shape=[4, 4])
    batch = net.add("Unsqueeze", net.add("Gather", net.add("Shape", y), net.const(0, np.int64)), zero)
    y = net.add("Reshape", y, net.add("Concat", batch, net.ints(-1), axis=0))
    net.add("Gemm", y, net.random(5, 8), net.random(5), transB=1, to="y")
    net.output("y", ["N", 5])
    return net.model()


def squeeze_excite() -> onnx.ModelProto:
    net = Net()
    x = net.add("HardSwish", net.batch_norm(net.conv(image(net), 3, 8), 8))
    s = net.add("ReduceMean", x, axes=[2, 3], keepdims=1)
    s = net.add("HardSigmoid", net.conv(net.add("Relu", net.conv(s, 8, 2, (1, 1), bias=True)), 2, 8, (1, 1)))
    net.batch_norm(net.conv(net.add("Mul", x, s), 8, 4, (1, 1)), 4, to="y")
    net.output("y", ["N", 4, 8, 8])
    return net.model()


def silu() -> onnx.ModelProto:
    net = Net()
    x = net.batch_norm(net.conv(image(net), 3, 4), 4)
    x = net.add("Mul", x, net.add("Sigmoid", x))
    net.conv(x, 4, 2, to="y")
    net.output("y", ["N", 2, 8, 8])
    return net.model()


def relu6(opset: int) -> onnx.ModelProto:
    net = Net(opset)
    x = net.conv(image(net), 3, 4)
    bounds, attributes = ([], {"min": 0.0, "max": 6.0}) if opset < 11 else ([net.floats(0.0), net.floats(6.0)], {})
    x = net.add("Clip", x, *bounds, **attributes)
    net.conv(x, 4, 2, to="y")
    net.output("y", ["N", 2, 8, 8])
    return net.model()


def channel_shuffle() -> onnx.ModelProto:
    net = Net()
    x = net.add("Relu", net.conv(image(net, 4), 4, 6, group=2))
    x = net.add("Reshape", x, net.ints(0, 2, 3, 8, 8))
    x = net.add("Transpose", x, perm=[0, 2, 1, 3, 4])
    x = net.add("Reshape", x, net.ints(-1, 6, 8, 8))
    net.conv(x, 6, 4, group=2, to="y")
    net.output("y", ["N", 4, 8, 8])
    return net.model()


def pools() -> onnx.ModelProto:
    net = Net()
    x = net.add("Relu", net.conv(image(net), 3, 4))
    x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = net.add("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    x = net.add("AveragePool", x, kernel_shape=[2, 2], pads=[1, 1, 0, 0], count_include_pad=0)
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    net.add("Softmax", net.add("Gemm", x, net.random(4, 3)), axis=-1, to="y")
    net.output("y", ["N", 3])
    return net.model()


def reduce_mean(opset: int) -> onnx.ModelProto:
    net = Net(opset)
    x = net.conv(image(net), 3, 4)
    if opset < 18:
        x = net.add("ReduceMean", x, axes=[2, 3], keepdims=0)
    else:
        x = net.add("ReduceMean", x, net.ints(2, 3), keepdims=0)
    net.add("MatMul", x, net.random(4, 3), to="y")
    net.output("y", ["N", 3])
    return net.model()


def dynamic_image() -> onnx.ModelProto:
    net = Net()
    x = image(net, 3, "H")
    y = net.add("Relu", net.batch_norm(net.conv(x, 3, 16, strides=[2, 2]), 16))
    size = net.add("Slice", net.add("Shape", x), net.ints(2), net.ints(4))
    sizes = net.add("Concat", net.add("Slice", net.add("Shape", y), net.ints(0), net.ints(2)), size, axis=0)
    net.add("Resize", y, "", "", sizes, mode="nearest", to="y")
    net.output("y", ["N", 16, "H", "H"])
    return net.model()


def attention() -> onnx.ModelProto:
    """A transformer block with dynamic batch and length; its Reshape targets come from Shape."""
    net = Net(20, ir_version=9)
    ids = net.input("ids", ["N", "S"], I64)
    x = net.add("Gather", net.random(11, 8, name="embedding"), ids)
    x = net.add("LayerNormalization", x, net.random(8), net.random(8), axis=-1)
    shape = net.add("Shape", ids)
    batch, length = (net.add("Gather", shape, net.ints(i)) for i in (0, 1))
    split = net.add("Concat", batch, length, net.ints(2), net.ints(4), axis=0)
    joined = net.add("Concat", batch, length, net.ints(-1), axis=0)

    def heads(perm: list[int]) -> str:
        projected = net.add("Add", net.add("MatMul", x, net.random(8, 8)), net.random(8))
        return net.add("Transpose", net.add("Reshape", projected, split), perm=perm)

    scores = net.add("MatMul", heads([0, 2, 1, 3]), heads([0, 2, 3, 1]))
    scores = net.add("Softmax", net.add("Div", scores, net.floats(2.0)), axis=-1)
    y = net.add("Transpose", net.add("MatMul", scores, heads([0, 2, 1, 3])), perm=[0, 2, 1, 3])
    y = net.add("Add", x, net.add("MatMul", net.add("Reshape", y, joined), net.random(8, 8)))
    y = net.add("Gelu", net.add("Add", net.add("MatMul", y, net.random(8, 16)), net.random(16)))
    net.add("MatMul", y, net.random(16, 4), to="y")
    net.output("y", ["N", "S", 4])
    return net.model()


# ---- sharing, scopes, interfaces ---------------------------------------------------------------------------------


def shared_weight() -> onnx.ModelProto:
    net = Net()
    weight = net.random(3, 3, 3, 3, name="shared")
    x = net.batch_norm(net.add("Conv", image(net), weight, pads=[1, 1, 1, 1]), 3)
    net.batch_norm(net.add("Conv", x, weight, pads=[1, 1, 1, 1]), 3, to="y")
    net.output("y", ["N", 3, 8, 8])
    return net.model()


def branch(net: Net, name: str) -> Net:
    """A net for a nested graph whose names cannot clash with those outside."""
    inner = Net(net.opset, seed=len(name))
    inner._name = lambda stem: f"{name}_{stem}_{next_number(inner)}"  # type: ignore[method-assign]
    return inner


def next_number(net: Net) -> int:
    net.count += 1
    return net.count


def weight_shared_with_branch() -> onnx.ModelProto:
    net = Net()
    x, weight = image(net), net.random(3, 3, 3, 3, name="shared")
    y = net.batch_norm(net.add("Conv", x, weight, pads=[1, 1, 1, 1]), 3)
    then, other = branch(net, "then"), branch(net, "else")
    then.batch_norm(then.add("Conv", y, weight, pads=[1, 1, 1, 1]), 3, to="then_out")
    other.add("Identity", y, to="else_out")
    for inner in (then, other):
        inner.output(inner.nodes[-1].output[0], ["N", 3, 8, 8])
    condition = net.input("condition", [], BOOL)
    net.add("If", condition, to="y", then_branch=then.body("then"), else_branch=other.body("else"))
    net.output("y", ["N", 3, 8, 8])
    return net.model()


def if_branches() -> onnx.ModelProto:
    """Folding, constants and dead nodes inside branches that read an outer tensor."""
    net = Net()
    x = net.add("Identity", image(net))
    then, other = branch(net, "then"), branch(net, "else")
    y = then.batch_norm(then.conv(then.add("Identity", x), 3, 3), 3)
    then.add("Exp", y)  # dead
    then.add("Add", y, then.add("Mul", then.floats(2.0), then.floats([1.0, 2.0, 3.0, 4.0] * 2)), to="then_out")
    other.add("Identity", other.add("Relu", x), to="else_out")
    for inner in (then, other):
        inner.output(inner.nodes[-1].output[0], ["N", 3, 8, 8])
    condition = net.input("condition", [], BOOL)
    y = net.add("If", condition, then_branch=then.body("then"), else_branch=other.body("else"))
    net.add("Relu", y, to="y")
    net.output("y", ["N", 3, 8, 8])
    return net.model()


def loop_body() -> onnx.ModelProto:
    net = Net()
    x = net.input("x", ["N", 4])
    weight = net.random(4, 4, name="outer_weight")
    scale = net.add("Mul", net.random(4), net.floats(0.5))
    inner = branch(net, "body")
    inner.input("i", [], I64)
    condition = inner.input("go", [], BOOL)
    state = inner.input("state", ["N", 4])
    inner.add("Identity", condition, to="go_on")
    y = inner.add("Mul", inner.add("MatMul", state, weight), scale)
    inner.add("Tanh", y, to="next")
    inner.add("Identity", "next", to="scanned")
    inner.output("go_on", [], BOOL)
    inner.output("next", ["N", 4])
    inner.output("scanned", ["N", 4])
    net.add("Loop", net.const(3, np.int64), "", x, to=["y", "all"], body=inner.body("body"))
    net.output("y", ["N", 4])
    net.output("all", [3, "N", 4])
    return net.model()


def scan_body() -> onnx.ModelProto:
    net = Net()
    start, x = net.input("start", [4]), net.input("x", ["S", 4])
    weight = net.random(4, 4, name="outer_weight")
    inner = branch(net, "body")
    state, step = inner.input("state", [4]), inner.input("step", [4])
    y = inner.add("Reshape", inner.add("Add", state, step), inner.ints(1, 4))
    y = inner.add("Mul", inner.add("Gemm", y, weight), inner.floats(0.5))
    inner.add("Reshape", y, inner.ints(4), to="next")
    inner.add("Identity", "next", to="emitted")
    inner.output("next", [4])
    inner.output("emitted", [4])
    net.add("Scan", start, x, to=["y", "all"], body=inner.body("body"), num_scan_inputs=1)
    net.output("y", [4])
    net.output("all", ["S", 4])
    return net.model()


def local_function() -> onnx.ModelProto:
    net = Net()
    net.domains["local"] = 1
    nodes = [
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
    ]
    net.functions.append(
        helper.make_function("local", "ConvRelu", ["a", "w"], ["d"], nodes, [helper.make_opsetid("", 17)])
    )
    y = net.add("ConvRelu", image(net), net.random(4, 3, 3, 3), domain="local")
    net.batch_norm(net.conv(y, 4, 2), 2, to="y")
    net.output("y", ["N", 2, 8, 8])
    return net.model()


def custom_domain() -> onnx.ModelProto:
    net = Net()
    net.domains["com.example"] = 1
    y = net.add("Mystery", net.conv(image(net), 3, 4), net.random(4), domain="com.example", level=3)
    y = net.batch_norm(y, 4)
    folded = net.add("Mystery", net.random(2), domain="com.example")  # constant inputs, unknown meaning
    net.add("Mul", y, folded, to="y")
    net.output("y", ["N", 4, 8, 8])
    return net.model()


def overridable_initializer() -> onnx.ModelProto:
    net = Net()
    weight = net.random(4, 3, 3, 3, name="weight")
    net.input(weight, [4, 3, 3, 3])
    scale = net.floats(2.0, name="scale")
    net.input(scale, [])
    y = net.batch_norm(net.add("Conv", image(net), weight, pads=[1, 1, 1, 1]), 4)
    net.add("Mul", net.conv(y, 4, 4), net.add("Mul", scale, net.floats(3.0)), to="y")
    net.output("y", ["N", 4, 8, 8])
    return net.model()


def output_in_the_middle() -> onnx.ModelProto:
    net = Net()
    net.conv(image(net), 3, 4, to="features")
    y = net.add("Identity", net.add("Relu", net.batch_norm("features", 4)), to="identity")
    net.conv(y, 4, 2, to="y")
    for name, channels in (("features", 4), ("identity", 4), ("y", 2)):
        net.output(name, ["N", channels, 8, 8])
    return net.model()


def output_is_input() -> onnx.ModelProto:
    net = Net()
    x = net.input("x", ["N", 4])
    net.add("Identity", x, to="same")
    net.add("Identity", net.add("Identity", net.floats([1.0, 2.0])), to="constant")
    net.add("Mul", net.floats(2.0), net.floats([3.0]), to="folded")
    net.add("Relu", x, to="y")
    net.add("Identity", "y", to="again")
    net.output("same", ["N", 4])
    net.output("constant", [2])
    net.output("folded", [1])
    net.output("y", ["N", 4])
    net.output("again", ["N", 4])
    return net.model()


def wrongly_declared_output() -> onnx.ModelProto:
    """An exporter that wrote the batch of its example into an inner shape: Shape must not be folded to it."""
    net = Net()
    x = net.add("Relu", net.input("x", ["N", 4]), to="hidden")
    size = net.add("Gather", net.add("Shape", x), net.const(0, np.int64))
    net.add("Div", net.add("ReduceSum", x, keepdims=0), net.add("Cast", size, to_=F32), to="y")
    net.output("y", [])
    model = net.model()
    model.graph.value_info.append(helper.make_tensor_value_info("hidden", F32, [1, 4]))
    return model


def dead_branch() -> onnx.ModelProto:
    net = Net()
    x = image(net)
    net.add("Exp", net.batch_norm(net.conv(x, 3, 8), 8))
    net.random(7, name="unread")
    net.conv(x, 3, 2, to="y")
    net.output("y", ["N", 2, 8, 8])
    return net.model()


def no_ops() -> onnx.ModelProto:
    net = Net()
    x = net.add("Relu", image(net))
    for op, inputs, attributes in (
        ("Identity", [], {}),
        ("Dropout", [net.floats(0.5), net.const(False)], {}),
        ("Reshape", [net.ints(0, 3, -1, 8)], {}),
        ("Cast", [], {"to_": F32}),
        ("Pad", [net.ints(*[0] * 8)], {}),
        ("Slice", [net.ints(0, 0), net.ints(2**31 - 1, 8), net.ints(0, 2)], {}),
        ("Transpose", [], {"perm": [0, 1, 2, 3]}),
        ("Concat", [], {"axis": 1}),
        ("Sum", [], {}),
        ("Expand", [net.ints(3, 1, 8)], {}),
    ):
        x = net.add("Relu", net.add(op, x, *inputs, **attributes))
    # look-alikes that do something
    x = net.add("Reshape", x, net.ints(-1, 8, 3, 8))
    x = net.add("Pad", x, net.ints(0, 0, 0, 0, 0, 0, 0, 1))
    x = net.add("Slice", x, net.ints(0), net.ints(7), net.ints(3))
    x = net.add("Expand", x, net.ints(2, 1, 1, 1, 1))
    net.add("Flatten", net.add("Flatten", x, axis=2), to="y")
    net.output("y", [None, 168])
    return net.model()


def dropout_training() -> onnx.ModelProto:
    net = Net()
    y = net.add("Dropout", net.conv(image(net), 3, 4), net.floats(0.0), net.const(True), seed=1)
    net.add("Relu", y, to="y")
    net.output("y", ["N", 4, 8, 8])
    return net.model()


def dropout_mask() -> onnx.ModelProto:
    net = Net()
    y = net.add("Dropout", net.conv(image(net), 3, 4), to=["kept", "mask"])
    net.add("Where", "mask", y, net.floats(0.0), to="y")
    net.output("y", ["N", 4, 8, 8])
    return net.model()


def dropout_attribute(opset: int) -> onnx.ModelProto:
    net = Net(opset)
    net.add("Relu", net.add("Dropout", net.conv(image(net), 3, 4), ratio=0.4), to="y")
    net.output("y", ["N", 4, 8, 8])
    return net.model()


def training_bn() -> onnx.ModelProto:
    net = Net()
    y = net.batch_norm(net.conv(image(net), 3, 4), 4, to=["bn", "running_mean", "running_var"], training_mode=1)
    net.add("Relu", y, to="y")
    net.output("y", ["N", 4, 8, 8])
    return net.model()


def bn_statistics() -> onnx.ModelProto:
    net = Net(9)
    outputs = ["bn", "mean_out", "var_out", "saved_mean", "saved_var"]
    y = net.batch_norm(net.conv(image(net), 3, 4), 4, to=outputs)
    net.add("Relu", y, to="y")
    net.output("y", ["N", 4, 8, 8])
    net.output("mean_out", [4])
    return net.model()


# ---- constants ---------------------------------------------------------------------------------------------------


def constant_kinds() -> onnx.ModelProto:
    net = Net(13)
    x = net.input("x", ["N", 3])
    values = np.array([1.0, 2.0, 3.0], np.float32)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([5.0], np.float32), "values"),
        numpy_helper.from_array(np.array([1], np.int64), "indices"),
        [3],
    )
    x = net.add("Add", x, net.add("Constant", value=numpy_helper.from_array(values)))
    x = net.add("Add", x, net.add("Constant", value_float=2.0))
    x = net.add("Add", x, net.add("Constant", value_floats=[1.0, 2.0, 3.0]))
    x = net.add("Add", x, net.add("Constant", sparse_value=sparse))
    for constant in (net.add("Constant", value_int=2), net.add("Constant", value_ints=[1, 2, 3])):
        x = net.add("Add", x, net.add("Cast", constant, to_=F32))
    net.add("Constant", value_strings=[b"a", b"b"], to="text")
    net.add("Identity", x, to="y")
    net.output("y", ["N", 3])
    net.output("text", [2], TensorProto.STRING)
    return net.model()


def random_and_stateful() -> onnx.ModelProto:
    net = Net()
    shape = net.add("RandomNormalLike", net.floats([1.0, 2.0]), seed=1.0)
    y = net.add("Mul", net.input("x", ["N", 2]), net.add("Mul", shape, net.floats(0.0)))
    net.add("Add", y, net.add("RandomUniform", shape=[2], high=0.0, low=0.0), to="y")
    net.output("y", ["N", 2])
    return net.model()


def sequences() -> onnx.ModelProto:
    net = Net()
    parts = net.add("SequenceConstruct", net.floats([1.0]), net.floats([2.0]))
    joined = net.add("ConcatFromSequence", net.add("Identity", parts), axis=0)
    net.add("Add", net.input("x", ["N", 2]), joined, to="y")
    net.output("y", ["N", 2])
    return net.model()


# ---- quantised ---------------------------------------------------------------------------------------------------


def existing_qdq() -> onnx.ModelProto:
    net = Net()

    def fake_quantised(x: str, scale: float) -> str:
        parameters = (net.floats(scale), net.const(128, np.uint8))
        return net.add("DequantizeLinear", net.add("QuantizeLinear", x, *parameters), *parameters)

    weight = net.const(net.rng.integers(-127, 128, (4, 3, 3, 3)), np.int8)
    scales = net.floats(net.rng.uniform(0.005, 0.01, 4))
    weight = net.add("DequantizeLinear", weight, scales, net.const(np.zeros(4), np.int8), axis=0)
    y = net.add("Conv", fake_quantised(image(net), 0.03), weight, net.random(4), pads=[1, 1, 1, 1])
    y = net.add("Mul", y, net.floats(0.5))
    y = fake_quantised(net.add("Relu", y), 0.02)
    net.add("GlobalAveragePool", y, to="y")
    net.output("y", ["N", 4, 1, 1])
    return net.model()


def dynamic_quantised() -> onnx.ModelProto:
    net = Net()
    x = net.input("x", ["N", 6])
    net.add("DynamicQuantizeLinear", x, to=["quantised", "scale", "zero"])
    weight = net.const(net.rng.integers(-127, 128, (6, 4)), np.int8)
    y = net.add("Cast", net.add("MatMulInteger", "quantised", weight, "zero"), to_=F32)
    y = net.add("Mul", y, net.add("Mul", "scale", net.floats(0.01)))
    net.add("Add", y, net.random(4), to="y")
    net.output("y", ["N", 4])
    return net.model()


# ---- the list ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hazard:
    """A named builder; ``runnable`` is False where onnxruntime's CPU provider cannot run the model."""

    name: str
    build: Callable[[], onnx.ModelProto]
    runnable: bool = True


def _hazards() -> list[Hazard]:
    found = [
        Hazard(build.__name__, build)
        for build in (
            conv_bn_relu,
            conv_grouped,
            conv_transpose_grouped,
            conv_affine_chain,
            bn_before_conv,
            pre_activation,
            weak_channels,
            matmul_bias,
            matmul_bn,
            matmul_left,
            residual,
            concat_ranges,
            slice_pad_shortcut,
            squeeze_excite,
            silu,
            channel_shuffle,
            pools,
            dynamic_image,
            attention,
            shared_weight,
            weight_shared_with_branch,
            if_branches,
            loop_body,
            scan_body,
            local_function,
            overridable_initializer,
            output_in_the_middle,
            output_is_input,
            wrongly_declared_output,
            dead_branch,
            no_ops,
            dropout_training,
            dropout_mask,
            training_bn,
            bn_statistics,
            constant_kinds,
            random_and_stateful,
            sequences,
            existing_qdq,
            dynamic_quantised,
        )
    ]
    found.append(Hazard("custom_domain", custom_domain, runnable=False))
    found += [Hazard(f"conv_{rank - 2}d", partial(conv_nd, rank)) for rank in (3, 5)]
    for alpha, beta, trans_a, trans_b, bias in (
        (1.0, 1.0, 0, 0, [4]),
        (0.5, 2.0, 0, 1, [1, 4]),
        (1.5, 0.0, 0, 1, [4]),
        (0.25, 1.0, 1, 0, None),
        (1.0, 0.5, 1, 1, [3, 4]),
    ):
        name = f"gemm_a{alpha}_b{beta}_{trans_a}{trans_b}_{'x'.join(map(str, bias or ['none']))}"
        found.append(Hazard(name, partial(gemm, alpha, beta, trans_a, trans_b, bias)))
    found += [Hazard(f"conv_bn_relu_opset{opset}", partial(conv_bn_relu, opset)) for opset in OPSETS]
    found += [Hazard(f"relu6_opset{opset}", partial(relu6, opset)) for opset in (7, 11, 13)]
    found += [Hazard(f"reduce_mean_opset{opset}", partial(reduce_mean, opset)) for opset in (11, 18)]
    found += [Hazard(f"dropout_opset{opset}", partial(dropout_attribute, opset)) for opset in (7, 10)]
    found += [
        Hazard("conv_bn_relu_float16", partial(conv_bn_relu, 17, F16)),
        Hazard("gemm_bn_double", partial(gemm, 0.5, 2.0, 0, 1, [4], F64)),
        Hazard("conv_bn_relu_double", partial(conv_bn_relu, 17, F64), runnable=False),
        Hazard("conv_bn_relu_bfloat16", partial(conv_bn_relu, 22, BF16), runnable=False),
    ]
    return found


HAZARDS: tuple[Hazard, ...] = tuple(_hazards())
BY_NAME: Mapping[str, Hazard] = {hazard.name: hazard for hazard in HAZARDS}


def make_feeds(
    model: onnx.ModelProto, *, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> dict[str, NDArray[Any]]:
    """Random inputs for ``model``: normal floats, integers in 0..4, booleans. Overridable initializers are not fed.

    ``sizes`` gives the length of a symbolic dimension; the defaults are N: 3, S: 5, every other one: 8.
    """
    rng = np.random.default_rng(seed)
    known = {"N": 3, "S": 5, **(sizes or {})}
    optional = {tensor.name for tensor in model.graph.initializer}
    feeds: dict[str, NDArray[Any]] = {}
    for value in model.graph.input:
        if value.name in optional:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else known.get(d.dim_param, 8) for d in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if dtype == np.bool_:
            feeds[value.name] = np.asarray(rng.integers(0, 2, shape), np.bool_)
        elif dtype.kind in "iu":
            feeds[value.name] = rng.integers(0, 5, shape).astype(dtype)
        else:
            feeds[value.name] = np.asarray(rng.standard_normal(shape)).astype(dtype)
    return feeds
