"""NNCF on an ONNX file, at its defaults; a transformer is named as such, which its documentation asks for."""

from __future__ import annotations

import nncf
import onnx
from driver import Job, main


def defaults(job: Job) -> None:
    """Post-training quantisation on all of the calibration data."""
    batches = list(job.batches())
    options = {"model_type": nncf.ModelType.TRANSFORMER} if job.transformer else {}
    quantised = nncf.quantize(onnx.load(job.model), nncf.Dataset(batches), subset_size=len(batches), **options)
    onnx.save(quantised, job.output)


if __name__ == "__main__":
    main("nncf", {"defaults": defaults})
