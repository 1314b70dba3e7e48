"""The targets: weights that cannot saturate, forms that each runtime understands, and what compress chooses."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from models import BY_NAME, HAZARDS, Net, image, make_feeds
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from random_graphs import random_model
from small_cnn import write_data, write_model

from onnxcompress.base import Context, PassResult
from onnxcompress.compress import compress
from onnxcompress.data import open_data
from onnxcompress.errors import UsageError
from onnxcompress.graph import Graph, input_specs
from onnxcompress.io import save
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.quantization.affine import (
    QParams,
    bounded_pairs,
    dequantize,
    quantize,
    quantize_weight,
    weight_qparams,
)
from onnxcompress.quantization.placement import place, why
from onnxcompress.recipe import load_recipe
from onnxcompress.session import Session
from onnxcompress.targets import CPU, CUDA, OPENVINO, TARGETS, X86_ANY, get_target

Array = NDArray[Any]
EIGHT_BIT = (TensorProto.UINT8, TensorProto.INT8)


def quantise(graph: Graph, feeds: dict[str, Array], target: str) -> tuple[PassResult, Context]:
    context = Context(data=open_data([feeds], input_specs(graph)), target=target, threads=1)
    return InsertQdq()(graph, context), context


def decibels(reference: Array, found: Array) -> float:
    noise = np.square(reference.astype(np.float64) - found).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / noise)) if noise else np.inf


def test_targets_are_found_by_name() -> None:
    assert list(TARGETS) == ["cpu", "x86-any", "cuda", "openvino"]
    assert all(get_target(name).name == name for name in TARGETS)
    with pytest.raises(UsageError, match="unknown target 'x86'; expected one of cpu, x86-any, cuda, openvino"):
        get_target("x86")


# ---- x86-any: vpmaddubsw -----------------------------------------------------------------------------------------


def saturating_pair_sums(integers: Array) -> tuple[Array, Array]:
    """(as vpmaddubsw adds, exact) for all pairs of weights in a row, and the activations that are worst for each pair.

    Two products are added in 16 bits with saturation; an activation is 0 or 255 where a sum is largest or smallest.
    """
    pairs = np.array(list(combinations(integers.astype(np.int64).tolist(), 2)))
    sums = np.concatenate([(pairs * np.array(x)).sum(axis=1) for x in ((255, 255), (255, 0), (0, 255))])
    return np.clip(sums, -32768, 32767), sums


def rows(integers: Array, axis: int) -> Array:
    return np.moveaxis(integers, axis, 0).reshape(integers.shape[axis], -1)


def assert_never_saturates(integers: Array, axis: int) -> None:
    for row in rows(integers, axis):
        if row.size > 1:
            saturated, exact = saturating_pair_sums(row)
            assert np.array_equal(saturated, exact), row


WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.floats(-8, 8, width=16),
)


def test_the_bound_is_the_exact_one() -> None:
    """128 is the largest sum of two weights of one sign that fits 16 bits with activations of 255; 129 does not."""
    assert X86_ANY.weights.largest_pair == 32767 // 255 == 128
    for one in range(2, 128):
        for two, fits in ((128 - one, True), (129 - one, False)):
            for sign in (1, -1):
                saturated, exact = saturating_pair_sums(np.array([sign * one, sign * two]))
                assert np.array_equal(saturated, exact) == fits


@settings(deadline=None, max_examples=300)
@given(WEIGHTS, st.integers(0, 1))
def test_no_pair_saturates_in_any_packing(weight: Array, axis: int) -> None:
    params = weight_qparams(weight, X86_ANY.weights, axis)
    assert_never_saturates(quantize(weight, params), axis)
    assert_never_saturates(quantize_weight(weight, params, X86_ANY.weights), axis)


@settings(deadline=None, max_examples=200)
@given(WEIGHTS)
def test_scales_grow_only_where_they_must(weight: Array) -> None:
    usual = weight_qparams(weight, CPU.weights, 0)
    found = weight_qparams(weight, X86_ANY.weights, 0)
    assert (found.scale >= usual.scale).all()
    assert (found.scale <= 2.25 * usual.scale).all()  # seven bits are always enough, and 12 % is what is searched
    grown = found.scale > usual.scale
    for channel, row in enumerate(rows(quantize(weight, usual), 0)):
        saturates = row.size > 1 and not np.array_equal(*saturating_pair_sums(row))
        assert grown[channel] == saturates


@pytest.mark.parametrize("shape", [(64, 1, 3, 3), (64, 32, 1, 1), (64, 32, 3, 3)])
def test_seven_bits_where_they_are_needed_cost_less_than_seven_bits_everywhere(shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = weight_qparams(weight, X86_ANY.weights, 0)
    usual = weight_qparams(weight, CPU.weights, 0)
    flat = QParams(usual.scale * np.float32(127 / 63), usual.zero_point, 0)
    assert decibels(weight, dequantize(quantize(weight, found), found)) > 0.5 + decibels(
        weight, dequantize(quantize(weight, flat), flat)
    )


def test_signs_and_single_weights_are_not_bound() -> None:
    weight = np.array([[127.0, -127.0], [127.0, 1.0], [127.0, 2.0]], np.float32)
    scale = weight_qparams(weight, X86_ANY.weights, 0).scale
    assert scale[0] == 1.0 and scale[1] == 1.0 and scale[2] > 1.0
    single = np.array([[127.0], [-3.0]], np.float32)
    assert np.array_equal(bounded_pairs(single, np.ones(2, np.float32), 0, 128), [1, 1])
    assert bounded_pairs(weight, np.array(1.0, np.float32), None, 128) > 1.9


@settings(deadline=None, max_examples=200)
@given(WEIGHTS, st.integers(0, 1))
def test_rounding_moves_weights_by_less_than_a_step_and_errors_cancel(weight: Array, axis: int) -> None:
    scheme = X86_ANY.weights
    params = weight_qparams(weight, scheme, axis)
    chosen, nearest = quantize_weight(weight, params, scheme), quantize(weight, params)
    exact = rows(weight, axis).astype(np.float64) / params.scale[:, None]
    errors = rows(chosen, axis) - exact
    assert np.abs(errors).max() <= 1.0 + 1e-6
    moved = (rows(chosen, axis) != rows(nearest, axis)).any(axis=1)
    before = np.abs((rows(nearest, axis) - exact).sum(axis=1))
    flat = weight.ndim == 2  # with kernels, what cancels in each may add up over all
    assert not flat or (np.abs(errors.sum(axis=1))[moved] <= before[moved] + 1e-6).all()
    assert np.array_equal(quantize_weight(weight, params, CPU.weights), nearest)


def test_kernels_and_channels_cancel() -> None:
    weight = np.random.default_rng(0).normal(size=(16, 8, 3, 3)).astype(np.float32)
    params = weight_qparams(weight, X86_ANY.weights, 0)
    exact = weight / params.scale.reshape(-1, 1, 1, 1)
    errors = quantize_weight(weight, params, X86_ANY.weights) - exact
    # half a step, and another one for the kernels that even out their channel
    assert np.abs(errors.sum(axis=(2, 3))).max() <= 1.5 + 1e-4
    assert np.abs(errors.sum(axis=(1, 2, 3))).max() <= 0.5 + 1e-4
    assert np.abs((quantize(weight, params) - exact).sum(axis=(1, 2, 3))).max() > 2


@pytest.mark.parametrize("seed", range(6))
def test_whole_graphs_hold_no_pair_that_saturates(seed: int) -> None:
    graph = from_proto(random_model(seed, steps=12))
    feeds = {"x": np.random.default_rng(seed).normal(size=(6, 3, 8, 8)).astype(np.float32)}
    result, context = quantise(graph, feeds, "x86-any")
    proof = result.report.details["audit"]
    assert proof["mismatches"] == () and proof["stranded"] == ()
    assert not [w for w in context.warnings if "saturate" in w]
    model = to_proto(result.graph)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.INT8}
    readers = {i: n for n in model.graph.node for i in n.input}
    checked = 0
    for name, integers in stored.items():
        if integers.ndim > 1:
            axes = [a.i for a in readers[name].attribute if a.name == "axis"]
            assert_never_saturates(integers, axes[0] if axes else 0)
            checked += 1
    assert checked or not any(n.op_type == "Conv" for n in model.graph.node)


@pytest.mark.cases
@pytest.mark.parametrize(("name", "most"), [("resnet20", 0.5), ("mobilenetv2_cifar10", 1.8)])
def test_x86_any_costs_little(name: str, most: float, cases: Mapping[str, Any]) -> None:
    graph = from_proto(onnx.load(cases[name].model))
    batches = list(cases[name].calibration(samples=384, batch=64))
    reference = Session(graph, threads=2)
    wanted = np.concatenate([next(iter(reference.run(b).values())) for b in batches[2:]])
    sqnr = {}
    for target in ("cpu", "x86-any"):
        context = Context(data=open_data(batches[:2], input_specs(graph)), target=target, threads=2)
        steps = [step for step in load_recipe("int8").passes if not step.needs_data or step.name == "insert_qdq"]
        result = load_recipe("lossless").pipeline()(graph, context)
        result = steps[-1](result.graph, context)
        session = Session(result.graph, threads=2)
        sqnr[target] = decibels(wanted, np.concatenate([next(iter(session.run(b).values())) for b in batches[2:]]))
    assert sqnr["x86-any"] >= sqnr["cpu"] - most, sqnr


# ---- data movement between pairs ---------------------------------------------------------------------------------

MOVES = [
    "slice_pad_shortcut",
    "channel_shuffle",
    "pools",
    "residual",
    "concat_ranges",
    "dynamic_image",
    "relu6_opset13",
]


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("target", [OPENVINO.name, CUDA.name])
def test_only_conversions_touch_integers(name: str, target: str) -> None:
    graph, feeds = from_proto(BY_NAME[name].build()), make_feeds(BY_NAME[name].build())
    result, _ = quantise(graph, feeds, target)
    model = to_proto(result.graph)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    integer = {v.name for v in inferred.value_info if v.type.tensor_type.elem_type in EIGHT_BIT}
    assert integer
    for node in inferred.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            assert not integer & {*node.input, *node.output}, node.name


@pytest.mark.parametrize("name", MOVES)
def test_both_forms_compute_the_same(name: str) -> None:
    graph, feeds = from_proto(BY_NAME[name].build()), make_feeds(BY_NAME[name].build())
    pairs = quantise(graph, feeds, "cuda")[0].graph
    integers = quantise(graph, feeds, "cpu")[0].graph
    expected = Session(integers, optimization="disabled", threads=1).run(feeds)
    found = Session(pairs, optimization="disabled", threads=1).run(feeds)
    for output, value in expected.items():
        assert np.allclose(found[output], value, rtol=0, atol=1e-5 * np.abs(value).max()), output


@pytest.mark.parametrize("target", ["x86-any", "cuda", "openvino"])
@pytest.mark.parametrize("hazard", [h for h in HAZARDS if h.runnable and "opset" not in h.name], ids=lambda h: h.name)
def test_every_hazard_stays_valid(hazard: Any, target: str) -> None:
    model = hazard.build()
    graph, feeds = from_proto(model), make_feeds(model)
    result, _ = quantise(graph, feeds, target)
    onnx.checker.check_model(to_proto(result.graph))
    if hazard.name in ("random_and_stateful", "dropout_training"):
        return
    expected = Session(model, optimization="disabled", threads=1).run(feeds)
    found = Session(result.graph, optimization="disabled", threads=1).run(feeds)
    for name, value in expected.items():
        if value.dtype.kind == "f" and value.size:
            wanted = value.astype(np.float64)
            assert np.linalg.norm(found[name] - wanted) <= 0.1 * np.linalg.norm(wanted) + 1e-12


# ---- cuda --------------------------------------------------------------------------------------------------------


def test_cuda_takes_float16_and_says_why_not_int8(tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "model.onnx"), write_data(tmp_path / "data.npz")
    result = compress(model, data, tmp_path / "small.onnx", target="cuda", benchmark=False)
    assert [step.name for step in result.recipe.passes][-1] == "convert_float16"
    assert {t.data_type for t in onnx.load(tmp_path / "small.onnx").graph.initializer} <= {TensorProto.FLOAT16, 7}
    assert result.verification is not None and result.verification.outputs[0].sqnr_db > 50
    asked = compress(model, data, tmp_path / "int8.onnx", target="cuda", recipe="int8", benchmark=False)
    assert any(step.name == "insert_qdq" for step in asked.recipe.passes)
    assert [w for w in asked.warnings if "no integer kernels" in w and "\n" not in w]
    named = compress(model, data, tmp_path / "named.onnx", recipe="fp16", benchmark=False)
    assert named.target == "cuda"


@pytest.mark.parametrize("target", ["cpu", "x86-any", "openvino", None])
def test_the_others_take_int8(target: str | None, tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "model.onnx"), write_data(tmp_path / "data.npz")
    result = compress(model, data, tmp_path / "small.onnx", target=target, benchmark=False, max_drop=None)
    assert any(step.name == "insert_qdq" for step in result.recipe.passes)
    assert result.target == (target or "cpu")


# ---- openvino ----------------------------------------------------------------------------------------------------

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,
    reason="openvino is not installed; the extra is [openvino]",
)


def run_on_openvino(path: Path, feeds: dict[str, Array]) -> tuple[Array, Counter[tuple[str, str]]]:
    """The first output, and how often each (operator, precision) is in the graph as OpenVINO runs it."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found: Counter[tuple[str, str]] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        found[str(info["layerType"].value), str(info["runtimePrecision"].value)] += 1
    return next(iter(compiled(feeds).values())), found


def assert_runs_as_integers(graph: Graph, feeds: dict[str, Array], path: Path, least: float) -> None:
    result, _ = quantise(graph, feeds, "openvino")
    save(result.graph, path)
    found, layers = run_on_openvino(path, feeds)
    expected = next(iter(Session(graph, optimization="disabled", threads=1).run(feeds).values()))
    on_ort = next(iter(Session(result.graph, optimization="disabled", threads=1).run(feeds).values()))
    products = {key: n for key, n in layers.items() if key[0] in ("Convolution", "FullyConnected", "MatMul")}
    assert products and all(precision in ("u8", "i8") for _, precision in products), layers
    assert decibels(expected, found) >= least
    assert decibels(on_ort, found) >= least


@needs_openvino
@pytest.mark.parametrize("name", ["residual", "pools", "concat_ranges", "slice_pad_shortcut"])
def test_openvino_runs_integers(name: str, tmp_path: Path) -> None:
    graph, feeds = from_proto(BY_NAME[name].build()), make_feeds(BY_NAME[name].build())
    folded = load_recipe("lossless").pipeline()(graph).graph
    assert_runs_as_integers(folded, feeds, tmp_path / "model.onnx", 25)


@needs_openvino
@pytest.mark.cases
@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2_cifar10"])
def test_openvino_runs_real_models_as_integers(name: str, cases: Mapping[str, Any], tmp_path: Path) -> None:
    graph = load_recipe("lossless").pipeline()(from_proto(onnx.load(cases[name].model))).graph
    (feeds,) = cases[name].calibration(samples=32, batch=32)
    assert_runs_as_integers(graph, dict(feeds), tmp_path / "model.onnx", 27)


# ---- placement on cpu --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "integer"), [(0.3, False), (0.0, True)])
def test_constants_are_not_joined_to_values_in_one_scale(value: float, integer: bool) -> None:
    """A class token among patches of a wider range would keep few levels; zeros lose nothing."""
    net = Net()
    patches = net.conv(image(net, batch=1), 3, 4)
    joined = net.add("Concat", net.const(np.full((1, 1, 8, 8), value, np.float32)), patches, axis=1)
    net.conv(joined, 5, 4, to="y")
    net.output("y", [1, 4, 8, 8])
    graph = from_proto(net.model())
    (unit,) = [unit for unit in place(graph, CPU).units if unit.node.op == "Concat"]
    assert unit.integer is integer
    assert integer or "class token" in why(unit)
