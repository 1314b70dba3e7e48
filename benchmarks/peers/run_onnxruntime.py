"""ONNX Runtime's own quantiser, each file prepared by ``quant_pre_process`` as its documentation says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from driver import Job, Reader, main
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


def prepared(job: Job) -> str:
    """The model with its shapes inferred and its graph optimised; its symbolic inference gives up on some models."""
    output: Path = job.folder / "prepared.onnx"
    try:
        quant_pre_process(str(job.model), str(output))
    except Exception as error:  # it raises no other
        if "Incomplete symbolic shape inference" not in str(error):
            raise
        quant_pre_process(str(job.model), str(output), skip_symbolic_shape=True)
    return str(output)


def static(job: Job, **options: Any) -> None:
    """QDQ at the options given and the defaults for the rest."""
    quantize_static(prepared(job), str(job.output), Reader(job), **options)


def unsigned(job: Job, method: CalibrationMethod) -> None:
    """Uint8 activations and int8 weights per channel: the form that x86 with VNNI runs fast."""
    static(
        job,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=method,
    )


def dynamic(job: Job) -> None:
    """Ranges of activations are taken while the model runs; int8 weights per channel."""
    quantize_dynamic(prepared(job), str(job.output), per_channel=True, weight_type=QuantType.QInt8)


if __name__ == "__main__":
    main(
        "onnxruntime",
        {
            "min_max": partial(unsigned, method=CalibrationMethod.MinMax),
            "percentile": partial(unsigned, method=CalibrationMethod.Percentile),
            "entropy": partial(unsigned, method=CalibrationMethod.Entropy),
            "defaults": static,
            "dynamic": dynamic,
        },
    )
