from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import HAZARDS, Hazard, make_feeds
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from random_graphs import random_model

from onnxcompress.base import Context, PassResult
from onnxcompress.data import open_data
from onnxcompress.errors import DataError
from onnxcompress.graph import Graph, copy_graph, input_specs
from onnxcompress.passes.equalize_layers import EqualizeLayers, _Group
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.quantization.channel_scales import ChannelScales
from onnxcompress.quantization.channel_statistics import channel_statistics
from onnxcompress.session import Session
from onnxcompress.shapes import infer_shapes

Array = NDArray[Any]
RUNNABLE = [h for h in HAZARDS if h.runnable and h.name not in ("random_and_stateful", "dropout_training")]


def distance(reference: dict[str, Array], found: dict[str, Array]) -> float:
    worst = 0.0
    for name, value in reference.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size:
            gap = np.linalg.norm((value - found[name]).astype(np.float64).ravel())
            worst = max(worst, gap / (np.linalg.norm(value.astype(np.float64).ravel()) + 1e-12))
    return worst


def run(model: Graph | onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    return Session(model, optimization="disabled", threads=1).run(feeds)


def equalise(graph: Graph, feeds: dict[str, Array], **options: Any) -> PassResult:
    return EqualizeLayers(**options)(graph, Context(data=open_data([feeds], input_specs(graph)), threads=1))


def scaled_at_random(graph: Graph, seed: int) -> tuple[Graph, int]:
    twin = copy_graph(graph)
    scales = ChannelScales(twin, infer_shapes(twin))
    rng = np.random.default_rng(seed)
    chosen = np.exp(rng.uniform(-1.5, 1.5, scales.count))
    chosen[~scales.free | np.isfinite(scales.limits)] = 1  # a bound admits only some scales
    return twin, len(scales.divide(chosen))


@pytest.mark.parametrize("seed", range(80))
def test_any_scales_of_free_channels_leave_the_outputs(seed: int) -> None:
    graph = from_proto(random_model(seed, steps=14))
    feeds = {"x": np.random.default_rng(seed).normal(size=(2, 3, 8, 8)).astype(np.float32)}
    twin, _ = scaled_at_random(graph, seed)
    assert distance(run(graph, feeds), run(twin, feeds)) <= 1e-4


def test_the_random_graphs_do_scale_something() -> None:
    assert sum(scaled_at_random(from_proto(random_model(seed, steps=14)), seed)[1] for seed in range(20)) > 40


@pytest.mark.parametrize("hazard", RUNNABLE, ids=lambda h: h.name)
def test_hazards_compute_the_same(hazard: Hazard) -> None:
    model = hazard.build()
    graph, feeds = from_proto(model), make_feeds(model)
    before = to_proto(graph).SerializeToString()
    result = equalise(graph, feeds)
    assert to_proto(graph).SerializeToString() == before
    onnx.checker.check_model(to_proto(result.graph))
    assert distance(run(model, feeds), run(result.graph, feeds)) <= (1e-2 if "16" in hazard.name else 1e-5)


def uneven(activation: str) -> Graph:
    """Two convolutions with a hundredfold spread between the channels in the middle."""
    rng = np.random.default_rng(0)
    first = (
        rng.normal(size=(16, 4, 3, 3)).astype(np.float32)
        * np.geomspace(0.02, 2, 16).astype(np.float32)[:, None, None, None]
    )
    second = (
        rng.normal(size=(4, 16, 3, 3)).astype(np.float32)
        / np.geomspace(0.02, 2, 16).astype(np.float32)[None, :, None, None]
    )
    inputs = ["c", "low", "high"] if activation == "Clip" else ["c", "slope"] if activation == "PRelu" else ["c"]
    constants = {"w1": first, "w2": second, "b": rng.normal(size=16).astype(np.float32) * 0.1}
    if activation == "Clip":
        constants |= {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    if activation == "PRelu":
        constants["slope"] = np.array([0.2], np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1", "b"], ["c"], name="first", pads=[1] * 4),
            helper.make_node(activation, inputs, ["r"], name="act"),
            helper.make_node("Conv", ["r", "w2"], ["y"], name="second", pads=[1] * 4),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    return from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize("activation", ["Relu", "Clip", "LeakyRelu", "PRelu"])
def test_int8_gets_better_where_channels_differ(activation: str) -> None:
    graph = uneven(activation)
    feeds = {"x": np.random.default_rng(1).normal(size=(16, 4, 8, 8)).astype(np.float32)}
    result = equalise(graph, feeds)
    assert distance(run(graph, feeds), run(result.graph, feeds)) <= 1e-5
    assert len([c for c in result.report.changes if c.kind == "equalised"]) == 1
    assert {c.node for c in result.report.changes if c.kind == "scaled"} == {"first", "second"}
    errors = []
    for model in (graph, result.graph):
        context = Context(data=open_data([feeds], input_specs(model)), threads=1)
        errors.append(distance(run(graph, feeds), run(InsertQdq()(model, context).graph, feeds)))
    assert errors[1] < 0.5 * errors[0]


def test_relu6_is_never_cut_lower_than_before_on_what_was_seen() -> None:
    graph = uneven("Clip")
    feeds = {"x": np.random.default_rng(1).normal(size=(16, 4, 8, 8)).astype(np.float32) * 5}
    for strength in (0.25, 0.5, 1.0):
        result = equalise(graph, feeds, strength=strength)
        assert distance(run(graph, feeds), run(result.graph, feeds)) <= 1e-5


def test_strength_zero_changes_nothing() -> None:
    graph = uneven("Relu")
    feeds = {"x": np.ones((1, 4, 8, 8), np.float32)}
    assert not equalise(graph, feeds, strength=0).report.changed


def test_channel_statistics_equal_numpy(rng: np.random.Generator) -> None:
    graph = uneven("Relu")
    feeds = [{"x": rng.normal(size=(n, 4, 8, 8)).astype(np.float32)} for n in (3, 1, 5)]
    data = open_data(feeds, input_specs(graph))
    found = channel_statistics(graph, {"x": (1, 4), "y": (1, 4)}, data)
    values = np.concatenate([f["x"] for f in feeds])
    np.testing.assert_allclose(found["x"].magnitude, np.abs(values).max(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found["x"].mean_square, np.square(values).mean(axis=(0, 2, 3)), rtol=1e-5)
    assert found["y"].magnitude.shape == (4,)


def test_infinite_activations_are_named(rng: np.random.Generator) -> None:
    graph = uneven("Relu")
    data = open_data({"x": np.full((1, 4, 8, 8), 3e38, np.float32)}, input_specs(graph))
    with pytest.raises(DataError, match="not finite"):
        EqualizeLayers()(graph, Context(data=data))


def test_no_data_is_a_usage_error() -> None:
    with pytest.raises(DataError, match="needs calibration data"):
        EqualizeLayers()(uneven("Relu"), Context())


def test_small_channels_keep_four_times_the_room_and_no_more() -> None:
    relative = np.array([1.0, 0.25, 1 / 16, 0.01, 1e-9])
    none = np.full(5, np.inf)
    group = _Group("x", np.arange(5), [], [], relative, relative, np.ones(5), none)
    room = np.maximum(relative, 0.001) / group.scales(0.5)  # the share of the tensor's range that each channel takes
    np.testing.assert_allclose(1 / room, [1, 2, 4, 4, 4])
    np.testing.assert_allclose(group.scales(1.0), np.maximum(relative, 0.001))
    np.testing.assert_array_equal(group.scales(0.0), np.ones(5))
    assert (group.scales(1e-4) > 0.999).all()
