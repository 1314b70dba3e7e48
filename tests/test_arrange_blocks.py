from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import HAZARDS, Hazard, Net, make_feeds
from numpy.typing import NDArray

from onnxcompress.base import Context
from onnxcompress.data import open_data
from onnxcompress.graph import Graph, input_specs
from onnxcompress.passes.arrange_blocks import ArrangeBlocks
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.quantization.audit import optimized_structure
from onnxcompress.session import Session

Array = NDArray[Any]
RUNNABLE = [h for h in HAZARDS if h.runnable and h.name not in ("random_and_stateful", "dropout_training")]
NEW = ArrangeBlocks(residuals="sum", projections="merged")


def block(*, decomposed: bool = False, biases: int = 3) -> Graph:
    """Three projections of one tensor, ``biases`` of them with a bias, and a residual addition with normalisation."""
    net = Net(17, ir_version=8)
    x = net.input("x", ["N", "S", 64])
    parts = []
    for index in range(3):
        part = net.add("MatMul", x, net.random(64, 64))
        parts.append(net.add("Add", part, net.random(64)) if index < biases else part)
    y = net.add("Mul", net.add("Mul", parts[0], net.add("Sigmoid", parts[1])), parts[2])
    y = net.add("Add", x, net.add("MatMul", y, net.random(64, 64)))
    if decomposed:
        away = net.add("Sub", y, net.add("ReduceMean", y, axes=[-1]))
        power = net.add("ReduceMean", net.add("Pow", away, net.floats(2.0)), axes=[-1])
        deviation = net.add("Sqrt", net.add("Add", power, net.floats(1e-5)))
        net.add("Add", net.add("Mul", net.add("Div", away, deviation), net.random(64)), net.random(64), to="y")
    else:
        net.add("LayerNormalization", y, net.random(64), net.random(64), axis=-1, to="y")
    net.output("y", ["N", "S", 64])
    return from_proto(net.model())


def operators(graph: Graph) -> list[str]:
    return [node.op_type for node in optimized_structure(graph).graph.node]


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("biases", [0, 2, 3])
def test_both_rewrites_compute_the_same(rng: np.random.Generator, decomposed: bool, biases: int) -> None:
    graph = block(decomposed=decomposed, biases=biases)
    before = to_proto(graph).SerializeToString()
    result = NEW(graph)
    assert to_proto(graph).SerializeToString() == before
    onnx.checker.check_model(to_proto(result.graph), full_check=True)
    assert [c.kind for c in result.report.changes] == ["rewritten", "merged"]
    x = rng.normal(size=(2, 5, 64)).astype(np.float32)
    wanted, found = (Session(g, optimization="disabled").run({"x": x})["y"] for g in (graph, result.graph))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("decomposed", [False, True])
def test_the_runtime_leaves_a_sum_alone(decomposed: bool) -> None:
    graph = block(decomposed=decomposed)
    assert "SkipLayerNormalization" in operators(graph)
    after = operators(NEW(graph).graph)
    assert "SkipLayerNormalization" not in after and "LayerNormalization" in after and "Sum" in after


def test_one_product_for_three() -> None:
    result = NEW(block())
    products = [node for node in result.graph.nodes if node.op == "MatMul"]
    assert len(products) == 2 and products[0].inputs[1].shape in ([64, 192], (64, 192))


def test_nothing_to_rewrite_is_not_timed(rng: np.random.Generator) -> None:
    net = Net(17, ir_version=8)
    net.add("MatMul", net.input("x", ["N", 8]), net.random(8, 4), to="y")
    net.output("y", ["N", 4])
    graph = from_proto(net.model())
    data = open_data([{"x": rng.normal(size=(4, 8)).astype(np.float32)}], input_specs(graph))
    result = ArrangeBlocks()(graph, Context(data=data))
    assert not result.report.changes and not result.report.decisions and not result.report.details


def test_without_data_nothing_changes() -> None:
    graph = block()
    result = ArrangeBlocks()(graph)
    assert to_proto(result.graph).SerializeToString() == to_proto(graph).SerializeToString()
    assert len(result.report.refusals) == 2


def test_what_is_measured_replays_to_the_same_bytes(rng: np.random.Generator) -> None:
    graph = block()
    data = open_data([{"x": rng.normal(size=(4, 9, 64)).astype(np.float32)}], input_specs(graph))
    result = ArrangeBlocks()(graph, Context(data=data, threads=1))
    assert set(result.report.decisions) == {"residuals", "projections"}
    for option, value in result.report.decisions.items():
        assert result.report.details[option]["taken"] == value
    again = ArrangeBlocks(**result.report.decisions)(graph)
    assert to_proto(again.graph).SerializeToString() == to_proto(result.graph).SerializeToString()


@pytest.mark.parametrize("hazard", RUNNABLE, ids=lambda h: h.name)
def test_hazards_compute_the_same(hazard: Hazard) -> None:
    model = hazard.build()
    feeds = make_feeds(model)
    result = NEW(from_proto(model))
    onnx.checker.check_model(to_proto(result.graph))
    expected, found = (Session(m, optimization="disabled", threads=1).run(feeds) for m in (model, result.graph))
    for name, value in expected.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size:
            gap = np.linalg.norm((found[name] - value).astype(np.float64).ravel())
            assert gap <= (1e-2 if "16" in hazard.name else 1e-5) * (np.linalg.norm(value.astype(np.float64)) + 1e-12)
