"""Cross-layer equalisation: scale channels so that one scale per tensor costs less, without changing the network.

::

    W1, b1 -> Relu -> W2      W1 / s, b1 / s -> Relu -> W2 * s

One activation scale has to serve all channels of a tensor, so a channel with small values loses resolution. Weights
have a scale per output channel and room to spare. Dividing a channel by ``s`` where it is made and multiplying where it
is read moves resolution from weights to activations. Residual streams are scaled as a whole, through Add, Concat,
channel Pad and Slice; LayerNormalization takes scales as SmoothQuant does.

``s = (r / max r) ** strength`` with ``r`` the largest magnitude of the channel on calibration data. Strength 0.5, the
default, leaves every channel but the largest some headroom: at 1 each of them ends where calibration ended, and on
samples that calibration did not see they overflow, all the more the fewer samples there were. Four times the room is
enough, though: a channel that would keep more, being less than a sixteenth of the largest, is scaled until it keeps
four times. Tensors that have to be scaled together are a group; one whose noise is predicted to grow at its readers is
left alone::

    activations   step_t^2 / 12 * sum_i (s_i * |w_i|)^2              step_t = max_i (r_i / s_i) / 255
    weights       step_o^2 / 12 * sum_i E[x_i^2] / s_i^2 * taps      step_o = max_i (s_i * |w_oi|) / 127

A channel behind ReLU6 keeps its bound exact for the values that calibration saw.

Where nothing can take the scales in, and matrix products alone read a float tensor as integers, a multiplication is
inserted in front of them (``insert``): behind LayerNormalization with a residual stream, and behind Gelu. See
:mod:`onnxcompress.quantization.inserted_scales`.

Sources: M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019;
G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from onnxcompress.base import Change, Context, Guarantee, Pass, Refusal
from onnxcompress.graph import Graph
from onnxcompress.quantization.channel_scales import ChannelScales, Reader
from onnxcompress.quantization.channel_statistics import ChannelStatistics, channel_statistics
from onnxcompress.quantization.inserted_scales import find_borders, insert_scales
from onnxcompress.shapes import infer_shapes
from onnxcompress.targets import get_target

__all__ = ["EqualizeLayers"]

#: a channel is magnified at most by the inverse of this, for what is hardly ever active says little about its range
_FLOOR = 0.001
#: how many times a channel may grow on samples that calibration did not see, at strength 0.5: smaller channels than
#: this leaves room for are magnified further
_HEADROOM = 4.0


class EqualizeLayers(Pass):
    """Scale channels between layers so that their activations quantise better."""

    name: ClassVar[str] = "equalize_layers"

    strength: float = Field(0.5, ge=0, le=1, description="0 leaves all as it is, 1 makes the ranges of channels equal")
    insert: bool = Field(
        True, description="Multiply by a constant in front of matrix products where no neighbour can take the scales in"
    )

    @property
    def guarantee(self) -> Guarantee:
        """Exact in real numbers, but a ReLU6 then cuts at the largest value that calibration saw."""
        return Guarantee.APPROXIMATE

    @property
    def needs_data(self) -> bool:
        """The ranges of channels come from samples."""
        return True

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal]:
        """Measure channels, find groups, rewrite the weights."""
        assert context.data is not None
        types = infer_shapes(graph)
        scales = ChannelScales(graph, types)
        watched = _watched(graph, scales)
        borders = find_borders(graph, get_target(context.target), types) if self.insert else []
        borders = [border for border in borders if border.tensor.name not in watched]
        axes = {name: (scales.tensors[name].axis, len(types[name].shape or ())) for name in watched}
        axes |= {border.tensor.name: (border.axis, border.rank) for border in borders}
        if not axes:
            return
        statistics = channel_statistics(graph, axes, context.data, threads=context.threads, progress=context.progress)
        chosen = np.ones(scales.count)
        makers = {tensor.name: node.name for node in graph.nodes for tensor in node.outputs}
        for group in _groups(scales, {name: statistics[name] for name in watched}):
            gain = group.gain(self.strength)
            if gain > 0:
                chosen[group.roots] = group.scales(self.strength)
                yield Change(
                    "equalised", makers[group.first], f"{len(group.roots)} channels, {gain:.1f} dB less noise predicted"
                )
            else:
                yield Refusal(makers[group.first], "equalising its channels would make their readers' weights noisier")
        for node in scales.divide(chosen):
            yield Change("scaled", node.name, f"weights of {node.op}")
        for node, gain in insert_scales(graph, borders, statistics):
            yield Change("inserted", node.name, f"Mul ahead of matrix products, {gain:.1f} dB less noise predicted")


def _watched(graph: Graph, scales: ChannelScales) -> list[str]:
    """Tensors with free channels that a labelled weight reads, or that meet one on the way: all of a free label."""
    read = np.zeros(scales.count, bool)
    for reader in scales.readers:
        read[scales.representatives(reader.labels)] = True
    names = []
    for node in graph.nodes:
        for tensor in node.outputs:
            channels = scales.tensors.get(tensor.name)
            if channels is None or node.op in ("Reshape", "Flatten", "Slice", "Pad", "MaxPool", "Concat", "Identity"):
                continue  # the same values as the input's
            followed = len(tensor.outputs) == 1 and tensor.outputs[0].op in ("Relu", "Clip")
            roots = scales.representatives(channels.labels)
            if not followed and (scales.free[roots] & read[roots]).any():
                names.append(tensor.name)
    return names


@dataclass
class _Group:
    """Tensors whose channels are scaled together, and the weights that read them."""

    first: str  # name of the first tensor
    roots: NDArray[np.int64]  # free representatives, sorted
    tensors: list[tuple[NDArray[np.int64], NDArray[np.float64]]]  # (representative, largest magnitude) per channel
    readers: list[tuple[Reader, NDArray[np.int64]]]
    relative: NDArray[np.float64]  # per root, largest magnitude relative to the tensor's
    largest: NDArray[np.float64]
    power: NDArray[np.float64]  # per label, mean square
    limits: NDArray[np.float64]

    def scales(self, strength: float) -> NDArray[np.float64]:
        """One scale per root."""
        relative = np.maximum(self.relative, _FLOOR)
        scale: NDArray[np.float64] = relative**strength
        if strength > 0:  # a channel keeps no more headroom than it needs
            scale = np.minimum(scale, relative * _HEADROOM ** min(0.5 / strength, 50.0))
        bounded = np.isfinite(self.limits)
        # behind min(x, 6) a channel may be magnified until its largest value meets the bound, and never shrunk
        scale[bounded] = np.clip(scale[bounded], np.minimum(self.largest[bounded] / self.limits[bounded], 1), 1)
        return scale

    def gain(self, strength: float) -> float:
        """Predicted noise before over after, in dB."""
        before, after = self._noise(np.ones(len(self.roots))), self._noise(self.scales(strength))
        return float(10 * np.log10(before / after)) if before > 0 and after > 0 else 0.0

    def _noise(self, scale: NDArray[np.float64]) -> float:
        everywhere = np.ones(len(self.power))
        everywhere[self.roots] = scale
        gain = np.zeros(len(self.power))
        noise = 0.0
        for reader, roots in self.readers:
            scaled = np.abs(reader.weight())
            groups, _, channels, taps = scaled.shape
            scaled *= everywhere[roots].reshape(groups, 1, channels, 1)
            np.add.at(gain, roots, np.square(scaled).sum(axis=(1, 3)).ravel())
            steps = scaled.max(axis=(2, 3)) / 127
            power = (self.power[roots] / np.square(everywhere[roots])).reshape(groups, channels).sum(axis=1) * taps
            noise += float((np.square(steps).sum(axis=1) * power).sum()) / 12
        for roots, magnitude in self.tensors:
            step = (magnitude / everywhere[roots]).max() / 255
            noise += float(step * step / 12 * gain[roots].sum())
        return noise


def _groups(scales: ChannelScales, statistics: dict[str, ChannelStatistics]) -> list[_Group]:
    """Connected sets of tensors: those that share a free representative label."""
    roots = {name: scales.representatives(scales.tensors[name].labels) for name in statistics}
    parent: dict[int, int] = {}

    def find(label: int) -> int:
        parent.setdefault(label, label)
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    for labels in roots.values():
        free = labels[scales.free[labels]]
        for label in free:
            parent[find(int(label))] = find(int(free[0]))
    members: dict[int, list[str]] = defaultdict(list)
    for name, labels in roots.items():
        free = labels[scales.free[labels]]
        members[find(int(free[0]))].append(name)

    relative, largest, power = np.zeros(scales.count), np.zeros(scales.count), np.zeros(scales.count)
    for name, labels in roots.items():
        magnitude = statistics[name].magnitude
        np.maximum.at(largest, labels, magnitude)
        np.maximum.at(relative, labels, magnitude / max(float(magnitude.max()), np.finfo(np.float64).tiny))
        np.maximum.at(power, labels, statistics[name].mean_square)
    readers: dict[int, list[tuple[Reader, NDArray[np.int64]]]] = defaultdict(list)
    for reader in scales.readers:
        labels = scales.representatives(reader.labels)
        for key in {find(int(label)) for label in labels if scales.free[label] and int(label) in parent}:
            readers[key].append((reader, labels))
    groups = []
    for key, names in members.items():
        own = np.unique(np.concatenate([roots[name] for name in names]))
        own = own[scales.free[own]]
        groups.append(
            _Group(
                names[0],
                own,
                [(roots[name], statistics[name].magnitude) for name in names],
                readers[key],
                relative[own],
                largest[own],
                power,
                scales.limits[own],
            )
        )
    return groups
