"""fold_batch_norm: every attribute that alters the algebra, every refusal, every place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BF16, BY_NAME, F16, F32, F64, Net, image, make_feeds
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxcompress.base import PassResult
from onnxcompress.graph import constant_value, walk_nodes
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.session import Session


def operators(result: PassResult) -> list[str]:
    return [node.op for node in walk_nodes(result.graph)]


def reasons(result: PassResult) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in result.report.refusals}


def folded(model: onnx.ModelProto, tolerance: float = 1e-5, **sizes: int) -> PassResult:
    """Fold ``model`` and compare both on random inputs at ORT_DISABLE_ALL."""
    onnx.checker.check_model(model, full_check=True)
    result = FoldBatchNorm()(from_proto(model))
    after = to_proto(result.graph)
    onnx.checker.check_model(after, full_check=True)
    feeds = make_feeds(model, sizes=sizes)
    expected = Session(model, optimization="disabled", threads=1).run(feeds)
    found = Session(after, optimization="disabled", threads=1).run(feeds)
    assert_close(found, expected, tolerance)
    return result


def assert_close(
    found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], tolerance: float = 1e-5
) -> None:
    for name, wanted in expected.items():
        difference = np.linalg.norm(found[name].astype(np.float64) - wanted.astype(np.float64))
        assert difference <= tolerance * np.linalg.norm(wanted.astype(np.float64))


# ---- Conv and ConvTranspose --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"pads": [0, 0, 0, 0]},
        {"pads": [2, 1, 0, 3]},
        {"strides": [2, 1]},
        {"dilations": [2, 2]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER"},
        {"auto_pad": "VALID"},
    ],
    ids=str,
)
def test_after_conv(attributes: dict[str, Any], group: int, bias: bool) -> None:
    net = Net()
    weight = net.random(8, 4 // group, 3, 3)
    biases = [net.random(8)] if bias else []
    if "auto_pad" not in attributes:
        attributes = {"pads": [1, 1, 1, 1], **attributes}
    y = net.add("Conv", image(net, 4), weight, *biases, group=group, **attributes)
    net.batch_norm(y, 8, to="y", epsilon=1e-3)
    net.output("y", ["N", 8, None, None])
    assert operators(folded(net.model())) == ["Conv"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 2]},
        {"strides": [3, 2], "output_padding": [1, 1]},
        {"pads": [1, 0, 1, 2]},
        {"dilations": [2, 1]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"output_shape": [17, 17], "strides": [2, 2]},
    ],
    ids=str,
)
def test_after_conv_transpose(attributes: dict[str, Any], group: int, bias: bool) -> None:
    net = Net()
    biases = [net.random(6)] if bias else []
    y = net.add("ConvTranspose", image(net, 4), net.random(4, 6 // group, 3, 3), *biases, group=group, **attributes)
    net.batch_norm(y, 6, to="y")
    net.output("y", ["N", 6, None, None])
    assert operators(folded(net.model())) == ["ConvTranspose"]


@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_after_convolution_of_any_rank(op: str, rank: int) -> None:
    net = Net()
    y = net.add(op, image(net, 4, 6, rank=rank), net.random(4, 4, *[3] * (rank - 2)))
    net.batch_norm(y, 4, to="y")
    net.output("y", ["N", 4, *[None] * (rank - 2)])
    assert operators(folded(net.model())) == [op]


@pytest.mark.parametrize("epsilon", [None, 0.0, 1e-5, 0.5])
def test_epsilon(epsilon: float | None) -> None:
    net = Net()
    attributes = {} if epsilon is None else {"epsilon": epsilon}
    net.batch_norm(net.conv(image(net), 3, 4), 4, to="y", momentum=0.1, **attributes)
    net.output("y", ["N", 4, 8, 8])
    assert operators(folded(net.model())) == ["Conv"]


@pytest.mark.parametrize("opset", [7, 8, 9, 13, 14, 15, 21])
def test_opsets(opset: int) -> None:
    net = Net(opset)
    attributes: dict[str, Any] = {"spatial": 1} if opset < 9 else {"training_mode": 0} if opset >= 14 else {}
    net.batch_norm(net.conv(image(net), 3, 4), 4, to="y", **attributes)
    net.output("y", ["N", 4, 8, 8])
    assert operators(folded(net.model())) == ["Conv"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-5), (F16, 1e-2)])
def test_types(dtype: int, tolerance: float) -> None:
    net = Net(dtype=dtype)
    y = net.batch_norm(net.conv(image(net), 3, 4), 4)
    net.add("Mul", y, net.random(4, 1, 1), to="y")
    net.output("y", ["N", 4, 8, 8])
    result = folded(net.model(), tolerance)
    assert operators(result) == ["Conv"]
    assert {t.dtype for t in result.graph.nodes[0].inputs[1:]} == {onnx.helper.tensor_dtype_to_np_dtype(dtype)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-14), (BF16, 2e-2)])
def test_types_without_a_kernel(dtype: int, tolerance: float) -> None:
    """onnxruntime has no Conv of these types: the folded weights are held against the formula."""
    net = Net(22, dtype=dtype)
    net.batch_norm(net.conv(image(net), 3, 4, bias=True), 4, to="y", epsilon=0.01)
    net.output("y", ["N", 4, 8, 8])
    model = net.model()
    stored = [numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer]
    bias, weight, gamma, beta, mean, variance = stored
    (conv,) = FoldBatchNorm()(from_proto(model)).graph.nodes
    scale = gamma / np.sqrt(variance + np.float32(0.01))
    for tensor, exact in (
        (conv.inputs[1], weight * scale[:, None, None, None]),
        (conv.inputs[2], (bias - mean) * scale + beta),
    ):
        value = constant_value(tensor)
        assert value is not None
        assert value.dtype == onnx.helper.tensor_dtype_to_np_dtype(dtype)
        np.testing.assert_allclose(value.astype(np.float64), exact, rtol=tolerance, atol=tolerance)


# ---- arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant_first", [False, True])
@pytest.mark.parametrize("op", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1), (4, 1, 1), (1, 4, 1, 1)], ids=str)
def test_arithmetic_after_conv(shape: tuple[int, ...], op: str, constant_first: bool) -> None:
    net = Net()
    y, constant = net.conv(image(net), 3, 4), net.floats(net.rng.uniform(0.5, 2.0, shape))
    net.add(op, *((constant, y) if constant_first else (y, constant)), to="y")
    net.output("y", ["N", 4, 8, 8])
    if op == "Div" and constant_first:  # 1/x is not affine: not even a candidate
        result = FoldBatchNorm()(from_proto(net.model()))
        assert not result.report.changed
        assert not result.report.refusals
        return
    assert operators(folded(net.model())) == ["Conv"]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((8,), "varies along more than the 4 channels"),
        ((4, 8, 1), "varies along more than the 4 channels"),
        ((3, 1, 1, 1), "varies along more than the 4 channels"),
        ((1, 1, 4, 1, 1), "may raise the rank"),
    ],
    ids=str,
)
def test_arithmetic_that_is_not_by_channel(shape: tuple[int, ...], reason: str) -> None:
    net = Net()
    y = net.add("Add", net.conv(image(net, batch=3), 3, 4), net.random(*shape), to="y")
    net.output(y, [None] * max(4, len(shape)))
    result = folded(net.model())
    assert not result.report.changed
    assert reason in reasons(result)["n1_Add"]


def test_constant_of_another_size_than_one_channel() -> None:
    """A single channel that a constant of four broadcasts to four."""
    net = Net()
    net.add("Mul", net.conv(image(net), 3, 1), net.random(4, 1, 1), to="y")
    net.output("y", ["N", 4, 8, 8])
    assert not folded(net.model()).report.changed


def test_chain_ends_in_the_name_of_its_last_tensor() -> None:
    result = folded(BY_NAME["conv_affine_chain"].build())
    (conv,) = result.graph.nodes
    assert [t.name for t in conv.outputs] == ["y"]
    assert conv.name == "n0_Conv"
    assert [c.node for c in result.report.changes] == ["n1_BatchNormalization", "n2_Mul", "n3_Add", "n4_Sub", "n5_Div"]


def test_chain_is_folded_up_to_the_first_refusal() -> None:
    net = Net()
    y = net.batch_norm(net.conv(image(net), 3, 4), 4)
    y = net.add("Mul", y, net.floats(0.5), to="half")
    net.add("Add", y, net.random(8, 8), to="y")
    net.output("y", ["N", 4, 8, 8])
    result = folded(net.model())
    assert operators(result) == ["Conv", "Add"]
    assert result.graph.nodes[0].outputs[0].name == "half"
    assert "varies" in reasons(result)["n3_Add"]


def test_zero_scale_and_dead_channels() -> None:
    assert operators(folded(BY_NAME["weak_channels"].build())) == ["Conv", "Relu"]


def test_names_of_weights_survive() -> None:
    net = Net()
    weight, bias = net.random(4, 3, 3, 3, name="w"), net.random(4, name="b")
    net.batch_norm(net.add("Conv", image(net), weight, bias), 4, to="y")
    net.output("y", ["N", 4, 6, 6])
    (conv,) = folded(net.model()).graph.nodes
    assert [t.name for t in conv.inputs] == ["x", "w", "b"]


def test_shared_bias_gets_a_copy() -> None:
    net = Net()
    bias = net.random(3, name="bias")
    x = net.batch_norm(net.add("Conv", image(net), net.random(3, 3, 1, 1), bias), 3)
    net.add("Conv", x, net.random(3, 3, 1, 1), bias, to="y")
    net.output("y", ["N", 3, 8, 8])
    result = folded(net.model())
    assert operators(result) == ["Conv", "Conv"]
    assert result.graph.nodes[0].inputs[2].name != "bias" == result.graph.nodes[1].inputs[2].name


def test_weight_from_a_constant_node() -> None:
    net = Net()
    value = net.rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    weight = net.add("Constant", value=numpy_helper.from_array(value))
    net.batch_norm(net.add("Conv", image(net), weight), 4, to="y")
    net.output("y", ["N", 4, 6, 6])
    result = folded(net.model())
    assert operators(result) == ["Conv"]
    assert result.graph.nodes[0].inputs[1].name == weight


# ---- Gemm and MatMul ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, (), (1,), (4,), (1, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 3.0), (2.0, 0.0)])
def test_after_gemm(alpha: float, beta: float, trans_a: int, trans_b: int, bias: tuple[int, ...] | None) -> None:
    net = Net(13)
    x = net.input("x", [5, 3] if trans_a else [3, 5])
    biases = [] if bias is None else [net.floats(net.rng.standard_normal(bias))]
    weight = net.random(4, 5) if trans_b else net.random(5, 4)
    y = net.add("Gemm", x, weight, *biases, alpha=alpha, beta=beta, transA=trans_a, transB=trans_b)
    y = net.add("Mul", net.batch_norm(y, 4), net.random(4))
    net.add("Sub", net.random(1, 4), y, to="y")
    net.output("y", [3, 4])
    assert operators(folded(net.model())) == ["Gemm"]


@pytest.mark.parametrize("bias", [None, (1,), (4,), (1, 4), (3, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 3.0), (2.0, 0.0)])
def test_before_gemm(alpha: float, beta: float, trans_b: int, shift: bool, bias: tuple[int, ...] | None) -> None:
    net = Net(13)
    x = net.add("Relu", net.input("x", [3, 5]))
    x = net.add("Mul", x, net.random(5))
    if shift:
        x = net.batch_norm(x, 5)
    biases = [] if bias is None else [net.floats(net.rng.standard_normal(bias))]
    weight = net.random(4, 5) if trans_b else net.random(5, 4)
    net.add("Gemm", x, weight, *biases, alpha=alpha, beta=beta, transB=trans_b, to="y")
    net.output("y", [3, 4])
    result = folded(net.model())
    if shift and bias is not None and len(bias) == 2 and bias[0] == 3:
        assert "varies by row" in reasons(result)["n2_BatchNormalization"]
    else:
        assert operators(result) == ["Relu", "Gemm"]


def test_before_transposed_gemm() -> None:
    net = Net(13)
    x = net.add("Mul", net.input("x", [5, 3]), net.random(5, 1))
    net.add("Gemm", x, net.random(5, 4), transA=1, to="y")
    net.output("y", [3, 4])
    assert operators(folded(net.model())) == ["Gemm"]
    net = Net(13)
    x = net.batch_norm(net.input("x", [5, 3]), 3)  # its channels are the rows of the product
    net.add("Gemm", x, net.random(5, 4), transA=1, to="y")
    net.output("y", [3, 4])
    assert "axis 1" in reasons(folded(net.model()))["n0_BatchNormalization"]


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_after_matmul(rank: int) -> None:
    net = Net()
    shape = ["N", 3, 5][-rank:] if rank < 4 else ["N", 2, 3, 5]
    y = net.add("MatMul", net.input("x", shape), net.random(5, 4))
    y = net.add("Add", net.add("Mul", y, net.random(4)), net.random(4))
    net.add("Mul", y, net.floats(3.0), to="y")
    net.output("y", [*shape[:-1], 4])
    assert operators(folded(net.model())) == ["MatMul", "Add"]


def test_batch_norm_after_matmul() -> None:
    assert operators(folded(BY_NAME["matmul_bn"].build())) == ["MatMul", "Add", "Tanh", "MatMul"]
    assert operators(folded(BY_NAME["matmul_left"].build())) == ["MatMul", "Add", "Relu"]
    net = Net()
    y = net.add("MatMul", net.input("x", ["N", 3, 5]), net.random(5, 4))
    net.batch_norm(y, 3, to="y")  # axis 1 is not what the weight makes
    net.output("y", ["N", 3, 4])
    assert "axis 1" in reasons(folded(net.model()))["n1_BatchNormalization"]


def test_before_matmul() -> None:
    net = Net()
    x = net.add("Mul", net.add("Relu", net.input("x", ["N", 5])), net.random(5))
    x = net.add("Relu", net.add("MatMul", x, net.random(5, 4)))
    net.add("MatMul", net.batch_norm(x, 4), net.random(4, 3), to="y")
    net.output("y", ["N", 3])
    result = folded(net.model())
    assert operators(result) == ["Relu", "MatMul", "Relu", "MatMul", "Add"]
    assert result.graph.nodes[-1].outputs[0].name == "y"


@pytest.mark.parametrize("place", ["after", "before"])
def test_single_add_at_a_matmul_stays(place: str) -> None:
    net = Net()
    x = net.add("Relu", net.input("x", ["N", 5]))
    if place == "after":
        net.add("Add", net.add("MatMul", x, net.random(5, 4)), net.random(4), to="y")
    else:
        net.add("MatMul", net.add("Add", x, net.random(5)), net.random(5, 4), to="y")
    net.output("y", ["N", 4])
    result = folded(net.model())
    assert not result.report.changed
    assert not result.report.refusals


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 4)])
def test_matmul_whose_output_a_constant_widens(shape: tuple[int, ...]) -> None:
    net = Net()
    net.add("Mul", net.add("MatMul", net.input("x", [5]), net.random(5, 4)), net.random(*shape), to="y")
    net.output("y", list(shape))
    assert not folded(net.model()).report.changed


# ---- before a convolution ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(
    ("kernel", "attributes", "folds"),
    [
        ((3, 3), {"pads": [0, 0, 0, 0]}, True),
        ((3, 3), {}, True),
        ((3, 3), {"auto_pad": "VALID", "strides": [2, 2]}, True),
        ((3, 3), {"dilations": [2, 2]}, True),
        ((1, 1), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, True),
        ((1, 1), {"pads": [0, 0, 0, 0]}, True),
        ((1, 1), {"pads": [1, 1, 1, 1]}, False),
        ((3, 3), {"pads": [0, 0, 1, 0]}, False),
        ((3, 3), {"auto_pad": "SAME_UPPER"}, False),
        ((3, 3), {"auto_pad": "SAME_LOWER"}, False),
    ],
    ids=str,
)
def test_before_conv(kernel: tuple[int, int], attributes: dict[str, Any], folds: bool, group: int, bias: bool) -> None:
    net = Net()
    x = net.batch_norm(net.add("Relu", image(net, 4)), 4)
    biases = [net.random(8)] if bias else []
    net.add("Conv", x, net.random(8, 4 // group, *kernel), *biases, group=group, to="y", **attributes)
    net.output("y", ["N", 8, None, None])
    result = folded(net.model())
    assert (operators(result) == ["Relu", "Conv"]) == folds
    if not folds:
        assert "pads with zeros" in reasons(result)["n1_BatchNormalization"]


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("group", [1, 2])
def test_scale_before_padding(op: str, group: int) -> None:
    net = Net()
    x = net.add("Div", net.add("Relu", image(net, 4)), net.floats(net.rng.uniform(1, 2, (4, 1, 1))))
    weight = net.random(6, 4 // group, 3, 3) if op == "Conv" else net.random(4, 6 // group, 3, 3)
    net.add(op, x, weight, group=group, pads=[1, 1, 1, 1], to="y")
    net.output("y", ["N", 6, None, None])
    assert operators(folded(net.model())) == ["Relu", op]


def test_shift_before_conv_transpose() -> None:
    net = Net()
    x = net.batch_norm(net.add("Relu", image(net, 4)), 4)
    net.add("ConvTranspose", x, net.random(4, 6, 3, 3), to="y")
    net.output("y", ["N", 6, 10, 10])
    assert "overlaps unevenly" in reasons(folded(net.model()))["n1_BatchNormalization"]


def test_chain_before_conv_stops_at_padding() -> None:
    net = Net()
    x = net.add("Sub", net.add("Relu", image(net)), net.random(3, 1, 1))
    x = net.add("Div", x, net.floats(2.0))
    net.conv(x, 3, 4, to="y")
    net.output("y", ["N", 4, 8, 8])
    result = folded(net.model())
    assert operators(result) == ["Relu", "Sub", "Conv"]
    assert "pads with zeros" in reasons(result)["n1_Sub"]


def test_constant_that_widens_the_input() -> None:
    """One grey channel that the constant makes three of: the convolution cannot read the grey image."""
    net = Net()
    x = net.add("Mul", net.add("Relu", image(net, 1)), net.random(3, 1, 1))
    net.conv(x, 3, 4, to="y")
    net.output("y", ["N", 4, 8, 8])
    assert "enlarges" in reasons(folded(net.model()))["n1_Mul"]


def test_between_two_convolutions_the_first_one_takes_it() -> None:
    net = Net()
    x = net.batch_norm(net.conv(image(net), 3, 4), 4)
    net.conv(x, 4, 2, to="y")
    net.output("y", ["N", 2, 8, 8])
    result = folded(net.model())
    assert operators(result) == ["Conv", "Conv"]
    assert "before it" in result.report.changes[0].detail


# ---- refusals ----------------------------------------------------------------------------------------------------


def refused(net: Net, output: str = "y") -> str:
    result = FoldBatchNorm()(from_proto(net.model()))
    assert not result.report.changed
    (refusal,) = result.report.refusals
    assert refusal.node.endswith("BatchNormalization")
    return refusal.reason


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (3, np.nan, "variance is not finite"),
        (3, np.inf, "variance is not finite"),
        (3, -0.5, "variance is negative"),
        (0, np.nan, "scale is not finite"),
        (2, np.inf, "mean is not finite"),
    ],
)
def test_unsound_statistics(position: int, value: float, reason: str) -> None:
    net = Net()
    net.batch_norm(net.conv(image(net), 3, 4), 4, to="y")
    net.output("y", ["N", 4, 8, 8])
    tensor = net.initializers[-4 + position]
    values = numpy_helper.to_array(tensor).copy()
    values[1] = value
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    assert reason in refused(net)


def test_variance_and_epsilon_zero() -> None:
    net = Net()
    y = net.conv(image(net), 3, 4)
    net.add("BatchNormalization", y, *[net.floats(np.zeros(4)) for _ in range(4)], to="y", epsilon=0.0)
    net.output("y", ["N", 4, 8, 8])
    assert "both zero" in refused(net)


def test_spatial_attribute() -> None:
    net = Net(7)
    y = net.conv(image(net), 3, 4)
    parameters = [net.floats(np.ones((4, 8, 8))) for _ in range(4)]
    net.add("BatchNormalization", y, *parameters, to="y", spatial=0)
    net.output("y", ["N", 4, 8, 8])
    assert "spatial is 0" in refused(net)


@pytest.mark.parametrize("is_test", [0, 1])
def test_opset_6(is_test: int) -> None:
    net = Net(6)
    net.batch_norm(net.conv(image(net), 3, 4), 4, to="y", is_test=is_test)
    net.output("y", ["N", 4, 8, 8])
    result = FoldBatchNorm()(from_proto(net.model()))
    assert operators(result) == (["Conv"] if is_test else ["Conv", "BatchNormalization"])


def test_opset_6_arithmetic_is_left_alone() -> None:
    net = Net(6)
    net.add("Mul", net.conv(image(net), 3, 4), net.random(4), to="y", broadcast=1, axis=1)
    net.output("y", ["N", 4, 8, 8])
    assert not FoldBatchNorm()(from_proto(net.model())).report.changed


@pytest.mark.parametrize(
    ("hazard", "node", "reason"),
    [
        ("training_bn", "n1_BatchNormalization", "training mode"),
        ("bn_statistics", "n1_BatchNormalization", "in use"),
        ("shared_weight", "n1_BatchNormalization", "'shared' of Conv n0_Conv is shared with n2_Conv"),
        ("weight_shared_with_branch", "n1_BatchNormalization", "is shared with"),
        ("overridable_initializer", "n1_BatchNormalization", "no constant but an input"),
        ("output_in_the_middle", "n1_BatchNormalization", "'features' in between is a graph output"),
        ("pre_activation", "n1_BatchNormalization", "in between is read 2 times"),
        ("existing_qdq", "n4_Mul", "is quantised"),
        ("custom_domain", "n2_BatchNormalization", "reads the output of Mystery"),
        ("gemm_a1.0_b0.5_11_3x4", "n1_BatchNormalization", "varies by row"),
    ],
)
def test_refused_with_the_reason(hazard: str, node: str, reason: str) -> None:
    result = FoldBatchNorm()(from_proto(BY_NAME[hazard].build()))
    assert reason in reasons(result)[node]


def test_parameter_that_is_no_constant() -> None:
    net = Net()
    scale = net.input("scale", [4])
    y = net.conv(image(net), 3, 4)
    net.add("BatchNormalization", y, scale, *[net.floats(np.ones(4)) for _ in range(3)], to="y")
    net.output("y", ["N", 4, 8, 8])
    assert "scale 'scale' is no constant" in refused(net)


def test_tensor_that_a_branch_reads() -> None:
    """The intermediate tensor has one reader in its own graph and one in a nested graph."""
    net = Net()
    y = net.add("Conv", image(net), net.random(4, 3, 1, 1), to="between")
    net.batch_norm(y, 4, to="y")
    branches = []
    for name in ("then", "else"):
        inner = Net()
        inner.add("Relu", "between", to=name)
        inner.output(name, ["N", 4, 8, 8])
        branches.append(inner.body(name))
    net.add("If", net.input("condition", [], 9), to="z", then_branch=branches[0], else_branch=branches[1])
    net.output("y", ["N", 4, 8, 8])
    net.output("z", ["N", 4, 8, 8])
    assert "read 3 times" in refused(net)


@pytest.mark.parametrize(("scale", "reason"), [(1e6, "overflows float16"), (1e-8, "underflows float16")])
def test_result_that_the_type_cannot_hold(scale: float, reason: str) -> None:
    net = Net(dtype=F16)
    y = net.add("Conv", image(net), net.floats(np.ones((4, 3, 1, 1))))
    for factor in (scale**0.5, scale**0.5):
        y = net.add("Mul", y, net.floats(factor))
    net.add("Relu", y, to="y")
    net.output("y", ["N", 4, 8, 8])
    result = FoldBatchNorm()(from_proto(net.model()))
    assert not result.report.changed
    assert reason in reasons(result)["n1_Mul"]


def test_division_by_zero() -> None:
    net = Net()
    net.add("Div", net.conv(image(net), 3, 4), net.floats(0.0), to="y")
    net.output("y", ["N", 4, 8, 8])
    assert "divides by zero" in reasons(FoldBatchNorm()(from_proto(net.model())))["n1_Div"]


# ---- nested graphs and size --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hazard", ["if_branches", "loop_body", "scan_body"])
def test_folds_inside_bodies(hazard: str) -> None:
    model = BY_NAME[hazard].build()
    result = folded(model)
    assert "BatchNormalization" not in operators(result)
    if hazard == "scan_body":
        assert "Mul" not in operators(result)


def test_linear_in_graph_size() -> None:
    """20,000 nodes, and one constant that 5,000 of them read."""
    net = Net()
    x, half = net.input("x", ["N", 2, 2, 2]), net.floats(0.5)
    for _ in range(5000):
        x = net.add("Relu", net.add("Mul", net.batch_norm(net.conv(x, 2, 2, (1, 1)), 2), half))
    net.add("Relu", x, to="y")
    net.output("y", ["N", 2, 2, 2])
    graph = from_proto(net.model())
    start = time.perf_counter()
    result = FoldBatchNorm()(graph)
    assert time.perf_counter() - start < 30  # 3 s on an idle machine
    assert result.report.after.operators == {"Conv": 5000, "Relu": 5001}


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["Mul", "Add", "Sub", "Div", "rsub", "bn"]),
            st.sampled_from([(), (1,), (4, 1, 1), (1, 4, 1, 1)]),
        ),
        min_size=1,
        max_size=6,
    ),
    op=st.sampled_from(["Conv", "ConvTranspose"]),
    seed=st.integers(0, 1000),
)
def test_any_chain(steps: list[tuple[str, tuple[int, ...]]], op: str, seed: int) -> None:
    net = Net(seed=seed)
    y = net.add(op, image(net, 4, 5), net.random(4, 2, 3, 3), group=2)
    for kind, shape in steps:
        constant = net.floats(net.rng.uniform(0.5, 2.0, shape) * net.rng.choice([-1, 1]))
        if kind == "bn":
            y = net.batch_norm(y, 4)
        elif kind == "rsub":
            y = net.add("Sub", constant, y)
        else:
            y = net.add(kind, y, constant)
    net.add("Identity", y, to="y")
    net.output("y", ["N", 4, None, None])
    assert operators(folded(net.model(), 2e-5)) == [op, "Identity"]
