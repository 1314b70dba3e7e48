"""Networks that integers ruin, or slow down, in known places; for tests of the search for layers."""

from __future__ import annotations

import numpy as np
import onnx
from models import Net, image
from numpy.typing import NDArray

__all__ = ["LAYERS", "SPOILED", "ruined_everywhere", "samples", "spoiled", "wobbly"]

#: convolutions of :func:`spoiled`
LAYERS = 8
#: those between which one channel is a few thousand times as large as the others
SPOILED = ("conv3", "conv4")
_CHANNELS = 8


def samples(count: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Inputs of all networks here."""
    return {"x": np.random.default_rng(seed).standard_normal((count, 3, 12, 12)).astype(np.float32)}


def spoiled(tensors: tuple[int, ...] = (3,), factor: float = 5000.0) -> onnx.ModelProto:
    """A chain of convolutions, each with Relu, that ends in class scores.

    Behind the convolutions ``tensors`` one channel is ``factor`` times as large, and the next layer divides it again:
    in floats it makes no difference, in 8 bits nothing is left of the other channels. The convolutions are called
    conv0 to conv7.
    """
    net = Net(seed=5)
    x = image(net, 3, 12)
    for layer in range(LAYERS):
        inputs = 3 if layer == 0 else _CHANNELS
        weight = net.rng.standard_normal((_CHANNELS, inputs, 3, 3)) * np.sqrt(2 / (9 * inputs))
        if layer in tensors:
            weight[0] *= factor
        if layer - 1 in tensors:
            weight[:, 0] /= factor
        # A positive bias: no channel is off for all samples.
        bias = np.full(_CHANNELS, 0.2) * np.where((np.arange(_CHANNELS) == 0) & (layer in tensors), factor, 1.0)
        x = net.add("Conv", x, net.floats(weight), net.floats(bias), pads=[1, 1, 1, 1])
        net.nodes[-1].name = f"conv{layer}"
        x = net.add("Relu", x)
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    net.add("Gemm", x, net.floats(net.rng.standard_normal((_CHANNELS, 6))), to="y")
    net.nodes[-1].name = "head"
    net.output("y", ["N", 6])
    return net.model()


def ruined_everywhere() -> onnx.ModelProto:
    """Every tensor between two layers is spoiled."""
    return spoiled(tuple(range(LAYERS - 1)))


def wobbly() -> onnx.ModelProto:
    """Convolutions between HardSwish, which has no integer form: many small integer regions."""
    net = Net(seed=7)
    x = image(net, 3, 12)
    for layer in range(4):
        x = net.add("HardSwish", net.conv(x, 3 if layer == 0 else _CHANNELS, _CHANNELS, bias=True))
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    net.add("Gemm", x, net.random(_CHANNELS, 6), to="y")
    net.output("y", ["N", 6])
    return net.model()
