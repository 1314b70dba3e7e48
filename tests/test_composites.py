from __future__ import annotations

import numpy as np
import pytest
from models import Net

from onnxcompress.composites import composite, silu
from onnxcompress.graph import Graph
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.quantization.audit import optimized_structure
from onnxcompress.quantization.canonical import to_canonical_form
from onnxcompress.quantization.placement import place
from onnxcompress.shapes import infer_shapes
from onnxcompress.targets import get_target


def written_out(halved: str = "last") -> Graph:
    """LayerNormalization and Gelu in the operators of opset 13, each in front of a matrix product."""
    net = Net(13, ir_version=8)
    x = net.input("x", ["N", "S", 64])
    away = net.add("Sub", x, net.add("ReduceMean", x, axes=[-1]))
    power = net.add("ReduceMean", net.add("Pow", away, net.floats(2.0)), axes=[-1])
    y = net.add("Div", away, net.add("Sqrt", net.add("Add", power, net.floats(1e-5))))
    y = net.add("Add", net.add("Mul", y, net.random(64)), net.random(64))
    y = net.add("Add", net.add("MatMul", y, net.random(64, 96)), net.random(96))
    factor = net.add("Add", net.add("Erf", net.add("Div", y, net.floats(1.4142135))), net.floats(1.0))
    half = net.floats(0.5)
    if halved == "last":
        y = net.add("Mul", net.add("Mul", y, factor), half)
    elif halved == "first":
        y = net.add("Mul", net.add("Mul", y, half), factor)
    else:
        y = net.add("Mul", y, net.add("Mul", factor, half))
    net.add("MatMul", y, net.random(96, 32), to="y")
    net.output("y", ["N", "S", 32])
    return from_proto(net.model())


forms = pytest.mark.parametrize("halved", ["last", "first", "factor"])


@forms
def test_the_parts_are_found(halved: str) -> None:
    graph = written_out(halved)
    found = [(node.op, composite(node)) for node in graph.nodes]
    assert found.count(("Add", "LayerNormalization")) == 1  # its bias; that of the matrix product stands by itself
    assert found.count(("Mul", "LayerNormalization")) == 1
    assert found.count(("Mul", "Gelu")) == 2
    assert [op for op, whole in found if whole is None].count("Add") == 2  # epsilon and the product's bias


@forms
def test_folding_and_placement_leave_them_whole(halved: str) -> None:
    graph = written_out(halved)

    def operators(candidate: Graph) -> list[str]:
        return [node.op_type for node in optimized_structure(candidate).graph.node]

    assert {"LayerNormalization", "MatMul"} < set(operators(graph))
    result = FoldBatchNorm()(graph)
    assert to_proto(result.graph).SerializeToString() == to_proto(graph).SerializeToString()
    assert not list(to_canonical_form(result.graph, infer_shapes(result.graph)))
    assert operators(result.graph) == operators(graph)
    placement = place(result.graph, get_target("cpu"))
    assert {unit.node.op for unit in placement.integer_units} == {"MatMul"}


def test_a_mean_over_positions_still_becomes_a_pool() -> None:
    net = Net(13, ir_version=8)
    x = net.add("Conv", net.input("x", ["N", 4, 16]), net.random(8, 4, 3))
    x = net.add("ReduceMean", x, axes=[2], keepdims=0)
    net.add("MatMul", x, net.random(8, 3), to="y")
    net.output("y", ["N", 3])
    graph = from_proto(net.model())
    assert [node.op for node, _ in to_canonical_form(graph, infer_shapes(graph))] == ["GlobalAveragePool"]
    assert np.all([composite(node) is None for node in graph.nodes])


def test_a_silu_is_a_sigmoid_and_its_product_and_no_gate() -> None:
    net = Net()
    x = net.input("x", ["N", 4])
    own = net.add("Mul", x, net.add("Sigmoid", x))
    other = net.add("Mul", x, net.add("Sigmoid", own))  # a gate
    net.add("Add", own, other, to="y")
    net.output("y", ["N", 4])
    found = [silu(node) for node in from_proto(net.model()).nodes]
    assert [pair is not None for pair in found] == [True, True, False, False, False]
    assert found[0] == found[1]
