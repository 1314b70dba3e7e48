"""fold_padding: fewer positions, the same outputs; and everything that must stay as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from models import Net

from onnxcompress.graph import Graph
from onnxcompress.passes.fold_padding import FoldPadding
from onnxcompress.passes.prune_channels import PruneChannels
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.quantization.placement import place
from onnxcompress.session import Session
from onnxcompress.shapes import infer_shapes, node_macs
from onnxcompress.targets import CPU


def network(
    mean: Callable[[Net, str], str],
    *,
    activations: Sequence[tuple[str, dict[str, Any]]] = (("Relu", {}),),
    image: Sequence[int | str] = (7, 5),
    opset: int = 17,
    bias: bool = True,
    flatten: bool = True,
    **conv: Any,
) -> Graph:
    """Conv 3x3, then a padded pointwise one, activations and a mean."""
    net = Net(opset, ir_version=8)
    x = net.input("x", ["N", 3, *image])
    x = net.add("Relu", net.add("Conv", x, net.random(8, 3, 3, 3), net.random(8), pads=[1, 1, 1, 1]))
    conv = {"pads": [1, 2, 0, 3]} | conv
    x = net.add("Conv", x, net.random(6, 8, 1, 1), *([net.random(6)] if bias else []), **conv)
    for op, attributes in activations:
        x = net.add(op, x, **attributes)
    x = mean(net, x)
    if flatten:
        x = net.add("Flatten", x)
    net.add("Identity", x, to="y")
    net.output("y", ["N", 6])
    return from_proto(net.model())


def pooled(net: Net, x: str) -> str:
    return net.add("GlobalAveragePool", x)


def macs(graph: Graph) -> int:
    return sum(node_macs(graph, infer_shapes(graph, {})).values())


def same(graph: Graph, other: Graph, rng: np.random.Generator) -> None:
    onnx.checker.check_model(to_proto(other), full_check=True)
    feeds = {"x": rng.normal(size=(3, 3, 7, 5)).astype(np.float32)}
    wanted, found = (Session(g, optimization="disabled").run(feeds)["y"] for g in (graph, other))
    assert wanted.shape == found.shape
    assert np.abs(wanted - found).max() <= 2e-6 * np.abs(wanted).max()


MEANS: dict[str, tuple[Callable[[Net, str], str], dict[str, Any]]] = {
    "global pool": (pooled, {}),
    "average pool": (lambda net, x: net.add("AveragePool", x, kernel_shape=[8, 10]), {}),
    "axes": (lambda net, x: net.add("ReduceMean", x, axes=[2, 3]), {}),
    "axes from the end": (lambda net, x: net.add("ReduceMean", x, axes=[-1, -2]), {}),
    "without dimensions": (
        lambda net, x: net.add("ReduceMean", x, axes=[2, 3], keepdims=0),
        {"flatten": False},
    ),
    "axes as an input": (lambda net, x: net.add("ReduceMean", x, net.ints(2, 3)), {"opset": 18}),
}


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_from_fewer_positions(mean: str, bias: bool, rng: np.random.Generator) -> None:
    make, options = MEANS[mean]
    graph = network(make, bias=bias, **options)
    before = to_proto(graph).SerializeToString()
    result = FoldPadding()(graph)
    assert to_proto(graph).SerializeToString() == before
    assert [change.detail for change in result.report.changes] == ["padding: 35 positions instead of 80"]
    assert macs(graph) - macs(result.graph) == 45 * 6 * 8
    same(graph, result.graph, rng)
    assert not FoldPadding()(result.graph).report.changes


@pytest.mark.parametrize(
    "activations",
    [
        (),
        (("LeakyRelu", {"alpha": 0.3}),),
        (("LeakyRelu", {}), ("Identity", {})),
        (("Relu", {}), ("Dropout", {})),
        (("LeakyRelu", {"alpha": -0.5}), ("Relu", {})),
    ],
)
def test_activations(activations: Sequence[tuple[str, dict[str, Any]]], rng: np.random.Generator) -> None:
    graph = network(pooled, activations=activations)
    result = FoldPadding()(graph)
    assert len(result.report.changes) == 1
    same(graph, result.graph, rng)


def test_weights_of_others_stay(rng: np.random.Generator) -> None:
    net = Net(17, ir_version=8)
    x = net.input("x", ["N", 3, 7, 5])
    weight, bias = net.random(6, 3, 1, 1), net.random(6)
    parts = [
        net.add("GlobalAveragePool", net.add("Relu", net.add("Conv", x, weight, bias, pads=[pad] * 4)))
        for pad in (0, 1, 2)
    ]
    net.add("Concat", *parts, axis=1, to="y")
    net.output("y", ["N", 18, 1, 1])
    graph = from_proto(net.model())
    result = FoldPadding()(graph)
    assert len(result.report.changes) == 2
    same(graph, result.graph, rng)


LEFT: dict[str, tuple[Callable[[Net, str], str], dict[str, Any], str | None]] = {
    "sizes that vary": (pooled, {"image": ("H", 5)}, "the size of the image is not fixed"),
    "windows": (lambda net, x: net.add("AveragePool", x, kernel_shape=[8, 5]), {}, "its reader averages windows"),
    "padded windows": (
        lambda net, x: net.add("AveragePool", x, kernel_shape=[8, 10], pads=[1, 1, 0, 0], count_include_pad=1),
        {},
        "its reader averages windows",
    ),
    "one axis": (lambda net, x: net.add("ReduceMean", x, axes=[2]), {}, "its reader averages over other axes"),
    "channels": (lambda net, x: net.add("ReduceMean", x, axes=[1, 2, 3]), {}, "its reader averages over other axes"),
    "stride": (pooled, {"strides": [2, 2]}, None),
    "no padding": (pooled, {"pads": [0, 0, 0, 0]}, None),
    "a maximum": (lambda net, x: net.add("GlobalMaxPool", x), {}, None),
    "saturates": (pooled, {"activations": (("Sigmoid", {}),)}, None),
    "two readers": (
        lambda net, x: net.add("Add", net.add("GlobalAveragePool", x), net.add("GlobalMaxPool", x)),
        {},
        None,
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case: str) -> None:
    make, options, reason = LEFT[case]
    result = FoldPadding()(network(make, **options))
    assert not result.report.changes
    assert [r.reason for r in result.report.refusals] == ([f"its padding stays: {reason}"] if reason else [])


def test_an_output_of_the_model_is_left_alone() -> None:
    graph = network(pooled, activations=())
    conv = next(node for node in graph.nodes if node.op == "Conv" and node.attrs["pads"] == [1, 2, 0, 3])
    graph.outputs.append(conv.outputs[0])
    conv.outputs[0].shape = ["N", 6, 8, 10]
    assert not FoldPadding()(graph).report.changes


def test_pruning_counts_what_it_saves(rng: np.random.Generator) -> None:
    graph = network(pooled)
    alone = FoldPadding()(graph).graph
    share = macs(alone) / macs(graph)
    prune = PruneChannels(macs=(1 + share) / 2, recover=False, importance="l2", round_to=1)(graph)
    assert [change.kind for change in prune.report.changes] == ["folded"]
    assert macs(prune.graph) == macs(alone)
    same(graph, prune.graph, rng)
    more = PruneChannels(macs=share * 0.8, recover=False, importance="l2", round_to=1)(graph)
    assert {change.kind for change in more.report.changes} == {"folded", "pruned"}
    assert 0.5 * share < macs(more.graph) / macs(graph) <= share * 0.8
    assert more.report.details["pruning"]["macs"] == [macs(graph), macs(more.graph)]


def test_the_mean_keeps_the_values_that_decide() -> None:
    """What becomes a large probability is rounded as finely as without the addition, wherever that runs."""
    net = Net(17, ir_version=8)
    x = net.add("Relu", net.add("Conv", net.input("x", ["N", 16, 9, 9]), net.random(64, 16, 3, 3), net.random(64)))
    x = net.add("Relu", net.add("Conv", x, net.random(100, 64, 1, 1), net.random(100), pads=[1, 1, 1, 1]))
    net.add("Softmax", net.add("Flatten", net.add("GlobalAveragePool", x)), axis=1, to="y")
    net.output("y", ["N", 100])
    placement = place(FoldPadding()(from_proto(net.model())).graph, CPU)
    made = {unit.node.op: unit.outputs[0].name for unit in placement.units if unit.integer}
    assert {made["GlobalAveragePool"], made["Add"]} <= placement.peaks()


def test_a_damaged_number_of_pads_is_left_alone() -> None:
    for pads in ([], [1], [1, 1, 1]):
        graph = network(pooled)
        next(node for node in graph.nodes if node.op == "Conv" and node.inputs[1].shape[2] == 1).attrs["pads"] = pads
        assert not FoldPadding()(graph).report.changed
