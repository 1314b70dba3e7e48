"""Made-up inputs that a model can run on: types, shapes and index bounds are respected, accuracy means nothing.

Integer inputs are followed forward through operators that only move or cast values to the tables that they index
(Gather, GatherElements, GatherND, Scatter, EmbedLayerNormalization), whose sizes bound them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.data.columns import Column, Rows
from onnxcompress.data.dataset import Chunk, Dataset
from onnxcompress.data.fit import Fitter
from onnxcompress.errors import DataError, UsageError
from onnxcompress.graph import Graph, InputSpec, attribute, constant_value, copy_graph, normal_domain
from onnxcompress.proto import to_proto
from onnxcompress.shapes import TensorType, infer_shapes

__all__ = ["synthetic_data"]

#: size of a free dimension that nothing says anything about, for example a sequence
DEFAULT_SIZE = 16
#: height and width of images, in the order in which they are tried against the graph
IMAGE_SIZES = (224, 32, 28, 64, 128, 256, 299, 384, 512)
#: highest value of an integer input that indexes no table that we know of: it may be a length or a count
UNKNOWN_BOUND = 2


def synthetic_data(
    specs: Sequence[InputSpec],
    *,
    graph: Graph | None = None,
    samples: int = 16,
    batch: int = 1,
    seed: int = 0,
    dynamic: Mapping[str, int] | None = None,
) -> Dataset:
    """Seeded inputs for a model; ``synthetic`` is set on the result, so that a report can say so.

    Floats are standard normal, 8-bit integers cover their range, indices stay below the size of their table, masks are
    ones, token types zeros, positions count up. A symbol has one size in all inputs: the first axis is the batch,
    height and width are what the graph demands (224 where it demands nothing), others 16. A sample depends on the seed
    and its number alone, so that batch sizes make no difference. Optional inputs are left out; a model
    without other inputs gets one sample that feeds nothing.

    Args:
        specs: the model's inputs.
        graph: the model, to find index bounds and demanded sizes in.
        samples: how many samples; rounded up to fill a batch that the model's shapes demand.
        batch: samples a batch; a batch that the model's shapes demand goes first.
        seed: of the generator.
        dynamic: sizes for symbols.

    Raises:
        UsageError: numbers below 1, or ``dynamic`` names a symbol that the inputs do not have.
        DataError: an input of unknown rank or of a type that cannot be made up.
    """
    for name, value in (("samples", samples), ("batch", batch), *(dynamic or {}).items()):
        if value < 1:
            raise UsageError(f"{name} is {value}; expected 1 or more")
    required = [spec for spec in specs if not spec.optional]
    if not required:  # there is one answer, and nothing to feed for it
        return Dataset((Chunk({}, {}, None, 1, ()),), 1, synthetic=True)
    whole = _is_whole(required)
    sizes = _Sizes(required, graph, batch if whole else 1, dynamic or {})
    bounds = _index_bounds(graph) if graph is not None else {}
    values = {
        spec.name: _Values(spec, bounds.get(spec.name), sizes.length, (seed, number))
        for number, spec in enumerate(required)
    }
    fitter = Fitter(specs, feeds=whole)
    if whole:  # one feed is one sample: its first axes are not all the batch
        chunks = [
            fitter.fit({s.name: _Feed(values[s.name], sizes.of(s), number) for s in required}, "synthetic data")
            for number in range(-(-samples // batch))
        ]
        return Dataset(tuple(chunks), None, fixed_batch=fitter.fixed_batch, synthetic=True)
    step = next((spec.shape[0] for spec in required if spec.shape and isinstance(spec.shape[0], int)), 1)
    if step == 0:
        raise DataError(
            "the model takes batches of 0 samples, so it takes no data; export it with a batch of 1 or more"
        )
    count = -(-samples // step) * step
    columns: dict[str, Column] = {}
    for spec in required:
        shape = sizes.of(spec)
        columns[spec.name] = _Samples(values[spec.name], (count, *shape[1:]) if shape else ())
    chunk = fitter.fit(columns, "synthetic data")
    return Dataset((chunk,), batch, fixed_batch=fitter.fixed_batch, synthetic=True)


def _is_whole(specs: Sequence[InputSpec]) -> bool:
    """True where the first axes are not all the batch, as for states ``[layers, batch, size]``."""
    return len({spec.shape[0] if isinstance(spec.shape[0], int) else None for spec in specs if spec.shape}) > 1


# -- values -------------------------------------------------------------------------------------------------------


class _Values:
    """Makes the values of one input, from the seed and the number of the sample alone."""

    def __init__(self, spec: InputSpec, bound: int | None, length: int, seed: tuple[int, int]) -> None:
        self.dtype = spec.dtype
        self._bound, self._length, self._seed = bound, length, seed
        self._name = spec.name.lower()
        if not (spec.dtype.hasobject or spec.dtype.kind in "biufV"):
            raise DataError(f"input {spec.name!r}: values of type {spec.dtype} cannot be made up; give data")

    def make(self, shape: tuple[int, ...], number: int) -> NDArray[Any]:
        """The values of sample ``number``."""
        generator = np.random.default_rng((*self._seed, number))
        if self.dtype.hasobject:
            return np.full(shape, "a", object)
        if "mask" in self._name:
            return np.ones(shape, self.dtype)
        if self.dtype.kind == "b":
            return generator.integers(0, 2, shape).astype(bool)
        if self.dtype.kind not in "iu":
            return generator.standard_normal(shape, np.float32).astype(self.dtype)
        if "token_type" in self._name or "segment" in self._name:
            return np.zeros(shape, self.dtype)
        if "position" in self._name and shape:
            positions = np.arange(shape[-1]) % (self._bound or shape[-1])
            return np.broadcast_to(positions, shape).astype(self.dtype)
        if self._bound == _CONTROL:
            return np.ones(shape, self.dtype)
        if self._bound is not None:
            return generator.integers(0, self._bound, shape).astype(self.dtype)
        if "length" in self._name:
            return np.full(shape, self._length, self.dtype)
        if not shape:
            return np.ones(shape, self.dtype)
        if self.dtype.itemsize == 1:
            limits = np.iinfo(self.dtype)
            return generator.integers(limits.min, limits.max + 1, shape).astype(self.dtype)
        return generator.integers(0, UNKNOWN_BOUND, shape).astype(self.dtype)


class _Samples(Column):
    """Samples made when they are read."""

    def __init__(self, values: _Values, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, values.dtype
        self._values = values

    def rows(self, index: Rows) -> NDArray[Any]:
        """See :meth:`Column.rows`."""
        if not self.shape:
            return self._values.make((), 0)
        return np.stack([self._values.make(self.shape[1:], number) for number in index.tolist()])

    def whole(self) -> Column:
        """See :meth:`Column.whole`."""
        return _Feed(self._values, self.shape, 0).whole()


class _Feed(Column):
    """The array of a whole feed, made when it is read."""

    def __init__(self, values: _Values, shape: tuple[int, ...], number: int, *, leading: bool = False) -> None:
        self.shape, self.dtype = ((1, *shape) if leading else shape), values.dtype
        self._values, self._feed_shape, self._number = values, shape, number

    def rows(self, index: Rows) -> NDArray[Any]:
        """See :meth:`Column.rows`."""
        return self._values.make(self._feed_shape, self._number).reshape(self.shape)

    def whole(self) -> Column:
        """See :meth:`Column.whole`."""
        return _Feed(self._values, self._feed_shape, self._number, leading=True)


# -- sizes --------------------------------------------------------------------------------------------------------


class _Sizes:
    """One size for each free dimension of the inputs."""

    def __init__(self, specs: Sequence[InputSpec], graph: Graph | None, batch: int, dynamic: Mapping[str, int]) -> None:
        self._specs = specs
        self._batch = batch
        self._known: dict[str, int] = {}
        for spec in specs:
            if spec.shape is None:
                raise DataError(f"input {spec.name!r} declares no rank, so no values can be made up; give data")
        symbols = {d for spec in specs for d in spec.shape or () if isinstance(d, str)}
        unknown = sorted(set(dynamic) - symbols)
        if unknown:
            raise UsageError(
                f"the inputs have no dimension {', '.join(map(repr, unknown))}; "
                f"they have {', '.join(map(repr, sorted(symbols))) or 'none that is free'}"
            )
        self._known.update(dynamic)
        self._set_batch()
        if graph is not None:
            for spec in specs:
                self._demands(graph, spec)
        self._set_images(graph)
        sequences = [self.of(spec) for spec in specs if spec.shape and len(spec.shape) > 1]
        #: what an input of lengths holds
        self.length = sequences[0][-1] if sequences and len(sequences[0]) == 2 else 1

    def of(self, spec: InputSpec) -> tuple[int, ...]:
        """The shape of ``spec`` in numbers."""
        return tuple(
            d if isinstance(d, int) else self._size(_key(spec, axis)) for axis, d in enumerate(spec.shape or ())
        )

    def _size(self, key: str) -> int:
        if key in self._known:
            return self._known[key]
        parts = [part.strip() for part in key.split("+")]  # "past + sequence": exporters write sums
        if len(parts) > 1 and all(part.isdecimal() or part.isidentifier() for part in parts):
            return sum(int(part) if part.isdecimal() else self._size(part) for part in parts)
        return DEFAULT_SIZE

    def _free(self, spec: InputSpec, axis: int) -> bool:
        return not isinstance((spec.shape or ())[axis], int) and _key(spec, axis) not in self._known

    def _set_batch(self) -> None:
        for spec in self._specs:
            if spec.shape and self._free(spec, 0):
                self._known[_key(spec, 0)] = self._batch

    def _demands(self, graph: Graph, spec: InputSpec) -> None:
        """Channels and features that constant weights next to the input demand."""
        shape = spec.shape or ()
        for node, index in _near_consumers(graph, spec.name):
            other = constant_value(node.inputs[1 - index]) if len(node.inputs) >= 2 and index < 2 else None
            if other is None:
                continue
            demanded: dict[int, int] = {}
            if node.op == "Conv" and len(shape) > 2:
                demanded[1] = other.shape[1] * int(attribute(node, "group", 1))
                if len(shape) == 3:
                    demanded[2] = 1024  # a signal: long enough for strides
            elif node.op in ("MatMul", "Gemm") and index == 0 and other.ndim >= 2:
                demanded[len(shape) - 1] = other.shape[-1 if attribute(node, "transB", 0) else -2]
            elif node.op in ("Add", "Sub", "Mul", "Div"):
                offset = len(shape) - other.ndim
                demanded = {axis + offset: size for axis, size in enumerate(other.shape) if size > 1}
            for axis, size in demanded.items():
                if 0 < axis < len(shape) and self._free(spec, axis):
                    self._known[_key(spec, axis)] = size

    def _set_images(self, graph: Graph | None) -> None:
        keys: list[str] = []
        wanted: list[int] = []
        for spec in self._specs:
            shape = spec.shape or ()
            if len(shape) != 4 or spec.dtype.kind not in "fuV":
                continue
            axes = (1, 2) if shape[3] in (1, 3, 4) and not isinstance(shape[1], int) else (2, 3)
            wanted += [d for d in (shape[a] for a in axes) if isinstance(d, int)]
            keys += [_key(spec, axis) for axis in axes if self._free(spec, axis)]
            channel = 3 if axes == (1, 2) else 1
            if self._free(spec, channel):
                self._known[_key(spec, channel)] = 3
        if not keys:
            return
        sizes = list(dict.fromkeys((*wanted, *IMAGE_SIZES)))
        for size in sizes if graph is not None else sizes[:1]:
            self._known.update(dict.fromkeys(keys, size))
            if graph is None or _accepts(graph, {spec.name: self.of(spec) for spec in self._specs}):
                return
        self._known.update(dict.fromkeys(keys, sizes[0]))


def _key(spec: InputSpec, axis: int) -> str:
    """A symbol, or a name of its own for a dimension without one."""
    dimension = (spec.shape or ())[axis]
    return dimension if isinstance(dimension, str) else f"{axis} of {spec.name}"


def _accepts(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True where shape inference finds no contradiction and the declared outputs come out.

    A contradiction may hide in a Reshape to ``[-1, features]``, which turns wrong features into more samples: seen by
    an output whose first axis is no longer the batch.
    """
    twin = copy_graph(graph)
    batch: dict[str, int] = {}
    for tensor in twin.inputs:
        if tensor.name in shapes:
            shape = list(shapes[tensor.name])
            if tensor.shape and isinstance(tensor.shape[0], str):
                batch[tensor.shape[0]] = shape[0]
            tensor.shape = shape
    declared = {tensor.name: list(tensor.shape) for tensor in twin.outputs if tensor.shape is not None}
    for tensor in (*twin.outputs, *(t for node in twin.nodes for t in node.outputs)):
        if isinstance(tensor, gs.Variable):
            tensor.shape = None
    try:
        model = onnx.shape_inference.infer_shapes(to_proto(twin, weights="omit"), strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return False
    for value in model.graph.output:
        for dim, want in zip(value.type.tensor_type.shape.dim, declared.get(value.name, ()), strict=False):
            expected = batch.get(want) if isinstance(want, str) else want
            if dim.HasField("dim_value") and (dim.dim_value < 1 or expected not in (None, dim.dim_value)):
                return False
    return True


# -- following inputs through the graph ---------------------------------------------------------------------------

#: operators whose output has the first input's shape
_SAME_SHAPE = {"Cast", "Identity", "QuantizeLinear", "DequantizeLinear", "Clip", "Relu", "Sigmoid", "Dropout"}
_ARITHMETIC = {"Add", "Sub", "Mul", "Div"}

#: operators that move or pass on the values of their first input
_MOVES = {
    "Cast", "Clip", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
#: operators that pass on the values of any input
_MERGES = {"Concat", "Max", "Min", "Where"}
#: stands for a bound where a value is a size, a count or a position
_CONTROL = 0
#: operators whose further inputs are sizes, counts or positions: one is the value that fits most
_CONTROLS = {
    "ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Reshape", "Resize", "Slice", "Tile", "TopK",
}  # fmt: skip


def _near_consumers(graph: Graph, name: str) -> Iterator[tuple[gs.Node, int]]:
    """Nodes that read the input, or a tensor of its shape computed from it, and which of their inputs that is."""
    start = next((t for t in graph.inputs if t.name == name), None)
    queue = [start] if start is not None else []
    seen: set[int] = set()
    while queue:
        tensor = queue.pop()
        for node in {id(n): n for n in tensor.outputs}.values():
            if id(node) in seen or normal_domain(node) != "":
                continue
            seen.add(id(node))
            index = next(i for i, t in enumerate(node.inputs) if t is tensor)
            yield node, index
            unary = node.op in _SAME_SHAPE and index == 0
            scaled = node.op in _ARITHMETIC and any(constant_value(t) is not None for t in node.inputs)
            if unary or scaled:
                queue.append(node.outputs[0])


def _index_bounds(graph: Graph) -> dict[str, int]:
    """{integer input: a value that it must stay below}, for inputs that index tables."""
    types: dict[str, TensorType] | None = None
    bounds: dict[str, int] = {}
    for start in graph.inputs:
        if start.dtype is None or isinstance(start.dtype, int) or np.dtype(start.dtype).kind not in "iu":
            continue
        types = types if types is not None else infer_shapes(graph)
        found = [bound for bound in _bounds_of(start, types) if bound is not None]
        if found:
            bounds[start.name] = _CONTROL if _CONTROL in found else max(1, min(found))
    return bounds


def _bounds_of(start: gs.Tensor, types: Mapping[str, TensorType]) -> Iterator[int | None]:
    queue = [(start, 0)]  # a tensor and the constant that was added to the input on the way
    seen = {id(start)}
    while queue:
        tensor, added = queue.pop()
        for node in {id(n): n for n in tensor.outputs}.values():
            for index, read in enumerate(node.inputs):
                if read is not tensor:
                    continue
                size = _table_size(node, index, types)
                if size is not None:
                    yield size - added
                offset = _passed_on(node, index)
                if offset is not None:
                    for output in node.outputs:
                        if id(output) not in seen:
                            seen.add(id(output))
                            queue.append((output, added + offset))


def _passed_on(node: gs.Node, index: int) -> int | None:
    """What is added to the values of input ``index`` on the way to the outputs; None where they end here."""
    if normal_domain(node) != "":
        return None
    if node.op in _MERGES or (node.op in _MOVES and index == 0):
        return None if node.op == "Where" and index == 0 else 0
    if node.op in ("Add", "Sub") and len(node.inputs) == 2:
        other = constant_value(node.inputs[1 - index])
        if other is not None and other.size and other.dtype.kind in "iu":
            if node.op == "Add":
                return int(other.max())
            return -int(other.min()) if index == 0 else None
    return None


def _table_size(node: gs.Node, index: int, types: Mapping[str, TensorType]) -> int | None:
    """The size that values of input ``index`` must stay below; None where they index nothing of known size."""
    if node.op == "EmbedLayerNormalization" and normal_domain(node) == "com.microsoft":
        table = {0: 2, 1: 4, 8: 3}.get(index)
        shape = _shape(node.inputs[table], types) if table is not None and table < len(node.inputs) else None
        return shape[0] if shape else None
    if normal_domain(node) != "":
        return None
    if (index > 0 and node.op in _CONTROLS) or node.op == "ConstantOfShape":
        return _CONTROL
    if index != 1 or node.op not in _INDEXED:
        return None
    shape = _shape(node.inputs[0], types)
    if not shape:
        return None
    if node.op in ("GatherND", "ScatterND"):
        sizes = [d for d in shape[int(attribute(node, "batch_dims", 0)) :] if d is not None]
        return min(sizes) if sizes else None
    return shape[int(attribute(node, "axis", 0))]


_INDEXED = {"Gather", "GatherElements", "GatherND", "Scatter", "ScatterElements", "ScatterND"}


def _shape(tensor: gs.Tensor, types: Mapping[str, TensorType]) -> list[int | None] | None:
    if isinstance(tensor, gs.Constant):
        return [int(d) for d in tensor.shape]
    known = types.get(tensor.name)
    if known is None or known.shape is None:
        return None
    return [d if isinstance(d, int) else None for d in known.shape]
