"""The demo's model and data: what they promise, and that they are what the package ships."""

from __future__ import annotations

from importlib import resources

import numpy as np
import onnx
import pytest

from onnxcompress.demo import demo_calibration, demo_evaluation, demo_model_path, enlarge_digits
from onnxcompress.session import Session


def stored(name: str) -> np.ndarray:
    with np.load(demo_model_path().with_name("digits.npz"), allow_pickle=False) as data:
        return data[name]


def test_files_are_small_and_credited() -> None:
    folder = resources.files("onnxcompress.demo")
    assert demo_model_path().stat().st_size < 600_000
    assert demo_model_path().with_name("digits.npz").stat().st_size < 150_000
    readme = folder.joinpath("README.md").read_text(encoding="utf-8")
    assert "CC BY 4.0" in readme
    assert "Alpaydin" in readme


def test_model_has_what_the_demo_shows() -> None:
    model = onnx.load(demo_model_path())
    onnx.checker.check_model(model, full_check=True)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("BatchNormalization") == operators.count("Conv") == 6
    assert "Add" in operators
    assert model.ir_version <= 10
    assert [entry.version for entry in model.opset_import] == [17]
    [spec] = Session(model).input_specs()
    assert (spec.name, spec.dtype, spec.shape) == ("input", np.float32, ("N", 1, 32, 32))
    assert not any(node.doc_string for node in model.graph.node)


def test_model_is_large_enough_to_gain() -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(demo_model_path()))
    sizes = {v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    weights = {i.name: list(i.dims) for i in model.graph.initializer}
    macs = sum(
        int(np.prod(sizes[node.output[0]]) * np.prod(weights[node.input[1]][1:]))
        for node in model.graph.node
        if node.op_type == "Conv"
    )
    assert macs >= 20_000_000


def test_accuracy_on_images_that_it_never_saw() -> None:
    data = demo_evaluation()
    logits = Session(demo_model_path()).run({"input": data["input"]})["logits"]
    assert np.mean(logits.argmax(1) == data["labels"]) >= 0.97


def test_data_fit_the_model() -> None:
    calibration, evaluation = demo_calibration(), demo_evaluation()
    assert set(calibration) == {"input"}
    assert calibration["input"].shape == (512, 1, 32, 32)
    assert evaluation["input"].shape == (600, 1, 32, 32)
    assert calibration["input"].dtype == evaluation["input"].dtype == np.float32
    assert evaluation["labels"].dtype == np.int64
    assert np.bincount(evaluation["labels"]).tolist() == [60] * 10
    for images in (calibration["input"], evaluation["input"]):
        assert images.min() == 0.0
        assert images.max() == 1.0


def test_calibration_and_evaluation_share_no_image() -> None:
    calibration = {image.tobytes() for image in stored("calibration_images")}
    evaluation = {image.tobytes() for image in stored("evaluation_images")}
    assert not calibration & evaluation
    assert len(calibration) == 512


def test_images_are_those_of_the_data_set() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn has the original images")
    digits = datasets.load_digits()
    known = {
        image.astype(np.uint8).tobytes(): int(label) for image, label in zip(digits.images, digits.target, strict=True)
    }
    labels = [known[image.tobytes()] for image in stored("evaluation_images")]
    assert labels == demo_evaluation()["labels"].tolist()


def test_enlarging_is_bilinear() -> None:
    flat = enlarge_digits(np.full((2, 8, 8), 16, np.uint8))
    np.testing.assert_array_equal(flat, np.ones((2, 1, 32, 32), np.float32))
    ramp = np.tile(np.arange(8, dtype=np.uint8), (1, 8, 1))
    expected = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7) / 16
    large = enlarge_digits(ramp)[0, 0]
    np.testing.assert_allclose(large, np.tile(expected, (32, 1)), rtol=1e-6)
    transposed = enlarge_digits(ramp.transpose(0, 2, 1))[0, 0]
    np.testing.assert_allclose(transposed, large.T, rtol=1e-6)
    dot = np.zeros((1, 8, 8), np.uint8)
    dot[0, 3, 4] = 16
    spread = enlarge_digits(dot)[0, 0]
    assert spread.sum() == pytest.approx(16)
    assert np.unravel_index(spread.argmax(), spread.shape) in [(y, x) for y in (13, 14) for x in (17, 18)]
