from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnxcompress.quantization.affine import (
    MAX_BIAS,
    QParams,
    QuantScheme,
    Range,
    activation_qparams,
    dequantize,
    fake_quantize,
    quantize,
    weight_qparams,
)
from onnxcompress.session import Session

UINT8 = QuantScheme("uint8", symmetric=False)
INT8 = QuantScheme("int8", symmetric=True)
FLOATS = st.floats(-1e4, 1e4, width=32)


def runtime(values: NDArray[Any], params: QParams) -> tuple[NDArray[Any], NDArray[Any]]:
    """QuantizeLinear and DequantizeLinear of onnxruntime."""
    axis = {} if params.axis is None else {"axis": params.axis}
    kind = helper.np_dtype_to_tensor_dtype(params.zero_point.dtype)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **axis),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **axis),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, values.shape)],
        [
            helper.make_tensor_value_info("q", kind, values.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, values.shape),
        ],
        [onnx.numpy_helper.from_array(params.scale, "s"), onnx.numpy_helper.from_array(params.zero_point, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    outputs = Session(model, optimization="disabled", threads=1).run({"x": values})
    return outputs["q"], outputs["y"]


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=6), elements=FLOATS), st.booleans())
def test_numpy_equals_the_runtime(values: NDArray[Any], weights: bool) -> None:
    if weights:
        params = weight_qparams(values, INT8, axis=0)
    else:
        params = activation_qparams(Range(float(values.min()), float(values.max())), UINT8)
    integers, floats = runtime(values, params)
    np.testing.assert_array_equal(quantize(values, params), integers)
    np.testing.assert_array_equal(dequantize(integers, params), floats)


@given(FLOATS, FLOATS)
def test_zero_is_exact_and_the_range_is_covered(first: float, second: float) -> None:
    low, high = sorted((first, second))
    params = activation_qparams(Range(low, high), UINT8)
    assert fake_quantize(np.zeros(1, np.float32), params)[0] == 0
    if high - low > 1e-3:
        ends = np.array([low, high], np.float32)
        assert np.abs(fake_quantize(ends, params) - ends).max() <= float(params.scale) * 0.501


@given(st.floats(0, 1e4, width=32), st.floats(0, 1e4, width=32))
def test_no_negative_values_give_zero_point_zero(first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert int(activation_qparams(Range(low, high), UINT8).zero_point) == 0


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-45, 3e38])
def test_degenerate_ranges_give_a_usable_scale(value: float) -> None:
    params = activation_qparams(Range(min(value, 0.0), max(value, 0.0)), UINT8)
    assert np.isfinite(params.scale) and params.scale > 0
    assert np.isfinite(fake_quantize(np.array([value], np.float32), params)).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_large_tables_are_quantised_in_parts(
    axis: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    weight = rng.standard_normal((7, 5)).astype(np.float32)
    params = weight_qparams(weight, INT8, axis)
    whole = quantize(weight, params)
    for elements in (1, 12, 35):
        monkeypatch.setattr("onnxcompress.quantization.affine._AT_ONCE", elements)
        np.testing.assert_array_equal(quantize(weight, params), whole)


def test_weights_are_symmetric_and_leave_minus_128_out(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(6, 4, 3, 3)).astype(np.float32)
    params = weight_qparams(weight, INT8, axis=0)
    integers = quantize(weight, params)
    assert integers.min() >= -127 and params.scale.shape == (6,) and not params.zero_point.any()
    assert (np.abs(integers).reshape(6, -1).max(1) == 127).all()


def test_a_near_zero_channel_does_not_overflow_its_bias(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(3, 4)).astype(np.float32)
    weight[1] *= 1e-12
    weight[2] = 0
    bias = np.array([0.5, 30.0, -4.0], np.float32)
    params = weight_qparams(weight, INT8, axis=0, bias=bias, input_scale=0.01)
    stored = bias.astype(np.float64) / (0.01 * params.scale.astype(np.float64))
    assert np.abs(stored).max() <= MAX_BIAS * 1.001
    assert np.isfinite(params.scale).all() and (params.scale > 0).all()
    assert params.scale[0] == np.float32(np.abs(weight[0]).max() / 127)


@pytest.mark.parametrize(
    ("scheme", "limits"), [(UINT8, (0, 255)), (INT8, (-127, 127)), (QuantScheme("int8", True, 7), (-63, 63))]
)
def test_limits(scheme: QuantScheme, limits: tuple[int, int]) -> None:
    assert scheme.limits == limits
