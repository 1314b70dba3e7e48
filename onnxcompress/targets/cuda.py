"""ONNX Runtime's CUDA execution provider: float16.

It has no integer Conv, Gemm or MatMul kernel: a QDQ model runs QuantizeLinear, DequantizeLinear and the float operator,
one after the other, and is slower than float32. Quantising for it simulates the rounding of INT8 and is good for that
only. Data movement stays in floats, since the provider lacks 8-bit kernels for most of it.
"""

from __future__ import annotations

from dataclasses import replace

from onnxcompress.targets.cpu import CPU

__all__ = ["CUDA"]

CUDA = replace(
    CPU,
    name="cuda",
    description="ONNX Runtime CUDA provider: float16",
    movement="qdq",
    recipe="fp16",
    audited=False,
    int8_note=(
        "the CUDA provider has no integer kernels, so INT8 runs as float operators between conversions, slower than "
        "float16; use --recipe fp16 there, and INT8 only to simulate its accuracy"
    ),
)
