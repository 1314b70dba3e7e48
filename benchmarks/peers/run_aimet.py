"""AIMET: its simulation at the defaults, BatchNormalization folded first as its guide has it, int8 weights written."""

from __future__ import annotations

import onnx
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from aimet_onnx.quantsim import QuantizationSimModel
from driver import Job, main


def defaults(job: Job) -> None:
    """Calibrate, and write the standard operators."""
    model = onnx.load(job.model)
    fold_all_batch_norms_to_weight(model)
    simulation = QuantizationSimModel(model, dummy_input=next(job.batches()), providers=["CPUExecutionProvider"])
    simulation.compute_encodings(job.batches())
    onnx.save(simulation.to_onnx_qdq(prequantize_constants=True), job.output)


if __name__ == "__main__":
    main("aimet-onnx", {"defaults": defaults})
