"""Task metrics: the user's function and top-k on labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.data import Batch, open_data
from onnxcompress.errors import DataError, ModelError, UsageError
from onnxcompress.evaluate import Run, checked_metric, evaluate_labels, load_evaluator
from onnxcompress.graph import InputSpec
from onnxcompress.session import Session


def batch_of(labels: list[int]) -> list[Batch]:
    return [Batch({"x": np.zeros((len(labels), 1), np.float32)}, np.array(labels, np.int64), len(labels))]


def answering(**outputs: NDArray[Any]) -> Run:
    return lambda feeds: outputs


def test_real_session_on_labelled_data(tmp_path: Path) -> None:
    """A model that copies its input: the label is where the input is largest, in nine of ten samples."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "copy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    values = np.random.default_rng(0).random((40, 8), np.float32)
    labels = values.argmax(1)
    labels[::10] = values[::10].argmin(1)
    np.savez(tmp_path / "data.npz", x=values, labels=labels)
    data = open_data(tmp_path / "data.npz", [InputSpec("x", np.dtype(np.float32), ("N", 8))], batch=7)
    assert evaluate_labels(Session(model).run, data) == {"top-1": 0.9, "top-5": 0.9}


def test_top_5_only_where_it_says_something() -> None:
    assert evaluate_labels(answering(y=np.eye(5, dtype=np.float32)), batch_of([0, 1, 2, 3, 4])) == {"top-1": 1.0}
    six = np.tile(np.arange(6, dtype=np.float32), (2, 1))
    assert evaluate_labels(answering(y=six), batch_of([5, 1])) == {"top-1": 0.5, "top-5": 1.0}
    assert evaluate_labels(answering(y=six), batch_of([0, 3]), top=(1, 3)) == {"top-1": 0.0, "top-3": 0.5}


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 999), classes=st.integers(2, 9), levels=st.integers(1, 4))
def test_ties_count_as_in_a_stable_sort(seed: int, classes: int, levels: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, (12, classes)).astype(np.float32)  # many ties
    labels = generator.integers(0, classes, 12)
    order = np.argsort(-scores, axis=1, kind="stable")
    top = (1, 2)
    wanted = {f"top-{k}": float((order[:, :k] == labels[:, None]).any(1).mean()) for k in top if k == 1 or k < classes}
    result = evaluate_labels(answering(y=scores), batch_of(labels.tolist()), top=top)
    assert result == pytest.approx(wanted)
    assert result["top-1"] == pytest.approx(float((scores.argmax(1) == labels).mean()))


def test_scores_that_are_not_a_number_are_no_hit() -> None:
    scores = np.array([[np.nan, 1], [np.nan, 1], [0, 1]], np.float32)
    assert evaluate_labels(answering(y=scores), batch_of([0, 1, 1])) == {"top-1": pytest.approx(2 / 3)}
    assert evaluate_labels(answering(y=np.full((2, 3), np.nan, np.float32)), batch_of([0, 1])) == {"top-1": 0.0}


def test_first_output_with_scores_is_taken() -> None:
    outputs = {
        "features": np.zeros((2, 4, 5, 5), np.float32),
        "classes": np.array([1, 0]),
        "scores": np.array([[0, 1, 0], [1, 0, 0]], np.float32)[:, :, None, None],
        "other": np.zeros((2, 3), np.float32),
    }
    assert evaluate_labels(answering(**outputs), batch_of([1, 0])) == {"top-1": 1.0}
    assert evaluate_labels(answering(**outputs), batch_of([1, 0]), output="other") == {"top-1": 0.5}
    with pytest.raises(UsageError, match="no output 'none'; it has 'features', 'classes'"):
        evaluate_labels(answering(**outputs), batch_of([1, 0]), output="none")
    with pytest.raises(ModelError, match=r"output 'features' is \[2, 4, 5, 5\] for 2 samples"):
        evaluate_labels(answering(**outputs), batch_of([1, 0]), output="features")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 7], "sample 1 has label 7 but output 'y' has 3 classes; expected 0 to 2"),
        ([-1, 0], "sample 0 has label -1"),
    ],
)
def test_labels_out_of_range(labels: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_labels(answering(y=np.zeros((2, 3), np.float32)), batch_of(labels))


def test_sample_numbers_go_on_over_batches() -> None:
    with pytest.raises(DataError, match="sample 3 has label 9"):
        evaluate_labels(answering(y=np.zeros((2, 3), np.float32)), [*batch_of([0, 1]), *batch_of([2, 9])])


def test_nothing_to_evaluate() -> None:
    with pytest.raises(DataError, match="no labels; add an array named 'labels'"):
        evaluate_labels(answering(y=np.zeros((2, 3))), [Batch({}, None, 2)])
    with pytest.raises(DataError, match="no data to evaluate on"):
        evaluate_labels(answering(), [])
    with pytest.raises(ModelError, match=r"no output has one row of scores a sample: 'y' \[2, 1\] for 2 samples"):
        evaluate_labels(answering(y=np.zeros((2, 1), np.float32)), batch_of([0, 0]))


# -- the user's function ------------------------------------------------------------------------------------------


def evaluator(tmp_path: Path, body: str) -> Any:
    path = tmp_path / "metric.py"
    path.write_text(f"import numpy as np\ndef score(run):\n    {body}\n")
    return load_evaluator(f"{path}:score")


@pytest.mark.parametrize(
    "value",
    ["0.5", "np.float32(0.5)", "np.array(0.5)", "np.array([0.5])", "float(run({'x': np.ones(2)})['y'].sum()) / 4"],
)
def test_number_of_the_users_function(tmp_path: Path, value: str) -> None:
    assert evaluator(tmp_path, f"return {value}")(lambda feeds: {"y": feeds["x"]}) == 0.5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pass", r"metric\.py:score returned NoneType None; expected one number, higher is better"),
        ("return 'good'", r"returned str 'good'; expected one number"),
        ("return [1, 2]", r"returned list; expected one number"),
        ("return np.nan", r"returned nan; expected a finite number"),
        ("return -np.inf", r"returned -inf; expected a finite number"),
        ("return run(1, 2)", r"metric\.py, line 3: TypeError"),
        ("raise SystemExit('bye')", r"metric\.py, line 3: SystemExit: bye"),
        ("assert False", r"metric\.py, line 3: AssertionError: no message"),
    ],
)
def test_wrong_answers_are_one_line(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        evaluator(tmp_path, body)(lambda feeds: {"y": feeds["x"]})
    assert "\n" not in str(caught.value)


def test_errors_of_the_model_keep_their_kind(tmp_path: Path) -> None:
    def run(feeds: Any) -> Any:
        raise ModelError("onnxruntime cannot run the model")

    with pytest.raises(ModelError, match="cannot run"):
        evaluator(tmp_path, "return run({})['y'].mean()")(run)


def test_interrupts_pass_through(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluator(tmp_path, "raise KeyboardInterrupt")(lambda feeds: {})


def test_checked_metric_accepts_what_torch_returns() -> None:
    class Scalar:
        shape = ()

        def item(self) -> float:
            return 0.25

    assert checked_metric(Scalar(), "f") == 0.25
    assert checked_metric(True, "f") == 1.0
    assert math.isclose(checked_metric(3, "f"), 3.0)
