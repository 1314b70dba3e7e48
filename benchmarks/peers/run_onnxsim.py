"""onnxsim's quantisers at their defaults; they want the calibration data as a list."""

from __future__ import annotations

import onnx
import onnxsim
from driver import Job, main


def static(job: Job) -> None:
    """QDQ around convolutions and matrix products."""
    onnx.save(onnxsim.quantize_static(str(job.model), list(job.batches())), job.output)


def full_graph(job: Job) -> None:
    """QDQ around everything that it can quantise."""
    onnx.save(onnxsim.quantize_static(str(job.model), list(job.batches()), full_graph=True), job.output)


def dynamic(job: Job) -> None:
    """Ranges of activations are taken while the model runs."""
    onnx.save(onnxsim.quantize_dynamic(str(job.model)), job.output)


if __name__ == "__main__":
    main("onnxsim", {"defaults": static, "full_graph": full_graph, "dynamic": dynamic})
