"""A small convolutional network with its data, for tests of the main job and of the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["CLASSES", "logits", "write_data", "write_model"]

CLASSES = 4
_SHAPE = (3, 8, 8)


def write_model(path: Path, *, classes: int = CLASSES, softmax: bool = True) -> Path:
    """Conv, BatchNormalization, Relu, global average pool, Gemm and (where asked for) Softmax; dynamic batch."""
    generator = np.random.default_rng(0)
    weights = {
        "w1": generator.normal(0, 0.3, (8, 3, 3, 3)),
        "scale": generator.uniform(0.5, 2, 8),
        "shift": generator.normal(0, 0.2, 8),
        "mean": generator.normal(0, 0.2, 8),
        "var": generator.uniform(0.5, 2, 8),
        "w2": generator.normal(0, 1.0, (8, classes)),
        "b2": generator.normal(0, 0.1, classes),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"], "norm"),
        helper.make_node("Relu", ["n"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["g" if softmax else "y"], "head"),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["g"], ["y"], "prob", axis=1))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *_SHAPE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def write_data(path: Path, samples: int = 64, *, seed: int = 1, labels: NDArray[np.int64] | None = None) -> Path:
    """A .npz with ``samples`` samples, and ``labels`` where they are given."""
    arrays: dict[str, NDArray[np.generic]] = {
        "x": np.random.default_rng(seed).normal(size=(samples, *_SHAPE)).astype(np.float32)
    }
    if labels is not None:
        arrays["labels"] = labels
    np.savez(path, allow_pickle=False, **arrays)
    return path


def logits(model: Path, data: Path) -> NDArray[np.float32]:
    """What the model answers to the samples in ``data``."""
    from onnxcompress.session import Session

    with np.load(data) as arrays:
        answer: NDArray[np.float32] = Session(model).run({"x": arrays["x"]})["y"]
    return answer
