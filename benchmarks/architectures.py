"""Well-known architectures with random weights, built node by node: for time only, since time needs no trained weights.

Each is the published architecture as an exporter writes it for inference, BatchNormalization folded: ResNet-50 v1.5 (He
et al. 2015, stride in the 3x3 convolution), MobileNetV2 1.0 (Sandler et al. 2018), ViT-B/16 (Dosovitskiy et al. 2020)
and BERT-base (Devlin et al. 2018) without its pooler. Weights are scaled so that activations keep their size, and the
last layer of every residual branch is small, as it is in trained networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["ARCHITECTURES", "build", "feeds"]

_OPSET = 20
#: how much smaller than He's the weights at the end of a residual branch are
_BRANCH = 0.3


class _Builder:
    """Adds nodes and random weights to a graph."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._generator = np.random.default_rng(seed)
        self._count = 0

    def constant(self, value: Any, name: str = "constant") -> str:
        """An initializer."""
        self._count += 1
        self.weights.append(numpy_helper.from_array(np.asarray(value), f"{name}_{self._count}"))
        return self.weights[-1].name

    def weight(self, shape: Sequence[int], fan_in: int, gain: float = 1.0) -> str:
        """A random weight."""
        values = self._generator.standard_normal(shape, np.float32) * np.float32(gain * math.sqrt(1.0 / fan_in))
        return self.constant(values, "weight")

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        self._count += 1
        output = f"{op.lower()}_{self._count}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], f"/{output}", **attributes))
        return output

    def conv(self, x: str, ins: int, outs: int, kernel: int, stride: int = 1, group: int = 1, gain: float = 1.4) -> str:
        """A convolution with a bias, its padding half of the kernel."""
        weight = self.weight((outs, ins // group, kernel, kernel), ins // group * kernel * kernel, gain)
        bias = self.constant(np.zeros(outs, np.float32), "bias")
        pad = [kernel // 2] * 4
        shape = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": pad, "group": group}
        return self.node("Conv", x, weight, bias, **shape)

    def linear(self, x: str, ins: int, outs: int, gain: float = 1.0) -> str:
        """MatMul and Add."""
        product = self.node("MatMul", x, self.weight((ins, outs), ins, gain))
        return self.node("Add", product, self.constant(np.zeros(outs, np.float32), "bias"))

    def norm(self, x: str, width: int) -> str:
        """LayerNormalization over the last axis."""
        scale, bias = np.ones(width, np.float32), np.zeros(width, np.float32)
        return self.node("LayerNormalization", x, self.constant(scale), self.constant(bias), axis=-1, epsilon=1e-6)

    def attention(self, x: str, width: int, heads: int, mask: str | None = None) -> str:
        """Multi-head self-attention on [N, length, width]."""
        size = width // heads
        split = self.constant(np.array([0, -1, heads, size], np.int64))

        def projected(permutation: Sequence[int]) -> str:
            reshaped = self.node("Reshape", self.linear(x, width, width), split)
            return self.node("Transpose", reshaped, perm=list(permutation))

        query, key, value = projected((0, 2, 1, 3)), projected((0, 2, 3, 1)), projected((0, 2, 1, 3))
        scores = self.node("Div", self.node("MatMul", query, key), self.constant(np.float32(math.sqrt(size))))
        if mask is not None:
            scores = self.node("Add", scores, mask)
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=-1), value)
        together = self.node("Transpose", mixed, perm=[0, 2, 1, 3])
        joined = self.node("Reshape", together, self.constant(np.array([0, -1, width], np.int64)))
        return self.linear(joined, width, width, _BRANCH)

    def feed_forward(self, x: str, width: int, inner: int) -> str:
        """Two layers with Gelu between them."""
        hidden = self.node("Gelu", self.linear(x, width, inner))
        return self.linear(hidden, inner, width, _BRANCH)

    def model(self, name: str, inputs: Mapping[str, tuple[int, Sequence[int | str]]], output: str) -> onnx.ModelProto:
        """The finished model; inputs are {name: (type, shape)}."""
        self.nodes[-1].output[0] = output
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _classifier(b: _Builder, x: str, width: int) -> str:
    flat = b.node("Flatten", b.node("GlobalAveragePool", x))
    bias = b.constant(np.zeros(1000, np.float32), "bias")
    return b.node("Gemm", flat, b.weight((1000, width), width), bias, transB=1)


def resnet50() -> onnx.ModelProto:
    """ResNet-50 v1.5, 25.6 M parameters, 4.1 G MACs."""
    b = _Builder()
    x = b.node("Relu", b.conv("image", 3, 64, 7, 2))
    x = b.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    ins = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = b.node("Relu", b.conv(x, ins, width, 1))
            y = b.node("Relu", b.conv(y, width, width, 3, stride))
            y = b.conv(y, width, 4 * width, 1, gain=_BRANCH)
            shortcut = x if block else b.conv(x, ins, 4 * width, 1, stride, gain=1.0)
            x = b.node("Relu", b.node("Add", y, shortcut))
            ins = 4 * width
    _classifier(b, x, ins)
    return b.model("resnet50", {"image": (TensorProto.FLOAT, ("N", 3, 224, 224))}, "logits")


def mobilenetv2() -> onnx.ModelProto:
    """MobileNetV2 1.0, 3.5 M parameters, 0.3 G MACs."""
    b = _Builder()
    low, high = b.constant(np.float32(0)), b.constant(np.float32(6))
    x = b.node("Clip", b.conv("image", 3, 32, 3, 2), low, high)
    ins = 32
    plan = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, outs, blocks, first_stride in plan:
        for block in range(blocks):
            stride = 1 if block else first_stride
            inner = ins * expansion
            y = b.node("Clip", b.conv(x, ins, inner, 1), low, high) if expansion > 1 else x
            y = b.node("Clip", b.conv(y, inner, inner, 3, stride, inner), low, high)
            residual = stride == 1 and ins == outs
            y = b.conv(y, inner, outs, 1, gain=_BRANCH if residual else 1.0)
            x = b.node("Add", x, y) if residual else y
            ins = outs
    x = b.node("Clip", b.conv(x, ins, 1280, 1), low, high)
    _classifier(b, x, 1280)
    return b.model("mobilenetv2", {"image": (TensorProto.FLOAT, ("N", 3, 224, 224))}, "logits")


def vit_b() -> onnx.ModelProto:
    """ViT-B/16, 86 M parameters, 17 G MACs; batch 1, since its class token is joined by Concat."""
    b = _Builder()
    width = 768
    patches = b.node(
        "Conv", "image", b.weight((width, 3, 16, 16), 768), kernel_shape=[16, 16], strides=[16, 16], pads=[0] * 4
    )
    flat = b.node("Reshape", patches, b.constant(np.array([0, width, -1], np.int64)))
    tokens = b.node("Transpose", flat, perm=[0, 2, 1])
    x = b.node("Concat", b.weight((1, 1, width), 50), tokens, axis=1)
    x = b.node("Add", x, b.weight((1, 197, width), 50))
    for _ in range(12):
        x = b.node("Add", x, b.attention(b.norm(x, width), width, 12))
        x = b.node("Add", x, b.feed_forward(b.norm(x, width), width, 4 * width))
    first = b.node("Gather", b.norm(x, width), b.constant(np.int64(0)), axis=1)
    b.linear(first, width, 1000)
    return b.model("vit_b", {"image": (TensorProto.FLOAT, (1, 3, 224, 224))}, "logits")


def bert_base(length: int = 128) -> onnx.ModelProto:
    """BERT-base, uncased, without its pooler: 109 M parameters, 11 G MACs at 128 tokens."""
    b = _Builder()
    width = 768
    words = b.node("Gather", b.weight((30522, width), 1), "input_ids")
    kinds = b.node("Gather", b.weight((2, width), 1), "token_type_ids")
    x = b.node("Add", b.node("Add", words, kinds), b.weight((1, length, width), 1))
    x = b.norm(x, width)
    shown = b.node("Cast", "attention_mask", to=TensorProto.FLOAT)
    wide = b.node("Unsqueeze", shown, b.constant(np.array([1, 2], np.int64)))
    hidden = b.node("Sub", b.constant(np.float32(1)), wide)
    mask = b.node("Mul", hidden, b.constant(np.float32(-1e4)))
    for _ in range(12):
        x = b.norm(b.node("Add", x, b.attention(x, width, 12, mask)), width)
        x = b.norm(b.node("Add", x, b.feed_forward(x, width, 4 * width)), width)
    kind = (TensorProto.INT64, ("N", length))
    names = ("input_ids", "attention_mask", "token_type_ids")
    return b.model("bert_base", dict.fromkeys(names, kind), "last_hidden_state")


ARCHITECTURES: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "resnet50": resnet50,
    "mobilenetv2": mobilenetv2,
    "vit_b": vit_b,
    "bert_base": bert_base,
}


def build(name: str) -> onnx.ModelProto:
    """The architecture ``name`` with random weights, the same on every call."""
    return ARCHITECTURES[name]()


def feeds(name: str, samples: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs of ``samples`` samples that look like real ones: normalised pixels, tokens with some padding."""
    generator = np.random.default_rng(seed)
    if name != "bert_base":
        return {"image": generator.standard_normal((samples, 3, 224, 224), np.float32)}
    lengths = generator.integers(64, 129, samples)
    mask = (np.arange(128) < lengths[:, None]).astype(np.int64)
    ids = generator.integers(1000, 30522, (samples, 128)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
