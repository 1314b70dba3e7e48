"""Layers as matrix products: for every operator, W X + b on its unfolded input is what the runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import BY_NAME, Net, image, make_feeds

from onnxcompress.graph import Names
from onnxcompress.proto import from_proto
from onnxcompress.pruning.mixing import MixingLayer, find_mixing_layers
from onnxcompress.session import Session


def one(build: Any) -> onnx.ModelProto:
    net = Net()
    build(net)
    return net.model()


def conv(**attributes: Any) -> onnx.ModelProto:
    def build(net: Net) -> None:
        group = attributes.get("group", 1)
        weight = net.random(6, 4 // group, 3, 3)
        net.add("Conv", image(net, 4, 9), weight, net.random(6), to="y", **attributes)
        net.output("y", None)

    return one(build)


def conv_transpose(**attributes: Any) -> onnx.ModelProto:
    def build(net: Net) -> None:
        weight = net.random(4, 6 // attributes.get("group", 1), 3, 2)
        net.add("ConvTranspose", image(net, 4, 5), weight, net.random(6), to="y", **attributes)
        net.output("y", None)

    return one(build)


def gemm(transposed: int, alpha: float, beta: float) -> onnx.ModelProto:
    def build(net: Net) -> None:
        x = net.add("Flatten", image(net, 2, 3))
        weight = net.random(7, 18) if transposed else net.random(18, 7)
        net.add("Gemm", x, weight, net.random(7), to="y", transB=transposed, alpha=alpha, beta=beta)
        net.output("y", None)

    return one(build)


def matmul(bias: bool) -> onnx.ModelProto:
    def build(net: Net) -> None:
        x = net.add("MatMul", image(net, 3, 5), net.random(5, 4), to="p" if bias else "y")
        if bias:
            net.add("Add", net.random(4), x, to="y")
        net.output("y", None)

    return one(build)


def batch_norm() -> onnx.ModelProto:
    def build(net: Net) -> None:
        net.add("Identity", net.batch_norm(image(net, 4, 5), 4), to="y")
        net.output("y", None)

    return one(build)


MODELS = {
    "conv": conv(pads=[1, 1, 1, 1]),
    "conv strides dilations": conv(pads=[2, 0, 1, 1], strides=[2, 1], dilations=[1, 2]),
    "conv grouped": conv(group=2),
    "conv same upper": conv(auto_pad="SAME_UPPER", strides=[2, 2]),
    "conv same lower": conv(auto_pad="SAME_LOWER", strides=[2, 2]),
    "conv transpose": conv_transpose(),
    "conv transpose grouped": conv_transpose(group=2, strides=[2, 3], pads=[1, 0, 0, 1]),
    "conv transpose padded": conv_transpose(strides=[2, 2], output_padding=[1, 0], dilations=[2, 1], pads=[1, 1, 1, 1]),
    "conv transpose cut": conv_transpose(strides=[1, 1], pads=[3, 2, 3, 2], dilations=[2, 2]),
    "conv transpose shape": conv_transpose(strides=[2, 2], output_shape=[10, 10], auto_pad="SAME_UPPER"),
    "gemm": gemm(0, 1.0, 1.0),
    "gemm scaled": gemm(1, 0.5, 2.0),
    "matmul": matmul(bias=False),
    "matmul with bias": matmul(bias=True),
    "batch norm": batch_norm(),
}


def only_layer(model: onnx.ModelProto) -> tuple[Any, MixingLayer]:
    graph = from_proto(model)
    layers = find_mixing_layers(graph)
    assert len(layers) == 1
    return graph, layers[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_matrix_product_is_what_the_layer_computes(name: str) -> None:
    model = MODELS[name]
    _, layer = only_layer(model)
    feeds = make_feeds(model, sizes={"N": 3})
    expected = Session(model, threads=1).run(feeds)["y"]
    inputs = next(iter(feeds.values()))
    if layer.op == "Gemm":
        inputs = inputs.reshape(len(inputs), -1)
    count = layer.positions(expected)
    chosen = np.sort(np.random.default_rng(0).choice(count, max(1, count * 2 // 3), replace=False))
    columns = layer.columns(inputs, expected.shape[2:] if layer.axis == 1 else (), chosen)
    found = layer.filters() @ columns + layer.bias()[:, :, None]
    np.testing.assert_allclose(found, layer.rows(expected, chosen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_other_weights_are_stored_as_they_are_read(name: str) -> None:
    graph, layer = only_layer(MODELS[name])
    generator = np.random.default_rng(1)
    weights = generator.standard_normal(layer.filters().shape)
    bias = generator.standard_normal(layer.bias().shape)
    names = Names(graph)
    kept = layer.node.inputs[1].name
    layer.set_filters(weights, names)
    np.testing.assert_allclose(layer.filters(), weights, rtol=1e-5)
    assert layer.node.inputs[1].name == kept
    assert layer.set_bias(bias, names) == (layer.bias_node is not None)
    if layer.bias_node is not None:
        np.testing.assert_allclose(layer.bias(), bias, rtol=1e-5, atol=1e-6)


def test_a_layer_without_bias_gets_one() -> None:
    def build(net: Net) -> None:
        net.add("Conv", image(net), net.random(4, 3, 1, 1), to="y")
        net.output("y", None)

    graph, layer = only_layer(one(build))
    assert not layer.has_bias
    assert layer.set_bias(np.ones((1, 4)), Names(graph))
    assert layer.has_bias
    assert layer.bias().tolist() == [[1.0] * 4]


def test_a_branch_aims_at_the_sum_and_values_beyond_a_relu_are_equal() -> None:
    layers = {layer.name: layer for layer in find_mixing_layers(from_proto(BY_NAME["residual"].build()))}
    joined = [layer for layer in layers.values() if layer.sum_output is not None]
    assert joined
    assert all(layer.shortcut is not None for layer in joined)
    assert any(layer.bounds == (0.0, np.inf) for layer in layers.values())


def test_a_clip_has_both_bounds() -> None:
    for opset in (7, 11):
        layers = find_mixing_layers(from_proto(BY_NAME[f"relu6_opset{opset}"].build()))
        assert any(layer.bounds == (0.0, 6.0) for layer in layers)


def test_a_shared_weight_is_left_out() -> None:
    layers = find_mixing_layers(from_proto(BY_NAME["shared_weight"].build()))
    assert {layer.op for layer in layers} == {"BatchNormalization"}
