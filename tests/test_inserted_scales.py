from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from models import Net
from numpy.typing import NDArray

from onnxcompress.base import Context
from onnxcompress.data import Dataset, open_data
from onnxcompress.graph import Graph, copy_graph, input_specs
from onnxcompress.passes.equalize_layers import EqualizeLayers
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.quantization.inserted_scales import find_borders
from onnxcompress.session import Session
from onnxcompress.shapes import infer_shapes
from onnxcompress.targets import get_target
from onnxcompress.verify import compare

Array = NDArray[Any]


def post_norm(outlier: float = 20.0) -> Graph:
    """A feed-forward block behind LayerNormalization, one of whose channels is ``outlier`` times the others."""
    net = Net(20, ir_version=9)
    x = net.input("x", ["N", "S", 64])
    scale = np.ones(64, np.float32)
    scale[7] = outlier
    normal = net.add("LayerNormalization", x, net.const(scale, np.float32), net.random(64), axis=-1, to="normal")
    y = net.add("Gelu", net.add("Add", net.add("MatMul", normal, net.random(64, 128)), net.random(128)))
    y = net.add("Add", net.add("MatMul", y, net.random(128, 64)), net.random(64))
    net.add("LayerNormalization", net.add("Add", normal, y), net.random(64), net.random(64), axis=-1, to="y")
    net.output("y", ["N", "S", 64])
    return from_proto(net.model())


def samples(graph: Graph, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    return open_data([{"x": rng.normal(size=(8, 12, 64)).astype(np.float32)}], input_specs(graph))


def sqnr(graph: Graph, reference: Graph) -> float:
    return compare(reference, graph, samples(reference, 1))[0].sqnr_db


def test_the_outlier_no_longer_takes_the_resolution_of_all() -> None:
    graph = post_norm()
    before = to_proto(graph).SerializeToString()
    result = EqualizeLayers()(graph, Context(data=samples(graph), threads=1))
    assert to_proto(graph).SerializeToString() == before
    onnx.checker.check_model(to_proto(result.graph), full_check=True)
    assert "normal_equalize" in [c.node for c in result.report.changes if c.kind == "inserted"]
    assert sqnr(result.graph, graph) > 100
    plain, even = (InsertQdq()(g, Context(data=samples(graph), threads=1)) for g in (graph, result.graph))
    assert sqnr(even.graph, graph) > sqnr(plain.graph, graph) + 5
    audit = even.report.details["audit"]
    assert not audit["mismatches"] and audit["quantize"] == 2 and audit["dequantize"] == 0
    assert "QLinearMul" not in audit["integer"]  # the multiplication stays in front of the quantiser


def test_only_the_products_read_the_even_tensor() -> None:
    graph = post_norm()
    result = EqualizeLayers()(graph, Context(data=samples(graph), threads=1)).graph
    tensors = result.tensors()
    assert [node.op for node in tensors["normal_even"].outputs] == ["MatMul"]
    assert sorted(node.op for node in tensors["normal"].outputs) == ["Add", "Mul"]


def test_nothing_is_inserted_where_channels_are_even_or_on_request() -> None:
    graph = post_norm(outlier=1.0)
    result = EqualizeLayers()(graph, Context(data=samples(graph), threads=1))
    assert "normal_equalize" not in [c.node for c in result.report.changes]
    graph = post_norm()
    result = EqualizeLayers(insert=False)(graph, Context(data=samples(graph), threads=1))
    assert not [c for c in result.report.changes if c.kind == "inserted"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_weight_that_others_read_is_not_scaled(shared: bool) -> None:
    graph = copy_graph(post_norm())
    if shared:
        product = next(node for node in graph.nodes if node.op == "MatMul")
        result = gs.Variable("z", np.dtype(np.float32), ["N", "S", 128])
        graph.nodes.append(gs.Node("MatMul", "other", {}, list(product.inputs), [result]))
        graph.outputs.append(result)
    borders = find_borders(graph, get_target("cpu"), infer_shapes(graph))
    assert ("normal" in [border.tensor.name for border in borders]) is not shared


def test_convolutions_get_none() -> None:
    net = Net()
    x = net.input("x", ["N", 3, 8, 8])
    y = net.add("GlobalAveragePool", net.add("Relu", net.add("Conv", x, net.random(16, 3, 3, 3))))
    net.add("Gemm", net.add("Flatten", y), net.random(16, 10), net.random(10), to="y")
    net.output("y", ["N", 10])
    graph = from_proto(net.model())
    assert find_borders(graph, get_target("cpu"), infer_shapes(graph)) == []
    feeds = {"x": np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)}
    result = EqualizeLayers()(graph, Context(data=open_data([feeds], input_specs(graph)), threads=1))
    wanted, found = (Session(g, optimization="disabled").run(feeds)["y"] for g in (graph, result.graph))
    assert "Mul" not in [node.op for node in result.graph.nodes]
    assert np.abs(wanted - found).max() < 1e-4
