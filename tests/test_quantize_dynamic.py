from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import HAZARDS, Hazard, make_feeds
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.base import Context
from onnxcompress.data import open_data
from onnxcompress.graph import Graph, input_specs
from onnxcompress.passes.quantize_dynamic import Comparison, QuantizeDynamic
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.quantization.affine import QuantScheme, dequantize, quantize, quantize_weight, weight_qparams
from onnxcompress.session import Session
from onnxcompress.targets import get_target
from onnxcompress.verify import compare

Array = NDArray[Any]
RUNNABLE = [h for h in HAZARDS if h.runnable and h.name not in ("random_and_stateful", "dropout_training")]


def build(nodes: list[onnx.NodeProto], constants: dict[str, Array], shape: list[Any], opset: int = 17) -> Graph:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"d{i}" for i in range(len(shape))])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def fake_dynamic(x: Array) -> Array:
    """DynamicQuantizeLinear and back, as the operator specification says."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / 255)
    zero_point = np.clip(np.rint(-np.float32(low) / scale), 0, 255)
    integers = np.clip(np.rint(x / scale) + zero_point, 0, 255)
    return ((integers - zero_point) * scale).astype(np.float64)


def fake_weight(weight: Array, scheme: QuantScheme) -> Array:
    params = weight_qparams(weight, scheme, 1)
    return dequantize(quantize_weight(weight, params, scheme), params).astype(np.float64)


def close(found: Array, wanted: Array) -> bool:
    """Equal but for a value of x in a few million that falls on the other side of a rounding boundary."""
    return bool(np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted))


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("beta", [1.0, -2.0, 0.0])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_equals_the_oracle(
    rng: np.random.Generator, alpha: float, beta: float, trans_a: int, trans_b: int
) -> None:
    weight, bias = rng.normal(size=(96, 80)).astype(np.float32), rng.normal(size=80).astype(np.float32)
    node = helper.make_node(
        "Gemm", ["x", "w", "b"], ["y"], name="gemm", alpha=alpha, beta=beta, transA=trans_a, transB=trans_b
    )
    stored = np.ascontiguousarray(weight.T) if trans_b else weight
    graph = build([node], {"w": stored, "b": bias}, [96, 5] if trans_a else [5, 96])
    x = rng.normal(size=(5, 96)).astype(np.float32)
    before = to_proto(graph).SerializeToString()
    result = QuantizeDynamic()(graph)
    assert to_proto(graph).SerializeToString() == before
    onnx.checker.check_model(to_proto(result.graph), full_check=True)
    wanted = alpha * fake_dynamic(x) @ fake_weight(weight, get_target("cpu").weights) + beta * bias
    for level in ("disabled", "all"):
        found = Session(result.graph, optimization=level).run({"x": x.T.copy() if trans_a else x})["y"]
        assert close(found, wanted)
    assert result.report.details["audit"]["integer"]["DynamicQuantizeMatMul"] == 1
    assert [c.kind for c in result.report.changes] == ["quantised"]


def projections() -> tuple[Graph, dict[str, Array]]:
    """Two products that share an input, one with a bias behind, added up."""
    rng = np.random.default_rng(3)
    constants = {f"w{i}": rng.normal(size=(64, 72)).astype(np.float32) for i in (0, 1)}
    constants["b"] = rng.normal(size=72).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["p"], name="first"),
        helper.make_node("Add", ["p", "b"], ["q"], name="bias"),
        helper.make_node("MatMul", ["x", "w1"], ["r"], name="second"),
        helper.make_node("Sigmoid", ["r"], ["s"], name="sigmoid"),
        helper.make_node("Mul", ["q", "s"], ["y"], name="gate"),
    ]
    return build(nodes, constants, ["N", "S", 64]), constants


def test_readers_of_one_tensor_share_its_integers(rng: np.random.Generator) -> None:
    graph, constants = projections()
    result = QuantizeDynamic()(graph)
    assert sum(node.op == "DynamicQuantizeLinear" for node in result.graph.nodes) == 1
    integer = result.report.details["audit"]["integer"]
    assert integer == {"MatMulIntegerToFloat": 2}
    x = rng.normal(size=(2, 7, 64)).astype(np.float32)
    scheme = get_target("cpu").weights
    first = fake_dynamic(x) @ fake_weight(constants["w0"], scheme) + constants["b"]
    second = fake_dynamic(x) @ fake_weight(constants["w1"], scheme)
    assert close(Session(result.graph).run({"x": x})["y"], first / (1 + np.exp(-second)))


def test_the_bias_behind_a_product_is_fused() -> None:
    graph, _ = projections()
    result = QuantizeDynamic(exclude_nodes=("second",))(graph)
    assert [r.node for r in result.report.refusals] == ["second"]
    audit = result.report.details["audit"]
    assert audit["integer"] == {"DynamicQuantizeMatMul": 1}
    assert {node["operator"] for node in audit["floats"]} <= {"MatMul", "Sigmoid", "Mul", "QuickGelu"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exclude_operators": ("MatMul",)}, "operator MatMul is excluded"),
        ({"exclude_nodes": ("fir*", "second")}, "it is excluded by name"),
        ({"minimum_weights": 10_000}, "weights are too few"),
    ],
)
def test_what_stays_float_is_told(options: dict[str, Any], reason: str) -> None:
    graph, _ = projections()
    result = QuantizeDynamic(**options)(graph)
    assert not result.report.changes
    assert len(result.report.refusals) == 2
    assert all(reason in refusal.reason for refusal in result.report.refusals)
    assert to_proto(result.graph).SerializeToString() == to_proto(graph).SerializeToString()


def test_no_pair_of_weights_saturates_for_x86_any() -> None:
    graph, _ = projections()
    result = QuantizeDynamic()(graph, Context(target="x86-any"))
    bound = get_target("x86-any").weights.largest_pair
    assert bound is not None
    stored = [t.values for n in result.graph.nodes if n.op == "MatMulInteger" for t in n.inputs[1:2]]
    assert len(stored) == 2
    for integers in stored:
        for signed in (integers.astype(int), -integers.astype(int)):
            assert np.maximum(np.sort(signed, axis=0)[-2:], 0).sum(axis=0).max() <= bound
    assert not result.report.warnings


def test_shared_weights_are_stored_once(rng: np.random.Generator) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="a"),
        helper.make_node("Relu", ["p"], ["r"], name="r"),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="b"),
    ]
    result = QuantizeDynamic()(build(nodes, {"w": rng.normal(size=(64, 64)).astype(np.float32)}, ["N", "S", 64]))
    assert [i.dims for i in to_proto(result.graph).graph.initializer if i.data_type == TensorProto.INT8] == [[64, 64]]


@pytest.mark.parametrize("hazard", RUNNABLE, ids=lambda h: h.name)
def test_hazards_stay_valid_and_close(hazard: Hazard) -> None:
    model = hazard.build()
    graph, feeds = from_proto(model), make_feeds(model)
    result = QuantizeDynamic(minimum_weights=0)(graph)
    onnx.checker.check_model(to_proto(result.graph))
    expected, found = (Session(m, optimization="disabled", threads=1).run(feeds) for m in (model, result.graph))
    for name, value in expected.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size:
            gap = np.linalg.norm((found[name] - value).astype(np.float64).ravel())
            assert gap <= 0.1 * np.linalg.norm(value.astype(np.float64).ravel()) + 1e-6


def test_measured_is_decided_and_replays_without_data() -> None:
    graph, _ = projections()
    rng = np.random.default_rng(5)
    data = open_data([{"x": rng.normal(size=(8, 7, 64)).astype(np.float32)}], input_specs(graph))
    result = QuantizeDynamic(use="measured")(graph, Context(data=data, threads=1))
    comparison = result.report.details["comparison"]
    taken = result.report.decisions["use"]
    assert taken == ("always" if comparison["taken"] == "dynamic" else "never")
    assert comparison["static_sqnr_db"] > 25 and comparison["dynamic_sqnr_db"] > 25
    again = QuantizeDynamic(use=taken)(graph)
    assert to_proto(again.graph).SerializeToString() == to_proto(result.graph).SerializeToString()


def test_weights_of_fewer_bits_are_rounded_on_the_data_and_still_cannot_saturate() -> None:
    graph, _ = projections()
    rng = np.random.default_rng(6)
    mixed = rng.normal(size=(64, 8)) @ rng.normal(size=(8, 64)) + 0.1 * rng.normal(size=(64, 64))  # correlated inputs

    def samples(count: int) -> list[dict[str, np.ndarray]]:
        return [{"x": (rng.normal(size=(8, 7, 64)) @ mixed).astype(np.float32)} for _ in range(count)]

    context = Context(data=open_data(samples(40), input_specs(graph)), target="x86-any", threads=1)
    fresh = open_data(samples(8), input_specs(graph))
    results = [QuantizeDynamic(round_weights=on)(graph, context).graph for on in (False, True)]
    integers = [
        {i.name: numpy_helper.to_array(i) for i in to_proto(g).graph.initializer if i.data_type == TensorProto.INT8}
        for g in results
    ]
    assert integers[0].keys() == integers[1].keys()
    assert any((integers[0][name] != integers[1][name]).any() for name in integers[0])
    for values in integers[1].values():
        for signed in (values.astype(int), -values.astype(int)):
            largest = np.sort(signed, axis=0)[-2:]
            assert np.maximum(largest, 0).sum(axis=0).max() <= 128
    for nearest, rounded in zip(*(compare(graph, g, fresh) for g in results), strict=True):
        assert rounded.relative_l2 < nearest.relative_l2


def test_nets_without_sequences_are_not_measured(rng: np.random.Generator) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="gemm")
    graph = build([node], {"w": rng.normal(size=(96, 80)).astype(np.float32)}, ["N", 96])
    data = open_data([{"x": rng.normal(size=(8, 96)).astype(np.float32)}], input_specs(graph))
    result = QuantizeDynamic(use="measured")(graph, Context(data=data, threads=1))
    assert not result.report.changes and not result.report.decisions and not result.report.details


@pytest.mark.parametrize(
    ("static", "dynamic", "speed", "taken"),
    [
        (20.0, 21.0, (1.0, 0.98, 1.02), True),  # as fast, closer
        (21.0, 20.0, (1.01, 0.99, 1.03), False),  # not surely faster, worse
        (20.3, 20.0, (1.0, 0.98, 1.02), True),  # a tie
        (20.5, 20.0, (1.1, 1.08, 1.12), True),  # 10 % are worth 1.4 dB
        (20.0, 21.0, (0.8, 0.78, 0.82), False),  # 20 % slower cost 3.2 dB
    ],
)
def test_the_rule_weighs_decibels_against_time(
    static: float, dynamic: float, speed: tuple[float, float, float], taken: bool
) -> None:
    assert Comparison(static, dynamic, *speed, 64).dynamic is taken


def test_quantize_is_the_oracle_of_weights(rng: np.random.Generator) -> None:
    weight, scheme = rng.normal(size=(64, 8)).astype(np.float32), get_target("cpu").weights
    params = weight_qparams(weight, scheme, 1)
    assert np.array_equal(quantize_weight(weight, params, scheme), quantize(weight, params))
