"""AIMET: its simulation at the defaults, written as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import onnx
from aimet_onnx.quantsim import QuantizationSimModel
from driver import Job, main


def defaults(job: Job) -> None:
    """Calibrate, and write the standard operators."""
    model = onnx.load(job.model)
    dummy = next(job.batches())
    simulation = QuantizationSimModel(model, dummy_input=dummy, providers=["CPUExecutionProvider"])
    simulation.compute_encodings(job.batches())
    onnx.save(simulation.to_onnx_qdq(), job.output)


if __name__ == "__main__":
    main("aimet-onnx", {"defaults": defaults})
