from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import BY_NAME
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from qdq_oracle import simulate
from random_graphs import random_model

from onnxcompress import targets
from onnxcompress.base import Context, PassResult
from onnxcompress.data import open_data
from onnxcompress.errors import DataError
from onnxcompress.graph import Graph, copy_graph, input_specs, sort_nodes
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.quantization.audit import audit
from onnxcompress.quantization.calibration import calibrate
from onnxcompress.quantization.canonical import to_canonical_form
from onnxcompress.quantization.placement import place
from onnxcompress.quantization.qdq import insert_quantizers
from onnxcompress.session import Session
from onnxcompress.shapes import infer_shapes
from onnxcompress.targets import CPU, OperatorRule, Role

Array = NDArray[Any]
F = TensorProto.FLOAT


def build(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    inputs: dict[str, list[int | str]],
    outputs: list[str],
    opset: int = 17,
) -> Graph:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, F, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, F, None) for n in outputs],
        [numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    return from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def node(op: str, inputs: list[str], output: str, **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"{output}_node", **attrs)


def weight(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def samples(graph: Graph, count: int = 8, size: int = 8) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    shape = {s.name: [d if isinstance(d, int) else size for d in s.shape or ()] for s in input_specs(graph)}
    return {name: rng.normal(size=[count, *dims[1:]]).astype(np.float32) for name, dims in shape.items()}


def quantise(graph: Graph, target: str = "cpu", **options: Any) -> tuple[PassResult, Context]:
    context = Context(data=open_data(samples(graph), input_specs(graph)), target=target)
    return InsertQdq(**options)(graph, context), context


def audit_of(result: PassResult) -> dict[str, Any]:
    return result.report.details["audit"]  # type: ignore[no-any-return]


def sqnr(reference: Array, value: Array) -> float:
    noise = ((reference - value) ** 2).sum()
    return float(10 * np.log10((reference**2).sum() / noise)) if noise else np.inf


def conv(x: str, y: str, w: str = "w", *rest: str, **attrs: Any) -> onnx.NodeProto:
    return node("Conv", [x, w, *rest], y, **({"pads": [1, 1, 1, 1]} | attrs))


IMAGE: dict[str, list[int | str]] = {"x": ["N", 4, 8, 8]}


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs_compute_what_numpy_says_and_become_integer(seed: int) -> None:
    model = random_model(seed, steps=12)
    graph = from_proto(model)
    feeds = {"x": np.random.default_rng(seed).normal(size=(6, 3, 8, 8)).astype(np.float32)}
    list(to_canonical_form(graph, infer_shapes(graph)))
    sort_nodes(graph)
    written = copy_graph(graph)
    placement = place(written, CPU)
    sources = [s for names in placement.sources.values() for s in names]
    ranges = calibrate(written, sources, open_data(feeds, input_specs(written)))
    expected = simulate(written, placement, ranges, feeds)
    list(insert_quantizers(written, placement, ranges))
    sort_nodes(written)
    onnx.checker.check_model(to_proto(written), full_check=True)
    found = Session(written, optimization="disabled", threads=1).run(feeds)
    for name, value in expected.items():
        scale = np.abs(value).max() + 1e-9
        assert np.abs(found[name] - value).max() <= 1e-5 * scale, name
    result, context = quantise(from_proto(model))
    proof = audit_of(result)
    assert proof["mismatches"] == () and proof["stranded"] == ()
    assert not [w for w in context.warnings if "as planned" in w]


def test_the_whole_network_is_one_integer_region() -> None:
    graph = build(
        [
            conv("x", "c1"),
            node("Relu", ["c1"], "r1"),
            conv("r1", "c2", "w2"),
            node("Add", ["c2", "r1"], "s"),
            node("Relu", ["s"], "r2"),
            node("GlobalAveragePool", ["r2"], "p"),
            node("Flatten", ["p"], "f"),
            node("Gemm", ["f", "g", "b"], "y"),
        ],
        {"w": weight(4, 4, 3, 3), "w2": weight(4, 4, 3, 3, seed=2), "g": weight(4, 5), "b": weight(5)},
        IMAGE,
        ["y"],
    )
    result, _ = quantise(graph)
    proof = audit_of(result)
    assert proof["integer"] == {
        "Flatten": 1,
        "QGemm": 1,
        "QLinearAdd": 1,
        "QLinearConv": 2,
        "QLinearGlobalAveragePool": 1,
    }
    assert (proof["quantize"], proof["dequantize"], proof["floats"]) == (1, 0, ())
    feeds = samples(graph)
    reference = Session(graph).run(feeds)["y"]
    assert sqnr(reference, Session(result.graph).run(feeds)["y"]) > 25


@pytest.mark.parametrize(
    ("bounds", "zero_point"), [((0.0, 6.0), 0), ((0.0, 0.5), 0), ((-0.7, 0.4), None), ((-0.3, 0.3), None)]
)
def test_clip_folds_because_the_integers_cannot_leave_its_bounds(
    bounds: tuple[float, float], zero_point: int | None
) -> None:
    graph = build(
        [conv("x", "c"), node("Clip", ["c", "low", "high"], "r"), conv("r", "y", "w2")],
        {
            "w": weight(4, 4, 3, 3) * 20,
            "w2": weight(4, 4, 3, 3),
            "low": np.array(bounds[0], np.float32),
            "high": np.array(bounds[1], np.float32),
        },
        IMAGE,
        ["y"],
    )
    result, _ = quantise(graph)
    assert audit_of(result)["integer"] == {"QLinearConv": 2}
    tensors = result.graph.tensors()
    quantiser = next(n for n in result.graph.nodes if n.outputs[0].name == "r_quantized")
    scale, zero = (tensors[quantiser.inputs[i].name].values for i in (1, 2))
    low, high = (np.float32(scale) * np.float32(end - int(zero)) for end in (0, 255))
    assert bounds[0] <= low <= 0 <= high <= bounds[1]
    if zero_point is not None:
        assert int(zero) == zero_point


def test_movement_is_written_on_the_integers_with_its_input_s_parameters() -> None:
    pads = np.array([0, 2, 0, 0, 0, 2, 0, 0])
    graph = build(
        [
            conv("x", "c"),
            node("Relu", ["c"], "r"),
            node("Slice", ["r", "zero", "end", "axes", "step"], "s"),
            node("Pad", ["s", "pads"], "p"),
            node("MaxPool", ["r"], "m", kernel_shape=[2, 2], strides=[2, 2]),
            conv("m", "c2", "w2"),
            node("Add", ["p", "c2"], "y"),
            conv("y", "z", "w3"),
        ],
        {
            "w": weight(4, 4, 3, 3),
            "w2": weight(8, 4, 3, 3),
            "w3": weight(2, 8, 3, 3),
            "zero": np.array([0, 0]),
            "end": np.array([99, 99]),
            "axes": np.array([2, 3]),
            "step": np.array([2, 2]),
            "pads": pads,
        },
        IMAGE,
        ["z"],
    )
    result, _ = quantise(graph)
    proof = audit_of(result)
    assert proof["integer"] == {"MaxPool": 1, "Pad": 1, "QLinearAdd": 1, "QLinearConv": 3, "Slice": 1}
    assert (proof["quantize"], proof["dequantize"]) == (1, 1)
    nodes = {n.name: n for n in result.graph.nodes}
    assert nodes["s_node"].inputs[0].name == "r_quantized"
    assert nodes["m_node"].inputs[0].name == "r_quantized"
    assert nodes["p_node"].inputs[2].values == 0


def test_concat_of_different_ranges_copies_bytes() -> None:
    graph = build(
        [
            conv("x", "a"),
            node("Relu", ["a"], "ra"),
            conv("x", "b", "w2"),
            node("Relu", ["b"], "rb"),
            node("Concat", ["ra", "rb"], "k", axis=1),
            conv("k", "y", "w3"),
        ],
        {"w": weight(4, 4, 3, 3), "w2": weight(4, 4, 3, 3) * 9, "w3": weight(4, 8, 3, 3)},
        IMAGE,
        ["y"],
    )
    result, _ = quantise(graph)
    assert audit_of(result)["integer"] == {"Concat": 1, "QLinearConv": 3}


def test_concat_keeps_the_resolution_of_an_input_that_others_read() -> None:
    graph = build(
        [
            conv("x", "a"),
            conv("x", "b", "w2"),
            node("Concat", ["a", "b"], "k", axis=1),
            conv("k", "y", "w3"),
            conv("a", "z", "w4"),
        ],
        {
            "w": weight(4, 4, 3, 3),
            "w2": weight(4, 4, 3, 3) * 99,
            "w3": weight(4, 8, 3, 3),
            "w4": weight(4, 4, 3, 3),
        },
        IMAGE,
        ["y", "z"],
    )
    result, _ = quantise(graph)
    assert audit_of(result)["integer"] == {"QLinearConcat": 1, "QLinearConv": 4}
    feeds = samples(graph)
    assert sqnr(Session(graph).run(feeds)["z"], Session(result.graph).run(feeds)["z"]) > 30


def test_a_relu_that_does_not_fold_becomes_a_clip_of_integers() -> None:
    graph = build(
        [
            conv("x", "c"),
            node("Relu", ["c"], "r"),
            conv("r", "d", "w2"),
            node("Add", ["c", "d"], "y"),
            conv("y", "z", "w3"),
        ],
        {"w": weight(4, 4, 3, 3), "w2": weight(4, 4, 3, 3), "w3": weight(4, 4, 3, 3)},
        IMAGE,
        ["z"],
    )
    result, _ = quantise(graph)
    assert audit_of(result)["integer"] == {"Clip": 1, "QLinearAdd": 1, "QLinearConv": 3}


def test_a_float_operator_between_integers_costs_only_its_own_conversions() -> None:
    graph = build(
        [
            conv("x", "c"),
            node("HardSwish", ["c"], "h"),
            conv("h", "d", "w2"),
            node("GlobalAveragePool", ["d"], "g"),
            conv("g", "e", "w3", pads=[0] * 4),
            node("HardSigmoid", ["e"], "gate"),
            node("Mul", ["d", "gate"], "m"),
            conv("m", "y", "w4"),
        ],
        {"w": weight(8, 4, 3, 3), "w2": weight(8, 8, 3, 3), "w3": weight(8, 8, 1, 1), "w4": weight(4, 8, 3, 3)},
        {"x": ["N", 4, 32, 32]},
        ["y"],
    )
    result, _ = quantise(graph)
    proof = audit_of(result)
    assert proof["integer"] == {"QLinearConv": 4, "QLinearGlobalAveragePool": 1, "QLinearMul": 1}
    floats = {f["operator"] for f in proof["floats"]}
    assert floats <= {"HardSwish", "HardSigmoid", "Mul"}
    assert all(f["reason"] for f in proof["floats"])
    reasons = {r.node: r.reason for r in result.report.refusals}
    assert reasons["h_node"] == "HardSwish stays float: the runtime has no integer HardSwish"


def test_graph_outputs_keep_their_names_and_the_values_that_others_read() -> None:
    graph = build(
        [conv("x", "y"), conv("y", "z", "w2"), node("Relu", ["y"], "r"), conv("r", "v", "w2")],
        {"w": weight(4, 4, 3, 3), "w2": weight(4, 4, 3, 3)},
        IMAGE,
        ["y", "z", "v"],
    )
    result, _ = quantise(graph)
    assert [t.name for t in result.graph.outputs] == ["y", "z", "v"]
    feeds = samples(graph)
    reference, found = Session(graph).run(feeds), Session(result.graph).run(feeds)
    assert all(sqnr(reference[n], found[n]) > 25 for n in reference)


def test_shared_weights_are_stored_once() -> None:
    graph = build(
        [conv("x", "a"), conv("a", "y")],
        {"w": weight(4, 4, 3, 3)},
        IMAGE,
        ["y"],
    )
    result, _ = quantise(graph)
    stored = [t for t in result.graph.tensors().values() if t.dtype == np.int8 and t.shape]
    assert [t.name for t in stored] == ["w_quantized"]
    assert audit_of(result)["integer"] == {"QLinearConv": 2}


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (2.0, 0.0)])
@pytest.mark.parametrize("bias", [(5,), (1, 5), (1,), (), None])
@pytest.mark.parametrize("last", [True, False])
def test_gemm_with_every_attribute(
    transposed: int, alpha: float, beta: float, bias: tuple[int, ...] | None, last: bool
) -> None:
    weights = {"g": weight(5, 16).T.copy() if not transposed else weight(5, 16)}
    inputs = ["x", "g"]
    if bias is not None:
        weights["b"] = weight(*bias) if bias else np.array(0.7, np.float32)
        inputs.append("b")
    nodes = [node("Gemm", inputs, "y", transB=transposed, alpha=alpha, beta=beta)]
    if not last:
        weights["g2"] = weight(5, 3)
        nodes += [node("Relu", ["y"], "r"), node("Gemm", ["r", "g2"], "z")]
    graph = build(nodes, weights, {"x": ["N", 16]}, ["y" if last else "z"])
    result, _ = quantise(graph)
    assert audit_of(result)["integer"] == {"QGemm": 1 if last else 2}
    feeds = samples(graph)
    name = graph.outputs[0].name
    assert sqnr(Session(graph).run(feeds)[name], Session(result.graph).run(feeds)[name]) > 25


@pytest.mark.parametrize("shape", [["N", 16], [4, 16], ["N", "S", 16], [8, 3, 16]])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_matmul_with_bias(shape: list[int | str], last: bool, swapped: bool) -> None:
    if shape[0] == 4:
        shape = [8, 16]
    nodes = [node("MatMul", ["x", "w"], "m"), node("Add", ["b", "m"] if swapped else ["m", "b"], "y")]
    weights = {"w": weight(16, 12), "b": weight(12)}
    if not last:
        nodes += [node("MatMul", ["y", "w2"], "z")]
        weights["w2"] = weight(12, 4)
    graph = build(nodes, weights, {"x": shape}, ["y" if last else "z"])
    result, _ = quantise(graph)
    integer = audit_of(result)["integer"]
    assert sum(n for op, n in integer.items() if op in ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat")) == 2 - last
    assert audit_of(result)["mismatches"] == ()
    name = graph.outputs[0].name
    feeds = samples(graph)
    assert sqnr(Session(graph).run(feeds)[name], Session(result.graph).run(feeds)[name]) > 25


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("opset", [13, 18])
def test_a_spatial_mean_becomes_a_global_pool(keepdims: int, opset: int) -> None:
    weights = {"w": weight(8, 4, 3, 3)}
    if opset == 18:
        weights["axes"] = np.array([-1, 2])
        mean = node("ReduceMean", ["c", "axes"], "m", keepdims=keepdims)
    else:
        mean = node("ReduceMean", ["c"], "m", axes=[2, -1], keepdims=keepdims)
    graph = build([conv("x", "c"), mean], weights, IMAGE, ["m"], opset=opset)
    result, _ = quantise(graph)
    assert audit_of(result)["integer"]["QLinearGlobalAveragePool"] == 1
    feeds = samples(graph)
    expected = Session(graph).run(feeds)["m"]
    found = Session(result.graph).run(feeds)["m"]
    assert found.shape == expected.shape and sqnr(expected, found) > 20


@pytest.mark.parametrize(
    ("options", "kept_float"),
    [
        ({"exclude_nodes": ("c2_node",)}, "c2_node"),
        ({"exclude_nodes": ("c2*",)}, "c2_node"),
        ({"exclude_operators": ("Gemm",)}, "y_node"),
    ],
)
def test_exclusions(options: dict[str, Any], kept_float: str) -> None:
    graph = build(
        [
            conv("x", "c1"),
            conv("c1", "c2", "w2"),
            conv("c2", "c3", "w3"),
            node("GlobalAveragePool", ["c3"], "p"),
            node("Flatten", ["p"], "f"),
            node("Gemm", ["f", "g"], "y"),
        ],
        {"w": weight(4, 4, 3, 3), "w2": weight(4, 4, 3, 3), "w3": weight(4, 4, 3, 3), "g": weight(4, 3)},
        IMAGE,
        ["y"],
    )
    result, _ = quantise(graph, **options)
    proof = audit_of(result)
    floats = {f["node"]: f["reason"] for f in proof["floats"]}
    assert set(floats) - {"f_node"} == {kept_float}  # Flatten is as fast on either side of the conversion
    assert "excluded" in floats[kept_float]
    assert sum(n for op, n in proof["integer"].items() if op in ("QLinearConv", "QGemm")) == 3


def test_what_is_quantised_already_is_left_alone() -> None:
    graph = build(
        [conv("x", "a"), conv("a", "y", "w2")], {"w": weight(4, 4, 3, 3), "w2": weight(4, 4, 3, 3)}, IMAGE, ["y"]
    )
    once, _ = quantise(graph)
    again, _ = quantise(once.graph)
    assert not again.report.changed
    assert to_proto(again.graph).SerializeToString() == to_proto(once.graph).SerializeToString()
    assert any("quantised in the file already" in r.reason for r in again.report.refusals)


@pytest.mark.parametrize("opset", [10, 11, 12])
def test_an_older_opset_is_raised_and_reported(opset: int) -> None:
    graph = build([conv("x", "a"), node("Relu", ["a"], "y")], {"w": weight(4, 4, 3, 3)}, IMAGE, ["y"], opset=opset)
    result, _ = quantise(graph)
    assert result.graph.opset == 13 and graph.opset == opset
    assert result.report.changes[0].kind == "opset"
    assert audit_of(result)["integer"] == {"QLinearConv": 1}
    feeds = samples(graph)
    assert sqnr(Session(graph).run(feeds)["y"], Session(result.graph).run(feeds)["y"]) > 25


def test_a_wrong_rule_is_found_out_stripped_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table claims an integer Erf that the runtime does not have."""
    rules = dict(CPU.rules) | {"Erf": OperatorRule(Role.ARITHMETIC, ("QLinearErf",))}
    monkeypatch.setitem(targets.TARGETS, "wrong", dataclasses.replace(CPU, name="wrong", rules=rules))
    graph = build(
        [conv("x", "c"), node("Erf", ["c"], "e"), conv("e", "y", "w2")],
        {"w": weight(4, 4, 3, 3), "w2": weight(4, 4, 3, 3)},
        IMAGE,
        ["y"],
    )
    result, _ = quantise(graph, target="wrong")
    assert audit_of(result)["mismatches"] == ()
    assert audit_of(result)["integer"] == {"QLinearConv": 2}
    assert result.report.decisions == {"exclude_nodes": ["e_node"]}
    refusal = next(r for r in result.report.refusals if r.node == "e_node")
    assert "the runtime did not make it integer (it became Erf)" in refusal.reason
    replay, _ = quantise(graph, target="wrong", **result.report.decisions)
    assert to_proto(replay.graph).SerializeToString() == to_proto(result.graph).SerializeToString()


def test_a_half_precision_model_is_refused_with_the_reason() -> None:
    graph = helper.make_graph(
        [conv("x", "y")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
        [numpy_helper.from_array(weight(4, 4, 3, 3).astype(np.float16), "w")],
    )
    loaded = from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    data = open_data({"x": np.ones((2, 4, 8, 8), np.float16)}, input_specs(loaded))
    result = InsertQdq()(loaded, Context(data=data))
    assert not result.report.changed
    assert [r.reason for r in result.report.refusals] == ["Conv stays float: it computes in float16, not in float32"]


def test_the_input_is_untouched_and_the_result_is_deterministic() -> None:
    graph = from_proto(random_model(3, steps=14))
    before = to_proto(graph).SerializeToString()
    results = [to_proto(quantise(graph)[0].graph).SerializeToString() for _ in range(2)]
    assert to_proto(graph).SerializeToString() == before
    assert results[0] == results[1]


def test_no_data_is_a_usage_error() -> None:
    graph = from_proto(random_model(3))
    with pytest.raises(DataError, match="needs calibration data"):
        InsertQdq()(graph, Context())


def test_weights_per_channel_and_float_bias() -> None:
    bias = np.array([1e6, 0.0, -3.0, 0.1], np.float32)
    narrow = weight(4, 4, 3, 3)
    narrow[0] *= 1e-9
    graph = build([conv("x", "y", "w", "b")], {"w": narrow, "b": bias}, IMAGE, ["y"])
    result, _ = quantise(graph)
    tensors = result.graph.tensors()
    assert tensors["w_quantized"].dtype == np.int8 and tensors["w_scale"].shape == (4,)
    np.testing.assert_array_equal(tensors["b"].values, bias)
    feeds = samples(graph)
    reference, found = Session(graph).run(feeds)["y"], Session(result.graph).run(feeds)["y"]
    np.testing.assert_allclose(found[:, 0], reference[:, 0], rtol=0.01)


def test_a_warning_names_processors_without_vnni() -> None:
    graph = build([conv("x", "y")], {"w": weight(4, 4, 3, 3)}, IMAGE, ["y"])
    result, context = quantise(graph)
    assert any("VNNI" in w and "x64quantprecision" in w for w in context.warnings)
    assert result.report.warnings == tuple(context.warnings)


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "Gemm"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_runtime_leaves_the_weights_of_float_operators_alone(kind: str, bias: bool) -> None:
    """onnxruntime quantises a float weight between a dequantiser and a quantiser, to one scale for all channels."""
    size = 256 if kind == "Gemm" else 8  # large enough for integers to pay off around the float operator
    wide = weight(size, size, 3, 3)
    wide[:, 0] *= 100  # one scale for all channels would destroy the others
    wide = wide if kind == "ConvTranspose" else np.ascontiguousarray(wide.swapaxes(0, 1))
    rest = ["b"] if bias else []
    if kind == "Gemm":
        nodes = [
            node("Gemm", ["x", "w0"], "a"),
            node("Relu", ["a"], "r"),
            node("Gemm", ["r", "w", *rest], "m", transB=1),
            node("Gemm", ["m", "w1"], "y"),
        ]
        weights = {"w0": weight(size, size), "w": wide[:, :, 0, 0], "w1": weight(size, size)}
        inputs: dict[str, list[int | str]] = {"x": ["N", size]}
    else:
        nodes = [
            conv("x", "a", "w0"),
            node("Relu", ["a"], "r"),
            node(kind, ["r", "w", *rest], "m", pads=[1, 1, 1, 1]),
            conv("m", "y", "w1"),
        ]
        weights = {"w0": weight(8, 4, 3, 3), "w": wide, "w1": weight(8, 8, 3, 3)}
        inputs = {"x": ["N", 4, 32, 32]}
    if bias:
        weights["b"] = weight(size)
    graph = build(nodes, weights, inputs, ["y"])
    result, _ = quantise(graph, exclude_nodes=("m_node",))
    proof = audit_of(result)
    assert [f["node"] for f in proof["floats"]] == ["m_node"]
    assert proof["mismatches"] == () and proof["stranded"] == ()
    feeds = samples(graph)
    unoptimised = Session(result.graph, optimization="disabled").run(feeds)["y"]
    assert sqnr(unoptimised, Session(result.graph).run(feeds)["y"]) > 30


def test_what_can_have_been_meant_otherwise_is_told() -> None:
    """A model that is quantised already, and arrays that were never filled."""
    graph = build([conv("x", "y")], {"w": weight(4, 4, 3, 3)}, IMAGE, ["y"])
    first, context = quantise(graph)
    assert not [w for w in context.warnings if "quantised already" in w or "are 0" in w]
    _, context = quantise(first.graph)
    assert [w for w in context.warnings if "the model is quantised already (5 Q" in w]

    empty = Context(data=open_data({"x": np.zeros((4, 4, 8, 8), np.float32)}, input_specs(graph)))
    InsertQdq()(graph, empty)
    assert [w for w in empty.warnings if "all values of input 'x' in the data are 0" in w]

    # A pass that repeats in a recipe meets its own work, which is no news.
    again = Context(original=graph, data=open_data(samples(graph), input_specs(graph)))
    InsertQdq()(first.graph, again)
    assert not [w for w in again.warnings if "quantised already" in w]


def silu_graph(**attributes: Any) -> Graph:
    return build(
        [
            conv("x", "a", **attributes),
            node("Sigmoid", ["a"], "s"),
            node("Mul", ["a", "s"], "m"),
            conv("m", "y", "w2", **attributes),
        ],
        {"w": weight(64, 64, 1, 1), "w2": weight(64, 64, 1, 1, seed=1)},
        {"x": ["N", 64, 8, 8]},
        ["y"],
    )


def test_a_silu_between_integers_is_one_float_operator(tmp_path: Path) -> None:
    graph = silu_graph(pads=[0] * 4)
    result, _ = quantise(graph)
    proof = audit_of(result)
    assert proof["integer"]["QLinearConv"] == 2
    assert [f["operator"] for f in proof["floats"]] == ["QuickGelu"]
    assert proof["mismatches"] == () and proof["stranded"] == ()
    assert all(types.shape is not None for types in infer_shapes(result.graph).values())
    path = tmp_path / "optimized.onnx"
    Session(result.graph, optimization="all", optimized_path=path)
    operators = [n.op_type for n in onnx.load(path).graph.node]
    # Only at the graph's own input and output: those around the SiLU cancel the runtime's.
    assert operators.count("QuickGelu") == 1 and operators.count("Transpose") == 2


def written_and_simulated(graph: Graph) -> tuple[Graph, Array, Array]:
    """(the quantised graph, its output ``y``, the same as numpy computes it)."""
    feeds = samples(graph)
    written = copy_graph(graph)
    list(to_canonical_form(written, infer_shapes(written)))
    sort_nodes(written)
    placement = place(written, CPU)
    sources = [s for names in placement.sources.values() for s in names]
    ranges = calibrate(written, sources, open_data(feeds, input_specs(written)))
    expected = simulate(written, placement, ranges, feeds)
    list(insert_quantizers(written, placement, ranges))
    sort_nodes(written)
    return written, Session(written, optimization="disabled", threads=1).run(feeds)["y"], expected["y"]


def test_a_silu_between_integers_computes_what_numpy_says() -> None:
    written, found, expected = written_and_simulated(silu_graph(pads=[0] * 4))
    assert "QuickGelu" in {n.op for n in written.nodes}
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def near_zero_channels() -> Graph:
    small = weight(4, 4, 3, 3)
    small[1], small[2] = 1e-30, 0
    bias = np.array([0.1, 5, -7, 0], np.float32)
    return build(
        [conv("x", "c", "w", "b"), conv("c", "y", "v")], {"w": small, "b": bias, "v": weight(4, 4, 3, 3)}, IMAGE, ["y"]
    )


def squeeze_excite() -> Graph:
    nodes = [
        conv("x", "c"),
        node("GlobalAveragePool", ["c"], "p"),
        conv("p", "q", "v", pads=[0] * 4),
        node("Relu", ["q"], "r"),
        conv("r", "t", "u", pads=[0] * 4),
        node("Sigmoid", ["t"], "g"),
        node("Mul", ["c", "g"], "m"),
        conv("m", "y", "k"),
    ]
    weights = {"w": weight(4, 4, 3, 3), "v": weight(2, 4, 1, 1), "u": weight(4, 2, 1, 1), "k": weight(4, 4, 3, 3)}
    return build(nodes, weights, IMAGE, ["y"])


def conv_transpose() -> Graph:
    nodes = [conv("x", "c"), node("ConvTranspose", ["c", "t"], "d", strides=[2, 2]), conv("d", "y", "v")]
    return build(nodes, {"w": weight(4, 4, 3, 3), "t": weight(4, 4, 2, 2), "v": weight(4, 4, 3, 3)}, IMAGE, ["y"])


def grouped() -> Graph:
    nodes = [conv("x", "c", group=2), node("Relu", ["c"], "r"), conv("r", "d", "v", group=4), conv("d", "y", "k")]
    return build(nodes, {"w": weight(4, 2, 3, 3), "v": weight(4, 1, 3, 3), "k": weight(4, 4, 3, 3)}, IMAGE, ["y"])


def conv_1d() -> Graph:
    nodes = [conv("x", "c", pads=[1, 1]), node("Relu", ["c"], "r"), conv("r", "y", "v", pads=[2, 2], dilations=[2])]
    return build(nodes, {"w": weight(4, 4, 3), "v": weight(4, 4, 3)}, {"x": ["N", 4, 32]}, ["y"])


def shared_weights() -> Graph:
    nodes = [conv("x", "c"), node("Relu", ["c"], "r"), conv("r", "d"), node("Add", ["c", "d"], "y")]
    return build(nodes, {"w": weight(4, 4, 3, 3)}, IMAGE, ["y"])


def concat_of_different_ranges() -> Graph:
    nodes = [conv("x", "a"), conv("x", "b", "v"), node("Concat", ["a", "b"], "c", axis=1), conv("c", "y", "k")]
    weights = {"w": weight(4, 4, 3, 3), "v": 30 * weight(4, 4, 3, 3, seed=3), "k": weight(4, 8, 3, 3)}
    return build(nodes, weights, IMAGE, ["y"])


@pytest.mark.parametrize(
    "make",
    [near_zero_channels, squeeze_excite, conv_transpose, grouped, conv_1d, shared_weights, concat_of_different_ranges],
)
def test_patterns_compute_what_numpy_says_and_the_audit_is_clean(make: Callable[[], Graph]) -> None:
    _, found, expected = written_and_simulated(make())
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    result, context = quantise(make())
    proof = audit_of(result)
    assert proof["integer"]["QLinearConv"] >= 2
    assert proof["mismatches"] == () and proof["stranded"] == ()
    assert not [w for w in context.warnings if "as planned" in w]


@pytest.mark.parametrize("target", ["openvino", "cuda"])
def test_other_runtimes_get_a_silu_in_operators_of_onnx(target: str) -> None:
    result, _ = quantise(silu_graph(pads=[0] * 4), target)
    assert {"Sigmoid", "Mul"} <= {n.op for n in result.graph.nodes}
    assert {n.domain or "" for n in result.graph.nodes} == {""}


def test_a_silu_whose_sigmoid_is_read_elsewhere_keeps_its_form() -> None:
    graph = silu_graph(pads=[0] * 4)
    gate = next(n for n in graph.nodes if n.op == "Sigmoid").outputs[0]
    gate.dtype = np.dtype(np.float32)
    graph.outputs.append(gate)
    result, _ = quantise(graph)
    assert "QuickGelu" not in {n.op for n in result.graph.nodes}
    found, reference = Session(result.graph).run(samples(graph)), Session(graph).run(samples(graph))
    assert sqnr(reference["y"], found["y"]) > 25 and sqnr(reference["s"], found["s"]) > 25


def test_a_layer_that_gains_less_than_its_conversions_stays_float() -> None:
    """A 1x1 convolution of few channels between two SiLUs; one of many channels is worth its conversions."""
    expected = {16: False, 128: True}
    for channels, integer in expected.items():
        graph = build(
            [
                node("Sigmoid", ["x"], "s"),
                node("Mul", ["x", "s"], "m"),
                conv("m", "a", pads=[0] * 4),
                node("Sigmoid", ["a"], "t"),
                node("Mul", ["a", "t"], "y"),
            ],
            {"w": weight(channels, channels, 1, 1)},
            {"x": ["N", channels, 16, 16]},
            ["y"],
        )
        placed = {u.node.op: u.integer for u in place(graph, CPU).units}
        assert placed["Conv"] is integer


def test_layers_in_branches_are_told_with_their_reason() -> None:
    """Nested graphs stay as they are, and a report that names nothing would say that there is nothing."""
    for name in ("if_branches", "loop_body"):
        floats = audit(BY_NAME[name].build(), CPU).floats
        told = {(node.operator, node.reason) for node in floats if "nested graph" in node.reason}
        assert {operator for operator, _ in told} == {{"if_branches": "Conv", "loop_body": "MatMul"}[name]}
        assert all(node.node for node in floats)
