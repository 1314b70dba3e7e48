"""Random convolutional graphs with the operators, shapes and wirings that quantisation has to get right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["random_model", "random_pruning_model"]

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


class _ChannelBuilder(_Builder):
    """What moves, mixes, repeats and normalises channels."""

    def shuffle(self, x: Value) -> Value:
        name, (channels, height, width) = x
        groups = int(self.rng.choice([2, 3]))
        if channels % groups:
            return x
        split = self.node("Reshape", [name, self.ints(-1, groups, channels // groups, height, width)], x[1])
        turned = self.node("Transpose", [split[0]], x[1], perm=[0, 2, 1, 3, 4])
        return self.node("Reshape", [turned[0], self.ints(0, -1, height, width)], x[1])

    def pick(self, x: Value) -> Value:
        name, (channels, height, width) = x
        kind = self.rng.choice(["slice", "reverse", "stride", "gather", "split", "pad", "tile"])
        if kind == "gather":
            picked = self.rng.integers(-channels, channels, int(self.rng.integers(2, channels + 2)))
            return self.node("Gather", [name, self.ints(*picked.tolist())], (len(picked), height, width), axis=1)
        if kind == "pad":
            before, after = (int(n) for n in self.rng.integers(0, 3, 2))
            pads = [name, self.ints(0, before, 0, 0, 0, after, 0, 0), self.scalar(float(self.rng.choice([0.0, 0.5])))]
            return self.node("Pad", pads, (channels + before + after, height, width))
        if kind == "tile":
            return self.node("Tile", [name, self.ints(1, 2, 1, 1)], (channels * 2, height, width))
        if channels < 4:
            return x
        if kind == "split":
            first = channels // 2 - 1
            names = [self.name("split"), self.name("split")]
            sizes = self.ints(first, channels - first)
            self.nodes.append(helper.make_node("Split", [name, sizes], names, name=f"{names[0]}_node", axis=1))
            return names[1], (channels - first, height, width)
        bounds = {"slice": (1, channels - 1, 1), "reverse": (-1, -(1 << 30), -1), "stride": (1, 1 << 30, 2)}
        start, end, step = bounds[str(kind)]
        inputs = [name, self.ints(start), self.ints(end), self.ints(1), self.ints(step)]
        window = len(range(channels)[slice(start, None if end < 0 else end, step)])
        return self.node("Slice", inputs, (window, height, width))

    def normalise(self, x: Value) -> Value:
        name, shape = x
        channels = shape[0]
        kind = self.rng.choice(["batch", "instance", "group", "layer", "prelu", "mean"])

        def parameter(*dims: int) -> str:
            return self.constant(self.rng.uniform(0.5, 1.5, dims).astype(np.float32))

        if kind == "batch":
            return self.node("BatchNormalization", [name, *(parameter(channels) for _ in range(4))], shape)
        if kind == "instance":
            # a channel that hardly varies must not be blown up to what is rounding
            inputs = [name, parameter(channels), parameter(channels)]
            return self.node("InstanceNormalization", inputs, shape, epsilon=0.5)
        if kind == "group" and channels % 2 == 0:  # as exporters write it
            rows = self.node("Reshape", [name, self.ints(0, 2, -1)], (2, channels // 2 * shape[1] * shape[2]))
            rows = self.node("InstanceNormalization", [rows[0], parameter(2), parameter(2)], rows[1], epsilon=0.5)
            back = self.node("Reshape", [rows[0], self.ints(0, channels, shape[1], shape[2])], shape)
            return self.node("Mul", [back[0], parameter(channels, 1, 1)], shape)
        if kind == "layer" and self.rng.random() < 0.3:
            last = self.node("Transpose", [name], (shape[1], shape[2], channels), perm=[0, 2, 3, 1])
            normal = self.node("LayerNormalization", [last[0], parameter(channels)], last[1], axis=-1, epsilon=0.5)
            return self.node("Transpose", [normal[0]], shape, perm=[0, 3, 1, 2])
        if kind == "prelu":
            return self.node("PRelu", [name, parameter(channels, 1, 1)], shape)
        return self.node("Softplus", [name], shape)

    def mix(self, x: Value) -> Value:
        """Matrix products over the channels: channels last, flattened, attention of channels, a transposed Conv."""
        name, (channels, height, width) = x
        kind = self.rng.choice(["last", "flat", "attention", "transposed", "grouped_transposed"])
        if kind == "last":
            out = int(self.rng.choice([4, 6]))
            last = self.node("Transpose", [name], (height, width, channels), perm=[0, 2, 3, 1])
            weight = (self.rng.normal(size=(channels, out)) / np.sqrt(channels)).astype(np.float32)
            product = self.node("MatMul", [last[0], self.constant(weight)], (height, width, out))
            return self.node("Transpose", [product[0]], (out, height, width), perm=[0, 3, 1, 2])
        if kind == "flat" and channels * height * width <= 1024:
            size = channels * height * width
            flat = self.node("Flatten", [name], (size,))
            weight = (self.rng.normal(size=(12, size)) / np.sqrt(size)).astype(np.float32)
            product = self.node("Gemm", [flat[0], self.constant(weight)], (12,), transB=1)
            return self.node("Reshape", [product[0], self.ints(-1, 3, 2, 2)], (3, 2, 2))
        if kind == "attention" and height * width <= 64:
            return self.attention(x)
        groups = 2 if kind == "grouped_transposed" and channels % 2 == 0 else 1
        weight = (self.rng.normal(size=(channels, 4, 2, 2)) / np.sqrt(channels)).astype(np.float32)
        inputs = [name, self.constant(weight), self.constant(self.rng.normal(size=4 * groups).astype(np.float32))]
        if height > 8:
            return x
        return self.node("ConvTranspose", inputs, (4 * groups, height * 2, width * 2), strides=[2, 2], group=groups)

    def part(self, joint: str, index: int, pixels: int) -> str:
        """Queries, keys or values, picked by number or as a window of one."""
        if self.rng.random() < 0.5:
            return self.node("Gather", [joint, self.constant(np.array(index, np.int64))], (2, pixels, 3), axis=0)[0]
        window = self.node("Slice", [joint, self.ints(index), self.ints(index + 1), self.ints(0)], (2, pixels, 3))
        return self.node("Squeeze", [window[0], self.ints(0)], (2, pixels, 3))[0]

    def attention(self, x: Value) -> Value:
        """Two heads of three over the pixels, queries, keys and values from one product or from three."""
        name, (channels, height, width) = x
        rows = self.node("Reshape", [name, self.ints(0, channels, -1)], (channels, height * width))
        rows = self.node("Transpose", [rows[0]], (height * width, channels), perm=[0, 2, 1])
        pixels = height * width

        def product(out: int) -> str:
            weight = (self.rng.normal(size=(channels, out)) / np.sqrt(channels)).astype(np.float32)
            found = self.node("MatMul", [rows[0], self.constant(weight)], (pixels, out))
            return self.node(
                "Add", [self.constant(self.rng.normal(size=out).astype(np.float32)), found[0]], (pixels, out)
            )[0]

        def turned(source: str, perm: list[int]) -> str:
            split = self.node("Reshape", [source, self.ints(0, 0, 2, 3)], (pixels, 2, 3))
            return self.node("Transpose", [split[0]], (2, pixels, 3), perm=perm)[0]

        if self.rng.random() < 0.5:
            joint = self.node("Reshape", [product(18), self.ints(-1, pixels, 3, 2, 3)], (pixels, 3, 2, 3))
            joint = self.node("Transpose", [joint[0]], (pixels, 3, 2, 3), perm=[2, 0, 3, 1, 4])
            query, key, value = (self.part(joint[0], i, pixels) for i in range(3))
            key = self.node("Transpose", [key], (2, 3, pixels), perm=[0, 1, 3, 2])[0]
        else:
            query, key, value = (
                turned(product(6), [0, 2, 1, 3]),
                turned(product(6), [0, 2, 3, 1]),
                turned(product(6), [0, 2, 1, 3]),
            )
        scores = self.node("MatMul", [query, key], (2, pixels, pixels))
        weights = self.node("Softmax", [scores[0]], scores[1], axis=-1)
        found = self.node("MatMul", [weights[0], value], (2, pixels, 3))
        found = self.node("Transpose", [found[0]], (pixels, 2, 3), perm=[0, 2, 1, 3])
        joined = self.node("Reshape", [found[0], self.ints(0, 0, 6)], (pixels, 6))
        last = self.node("Transpose", [joined[0]], (6, pixels), perm=[0, 2, 1])
        return self.node("Reshape", [last[0], self.ints(0, 6, height, width)], (6, height, width))


def random_pruning_model(seed: int, *, steps: int = 10) -> onnx.ModelProto:
    """As :func:`random_model`, with what permutes, repeats, splits and normalises channels, and attention."""
    build = _ChannelBuilder(seed, 17)
    more: list[Callable[[Value], Value]] = [build.shuffle, build.pick, build.pick, build.normalise, build.mix]
    return _random_model(build, seed, steps, more)


def random_model(seed: int, *, steps: int = 10, opset: int = 17) -> onnx.ModelProto:
    """A valid float model with input ``x`` [N, 3, 8, 8] and one to three outputs, the same for the same arguments."""
    return _random_model(_Builder(seed, opset), seed, steps, [])


def _random_model(build: _Builder, seed: int, steps: int, more: list[Callable[[Value], Value]]) -> onnx.ModelProto:
    opset = build.opset
    pool: list[Value] = [build.conv(("x", (3, 8, 8)))]
    single: list[Callable[[Value], Value]] = [
        build.conv,
        build.conv,
        build.activation,
        build.activation,
        build.pool,
        build.move,
        build.arithmetic,
        *more,
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
