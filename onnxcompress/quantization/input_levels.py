"""Images are 8-bit: put the levels of the input's quantiser onto the levels that its values come in.

A picture has 256 levels a channel, and normalising it, ``(x / 255 - mean) / std``, leaves as many; but a quantiser that
takes its scale from the range of all channels has its levels elsewhere, and rounds every pixel. In a small network that
is the largest of all rounding errors. On its own levels the input loses nothing::

    x = step_c * (first_c + i)              i = 0, 1, ..., 255 the pixel, c the channel

    x -> Conv(W, b)                         x -> Mul(f_c) -> Add(o_c) -> Conv(W / f_c, b - sum of W / f_c * o_c)

with ``f_c`` and ``o_c`` such that all channels have one step and one zero point. What a Conv pads with would then have
to be ``o_c``, other for each channel. So where it pads, the offsets are not taken from the bias: one more channel,
``u`` inside of the image and 0 in the padding, with the weights ``-sum over c of W_c / f_c * o_c / u``, takes them off
where there is an image. A Pad appends it. Once quantised, Mul and Add are gone: a QuantizeLinear with a scale and a
zero point of each channel's own writes the very same integers, and Pad works on these
(:mod:`onnxcompress.quantization.qdq`).

Levels are found in the data, so nothing has to be told about the preprocessing; where values are not on any (resized
as floats, augmented), there are none and nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    constant_value,
    copy_graph,
    graph_output_ids,
    normal_domain,
    set_constant,
)
from onnxcompress.quantization.affine import LevelRange, Range
from onnxcompress.session import Session

if TYPE_CHECKING:
    from onnxcompress.data import Dataset

__all__ = [
    "Affine",
    "Aligned",
    "LevelCounter",
    "Levels",
    "Picture",
    "affine",
    "align_inputs",
    "find_pictures",
    "plain_range",
]

Floats = NDArray[np.float64]

#: levels of a quantiser, and most that a channel of 8-bit pixels has
_LEVELS = 256
#: a channel with fewer levels is no picture: a mask, or a constant
_FEWEST = 32
#: how far from its level a value may lie, in steps: float32 arithmetic is some thousand times more exact
_TOLERANCE = 0.02
#: values a channel that levels are first looked for in
_FIRST_VALUES = 1 << 17
#: scales that are tried, relative to the smallest that holds all values
_STRETCHES = np.linspace(1.0, 1.1, 51)
#: what is left of the usual noise where the channels as they are count as lying on the quantiser's levels
_WORTH = 0.3
#: what may lie between a graph input and the convolutions: pixels stay on levels
_NORMALISING = frozenset(
    {"Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Squeeze", "Sub", "Transpose", "Unsqueeze"}
)
#: more channels are no picture
_MOST_CHANNELS = 16


@dataclass(frozen=True)
class Levels:
    """The values that a channel takes: ``step * (first + i)`` for i = 0, 1, ... with ``counts[i]`` of them.

    ``first`` is not an integer where 0 is not among the levels.
    """

    step: float
    first: float
    counts: NDArray[np.int64]

    @property
    def values(self) -> Floats:
        """One value a level, in units of the step."""
        return np.arange(len(self.counts), dtype=np.float64) + self.first


class LevelCounter:
    """Counts how often a channel takes which level, batch by batch; gives up where it has none."""

    def __init__(self) -> None:
        self._step = 0.0
        self._start = 0.0  # a value on a level
        self._counts = np.zeros(2 * _LEVELS + 1, np.int64)  # of levels from -256 to 256, 0 being the start
        self.failed = False

    def update(self, values: NDArray[np.float32]) -> None:
        """Take in more values of the channel, of any shape."""
        if self.failed:
            return
        flat = values.reshape(-1).astype(np.float64)
        if self._step == 0.0 and not self._find(flat[:_FIRST_VALUES]):
            self.failed = True
            return
        places = (flat - self._start) / self._step
        levels = np.rint(places)
        if not np.all(np.abs(places - levels) <= _TOLERANCE):  # also where one is NaN
            self.failed = True
            return
        shifted = levels.astype(np.int64) + _LEVELS
        if len(shifted) and not 0 <= shifted.min() <= shifted.max() <= 2 * _LEVELS:
            self.failed = True
            return
        self._counts += np.bincount(shifted, minlength=len(self._counts))

    def _find(self, values: Floats) -> bool:
        """The step between levels: the smallest difference, made exact by the largest."""
        distinct = np.unique(values)
        if len(distinct) < _FEWEST or not np.isfinite(distinct).all():
            return False
        differences = np.diff(distinct)
        # the same level, reached by different roundings of float32, is no difference
        apart = differences[differences > 1e-5 * (distinct[-1] - distinct[0])]
        if not len(apart):
            return False
        span = distinct[-1] - distinct[0]
        count = round(span / apart.min())
        if not 0 < count < _LEVELS:
            return False
        self._step, self._start = float(span / count), float(distinct[0])
        return True

    def result(self) -> Levels | None:
        """The levels; None where the values lie on none."""
        seen = np.flatnonzero(self._counts)
        if self.failed or len(seen) < _FEWEST or seen[-1] - seen[0] >= _LEVELS:
            return None
        first = int(seen[0]) - _LEVELS
        return Levels(self._step, self._start / self._step + first, self._counts[seen[0] : seen[-1] + 1].copy())


def plain_range(channels: Sequence[Levels], weights: Floats) -> tuple[Range, float]:
    """The range of one quantiser for all of ``channels`` as they are, and its noise relative to the usual one.

    The usual scale is the range of all channels, with rounding errors evenly spread.

    Args:
        channels: the levels of each channel.
        weights: how much an error of each channel counts, such as the energy of the weights that read it.
    """
    values = [levels.values * levels.step for levels in channels]
    low = min(0.0, *(float(v[0]) for v in values))
    high = max(0.0, *(float(v[-1]) for v in values))
    usual = (high - low) / (_LEVELS - 1)
    best, least = Range(low, high), np.inf
    for scale in (*sorted({levels.step for levels in channels}), *(usual * _STRETCHES).tolist()):
        zero = round(-low / scale)
        if round(high / scale) + zero > _LEVELS - 1:
            continue
        noise = 0.0
        for v, levels, weight in zip(values, channels, weights, strict=True):
            place = v / scale
            error = np.rint(place) * scale - v
            error[np.abs(place - np.floor(place) - 0.5) < _TOLERANCE] = scale / 2  # rounded up or down by chance
            noise += float(weight * np.average(np.square(error), weights=levels.counts))
        if noise < least:
            best, least = Range(-zero * scale, (_LEVELS - 1 - zero) * scale), noise
    return best, least / (float(weights.sum()) * usual**2 / 12)


@dataclass(frozen=True)
class Affine:
    """``x * factors + offsets``, channel by channel, whose values in ``range`` lie on the 256 levels of a quantiser."""

    factors: Floats
    offsets: Floats
    range: Range


def affine(channels: Sequence[Levels]) -> Affine:
    """What puts all of ``channels`` onto the same levels, with 0 close to what 0 was."""
    scale = max(levels.step for levels in channels)
    # Where not all 256 levels were seen, the others may be on either side.
    start = [levels.first - (_LEVELS - len(levels.counts)) // 2 for levels in channels]
    zero = int(np.clip(round(-sum(start) / len(start)), 0, _LEVELS - 1))
    factors = np.array([scale / levels.step for levels in channels])
    offsets = np.array([-(first + zero) * scale for first in start])
    return Affine(factors, offsets, LevelRange(-zero * scale, (_LEVELS - 1 - zero) * scale))


# ----------------------------------------------------------------------------------------------------------------------
# In a graph


@dataclass
class Picture:
    """A tensor of ``channels`` channels that may hold pixels, and the convolutions that are all its readers."""

    tensor: gs.Tensor
    readers: list[gs.Node]
    channels: int


def find_pictures(graph: Graph) -> list[Picture]:
    """Tensors that come from an input by normalising alone, and that only convolutions with own weights read."""
    outputs = graph_output_ids(graph)
    near = {id(tensor) for tensor in graph.inputs}
    found: dict[int, Picture] = {}
    refused: set[int] = set()
    for node in graph.nodes:  # in topological order
        data = [tensor for tensor in node.inputs if constant_value(tensor) is None and tensor.name]
        if len(data) == 1 and id(data[0]) in near and node.op in _NORMALISING and normal_domain(node) == "":
            near.update(id(tensor) for tensor in node.outputs)
        for tensor in data:
            if id(tensor) not in near or id(tensor) in outputs:
                continue
            channels = _channels(node, tensor)
            if channels is None:
                refused.add(id(tensor))
            else:
                found.setdefault(id(tensor), Picture(tensor, [], channels)).readers.append(node)
    return [picture for key, picture in found.items() if key not in refused and picture.channels <= _MOST_CHANNELS]


@dataclass(frozen=True)
class Aligned:
    """What became of a picture: the tensor to be quantised, what was done or why nothing, and its range.

    ``nodes`` were inserted and are to stay float.
    """

    picture: Picture
    tensor: str
    detail: str
    range: Range | None = None
    nodes: tuple[str, ...] = ()


def align_inputs(graph: Graph, pictures: Sequence[Picture], data: Dataset, *, threads: int = 0) -> Iterator[Aligned]:
    """Put ``pictures`` onto their levels.

    Args:
        graph: changed in place; it has to be sorted afterwards.
        pictures: of :func:`find_pictures` on this graph.
        data: calibration samples; read once for each picture, or until its values turn out to lie on no levels.
        threads: intra-op threads where pixels are normalised inside the graph.

    Yields:
        What became of each.
    """
    names = Names(graph)
    for picture in pictures:
        name = str(picture.tensor.name)
        levels = _levels(graph, picture, data, threads)
        if levels is None:
            yield Aligned(picture, name, f"its values lie on no {_LEVELS} levels a channel")
            continue
        plain, noise = plain_range(levels, np.sum([_energy(reader) for reader in picture.readers], axis=0))
        if noise < _WORTH:
            yield Aligned(picture, name, "its scale is the step between its values", plain)
        else:
            found = affine(levels)
            nodes = _insert(graph, picture, found, names)
            detail = f"{', '.join(node.op for node in nodes)} in front put its channels onto one set of levels"
            floats = [node for node in nodes if node.op != "Pad"]
            name = str(floats[-1].outputs[0].name)
            yield Aligned(picture, name, detail, found.range, tuple(node.name for node in floats))


def _channels(node: gs.Node, tensor: gs.Tensor) -> int | None:
    """Channels of ``tensor`` where ``node`` is a convolution of it with a float32 weight of its own."""
    if node.op != "Conv" or normal_domain(node) != "" or attribute(node, "group", 1) != 1:
        return None
    if node.inputs[0] is not tensor or any(other is tensor for other in node.inputs[1:]):
        return None
    weight = constant_value(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or weight.ndim < 3 or len(node.inputs[1].outputs) != 1:
        return None
    if len(node.inputs) > 2 and node.inputs[2].name and constant_value(node.inputs[2]) is None:
        return None
    return int(weight.shape[1])


def _energy(node: gs.Node) -> NDArray[np.float64]:
    """Sum of the squared weights that read each channel."""
    weight = constant_value(node.inputs[1])
    assert weight is not None
    energy: Floats = np.square(weight.astype(np.float64)).sum(axis=(0, *range(2, weight.ndim)))
    return energy


def _levels(graph: Graph, picture: Picture, data: Dataset, threads: int) -> list[Levels] | None:
    """The levels of every channel; None where one has none."""
    counters = [LevelCounter() for _ in range(picture.channels)]
    for values in _values(graph, picture.tensor, data, threads):
        if values.ndim < 3 or values.shape[1] != picture.channels or values.dtype != np.float32:
            return None
        for channel, counter in enumerate(counters):
            counter.update(values[:, channel])
            if counter.failed:
                return None
    found = [counter.result() for counter in counters]
    return None if any(levels is None for levels in found) else [levels for levels in found if levels is not None]


def _values(graph: Graph, tensor: gs.Tensor, data: Dataset, threads: int) -> Iterator[NDArray[Any]]:
    """The values of ``tensor``, batch by batch."""
    if any(tensor is given for given in graph.inputs):
        for batch in data:
            yield batch.feeds[tensor.name]
        return
    twin = copy_graph(graph)
    twin.outputs = [twin.tensors()[tensor.name]]
    session = Session(twin, threads=threads)
    for batch in data:
        yield session.run(batch.feeds, [tensor.name])[tensor.name]


def _insert(graph: Graph, picture: Picture, found: Affine, names: Names) -> list[gs.Node]:
    """Insert Mul, Add and Pad as far as they are needed, and undo in the weights what they do."""
    name = picture.tensor.name
    weights = [constant_value(node.inputs[1]) for node in picture.readers]
    rank = max(weight.ndim for weight in weights if weight is not None)
    shape = (1, -1, *(1,) * (rank - 2))
    factors, offsets = (values.astype(np.float32).reshape(shape) for values in (found.factors, found.offsets))
    made: list[gs.Node] = []

    def append(op: str, label: str, *others: NDArray[Any]) -> None:
        before = made[-1].outputs[0] if made else picture.tensor
        result = gs.Variable(names.free(f"{name}_{label}"), np.dtype(np.float32), None)
        constants = [gs.Constant(names.free(f"{result.name}_by"), other) for other in others]
        made.append(gs.Node(op, names.free(f"{result.name}_{op}"), {}, [before, *constants], [result]))

    if np.allclose(factors, 1, rtol=1e-5, atol=0):
        factors = np.ones_like(factors)
    else:
        append("Mul", "scaled", factors)
    append("Add", "aligned", offsets)
    scaled = [weight.astype(np.float64) / factors for weight in weights if weight is not None]
    away = [np.tensordot(weight, offsets.reshape(-1).astype(np.float64), (1, 0)) for weight in scaled]
    inside = 0.0
    if any(_pads(node) for node in picture.readers):
        inside = _inside(scaled, away, found.range)
        append(
            "Pad", "marked", np.array([0] * (rank + 1) + [1] + [0] * (rank - 2), np.int64), np.array(inside, np.float32)
        )
    graph.nodes.extend(made)
    for node, weight, taken in zip(picture.readers, scaled, away, strict=True):
        node.inputs[0] = made[-1].outputs[0]
        if inside:
            weight = np.concatenate([weight, -taken[:, None] / inside], axis=1)
        set_constant(node, 1, node.inputs[1].name, weight.astype(np.float32))
        has_bias = len(node.inputs) > 2 and bool(node.inputs[2].name)
        if inside and has_bias:
            continue
        bias = constant_value(node.inputs[2]) if has_bias else np.zeros(len(weight))
        assert bias is not None
        old = node.inputs[2].name if has_bias and len(node.inputs[2].outputs) == 1 else None
        shifted = bias if inside else bias - taken.reshape(len(weight), -1).sum(axis=1)
        set_constant(node, 2, old or names.free(f"{node.inputs[1].name}_bias"), shifted.astype(np.float32))
    return made


def _pads(node: gs.Node) -> bool:
    """True unless ``node`` surely pads nothing."""
    rule = attribute(node, "auto_pad", "NOTSET")
    return bool(any(attribute(node, "pads", ()))) if rule == "NOTSET" else rule != "VALID"


def _inside(weights: Sequence[Floats], away: Sequence[Floats], levels: Range) -> float:
    """The value of the marking channel: a level, and the smallest that makes its weights the largest of no filter.

    Its weights are rounded like all others, and what that costs grows with the value.
    """
    step = (levels.high - levels.low) / (_LEVELS - 1)
    need = step
    for weight, taken in zip(weights, away, strict=True):
        axes = tuple(range(1, weight.ndim))
        largest = np.abs(weight).max(axis=axes)
        wanted = np.abs(taken).max(axis=tuple(range(1, taken.ndim)))
        need = max(need, float((wanted[largest > 0] / largest[largest > 0]).max(initial=0.0)))
    most = round(levels.high / step)
    return float(min(int(np.ceil(need / step)), max(most, 1)) * step)
