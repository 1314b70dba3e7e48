"""NVIDIA Model Optimizer on an ONNX file, at its defaults, calibrated on the CPU."""

from __future__ import annotations

from driver import Job, Reader, main
from modelopt.onnx.quantization import quantize


def defaults(job: Job) -> None:
    """INT8; what stays float is left in 32 bits, since the CPU has no 16-bit kernels."""
    quantize(
        str(job.model),
        quantize_mode="int8",
        calibration_data_reader=Reader(job),
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(job.output),
    )


if __name__ == "__main__":
    main("nvidia-modelopt", {"defaults": defaults})
