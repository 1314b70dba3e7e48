"""OpenVINO on x86: uint8 activations and symmetric int8 weights per channel.

OpenVINO reads each QuantizeLinear, DequantizeLinear pair as one FakeQuantize, and its low-precision transformations
then move the dequantisation behind whatever runs on integers. They do not see through operators that are written on
8-bit tensors, so data movement stays in floats, between pairs of equal parameters.

What has an integer form is listed in OpenVINO's documentation of the low-precision transformations. Functions such as
Sigmoid are not in it. The fusion audit does not apply: it optimises as ONNX Runtime does.
"""

from __future__ import annotations

from dataclasses import replace

from onnxcompress.targets.base import Costs
from onnxcompress.targets.cpu import CPU

__all__ = ["OPENVINO"]

_NO_FORM = ("Sigmoid", "LeakyRelu", "Where")

OPENVINO = replace(
    CPU,
    name="openvino",
    description="OpenVINO: uint8 activations, int8 per-channel weights, Q/DQ pairs around everything",
    # What ONNX Runtime's kernels lose is not lost here.
    rules={op: replace(rule, gain=max(rule.gain, 0.1)) for op, rule in CPU.rules.items() if op not in _NO_FORM},
    costs=Costs(),
    float_reasons={
        **{op: reason.replace("the runtime", "OpenVINO") for op, reason in CPU.float_reasons.items()},
        **{op: f"OpenVINO's low-precision transformations have no {op}" for op in _NO_FORM},
    },
    movement="qdq",
    audited=False,
)
