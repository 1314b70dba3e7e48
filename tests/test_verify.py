"""Comparison of outputs, on real sessions: the figures are checked against formulas over all the data at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.data import Batch, Dataset, open_data
from onnxcompress.errors import DataError, ModelError, OnnxCompressError, UsageError
from onnxcompress.graph import InputSpec
from onnxcompress.proto import from_proto
from onnxcompress.session import Session
from onnxcompress.verify import OutputComparison, Run, check_equivalent, compare

SPEC = [InputSpec("x", np.dtype(np.float32), ("N", 6))]


def linear(weight: NDArray[Any], output: str = "y") -> onnx.ModelProto:
    """``y = x @ weight``."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], [output])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", weight.shape[0]])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def samples(count: int = 23, batch: int = 5) -> Dataset:
    values = np.random.default_rng(0).standard_normal((count, 6)).astype(np.float32)
    values[:batch] *= 100  # the mean of the batches' SQNR is then far from that of all the data
    return open_data({"x": values}, SPEC, batch=batch)


def weights() -> tuple[NDArray[Any], NDArray[Any]]:
    generator = np.random.default_rng(1)
    weight = generator.standard_normal((6, 4)).astype(np.float32)
    return weight, weight + 0.05 * generator.standard_normal((6, 4)).astype(np.float32)


def answering(**outputs: Any) -> Run:
    """A model that answers the same whatever it is asked."""
    return lambda feeds: outputs


ONE: list[Batch] = [Batch({"x": np.zeros((2, 6), np.float32)}, None, 2)]


def only(results: list[OutputComparison]) -> OutputComparison:
    assert len(results) == 1
    return results[0]


@pytest.mark.parametrize("batch", [1, 5, 23])
def test_figures_are_over_all_the_data(tmp_path: Path, batch: int) -> None:
    weight, changed = weights()
    onnx.save(linear(weight), tmp_path / "a.onnx")
    data = samples().rebatch(batch)
    result = only(compare(tmp_path / "a.onnx", from_proto(linear(changed)), data))
    x = np.concatenate([b.feeds["x"] for b in data]).astype(np.float64)
    a, b = x @ weight, x @ changed
    assert result.name == "y"
    assert result.max_abs == pytest.approx(np.abs(a - b).max(), rel=1e-5)
    assert result.relative_l2 == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-5)
    assert result.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-5)
    assert result.same_argmax == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
    assert 0 < result.same_argmax <= 1 and result.equal_elements is None and result.nonfinite_mismatches == 0


def test_equal_models() -> None:
    weight, _ = weights()
    result = only(check_equivalent(from_proto(linear(weight)), from_proto(linear(weight)), samples()))
    assert result == OutputComparison("y", 0.0, 0.0, math.inf, 1.0, score_rows=True)


def test_not_equivalent_names_the_worst_output() -> None:
    good, bad = np.ones((2, 3), np.float32), np.full((2, 3), 1.5, np.float32)
    with pytest.raises(OnnxCompressError, match=r"not equivalent: 'second' differs \(relative L2 0\.5, max abs 0\.5\)"):
        check_equivalent(answering(first=good, second=good), answering(first=good * 1.001, second=bad), ONE)
    weight, changed = weights()
    with pytest.raises(OnnxCompressError, match="'y' differs") as caught:
        check_equivalent(from_proto(linear(weight)), from_proto(linear(changed)), samples())
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert check_equivalent(from_proto(linear(weight)), from_proto(linear(changed)), samples(), tolerance=0.2)


def test_optimization_levels_reach_the_sessions() -> None:
    """At `all` the runtime folds the BatchNormalization into the Conv, which rounds otherwise."""
    generator = np.random.default_rng(3)
    arrays = {
        "w": generator.standard_normal((4, 3, 3, 3)),
        "scale": generator.random(4) + 0.5,
        "bias": generator.random(4),
        "mean": generator.random(4),
        "var": generator.random(4) + 0.5,
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"]),
            helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["y"]),
        ],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 6, 6])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    model = from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    data = open_data(generator.random((4, 3, 8, 8), np.float32), [InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 8))])
    assert only(compare(model, model, data)).max_abs == 0.0
    assert 0.0 < only(compare(model, model, data, optimization=("disabled", "all"))).relative_l2 < 1e-5


# -- matching outputs ---------------------------------------------------------------------------------------------


def test_outputs_are_matched_by_name_else_by_position() -> None:
    a, b = np.ones((2, 2), np.float32), np.full((2, 2), 3, np.float32)
    swapped = compare(answering(a=a, b=b), answering(b=b, a=a), ONE)
    assert [(r.name, r.max_abs) for r in swapped] == [("a", 0.0), ("b", 0.0)]
    renamed = compare(answering(a=a, b=b), answering(c=a, d=b), ONE)
    assert [(r.name, r.max_abs) for r in renamed] == [("a", 0.0), ("b", 0.0)]


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        (["a", "b"], ["a"], r"different outputs: only the reference has 'b'; compare"),
        (["a"], ["a", "b"], r"different outputs: only the candidate has 'b'; compare"),
        (["a", "b"], ["a", "c"], r"only the reference has 'b'; only the candidate has 'c'; compare"),
        (["a"], ["b", "c"], r"only the reference has 'a'; only the candidate has 'b', 'c'"),
    ],
)
def test_different_outputs(reference: list[str], candidate: list[str], message: str) -> None:
    value = np.ones((2, 2), np.float32)
    with pytest.raises(ModelError, match=message):
        compare(answering(**dict.fromkeys(reference, value)), answering(**dict.fromkeys(candidate, value)), ONE)


def test_shapes_must_agree() -> None:
    with pytest.raises(
        ModelError, match=r"output 'y': the reference answers shape \[2, 3\], the candidate shape \[2, 4\]"
    ):
        compare(answering(y=np.ones((2, 3))), answering(y=np.ones((2, 4))), ONE)


def test_no_data_and_no_model() -> None:
    with pytest.raises(DataError, match="no data to compare"):
        compare(answering(), answering(), [])
    with pytest.raises(ModelError, match="int cannot be run"):
        compare(3, answering(), ONE)  # type: ignore[arg-type]


# -- argmax -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 5), 1), ((4, 3, 5), 2), ((2, 5, 3, 4), 1), ((9, 5, 1, 1), 1), ((2, 5, 2, 2, 2), 1)]
)
def test_argmax_axis(shape: tuple[int, ...], axis: int) -> None:
    generator = np.random.default_rng(2)
    a = generator.standard_normal(shape).astype(np.float32)
    b = a + 3 * generator.standard_normal(shape).astype(np.float32)
    wanted = (a.argmax(axis) == b.argmax(axis)).mean()
    assert 0 < wanted < 1
    result = only(compare(answering(y=a), answering(y=b), ONE))
    assert result.same_argmax == pytest.approx(wanted)
    assert result.score_rows is (shape in ((8, 5), (9, 5, 1, 1)))


@pytest.mark.parametrize("shape", [(), (8,), (8, 1), (3, 4, 1), (2, 1, 3, 4)])
def test_no_argmax_without_classes(shape: tuple[int, ...]) -> None:
    value = np.ones(shape, np.float32)
    assert only(compare(answering(y=value), answering(y=value), ONE)).same_argmax is None


# -- values that are not plain floats -----------------------------------------------------------------------------


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nonfinite_at_the_same_places_is_equal(special: float) -> None:
    value = np.array([[1, special, 3], [4, 5, 6]], np.float32)
    result = only(check_equivalent(answering(y=value), answering(y=value.copy()), ONE))
    assert (result.max_abs, result.relative_l2, result.nonfinite_mismatches) == (0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(np.nan, 1.0), (1.0, np.nan), (np.inf, -np.inf), (np.inf, np.nan), (1.0, np.inf)]
)
def test_nonfinite_at_other_places_is_a_failure(ours: float, theirs: float) -> None:
    a, b = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    a[1, 1], b[1, 1] = ours, theirs
    result = only(compare(answering(y=a), answering(y=b), ONE))
    assert result.nonfinite_mismatches == 1
    assert (result.max_abs, result.relative_l2, result.sqnr_db) == (math.inf, math.inf, -math.inf)
    with pytest.raises(OnnxCompressError, match="NaN or infinity in one of the models at 1 places"):
        check_equivalent(answering(y=a), answering(y=b), ONE, tolerance=1e9)


def test_zero_reference() -> None:
    zero = np.zeros((2, 3), np.float32)
    assert only(compare(answering(y=zero), answering(y=zero), ONE)).sqnr_db == math.inf
    result = only(compare(answering(y=zero), answering(y=zero + 1), ONE))
    assert (result.max_abs, result.relative_l2, result.sqnr_db) == (1.0, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32, bool])
def test_whole_numbers_are_compared_for_equality(dtype: Any) -> None:
    a = np.zeros((2, 5), dtype)
    b = a.copy()
    b[0, 0] = 1
    result = only(compare(answering(y=a), answering(y=b), ONE))
    assert result.equal_elements == pytest.approx(0.9) and result.same_argmax is None and result.max_abs == 1
    assert only(compare(answering(y=a), answering(y=a), ONE)).equal_elements == 1.0
    with pytest.raises(OnnxCompressError, match="10 % of the elements differ"):
        check_equivalent(answering(y=a), answering(y=b), ONE)


def test_huge_whole_numbers_that_float64_cannot_tell_apart() -> None:
    a = np.array([2**62], np.int64)
    assert only(compare(answering(y=a), answering(y=a + 1), ONE)).equal_elements == 0.0


def test_text() -> None:
    a = np.array([["cat", "dog"]], object)
    b = np.array([["cat", "cow"]], object)
    assert only(compare(answering(y=a), answering(y=a.copy()), ONE)) == OutputComparison("y", 0, 0, math.inf, None, 1.0)
    result = only(compare(answering(y=a), answering(y=b), ONE))
    assert result.equal_elements == 0.5 and result.relative_l2 == math.inf
    with pytest.raises(ModelError, match=r"output 'y': the reference answers object, the candidate float64"):
        compare(answering(y=a), answering(y=np.ones((1, 2))), ONE)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats(dtype: Any) -> None:
    a = np.array([[1, 2, 3]], dtype)
    result = only(compare(answering(y=a), answering(y=a + a), ONE))
    assert (result.max_abs, result.relative_l2, result.same_argmax) == (3.0, 1.0, 1.0)


def test_types_may_differ_as_they_do_after_conversion_to_half() -> None:
    a = np.array([[1, 2, 3]], np.float32)
    assert only(compare(answering(y=a), answering(y=a.astype(np.float16)), ONE)).max_abs == 0.0


def test_sequences_maps_and_optionals() -> None:
    a, b = np.ones(3, np.float32), np.full(2, 2, np.float32)
    same = only(compare(answering(y=[a, b]), answering(y=[a, b]), ONE))
    assert same.max_abs == 0.0
    assert only(compare(answering(y=[a, b]), answering(y=[a, b + 1]), ONE)).max_abs == 1.0
    assert only(compare(answering(y=[{0: 0.5, 1: 0.5}]), answering(y=[{0: 0.25, 1: 0.75}]), ONE)).max_abs == 0.25
    assert only(compare(answering(y=None), answering(y=None), ONE)).relative_l2 == 0.0
    for ours, theirs, message in [
        ([a], [a, a], "a sequence of 1, the candidate one of 2"),
        ([{0: 1.0}], [{1: 1.0}], "a map with 1 keys"),
        (None, a, "an empty optional, the candidate a value"),
        (a, None, "a value, the candidate an empty optional"),
    ]:
        with pytest.raises(ModelError, match=message):
            compare(answering(y=ours), answering(y=theirs), ONE)


def test_sequence_of_a_real_session() -> None:
    graph = helper.make_graph(
        [helper.make_node("SplitToSequence", ["x"], ["parts"], axis=1)],
        "sequence",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6])],
        [helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    session = Session(model)
    result = only(compare(session.run, session.run, samples()))
    assert result.name == "parts" and result.max_abs == 0.0


def test_large_outputs_are_added_in_parts() -> None:
    a = np.ones((1, 3, 1000, 1000), np.float32)
    b = a.copy()
    b[0, 2, 999, 999] = 3
    result = only(compare(answering(y=a), answering(y=b), ONE))
    assert result.max_abs == 2.0 and result.relative_l2 == pytest.approx(2 / math.sqrt(3e6))


@settings(deadline=None, max_examples=50)
@given(cuts=st.lists(st.integers(1, 22), max_size=5), seed=st.integers(0, 99))
def test_batches_make_no_difference(cuts: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    a = generator.standard_normal((23, 4)).astype(np.float32)
    b = a + generator.standard_normal((23, 4)).astype(np.float32)
    edges = sorted({0, *cuts, 23})

    def model(values: NDArray[Any]) -> Run:
        def run(feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            return {"y": values[feeds["rows"]]}

        return run

    def batches(bounds: list[int]) -> list[Batch]:
        return [Batch({"rows": np.arange(start, stop)}, None, stop - start) for start, stop in pairwise(bounds)]

    parts = only(compare(model(a), model(b), batches(edges)))
    whole = only(compare(model(a), model(b), batches([0, 23])))
    assert parts.max_abs == whole.max_abs and parts.same_argmax == whole.same_argmax
    assert parts.relative_l2 == pytest.approx(whole.relative_l2, rel=1e-12)
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-12)


# -- models that are not open at once --------------------------------------------------------------------------------


def test_one_at_a_time_gives_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path, weight in zip(paths, weights(), strict=True):
        onnx.save(linear(weight), path)
    together = compare(paths[0], paths[1], samples())
    monkeypatch.setattr("onnxcompress.verify.TOGETHER_BYTES", 0)
    open_now: list[int] = []
    most: list[int] = []

    class Counted(Session):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            open_now.append(1)
            most.append(sum(open_now))

        def __del__(self) -> None:
            open_now.append(-1)

    monkeypatch.setattr("onnxcompress.verify.Session", Counted)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert compare(paths[0], paths[1], samples()) == together
    assert most == [1, 1]
    assert compare(from_proto(linear(weights()[0])), paths[1], samples()) == together
    assert sorted(tmp_path.iterdir()) == paths


def test_one_at_a_time_is_for_arrays_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are compared with both open: a reference that answers text, sequences, or what a file cannot hold."""
    monkeypatch.setattr("onnxcompress.verify.TOGETHER_BYTES", -1)
    for value in (np.array(["a", "b"], object), [np.zeros(2)], np.zeros(2, ml_dtypes.bfloat16)):
        (output,) = compare(answering(y=value), answering(y=value), samples())
        assert output.max_abs == 0 or output.equal_elements == 1


def test_one_at_a_time_checks_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = linear(weights()[1])
    other.graph.input[0].name = other.graph.node[0].input[0] = "z"
    monkeypatch.setattr("onnxcompress.verify.TOGETHER_BYTES", 0)
    onnx.save(linear(weights()[0]), tmp_path / "a.onnx")
    onnx.save(other, tmp_path / "b.onnx")
    with pytest.raises(UsageError, match="different inputs"):
        compare(tmp_path / "a.onnx", tmp_path / "b.onnx", samples())
