from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxcompress.data import open_data
from onnxcompress.errors import DataError, UsageError
from onnxcompress.graph import Graph, input_specs
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.quantization.affine import Range
from onnxcompress.quantization.calibration import calibrate, observe
from onnxcompress.quantization.calibration_cache import CalibrationKey, graph_sha256, read_ranges, write_ranges
from onnxcompress.quantization.observers import MseObserver, make_observer
from onnxcompress.session import Session


def model(batch: str | int = "N") -> Graph:
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Mul", ["r", "x"], ["m"]),
            helper.make_node("Log", ["r"], ["l"]),
            helper.make_node("Add", ["m", "l"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3, "W"])],
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


# ---- observers that see whole tensors


def reference(graph: Graph, x: np.ndarray, name: str) -> np.ndarray:
    r = np.maximum(x, 0)
    return {"x": x, "r": r, "m": r * x}[name]


@pytest.mark.parametrize("observer", ["percentile", "entropy", "mse", "weighted_mse"])
def test_the_range_is_that_of_all_values_in_one_array(observer: str, rng: np.random.Generator) -> None:
    graph = model()
    arrays = [rng.normal(size=(n, 3, w)).astype(np.float32) for n, w in ((4, 500), (1, 90), (70, 20))]
    found = calibrate(graph, ["x", "r", "m"], open_data([{"x": a} for a in arrays], input_specs(graph)), observer)
    for name, interval in found.items():
        alone = make_observer(observer)
        values = [reference(graph, a, name) for a in arrays]
        if observer == "weighted_mse":  # it looks at samples as well
            values = [np.pad(v.reshape(len(v), -1), [(0, 0), (0, 1500 - v[0].size)]) for v in values]
        else:
            values = [v.ravel() for v in values]
        alone.update(np.concatenate(values))
        assert interval == alone.range()


def test_tensors_that_share_parameters_are_seen_as_one(rng: np.random.Generator) -> None:
    graph = model()
    x = rng.normal(size=(64, 3, 50)).astype(np.float32)
    data = open_data({"x": x}, input_specs(graph))
    found = calibrate(graph, ["x", "m", "r"], data, "mse", shared=[["x", "m"], ["r"]])
    together = MseObserver()
    together.update(x)
    together.update(reference(graph, x, "m"))
    assert found["x"] == found["m"] == together.range() != found["r"]
    extremes = calibrate(graph, ["x", "m"], data, shared=[["x", "m"]])
    assert extremes["x"] == extremes["m"]
    assert extremes["x"].low == x.min() and extremes["x"].high == max(x.max(), reference(graph, x, "m").max())


@pytest.mark.parametrize("batch", ["N", 8])
@pytest.mark.parametrize("in_flight", [1, 600, 5_000, 1 << 30])
def test_little_in_flight_memory_changes_nothing(batch: str | int, in_flight: int, rng: np.random.Generator) -> None:
    """Batches are split, and where the model fixes them or one sample is too much, tensors go in groups."""
    graph = model(batch)
    data = open_data({"x": rng.normal(size=(32, 3, 40)).astype(np.float32)}, input_specs(graph)).rebatch(16)
    watchers = {name: MseObserver() for name in ("x", "r", "m")}
    observe(graph, watchers, data, in_flight=in_flight)
    whole = {name: MseObserver() for name in watchers}
    observe(graph, whole, data)
    for name, watching in watchers.items():
        assert watching.range() == whole[name].range()
        assert watching.histogram.total == whole[name].histogram.total == 32 * 3 * 40


def test_memory_does_not_grow_with_the_samples(rng: np.random.Generator) -> None:
    graph = model()
    peaks = []
    for samples in (64, 640):
        data = open_data({"x": rng.normal(size=(samples, 3, 1000)).astype(np.float32)}, input_specs(graph)).rebatch(16)
        calibrate(graph, ["x", "r", "m"], data.take(16), "entropy")
        tracemalloc.start()
        calibrate(graph, ["x", "r", "m"], data, "entropy")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_values_that_are_not_finite_are_named_by_every_observer() -> None:
    graph = model()
    data = open_data({"x": -np.ones((2, 3, 4), np.float32)}, input_specs(graph))
    with pytest.raises(DataError, match="'l' takes values that are not finite"):
        calibrate(graph, ["r", "l"], data, "entropy")


# ---- the cache


def key(**changes: Any) -> CalibrationKey:
    return CalibrationKey(**({"model": "a" * 64, "data": "b" * 64, "observer": {"name": "mse"}} | changes))


def test_a_cache_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    ranges = {"x": Range(-0.1, 1 / 3), "ü/1:0": Range(0.0, 1e-30)}
    assert read_ranges(path) is None
    write_ranges(path, key(), ranges)
    assert read_ranges(path) == (key(), ranges)
    assert [p.name for p in tmp_path.iterdir()] == ["cache.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"format": "other", "version": 1}',
        '{"format": "onnxcompress calibration", "version": 2, "model": "", "data": "", "observer": {}, "ranges": {}}',
        '{"format": "onnxcompress calibration", "version": 1, "model": 3, "data": "", "observer": {}, "ranges": {}}',
        *(
            '{"format": "onnxcompress calibration", "version": 1, "model": "", "data": "", "observer": {}, '
            f'"ranges": {{"x": {found}}}}}'
            for found in ("1", "[1]", "[2, 1]", "[0, NaN]", "[0, Infinity]", '["0", "1"]', "[true, 1]", "null")
        ),
        "[" * 100_000,
    ],
)
def test_a_damaged_cache_is_refused_in_one_line_and_kept(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    path.write_text(text)
    with pytest.raises(DataError, match="is no calibration cache or is damaged") as caught:
        read_ranges(path)
    assert "\n" not in str(caught.value) and path.read_text() == text


def test_a_cache_that_cannot_be_read_or_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as a calibration cache"):
        read_ranges(tmp_path)
    with pytest.raises(UsageError, match="is a folder"):
        write_ranges(tmp_path, key(), {})
    with pytest.raises(UsageError, match="its folder does not exist"):
        write_ranges(tmp_path / "no" / "cache.json", key(), {})


def test_the_key_tells_models_data_and_observers_apart(rng: np.random.Generator) -> None:
    assert key().difference(key()) is None
    assert key().difference(key(model="c")) == "another model"
    assert key().difference(key(data="c", observer={})) == "other data and another observer"
    assert graph_sha256(model()) == graph_sha256(model()) != graph_sha256(model(4))


# ---- a real model

_PEAK = """
import importlib.util, resource, sys, time
spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
cases = importlib.util.module_from_spec(spec)
sys.modules["cases"] = cases
sys.dont_write_bytecode = True
spec.loader.exec_module(cases)
from onnxcompress.base import Context
from onnxcompress.data import open_data
from onnxcompress.graph import input_specs
from onnxcompress.io import load
from onnxcompress.passes.insert_qdq import InsertQdq
case = cases.CASES["squeezenet1.1"]
graph = load(case.model)
data = open_data(list(case.calibration(120, 16)), input_specs(graph))
start = time.process_time()
InsertQdq(observer=sys.argv[2])(graph, Context(data=data))
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
@pytest.mark.cases
@pytest.mark.parametrize("observer", ["entropy", "mse"])
def test_squeezenet_takes_little_memory_and_time(observer: str, cases: Mapping[str, Any]) -> None:
    source = sys.modules[type(cases["squeezenet1.1"]).__module__].__file__
    assert source is not None
    # A process starts with the peak of the one that started it, and that of a whole run of tests is high.
    between = [sys.executable, "-S", "-c", "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"]
    command = [*between, sys.executable, "-c", _PEAK, source, observer]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    seconds, mebibytes = map(float, answer.split())
    assert mebibytes <= 1024
    # Processor time of all threads, which other work on the machine hardly changes: at most 6 s even on one core.
    assert seconds <= 6
