"""Weights that become zero: which, how many, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from models import BY_NAME, HAZARDS, Hazard, Net, image, make_feeds
from onnx import numpy_helper
from pydantic import ValidationError

from onnxcompress.base import Context
from onnxcompress.graph import Graph, constant_value
from onnxcompress.passes.prune_weights import PruneWeights
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.session import Session


def weights(graph: Graph) -> dict[str, np.ndarray]:
    found = {}
    for node in graph.nodes:
        for tensor in node.inputs:
            value = constant_value(tensor)
            if value is not None and value.ndim >= 2:
                found[tensor.name] = value
    return found


def three_layers() -> onnx.ModelProto:
    net = Net()
    x = net.add("Relu", net.conv(image(net, 8), 8, 6, bias=True))
    x = net.add("Flatten", net.add("GlobalAveragePool", net.conv(x, 6, 10)))
    net.add("Gemm", x, net.random(4, 10), net.random(4), transB=1, to="y")
    net.output("y", ["N", 4])
    return net.model()


def test_each_layer_loses_its_smallest() -> None:
    graph = from_proto(three_layers())
    result = PruneWeights(sparsity=0.3)(graph)
    before, after = weights(graph), weights(result.graph)
    assert before.keys() == after.keys()
    for name, old in before.items():
        gone = after[name] == 0
        assert gone.sum() == int(0.3 * old.size)
        assert np.array_equal(after[name][~gone], old[~gone])
        assert np.abs(old[gone]).max() <= np.abs(old[~gone]).min()
    assert [c.node for c in result.report.changes] == ["n0_Conv", "n2_Conv", "n5_Gemm"]
    zeros = sum(int((v == 0).sum()) for v in after.values())
    assert result.report.details["sparsity"] == {"zeros": zeros, "weights": sum(v.size for v in after.values())}


def test_one_threshold_for_all_layers() -> None:
    graph = from_proto(three_layers())
    after = weights(PruneWeights(sparsity=0.5, scope="global")(graph).graph)
    before = weights(graph)
    total = sum(v.size for v in before.values())
    assert sum(int((v == 0).sum()) for v in after.values()) == total // 2
    gone = np.concatenate([np.abs(before[n][after[n] == 0]) for n in before])
    stays = np.concatenate([np.abs(before[n][after[n] != 0]) for n in before])
    assert gone.max() <= stays.min()


@pytest.mark.parametrize(("pattern", "kept", "run"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)])
def test_n_of_every_m_along_the_summed_axis(pattern: str, kept: int, run: int) -> None:
    result = PruneWeights(pattern=pattern)(from_proto(three_layers()))
    for value in weights(result.graph).values():
        rows = np.moveaxis(value, 1, -1)
        for start in range(0, rows.shape[-1], run):
            part = rows[..., start : start + run]
            assert ((part != 0).sum(axis=-1) == -(-kept * part.shape[-1] // run)).all()


@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0)])
def test_the_summed_axis_of_matrices(trans_a: int, trans_b: int) -> None:
    net = Net()
    x = net.input("x", [4, 3] if trans_a else ["N", 4])
    weight = net.random(8, 4) if trans_b else net.random(4, 8)
    y = net.add("Gemm", x, weight, transA=trans_a, transB=trans_b)
    net.add("MatMul", y, net.random(8, 2), to="y")
    net.output("y", [3 if trans_a else "N", 2])
    graph = PruneWeights(pattern="2:4")(from_proto(net.model())).graph
    for name, value in weights(graph).items():
        rows = value if name == weight and trans_b else value.T
        assert ((rows.reshape(rows.shape[0], -1, 4) != 0).sum(axis=-1) == 2).all()


def test_a_matrix_on_the_left_and_a_transposed_convolution() -> None:
    net = Net()
    y = net.add("ConvTranspose", net.input("x", ["N", 4, 3, 3]), net.random(4, 6, 2, 2))
    y = net.add("Reshape", y, net.ints(-1, 4, 24))
    net.add("MatMul", net.random(5, 4), y, to="y")
    net.output("y", ["N", 5, 24])
    kernel, matrix = weights(PruneWeights(pattern="2:4")(from_proto(net.model())).graph).values()
    assert ((kernel != 0).sum(axis=0) == 2).all()
    assert ((matrix != 0).sum(axis=1) == 2).all()


def test_a_shared_weight_is_pruned_once_and_for_all_its_readers() -> None:
    graph = from_proto(BY_NAME["shared_weight"].build())
    result = PruneWeights(sparsity=0.5)(graph)
    assert [c.node for c in result.report.changes] == ["n0_Conv"]
    shared = {id(n.inputs[1]) for n in result.graph.nodes if n.op == "Conv"}
    assert len(shared) == 1


def test_the_output_of_a_constant_node() -> None:
    net = Net()
    weight = net.add("Constant", value=numpy_helper.from_array(net.rng.standard_normal((4, 6)).astype(np.float32)))
    net.add("MatMul", net.input("x", ["N", 4]), weight, to="y")
    net.output("y", ["N", 6])
    (value,) = weights(PruneWeights()(from_proto(net.model())).graph).values()
    assert (value == 0).sum() == 12


def test_what_stays_and_why() -> None:
    result = PruneWeights(exclude_nodes=("n5_*",))(from_proto(three_layers()))
    assert [(r.node, r.reason) for r in result.report.refusals] == [("n5_Gemm", "its weights stay: excluded")]
    result = PruneWeights()(from_proto(BY_NAME["dynamic_quantised"].build()))
    assert result.report.changes == ()


def test_the_report_says_that_the_runtime_gets_no_faster() -> None:
    context = Context()
    PruneWeights()(from_proto(three_layers()), context)
    assert any("no faster" in warning for warning in context.warnings)
    context = Context()
    PruneWeights(sparsity=0.0)(from_proto(three_layers()), context)
    assert not context.warnings


@pytest.mark.parametrize("pattern", ["2:2", "4:2", "0:4", "dense", "2:4:8", "a:b"])
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match=r"expected .unstructured. or N:M"):
        PruneWeights(pattern=pattern)


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.name)
def test_every_hazard_stays_a_valid_model(hazard: Hazard) -> None:
    graph = from_proto(hazard.build())
    before = to_proto(graph).SerializeToString()
    result = PruneWeights(sparsity=0.6)(graph)
    assert to_proto(graph).SerializeToString() == before
    model = to_proto(result.graph)
    onnx.checker.check_model(model, full_check=True)
    assert result.report.changed == (model.SerializeToString() != before)
    if hazard.runnable:
        Session(model, threads=1).run(make_feeds(hazard.build()))
    assert to_proto(PruneWeights(sparsity=0.6)(graph).graph).SerializeToString() == model.SerializeToString()
