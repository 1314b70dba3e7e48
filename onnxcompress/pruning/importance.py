"""Which channels of a coupling group to remove first, and what each removal costs.

A criterion answers with a removal order and the error after each removal, so that groups can be compared and one budget
be shared out among all of them (:mod:`onnxcompress.pruning.allocation`):

- ``l1``, ``l2``: norm of the weights that make a channel (Li et al., "Pruning Filters for Efficient ConvNets", 2017)
- ``fpgm``: distance of a channel's weights to those of all others (He et al., "Filter Pruning via Geometric
  Median", 2019)
- ``batch_norm``: scale of the BatchNormalization that a channel goes through, read before it is folded (Liu et al.,
  "Network Slimming", 2017)
- ``activation``: norm of the weights that read a channel times the size of what they read (Sun et al., "A Simple and
  Effective Pruning Approach for Large Language Models", 2024)
- ``random``
- ``obs``: what the readers' outputs lose when everything that is left makes up for the channel as well as it can. It is
  removed whose loss is smallest, then the next one for what is left: backward elimination on the inverse of the Gram
  matrix of the readers' inputs, over all readers of the group at once (Hassibi & Stork, "Optimal Brain Surgeon", 1993;
  Frantar & Alistarh, "Optimal Brain Compression", 2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.base import Progress, SilentProgress
from onnxcompress.graph import Graph, attribute, constant_value
from onnxcompress.lockstep import Advance
from onnxcompress.patches import Moments
from onnxcompress.pruning.coupling import CouplingGroup
from onnxcompress.pruning.mixing import MixingLayer, wanted_rows

__all__ = [
    "LEVELS",
    "Combine",
    "Criterion",
    "Readers",
    "Removal",
    "batch_norm_scales",
    "eliminate",
    "random_order",
    "removal_by_scores",
    "scores",
    "weight_axis",
]

Array = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Criterion = Literal["obs", "l1", "l2", "fpgm", "batch_norm", "activation", "random"]
Combine = Literal["mean", "sum", "max"]

#: ridge of the Gram matrix, relative to the mean input power
_RIDGE = 1e-3
#: one of this many remaining channels is removed at a time, at least one
_AT_ONCE = 48
#: shares of a group at which the weights that make up for the removed channels are kept, for probing
LEVELS = (0.25, 0.5, 0.75)


@dataclass(frozen=True, eq=False)
class Removal:
    """The order in which the channels of a group go, and the error after each of them.

    ``error[k]`` is what is lost when ``order[:k + 1]`` are gone, as a share of the whole: of the squared outputs of the
    group's readers (``obs``), or of the sum of all scores. ``mended`` holds, for some numbers of removed channels,
    weights and biases of each reader that make up for them.
    """

    group: str
    order: Ints
    error: Floats
    mended: Mapping[int, Sequence[tuple[MixingLayer, Floats, Floats]]] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Channels of the group."""
        return len(self.order)

    def kept(self, removed: int) -> Ints:
        """What is left, sorted, when the first ``removed`` channels of the order are gone."""
        return np.sort(self.order[removed:])


# ----------------------------------------------------------------------------------------------------------------------
# Scores of single channels


def batch_norm_scales(graph: Graph) -> dict[str, Array]:
    """|scale| of every BatchNormalization of ``graph`` by the name of its output, which folding keeps."""
    found = {}
    for node in graph.nodes:
        value = constant_value(node.inputs[1]) if node.op == "BatchNormalization" and len(node.inputs) > 1 else None
        if value is not None:
            found[str(node.outputs[0].name)] = np.abs(value).reshape(-1)
    return found


def scores(
    group: CouplingGroup,
    graph: Graph,
    criterion: Criterion,
    *,
    combine: Combine = "mean",
    scales: Mapping[str, Array] | None = None,
    power: Mapping[str, Floats] | None = None,
) -> Floats | None:
    """One score a channel, ``[channels]``, of a criterion that looks at each by itself; higher is more important.

    None where the graph does not have what the criterion asks for.

    Args:
        group: the group.
        graph: the graph it is a group of.
        criterion: ``l1``, ``l2``, ``fpgm``, ``batch_norm`` or ``activation``.
        combine: how the scores of several nodes become one.
        scales: for ``batch_norm``, :func:`batch_norm_scales` of the graph before folding.
        power: for ``activation``, mean square at each position of the readers' inputs, by tensor name.
    """
    found: list[Floats] = []
    if criterion == "batch_norm":
        for member in group.members:
            values = (scales or {}).get(member.tensor)
            if values is not None and len(values) == len(member.channel_of):
                found.append(_by_channel(values.astype(np.float64), member.channel_of, group.channels))
    else:
        wanted = set(group.consumers if criterion == "activation" else group.producers)
        for node in graph.nodes:
            if node.name in wanted:
                found.extend(_node_scores(node, group, criterion, power or {}))
    if not found:
        return None
    stacked = np.stack([values / max(float(values.mean()), 1e-300) for values in found])
    if combine == "max":
        return np.asarray(stacked.max(axis=0))
    return np.asarray(stacked.sum(axis=0) / (len(stacked) if combine == "mean" else 1))


def _node_scores(
    node: gs.Node, group: CouplingGroup, criterion: Criterion, power: Mapping[str, Floats]
) -> Iterable[Floats]:
    index = next((i for i, t in enumerate(node.inputs[:2]) if constant_value(t) is not None), None)
    if index is None:
        return
    name = str(node.inputs[index].name)
    weight = constant_value(node.inputs[index])
    assert weight is not None
    reading = criterion == "activation"
    axis = weight_axis(node, weight.ndim, reading=reading)
    for member in group.members:
        if member.tensor != name or member.axis != axis or len(member.channel_of) != weight.shape[axis]:
            continue
        rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64)
        if reading:
            known = power.get(str(node.inputs[1 - index].name))
            if known is None or len(known) != len(rows):
                return
            yield _by_channel(np.linalg.norm(rows, axis=1) * np.sqrt(known), member.channel_of, group.channels)
        elif criterion == "l1":
            yield _by_channel(np.abs(rows).sum(axis=1), member.channel_of, group.channels)
        elif criterion == "l2":
            yield np.sqrt(_by_channel(np.square(rows).sum(axis=1), member.channel_of, group.channels))
        else:
            yield _distances(rows, member.channel_of, group.channels)


def weight_axis(node: gs.Node, rank: int, *, reading: bool) -> int:
    """The axis of a node's weight that counts what it makes, or with ``reading`` what it reads (within a group)."""
    if node.op == "Conv":
        return 1 if reading else 0
    if node.op == "ConvTranspose":
        return 0 if reading else 1
    if node.op == "Gemm":
        return 1 if bool(attribute(node, "transB", 0)) == reading else 0
    return rank - 2 if reading else rank - 1


def _by_channel(values: Floats, channel_of: Ints, channels: int) -> Floats:
    """Sums of ``values`` over the positions of each channel."""
    known = channel_of >= 0
    return np.asarray(np.bincount(channel_of[known], values[known], channels), np.float64)


def _distances(rows: Floats, channel_of: Ints, channels: int) -> Floats:
    """Sum of the distances of each channel's weights to those of all others."""
    order = np.argsort(channel_of, kind="stable")
    order = order[channel_of[order] >= 0]
    if len(order) % channels:
        return np.zeros(channels)
    flat = rows[order].reshape(channels, -1)
    squares = np.square(flat).sum(axis=1)
    between = squares[:, None] + squares[None, :] - 2 * (flat @ flat.T)
    distances: Floats = np.sqrt(np.maximum(between, 0.0)).sum(axis=1)
    return distances


def removal_by_scores(group: CouplingGroup, values: Floats) -> Removal:
    """Lowest score first; the error is the share of all scores that is gone."""
    order = np.argsort(values, kind="stable")
    total = float(values.sum())
    lost = np.cumsum(values[order]) / total if total > 0 else np.arange(1, len(order) + 1) / len(order)
    return Removal(group.name, order, lost)


def random_order(group: CouplingGroup, generator: np.random.Generator) -> Removal:
    """Channels in random order, each as good as any other."""
    order = generator.permutation(group.channels)
    return Removal(group.name, order, np.arange(1, group.channels + 1) / group.channels)


# ----------------------------------------------------------------------------------------------------------------------
# Block OBS


@dataclass(eq=False)
class Readers:
    """Gram matrices of the inputs of layers, taken in one run of ``graph`` over batches that stay in memory.

    ::

        for layer, moments in Readers(graph, layers, feeds, seed=0).run(): ...

    ``graph`` is run to the end in pieces; nothing is changed. A reader's Gram matrix can be dropped by the caller as
    soon as the groups that it reads are done.
    """

    graph: Graph
    layers: Sequence[MixingLayer]
    feeds: Sequence[Mapping[str, Array]]
    seed: int = 0
    threads: int = 0
    progress: Progress = field(default_factory=SilentProgress)

    def run(self) -> Iterable[tuple[MixingLayer, Moments]]:
        """Each layer in order with the moments of its input; they hold no aim."""
        schedule = [[layer.data, str(layer.output.name)] for layer in self.layers]
        samples = sum(max((v.shape[0] for v in given.values() if v.ndim), default=1) for given in self.feeds)
        advance = Advance(self.graph, self.feeds, schedule, optimization="all", threads=self.threads)
        described = self.progress.track(self.layers, "reading activations", len(self.layers))
        for number, layer in enumerate(described):
            generator = np.random.default_rng([self.seed, number])
            weight = layer.filters().astype(np.float32)
            # Without filters there is no residual to sum up: only the inputs are of interest.
            moments = Moments(weight[:, :0], np.zeros((len(weight), 0), np.float32))
            many = wanted_rows(weight.shape[2]) / max(samples, 1)
            chosen: dict[tuple[int, ...], Ints] = {}
            for values in advance.step():
                output = values[str(layer.output.name)]
                if output.shape not in chosen:
                    count = layer.positions(output)
                    share = many if layer.axis == 1 else many * output.shape[0]
                    places = np.arange(count)
                    if share < count:
                        places = np.sort(generator.choice(count, max(1, int(np.ceil(share))), replace=False))
                    chosen[output.shape] = places
                sizes = output.shape[2:] if layer.axis == 1 else ()
                columns = layer.columns(values[layer.data], sizes, chosen[output.shape])
                moments.add(columns, np.empty((len(weight), 0, columns.shape[2]), np.float32))
            yield layer, moments


@dataclass(eq=False)
class _Part:
    """One matrix product that reads the group: inverse Gram matrix, weights, and the columns of each channel."""

    layer: int
    index: int
    inverse: Floats
    weights: Floats
    columns: list[Ints]
    scale: float


def channel_columns(layer: MixingLayer, channel_of: Ints, channels: int) -> list[list[Ints]]:
    """For each of the layer's matrix products (groups of a Conv) the columns of each channel."""
    groups = layer.groups
    taps = prod(layer.kernel)
    per_group = len(channel_of) // groups
    found = []
    for group in range(groups):
        own = channel_of[group * per_group : (group + 1) * per_group]
        found.append(
            [
                (np.flatnonzero(own == channel)[:, None] * taps + np.arange(taps)).reshape(-1)
                for channel in range(channels)
            ]
        )
    return found


def eliminate(
    group: CouplingGroup, readers: Sequence[tuple[MixingLayer, Moments, Ints]], *, levels: Sequence[float] = LEVELS
) -> Removal:
    """Block-OBS order of ``group``: backward elimination over all its readers at once.

    Args:
        group: the group.
        readers: each layer that reads it, the moments of its input, and the channel of each position of the input.
        levels: shares of removed channels at which mended weights are kept.
    """
    parts: list[_Part] = []
    for number, (layer, moments, channel_of) in enumerate(readers):
        gram, _ = moments.normal_equations(centred=layer.bias_node is not None)
        filters = layer.filters()
        signal = max(float(np.einsum("gij,gjk,gik->", filters, gram, filters, optimize=True)), 1e-300)
        columns = channel_columns(layer, channel_of, group.channels)
        for index in range(len(gram)):
            if not any(len(c) for c in columns[index]):
                continue
            width = len(gram[index])
            power = np.trace(gram[index]) / width
            inverse = np.linalg.inv(gram[index] + _RIDGE * (power if power > 0 else 1.0) * np.eye(width))
            parts.append(_Part(number, index, inverse, filters[index].copy(), columns[index], 1 / signal))
    return _eliminate(group, readers, parts, levels)


def _eliminate(
    group: CouplingGroup,
    readers: Sequence[tuple[MixingLayer, Moments, Ints]],
    parts: Sequence[_Part],
    levels: Sequence[float],
) -> Removal:
    channels = group.channels
    alive = np.ones(channels, bool)
    order: list[int] = []
    errors: list[float] = []
    total = 0.0
    marks = {max(1, int(channels * level)) for level in levels}
    mended: dict[int, Sequence[tuple[MixingLayer, Floats, Floats]]] = {}
    while alive.any():
        left = np.flatnonzero(alive)
        losses = np.zeros(len(left))
        for part in parts:
            losses += part.scale * _losses(part, left)
        next_mark = min((m for m in marks if m > len(order)), default=channels)
        many = min(max(1, len(left) // _AT_ONCE), next_mark - len(order))
        chosen = left[np.argsort(losses, kind="stable")[:many]]
        for part in parts:
            _remove(part, np.concatenate([part.columns[c] for c in chosen]))
        loss = losses[np.argsort(losses, kind="stable")[:many]]
        for channel, value in zip(chosen, loss, strict=True):
            total += max(float(value), 0.0)
            order.append(int(channel))
            errors.append(total)
        alive[chosen] = False
        if len(order) in marks:
            mended[len(order)] = _mended(readers, parts)
    return Removal(group.name, np.array(order, np.int64), np.array(errors) / max(len(readers), 1), mended)


def _losses(part: _Part, left: Ints) -> Floats:
    """What the outputs of one product lose by each of the channels ``left``."""
    losses = np.zeros(len(left))
    widths = np.array([len(part.columns[c]) for c in left])
    for width in np.unique(widths[widths > 0]):
        places = np.flatnonzero(widths == width)
        columns = np.stack([part.columns[c] for c in left[places]])
        if width == 1:
            flat = columns[:, 0]
            losses[places] = np.square(part.weights[:, flat]).sum(axis=0) / part.inverse[flat, flat]
            continue
        blocks = part.inverse[columns[:, :, None], columns[:, None, :]]
        weights = part.weights[:, columns].transpose(1, 2, 0)
        losses[places] = (weights * np.linalg.solve(blocks, weights)).sum(axis=(1, 2))
    return losses


def _remove(part: _Part, columns: Ints) -> None:
    """Remove ``columns``, and let the others make up for them as well as they can."""
    if not len(columns):
        return
    rows = part.inverse[columns]
    spread = np.linalg.solve(rows[:, columns], rows)
    part.weights -= part.weights[:, columns] @ spread
    part.inverse -= rows.T @ spread
    part.weights[:, columns] = 0.0
    part.inverse[columns] = 0.0
    part.inverse[:, columns] = 0.0
    part.inverse[columns, columns] = 1.0


def _mended(
    readers: Sequence[tuple[MixingLayer, Moments, Ints]], parts: Sequence[_Part]
) -> list[tuple[MixingLayer, Floats, Floats]]:
    """Weights and bias of every reader as they are now."""
    found = []
    for number, (layer, moments, _) in enumerate(readers):
        original, bias = layer.filters(), layer.bias()
        weights = original.copy()
        for part in parts:
            if part.layer == number:
                weights[part.index] = part.weights
        if layer.bias_node is not None:
            mean = moments.inputs / moments.count
            bias = bias + np.einsum("gij,gj->gi", original - weights, mean)
        found.append((layer, weights, bias))
    return found
