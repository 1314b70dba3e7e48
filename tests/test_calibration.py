from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxcompress.calibration import calibrate
from onnxcompress.data import open_data
from onnxcompress.errors import DataError, UsageError
from onnxcompress.graph import Graph, input_specs
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.session import Session


def model() -> Graph:
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Mul", ["r", "x"], ["m"]),
            helper.make_node("Log", ["r"], ["l"]),
            helper.make_node("Add", ["m", "l"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3, "W"])],
    )
    return from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_min_max_equals_numpy_over_batches_of_different_shape(rng: np.random.Generator) -> None:
    graph = model()
    feeds = [{"x": rng.normal(size=(n, 3, w)).astype(np.float32)} for n, w in ((4, 5), (1, 9), (7, 2))]
    before = to_proto(graph).SerializeToString()
    ranges = calibrate(graph, ["x", "r", "m"], open_data(feeds, input_specs(graph)))
    assert to_proto(graph).SerializeToString() == before
    for name, value in (
        ("x", lambda x: x),
        ("r", lambda x: np.maximum(x, 0)),
        ("m", lambda x: np.maximum(x, 0) * x),
    ):
        all_values = np.concatenate([value(f["x"]).ravel() for f in feeds])
        assert ranges[name].low == all_values.min()
        assert ranges[name].high == all_values.max()


def test_batch_size_does_not_matter(rng: np.random.Generator) -> None:
    graph = model()
    data = open_data({"x": rng.normal(size=(32, 3, 8)).astype(np.float32)}, input_specs(graph))
    one = calibrate(graph, ["m"], data.rebatch(1))
    assert one == calibrate(graph, ["m"], data.rebatch(32)) == calibrate(graph, ["m"], data.rebatch(5))


def test_infinite_values_are_named(rng: np.random.Generator) -> None:
    graph = model()
    data = open_data({"x": -np.ones((2, 3, 4), np.float32)}, input_specs(graph))
    with pytest.raises(DataError, match="'l' takes values that are not finite") as caught:
        calibrate(graph, ["r", "l"], data)
    assert "\n" not in str(caught.value)


def test_nan_is_not_forgotten_by_a_later_batch() -> None:
    graph = helper.make_graph(
        [helper.make_node("Sqrt", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
    )
    loaded = from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    feeds = [{"x": np.array([4.0, -1.0], np.float32)}, {"x": np.array([9.0, 1.0], np.float32)}]
    with pytest.raises(DataError, match="'y' of the float model is NaN"):
        calibrate(loaded, ["x"], open_data(feeds, input_specs(loaded)))


def test_unknown_names_are_refused() -> None:
    graph = model()
    data = open_data({"x": np.ones((2, 3, 4), np.float32)}, input_specs(graph))
    with pytest.raises(UsageError, match="tensor 'nothing' is not in the graph"):
        calibrate(graph, ["nothing"], data)
    with pytest.raises(UsageError, match="unknown observer 'best'"):
        calibrate(graph, ["r"], data, "best")


def test_the_float_model_is_what_is_watched(rng: np.random.Generator) -> None:
    graph = model()
    x = rng.uniform(0.5, 1, size=(2, 3, 4)).astype(np.float32)
    expected = Session(graph, optimization="disabled").run({"x": x})["y"]
    found = calibrate(graph, ["y"], open_data({"x": x}, input_specs(graph)))["y"]
    np.testing.assert_allclose([found.low, found.high], [expected.min(), expected.max()], rtol=1e-6)
