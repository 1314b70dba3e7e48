from __future__ import annotations

import json
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.base import Context, PassResult
from onnxcompress.data import Dataset, open_data
from onnxcompress.errors import DataError, UsageError
from onnxcompress.graph import Graph, copy_graph, input_specs
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.quantization.affine import MAX_BIAS, QuantScheme, Range, weight_qparams
from onnxcompress.quantization.calibration import observe
from onnxcompress.quantization.observers import PEAK_CLIPPING_WEIGHT, WeightedMseObserver
from onnxcompress.quantization.range_search import LADDER, at_rung, default_evaluations, ladder, search_ranges
from onnxcompress.recipe import parse_recipe, with_decisions
from onnxcompress.session import Session

Array = NDArray[Any]


def network(seed: int = 0) -> Graph:
    """Four convolutions with a residual, pooling and a Gemm; some channels have rare large values."""
    rng = np.random.default_rng(seed)
    weights = {f"w{i}": rng.normal(0, 0.25, (8, 4 if i == 0 else 8, 3, 3)) for i in range(4)}
    weights |= {"b0": rng.normal(0, 1, 8), "g": rng.normal(0, 1, (8, 5))}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], "conv0", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], "relu0"),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "conv2", pads=[1] * 4),
        helper.make_node("Add", ["c2", "r0"], ["s"], "add"),
        helper.make_node("Relu", ["s"], ["r2"], "relu2"),
        helper.make_node("MaxPool", ["r2"], ["m"], "maxpool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["m", "w3"], ["c3"], "conv3", pads=[1] * 4),
        helper.make_node("Relu", ["c3"], ["r3"], "relu3"),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "g"], ["y"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def samples(count: int = 160, seed: int = 1) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {"x": (rng.standard_t(4, size=(count, 4, 8, 8))).astype(np.float32)}


def dataset(graph: Graph, count: int = 160, seed: int = 1) -> Dataset:
    return open_data(samples(count, seed), input_specs(graph))


def quantise(graph: Graph, data: Dataset | None = None, **options: Any) -> tuple[PassResult, Context]:
    context = Context(data=data if data is not None else dataset(graph))
    return InsertQdq(**options)(graph, context), context


def proto(result: PassResult) -> bytes:
    return to_proto(result.graph).SerializeToString()


def noise(graph: Graph, result: PassResult, feeds: dict[str, Array]) -> float:
    expected, found = Session(graph).run(feeds)["y"], Session(result.graph).run(feeds)["y"]
    return float(((expected - found) ** 2).sum() / (expected**2).sum())


# ---- the ladder


def test_the_ladder_climbs_from_least_error_to_the_extremes(rng: np.random.Generator) -> None:
    observer = WeightedMseObserver()
    observer.update(np.maximum(rng.laplace(size=(100, 10_000)), 0).astype(np.float32))
    rungs = ladder(observer)
    assert len(rungs) == len(LADDER)
    assert rungs[-1] == observer.min_max() and LADDER[-1] == inf
    assert rungs[1] == observer.range()
    more = ladder(observer.with_clipping(PEAK_CLIPPING_WEIGHT))
    assert more[0] == rungs[1] and all(a.high >= b.high for a, b in zip(more, rungs, strict=True))
    highs = [r.high for r in rungs]
    assert highs == sorted(highs) and highs[0] < 0.9 * highs[-1] and all(r.low == 0 for r in rungs)


# ---- the search


def scaled(graph: Graph) -> Any:
    """A stand-in for quantising that says how good each range is: noise grows with the distance to a wanted end."""

    def write(ranges: Mapping[str, Range]) -> Graph:
        candidate = copy_graph(graph)
        off = sum(abs(ranges[name].high - wanted) for name, wanted in WANTED.items())
        weight = candidate.tensors()["scale"]
        weight.values = (weight.values * np.float32(1 + off)).astype(np.float32)
        return candidate

    return write


WANTED = {"a": 1.0, "b": 1.0, "c": 16.0, "d": 99.0}
RUNGS = {name: [Range(0.0, high) for high in (1.0, 4.0, 16.0, 99.0)] for name in WANTED}


def line() -> Graph:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "scale"], ["y"], "mul")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(np.ones(3, np.float32), "scale")],
    )
    return from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_each_tensor_finds_its_own_rung() -> None:
    graph = line()
    data = open_data({"x": np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)}, input_specs(graph))
    found = search_ranges(graph, scaled(graph), RUNGS, data, evaluations=100)
    assert found.clipping == {"a": 1.0, "b": 1.0, "c": 16.0, "d": inf}
    assert {name: r.high for name, r in found.ranges.items()} == WANTED
    assert found.samples == (20, 20)
    assert found.searched[1] == pytest.approx(0) and found.confirmed[1] == pytest.approx(0)
    assert found.searched[0] > 1 and found.evaluations <= 100


@pytest.mark.parametrize("evaluations", [2, 3, 5, 9])
def test_the_number_of_evaluations_is_a_limit_and_more_never_hurt(evaluations: int) -> None:
    graph = line()
    data = open_data({"x": np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)}, input_specs(graph))
    few = search_ranges(graph, scaled(graph), RUNGS, data, evaluations=evaluations)
    more = search_ranges(graph, scaled(graph), RUNGS, data, evaluations=evaluations + 4)
    assert few.evaluations <= evaluations
    assert more.confirmed[1] <= few.confirmed[1] <= few.confirmed[0]


def test_a_gain_on_the_searching_samples_alone_is_not_believed() -> None:
    """Ranges that help the samples that search and hurt the others: minimum and maximum stay."""
    graph = line()
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    data = open_data({"x": x}, input_specs(graph))
    searching = data.split(0.5, 0)[1]
    favoured = np.concatenate([batch.feeds["x"] for batch in searching]).sum(axis=0)

    def write(ranges: Mapping[str, Range]) -> Graph:
        candidate = copy_graph(graph)
        # Doubles every sample that does not search; leaves those that do as they are. At the top all are off by half.
        clipped = ranges["a"].high < 99
        known = {row.tobytes() for batch in searching for row in batch.feeds["x"]}
        assert favoured.shape == (3,)
        table = np.array([[1.0 if (row.tobytes() in known) == clipped else 1.5] for row in x], np.float32)
        return _by_row(candidate, x, table)

    found = search_ranges(graph, write, {"a": RUNGS["a"]}, data, evaluations=20)
    assert found.clipping == {"a": inf}
    assert found.confirmed[1] == found.confirmed[0]


def _by_row(graph: Graph, x: Array, table: Array) -> Graph:
    """y = x * table[the row of x that comes closest]."""
    nodes = [
        helper.make_node("MatMul", ["x", "rows"], ["score"], "score"),
        helper.make_node("Sub", ["score", "half"], ["closeness"], "closeness"),
        helper.make_node("ArgMax", ["closeness"], ["index"], "index", axis=1, keepdims=0),
        helper.make_node("Gather", ["table", "index"], ["factor"], "factor", axis=0),
        helper.make_node("Mul", ["x", "factor"], ["y"], "mul"),
    ]
    built = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [
            numpy_helper.from_array(np.ascontiguousarray(x.T), "rows"),
            numpy_helper.from_array(((x**2).sum(axis=1) / 2).astype(np.float32), "half"),
            numpy_helper.from_array(table, "table"),
        ],
    )
    return from_proto(helper.make_model(built, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_too_little_to_judge_by_is_refused() -> None:
    graph = line()
    with pytest.raises(DataError, match="cannot be searched with one sample"):
        data = open_data({"x": np.ones((1, 3), np.float32)}, input_specs(graph))
        search_ranges(graph, scaled(graph), RUNGS, data, evaluations=9)
    with pytest.raises(DataError, match="no float output of the model is finite and other than zero"):
        data = open_data({"x": np.zeros((8, 3), np.float32)}, input_specs(graph))
        search_ranges(graph, scaled(graph), RUNGS, data, evaluations=9)


def test_large_models_get_fewer_evaluations() -> None:
    counts = [default_evaluations(macs) for macs in (0, 10**6, 10**8, 10**9, 10**12)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 32 and counts[-1] == 4


# ---- the observer auto


def test_auto_is_not_worse_than_min_max_where_it_was_confirmed() -> None:
    graph = network()
    data = dataset(graph)
    result, _ = quantise(graph, data, observer="auto")
    found = result.report.details["range_search"]
    assert json.loads(json.dumps(found)) == found
    # The same samples that the search says to have used; the ranges that it tried come from the others.
    seen, judging = data.split(0.5, 0)
    confirming, searching = judging.split(0.5, 0)
    assert found["samples"] == [searching.samples, confirming.samples] == [40, 40]
    extremes, _ = quantise(graph, seen)
    chosen = {float(label) for label in found["tensors_by_clipping_weight"]}
    assert len(chosen) == 1
    observers = {name: WeightedMseObserver() for name in result.report.decisions["ranges"]}
    observe(graph, observers, seen)
    ranges = {name: at_rung(watching, *chosen) for name, watching in observers.items()}
    tried, _ = quantise(graph, seen, ranges={name: (found.low, found.high) for name, found in ranges.items()})
    observe(graph, observers, judging)
    final = {name: [r.low, r.high] for name, r in ((n, at_rung(w, *chosen)) for n, w in observers.items())}
    assert result.report.decisions["ranges"] == final
    for part, samples_of_part in (("search_sqnr_db", searching), ("confirm_sqnr_db", confirming)):
        feeds = {"x": np.concatenate([batch.feeds["x"] for batch in samples_of_part])}
        for name, quantised in (("min_max", extremes), ("chosen", tried)):
            assert found[part][name] == pytest.approx(-10 * np.log10(noise(graph, quantised, feeds)), abs=2e-3)
        assert found[part]["chosen"] > found[part]["min_max"]
    assert result.report.details["audit"]["mismatches"] == () and result.report.refusals == ()


def test_auto_is_deterministic_and_a_replay_searches_nothing() -> None:
    graph = network()
    before = to_proto(graph).SerializeToString()
    first, _ = quantise(graph, observer="auto", search_evaluations=8)
    second, _ = quantise(graph, observer="auto", search_evaluations=8)
    assert proto(first) == proto(second) and to_proto(graph).SerializeToString() == before
    recipe = parse_recipe("version: 1\npasses: [insert_qdq: {observer: auto, search_evaluations: 8}]")
    report = recipe.pipeline()(graph, Context(data=dataset(graph))).report
    saved = parse_recipe(with_decisions(recipe, report).to_yaml())
    # Other data: nothing is read from it.
    replay = saved.pipeline()(graph, Context(data=dataset(graph, 3, seed=77)))
    assert to_proto(replay.graph).SerializeToString() == proto(first)
    assert "range_search" not in replay.report.children[0].details


def test_auto_with_one_sample_warns_and_does_without_the_search() -> None:
    graph = network()
    result, context = quantise(graph, dataset(graph, 1), observer="auto")
    assert any("cannot be searched with 1 sample;" in w and "weighted_mse" in w for w in context.warnings)
    other, _ = quantise(graph, dataset(graph, 1), observer="weighted_mse")
    assert proto(result) == proto(other)


@pytest.mark.parametrize("observer", ["percentile", "entropy", "mse", "weighted_mse", "auto"])
def test_every_observer_keeps_relu_and_clip_folded(observer: str) -> None:
    graph = network()
    for node in graph.nodes:
        if node.name == "relu1":
            node.op, node.attrs = "Clip", {}
            low, high = (np.array(v, np.float32) for v in (0.0, 2.5))
            import onnx_graphsurgeon as gs

            node.inputs = [node.inputs[0], gs.Constant("low", low), gs.Constant("high", high)]
    result, _ = quantise(graph, observer=observer)
    proof = result.report.details["audit"]
    assert proof["mismatches"] == () and proof["stranded"] == () and proof["floats"] == ()
    assert proof["integer"]["QLinearConv"] == 4 and "Clip" not in proof["integer"]
    onnx.checker.check_model(to_proto(result.graph), full_check=True)


# ---- the option ranges


def test_given_ranges_are_taken_and_the_others_calibrated() -> None:
    graph = network()
    given, _ = quantise(graph, ranges={"r0": (0.0, 2.55), "c2": (-1.0, 1.55)})
    tensors = given.graph.tensors()
    assert tensors["r0_scale"].values == np.float32(2.55 / 255)
    assert tensors["c2_scale"].values == np.float32(2.55 / 255)
    plain, _ = quantise(graph)
    assert tensors["r1_scale"].values == plain.graph.tensors()["r1_scale"].values


def test_auto_leaves_given_ranges_alone() -> None:
    graph = network()
    found, _ = quantise(graph, observer="auto", ranges={"r0": (0.0, 2.55)}, search_evaluations=6)
    assert found.report.decisions["ranges"]["r0"] == [0.0, 2.55]
    assert found.graph.tensors()["r0_scale"].values == np.float32(2.55 / 255)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"nothing": (0.0, 1.0)}, "tensor 'nothing' is not in the graph"),
        ({"m": (0.0, 1.0)}, "tensor 'm' shares the range of 'r2'; give a range for that"),
    ],
)
def test_ranges_that_cannot_be_used_are_refused(ranges: dict[str, tuple[float, float]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantise(network(), ranges=ranges)


@pytest.mark.parametrize("bad", [(1.0, 0.0), (0.0, inf), (float("nan"), 1.0), (0.0,)])
def test_malformed_ranges_are_found_before_any_data_is_read(bad: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ranges"):
        InsertQdq.model_validate({"ranges": {"x": bad}})


# ---- the cache


@pytest.mark.parametrize("observer", ["min_max", "mse", "auto"])
def test_the_cache_gives_the_same_bytes_without_calibrating(observer: str, tmp_path: Path) -> None:
    graph = network()
    options = {"observer": observer, "calibration_cache": tmp_path / "cache.json", "search_evaluations": 6}
    first, _ = quantise(graph, **options)
    content = json.loads((tmp_path / "cache.json").read_text())
    assert content["observer"]["name"] == observer and "r0" in content["ranges"]
    # Proof that it is read: what the file says is what is written.
    content["ranges"]["r0"] = [0.0, 2.55]
    second, context = quantise(graph, **options)
    assert proto(first) == proto(second) and not [w for w in context.warnings if "cache" in w]
    (tmp_path / "cache.json").write_text(json.dumps(content))
    third, _ = quantise(graph, **options)
    assert third.graph.tensors()["r0_scale"].values == np.float32(2.55 / 255)


def test_a_cache_of_something_else_is_told_and_replaced(tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    graph = network()
    quantise(graph, calibration_cache=cache)
    for other, data, options, message in (
        (network(5), None, {}, "another model"),
        (network(5), dataset(graph, 20), {}, "other data"),
        (network(5), dataset(graph, 20), {"observer": "mse"}, "another observer"),
    ):
        result, context = quantise(other, data, calibration_cache=cache, **options)
        assert any(f"made from {message}; calibrated anew" in w for w in context.warnings)
        assert proto(result) == proto(quantise(other, data, **options)[0])
        again, context = quantise(other, data, calibration_cache=cache, **options)
        assert proto(again) == proto(result) and not [w for w in context.warnings if "cache" in w]


def test_a_damaged_cache_and_a_wrong_place_are_refused_before_work(tmp_path: Path) -> None:
    graph = network()
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(DataError, match="is no calibration cache"):
        quantise(graph, calibration_cache=tmp_path / "notes.json")
    with pytest.raises(UsageError, match="its folder does not exist"):
        quantise(graph, calibration_cache=tmp_path / "no" / "cache.json")


# ---- weights


def test_weights_by_mean_squared_error_are_closer_and_keep_their_limits() -> None:
    graph = network()
    tensors = {method: quantise(graph, weight_range=method)[0].graph.tensors() for method in ("max", "mse")}
    changed = 0
    for name in ("w0", "w1", "w2", "w3"):
        weight = graph.tensors()[name].values
        errors = {}
        for method, found in tensors.items():
            integers, scale = found[f"{name}_quantized"].values, found[f"{name}_scale"].values
            assert np.abs(integers.astype(int)).max() == 127
            errors[method] = ((integers * scale.reshape(-1, 1, 1, 1) - weight) ** 2).sum(axis=(1, 2, 3))
        assert (errors["mse"] <= errors["max"] * 1.0001).all()
        changed += int((errors["mse"] < errors["max"]).sum())
    assert changed > 8


@pytest.mark.parametrize("axis", [0, 1, None])
def test_weight_ranges_by_mean_squared_error_are_the_best_of_those_tried(
    axis: int | None, rng: np.random.Generator
) -> None:
    scheme = QuantScheme("int8", symmetric=True, bits=4)
    weight = rng.laplace(size=(5, 40, 3)).astype(np.float32)
    weight[2, 3] = 0
    found = weight_qparams(weight, scheme, axis, method="mse")
    widest = weight_qparams(weight, scheme, axis)

    def error(scale: Array) -> Array:
        step = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(3)])
        restored = np.clip(np.rint(weight / step), -7, 7) * step
        return ((restored - weight) ** 2).sum(axis=tuple(i for i in range(3) if i != axis))  # type: ignore[no-any-return]

    tried = [error(widest.scale * np.float32(share)) for share in np.linspace(0.6, 1, 201)]
    assert (error(found.scale) <= 1.03 * np.min(tried, axis=0)).all()
    assert error(found.scale).sum() < 0.95 * error(widest.scale).sum()


def test_weight_ranges_by_mean_squared_error_keep_the_bound_of_the_bias(rng: np.random.Generator) -> None:
    weight = rng.laplace(size=(4, 30)).astype(np.float32)
    weight[1] *= 1e-12
    weight[2] = 0
    bias = np.array([0.5, 30.0, -4.0, 1e9], np.float32)
    params = weight_qparams(weight, QuantScheme("int8", symmetric=True), 0, bias=bias, input_scale=0.01, method="mse")
    assert (np.abs(bias.astype(np.float64)) / (0.01 * params.scale) <= MAX_BIAS * 1.001).all()
    assert np.isfinite(params.scale).all() and (params.scale > 0).all()
