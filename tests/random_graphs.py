"""Random convolutional graphs with the operators, shapes and wirings that quantisation has to get right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["random_model"]

Value = tuple[str, tuple[int, ...]]  # name and shape without the batch axis


class _Builder:
    def __init__(self, seed: int, opset: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.outputs: list[Value] = []
        self.count = 0

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}_{self.count}"

    def constant(self, value: np.ndarray) -> str:
        name = self.name("c")
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def node(self, op: str, inputs: list[str], shape: tuple[int, ...], **attrs: object) -> Value:
        name = self.name(op.lower())
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{name}_node", **attrs))
        return name, shape

    def conv(self, x: Value) -> Value:
        name, (channels, height, width) = x
        kind = self.rng.choice(["dense", "depthwise", "grouped", "pointwise"])
        groups = {"depthwise": channels, "grouped": 2 if channels % 2 == 0 else 1}.get(str(kind), 1)
        out = channels if kind == "depthwise" else int(self.rng.choice([4, 6, 8]))
        size = 1 if kind == "pointwise" else 3
        fan = channels // groups * size * size
        weight = (self.rng.normal(size=(out, channels // groups, size, size)) / np.sqrt(fan)).astype(np.float32)
        weight[0] *= self.rng.choice([1.0, 1e-6])
        inputs = [name, self.constant(weight)]
        if self.rng.random() < 0.7:
            inputs.append(self.constant(self.rng.normal(size=out).astype(np.float32) * 0.3))
        return self.node("Conv", inputs, (out, height, width), group=int(groups), pads=[size // 2] * 4)

    def activation(self, x: Value) -> Value:
        kind = self.rng.choice(["relu", "relu", "relu6", "clip", "sigmoid", "leaky", "hardswish"])
        name, shape = x
        if kind == "relu":
            return self.node("Relu", [name], shape)
        if kind == "relu6":
            return self.node("Clip", [name, self.scalar(0.0), self.scalar(6.0)], shape)
        if kind == "clip":
            return self.node("Clip", [name, self.scalar(-0.7), self.scalar(0.4)], shape)
        op = {"sigmoid": "Sigmoid", "leaky": "LeakyRelu", "hardswish": "HardSwish"}[str(kind)]
        return self.node(op, [name], shape)

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def pool(self, x: Value) -> Value:
        name, (channels, height, width) = x
        op = str(self.rng.choice(["MaxPool", "AveragePool"]))
        if min(height, width) < 4:
            return x
        return self.node(op, [name], (channels, height // 2, width // 2), kernel_shape=[2, 2], strides=[2, 2])

    def move(self, x: Value) -> Value:
        name, (channels, height, width) = x
        kind = self.rng.choice(["slice", "pad", "transpose", "resize", "depth", "flip", "reshape", "tile"])
        if kind == "slice" and height >= 4:
            inputs = [name, self.ints(0), self.ints(1 << 30), self.ints(2), self.ints(2)]
            return self.node("Slice", inputs, (channels, (height + 1) // 2, width))
        if kind == "flip":
            inputs = [name, self.ints(-1), self.ints(-(1 << 30)), self.ints(1), self.ints(-1)]
            return self.node("Slice", inputs, (channels, height, width))
        if kind == "pad":
            pads = self.ints(0, 1, 0, 0, 0, 1, 0, 0)
            return self.node("Pad", [name, pads], (channels + 2, height, width))
        if kind == "transpose":
            return self.node("Transpose", [name], (channels, width, height), perm=[0, 1, 3, 2])
        if kind == "resize" and height <= 8:
            scales = self.constant(np.array([1, 1, 2, 2], np.float32))
            return self.node("Resize", [name, "", scales], (channels, height * 2, width * 2), mode="nearest")
        if kind == "depth" and channels % 4 == 0:
            return self.node("DepthToSpace", [name], (channels // 4, height * 2, width * 2), blocksize=2)
        if kind == "reshape" and height % 2 == 0:
            target = self.ints(0, channels, height // 2, width * 2)
            return self.node("Reshape", [name, target], (channels, height // 2, width * 2))
        if kind == "tile":
            return self.node("Tile", [name, self.ints(1, 2, 1, 1)], (channels * 2, height, width))
        return x

    def join(self, x: Value, y: Value) -> Value:
        (first, shape), (second, other) = x, y
        if shape == other and self.rng.random() < 0.6:
            return self.node(str(self.rng.choice(["Add", "Add", "Mul"])), [first, second], shape)
        if shape[1:] == other[1:]:
            return self.node("Concat", [first, second], (shape[0] + other[0], *shape[1:]), axis=1)
        gate = self.node("GlobalAveragePool", [second], (other[0], 1, 1))
        if other[0] == shape[0]:
            return self.node("Mul", [first, self.node("Sigmoid", [gate[0]], gate[1])[0]], shape)
        return x

    def arithmetic(self, x: Value) -> Value:
        name, shape = x
        operand = self.rng.normal(size=(shape[0], 1, 1)).astype(np.float32)
        inputs = [name, self.constant(operand)]
        if self.rng.random() < 0.5:
            inputs.reverse()
        return self.node(str(self.rng.choice(["Add", "Mul"])), inputs, shape)

    def head(self, x: Value) -> Value:
        pooled = self.node("GlobalAveragePool", [x[0]], (x[1][0], 1, 1))
        flat = self.node("Flatten", [pooled[0]], (x[1][0],), axis=1)
        channels = x[1][0]
        weight = (self.rng.normal(size=(channels, 5)) / np.sqrt(channels)).astype(np.float32)
        kind = self.rng.choice(["gemm", "gemm_t", "matmul", "matmul_add", "none"])
        if kind == "none":
            return flat
        if kind == "matmul":
            return self.node("MatMul", [flat[0], self.constant(weight)], (5,))
        if kind == "matmul_add":
            product = self.node("MatMul", [flat[0], self.constant(weight)], (5,))
            return self.node("Add", [product[0], self.constant(self.rng.normal(size=5).astype(np.float32))], (5,))
        transposed = kind == "gemm_t"
        inputs = [flat[0], self.constant(np.ascontiguousarray(weight.T) if transposed else weight)]
        attrs: dict[str, float | int] = {"transB": int(transposed)}
        if self.rng.random() < 0.7:
            inputs.append(self.constant(self.rng.normal(size=5).astype(np.float32)))
        if self.rng.random() < 0.3:
            attrs |= {"alpha": 0.5, "beta": 2.0}
        return self.node("Gemm", inputs, (5,), **attrs)


def random_model(seed: int, *, steps: int = 10, opset: int = 17) -> onnx.ModelProto:
    """A valid float model with input ``x`` [N, 3, 8, 8] and one to three outputs, the same for the same arguments."""
    build = _Builder(seed, opset)
    pool: list[Value] = [build.conv(("x", (3, 8, 8)))]
    single: list[Callable[[Value], Value]] = [
        build.conv,
        build.conv,
        build.activation,
        build.activation,
        build.pool,
        build.move,
        build.arithmetic,
    ]
    for _ in range(steps):
        x = pool[int(build.rng.integers(max(0, len(pool) - 3), len(pool)))]
        if build.rng.random() < 0.3:
            y = pool[int(build.rng.integers(len(pool)))]
            result = build.join(x, y)
        else:
            result = single[int(build.rng.integers(len(single)))](x)
        if np.prod(result[1]) <= 4096:
            pool.append(result)
    outputs = [build.head(pool[-1])]
    outputs += [v for v in pool[:-1] if build.rng.random() < 0.08 and v[0] != "x"]
    unique = dict(outputs)
    graph = helper.make_graph(
        build.nodes,
        f"random_{seed}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", *shape]) for n, shape in unique.items()],
        build.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model
