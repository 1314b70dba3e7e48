"""The demo: a small residual network that reads handwritten digits, with the data to calibrate and judge it.

The model and the data come with the package, so that nothing is downloaded. ``benchmarks/train_demo.py`` made both;
README.md in this folder gives the source and the licence of the digits.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["demo_calibration", "demo_evaluation", "demo_model_path", "enlarge_digits"]

#: side of the images that the model reads, in pixels
_SIDE = 32
#: darkest value of the original images, which count the inked ones among 4 x 4 pixels
_MAXIMUM = 16


def demo_model_path() -> Path:
    """The demo's model: ``input`` (N, 1, 32, 32) float32 in 0..1 to ``logits`` (N, 10); BatchNorm is not folded."""
    return _file("digits_cnn.onnx")


def demo_calibration() -> dict[str, NDArray[Any]]:
    """Images to calibrate with, without labels: {"input": (512, 1, 32, 32) float32}.

    They are a part of the images that the model was trained on.
    """
    with np.load(_file("digits.npz"), allow_pickle=False) as data:
        return {"input": enlarge_digits(data["calibration_images"])}


def demo_evaluation() -> dict[str, NDArray[Any]]:
    """Images that the model never saw, with labels: {"input": (600, 1, 32, 32) float32, "labels": (600,) int64}."""
    with np.load(_file("digits.npz"), allow_pickle=False) as data:
        return {
            "input": enlarge_digits(data["evaluation_images"]),
            "labels": data["evaluation_labels"].astype(np.int64),
        }


def enlarge_digits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images as the model reads them: (N, 8, 8) with values 0..16 to (N, 1, 32, 32) float32 with values 0..1.

    Bilinear, with pixel centres at half coordinates and the border repeated.
    """
    small = images.shape[-1]
    centre = (np.arange(_SIDE) + 0.5) * small / _SIDE - 0.5
    left = np.floor(centre)
    weights = np.zeros((_SIDE, small))
    for side, share in ((left, left + 1 - centre), (left + 1, centre - left)):
        np.add.at(weights, (np.arange(_SIDE), np.clip(side, 0, small - 1).astype(np.int64)), share)
    # einsum, not matmul: the sum over eight pixels is then the same on every machine
    large: NDArray[np.float64] = np.einsum("yi,nij,xj->nyx", weights, images / _MAXIMUM, weights)
    return large[:, np.newaxis].astype(np.float32)


def _file(name: str) -> Path:
    return Path(str(resources.files(__name__).joinpath(name)))
