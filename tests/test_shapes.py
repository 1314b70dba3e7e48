"""Multiply-accumulates do not depend on how a product is written."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from models import BY_NAME
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxcompress.errors import ModelError
from onnxcompress.proto import from_proto
from onnxcompress.shapes import infer_shapes, node_macs

#: [N, 8, 6, 6] with 4 filters of 8 x 3 x 3 at stride 1 without padding
CONV = 4 * 4 * 4 * 8 * 3 * 3
#: [N, 5, 8] times [8, 4]
MATMUL = 5 * 4 * 8


def counted(node: onnx.NodeProto, shape: list[int | str], kind: int, constants: dict[str, NDArray[np.generic]]) -> int:
    out_kind = onnx.TensorProto.INT32 if node.op_type.endswith("Integer") else kind
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, ["N", *shape])],
        [helper.make_tensor_value_info("y", out_kind, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    loaded = from_proto(model)
    return node_macs(loaded, infer_shapes(loaded))["n"]


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        ("Conv", ["x", "w"]),
        ("ConvInteger", ["x", "w"]),
        ("QLinearConv", ["x", "s", "z", "w", "s", "t", "s", "z"]),
        ("MatMul", ["x", "w"]),
        ("MatMulInteger", ["x", "w"]),
        ("QLinearMatMul", ["x", "s", "z", "w", "s", "t", "s", "z"]),
    ],
)
def test_macs_of_float_and_integer_forms(op: str, inputs: list[str]) -> None:
    conv, floats = "Conv" in op, op in ("Conv", "MatMul")
    weight = np.ones((4, 8, 3, 3) if conv else (8, 4), np.float32 if floats else np.int8)
    constants = {"w": weight, "s": np.float32(0.5), "z": np.uint8(3), "t": np.int8(0)}
    used = {name: np.asarray(value) for name, value in constants.items() if name in inputs}
    node = helper.make_node(op, inputs, ["y"], name="n")
    kind = onnx.TensorProto.FLOAT if floats else onnx.TensorProto.UINT8
    assert counted(node, [8, 6, 6] if conv else [5, 8], kind, used) == (CONV if conv else MATMUL)


def test_a_size_of_minus_one_is_not_known() -> None:
    """Some exporters write it, and with a Slice that steps backwards it ended the process inside of onnx."""
    constants = {"start": -1, "end": -100, "axis": 0, "step": -1}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Slice", ["x", *constants], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [-1, 4])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, 4])],
        [onnx.numpy_helper.from_array(np.array([value]), name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    known = infer_shapes(from_proto(model))
    assert known["x"].shape == (None, 4)
    shape = known["y"].shape
    assert shape is not None and not isinstance(shape[0], int) and shape[1] == 4


def test_the_default_domain_has_two_names() -> None:
    """ONNX's own inference fails on a node of the second where the file imports the first."""
    model = BY_NAME["residual"].build()
    wanted = infer_shapes(from_proto(model))
    for node in model.graph.node:
        node.domain = "ai.onnx"
    assert infer_shapes(from_proto(model)) == wanted
    model.opset_import[0].domain = "ai.onnx"
    assert infer_shapes(from_proto(model)) == wanted


def test_what_inference_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = from_proto(BY_NAME["residual"].build())
    monkeypatch.setattr("onnxcompress.shapes.spell_default_domain", lambda model: model.ClearField("opset_import"))
    with pytest.raises(ModelError, match=r"shape inference fails: .*No opset import"):
        infer_shapes(graph)
