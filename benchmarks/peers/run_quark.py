"""AMD Quark: a preset of the same form as ours, and its default for the kind of network."""

from __future__ import annotations

from driver import Job, Reader, main
from quark.onnx import ModelQuantizer
from quark.onnx.quantization.config import Config, get_default_config


def preset(job: Job, name: str) -> None:
    """Quantise by the preset ``name``."""
    ModelQuantizer(Config(global_quant_config=get_default_config(name))).quantize_model(
        str(job.model), str(job.output), Reader(job)
    )


def unsigned(job: Job) -> None:
    """Uint8 activations, int8 weights."""
    preset(job, "U8S8_AAWS")


def default(job: Job) -> None:
    """What it recommends to those who do not choose."""
    preset(job, "INT8_TRANSFORMER_DEFAULT" if job.transformer else "INT8_CNN_DEFAULT")


if __name__ == "__main__":
    main("amd-quark", {"U8S8_AAWS": unsigned, "default": default})
