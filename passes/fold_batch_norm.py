"""Fold BatchNormalization and constant Mul, Add, Sub, Div into the linear operator before or after them.

Patterns, where ``affine`` is BatchNormalization in inference mode or Mul/Add/Sub/Div with one constant operand that
is a scalar or varies along the channels only::

    Conv | ConvTranspose | Gemm -> affine -> affine ...     becomes   Conv | ConvTranspose | Gemm
    MatMul -> affine -> affine ...                          becomes   MatMul [-> Add]
    affine -> affine ... -> Conv | ConvTranspose | Gemm     becomes   Conv | ConvTranspose | Gemm
    affine -> affine ... -> MatMul                          becomes   MatMul [-> Add]

Each affine operator is ``y = scale[c] * x + shift[c]``; for BatchNormalization (operator specification)
``scale = gamma / sqrt(variance + epsilon)`` and ``shift = beta - mean * scale``. A chain composes to one pair.

After the operator the channels are its outputs: ``W'[m, ...] = scale[m] * W[m, ...]`` and
``b'[m] = scale[m] * b[m] + shift[m]``. Before it they are its inputs: ``W'[m, c, ...] = W[m, c, ...] * scale[c]`` and
``b'[m] = b[m] + sum over c and the kernel of W[m, c, ...] * shift[c]``. The latter holds only where no position of the
kernel falls on padding, since zeros are padded after the shift; so a shift is folded without padding only.

Layouts: Conv ``W[M, C/group, k...]``; ConvTranspose ``W[C, M/group, k...]``; Gemm ``B[K, N]``, with transB
``B[N, K]``; MatMul a constant ``B[..., K, N]`` on the right or ``A[..., M, K]`` on the left.

Arithmetic is in float64, results are stored in the type of the weight. The last tensor of a chain keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.base import Change, Context, Decision, Guarantee, Pass, Refusal
from onnxcompress.composites import composite
from onnxcompress.errors import ModelError
from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    constant_value,
    first_output,
    graph_output_ids,
    normal_domain,
    release,
    remove_nodes,
    set_constant,
    sort_nodes,
    walk_graphs,
)
from onnxcompress.shapes import DerivedTypes, Shape, derive_types

__all__ = ["FoldBatchNorm"]

Float64 = NDArray[np.float64]

#: largest error of a stored weight, relative to the exact one, in units of the type's machine epsilon
STORAGE_ERROR = 4.0

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ARITHMETIC = ("Mul", "Add", "Sub", "Div")
#: machine epsilon by type name; bfloat16 is no numpy type
_EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


class FoldBatchNorm(Pass):
    """Fold BatchNormalization and constant affine operators into Conv, ConvTranspose, Gemm and MatMul."""

    name: ClassVar[str] = "fold_batch_norm"

    @property
    def guarantee(self) -> Guarantee:
        """Equal but for rounding."""
        return Guarantee.EQUIVALENT

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision]:
        """Fold every chain after a linear operator, then every chain before one, in nested graphs too."""
        with np.errstate(invalid="ignore"):  # a signalling NaN warns when it is widened; what is not finite is refused
            yield from _Folder(graph).run()


@dataclass
class _Affine:
    """``y = scale * x + shift`` by channel, both of shape [channels]."""

    scale: Float64
    shift: Float64

    def then(self, other: _Affine) -> _Affine:
        return _Affine(other.scale * self.scale, other.scale * self.shift + other.shift)


@dataclass(frozen=True)
class _Layout:
    """Where the channels of a data tensor lie: how many, on which axis counted from the end (1: the last)."""

    channels: int
    from_end: int
    #: rank of the tensor; the smallest possible one where ``exact`` is False
    rank: int
    exact: bool

    def vector(self, value: NDArray[Any]) -> Float64 | str:
        """``value`` as one number a channel, or why broadcasting it is something else."""
        if value.ndim > self.rank:
            return f"its constant of shape {list(value.shape)} may raise the rank of the data"
        for axis, size in enumerate(reversed(value.shape), start=1):
            if size != 1 and (axis != self.from_end or size != self.channels):
                return f"its constant of shape {list(value.shape)} varies along more than the {self.channels} channels"
        flat = value.astype(np.float64).reshape(-1)
        return np.full(self.channels, flat[0]) if flat.size == 1 else flat


@dataclass
class _Linear:
    """A linear operator whose weight is constant and its own."""

    node: gs.Node
    #: input index of the weight and of the data
    weight_index: int
    data_index: int
    weight: NDArray[Any]
    output: _Layout
    input: _Layout
    group: int = 1


class _Refused(Exception):
    """A candidate that must be left alone; the message is the reason."""


class _Folder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.opset = int(graph.opset)
        self.names = Names(graph)
        self.leaving = graph_output_ids(graph)
        self.types = self._types()
        #: detached nodes, dropped together at the end
        self.removed: dict[int, gs.Node] = {}
        #: refused nodes by id: the first reason counts
        self.refused: dict[int, Refusal] = {}
        self.local: set[int] = set()

    def _types(self) -> DerivedTypes:
        """Types of the outermost graph's tensors; derived once, and only where a fold may ask."""
        readers = {*_LINEAR, *_ARITHMETIC, "BatchNormalization"}
        wanted = any(
            node.op == "MatMul"
            or (node.op in _ARITHMETIC and any(c.op in readers for t in node.outputs for c in t.outputs))
            for node in self.graph.nodes
        )
        if not wanted:
            return DerivedTypes()
        try:
            return derive_types(self.graph)
        except ModelError:  # then shapes are unknown, and what needs them is refused for that reason
            return DerivedTypes()

    def _shape(self, tensor: gs.Tensor) -> Shape | None:
        known = self.types.of(tensor)
        return known.shape if known is not None else None

    def run(self) -> Iterator[Change | Refusal]:
        for part in walk_graphs(self.graph):
            nodes = list(part.nodes)
            self.local = {id(node) for node in nodes}
            for fold in (self._fold_after, self._fold_before):
                for node in nodes:
                    if node.op in _LINEAR and normal_domain(node) == "" and id(node) not in self.removed:
                        yield from fold(node, part)
            for node in nodes:
                if id(node) not in self.removed and node.op == "BatchNormalization" and normal_domain(node) == "":
                    self._refuse(node, _why_alone(node))
        remove_nodes(self.graph, self.removed.values())
        for part in walk_graphs(self.graph):
            if part is not self.graph:  # the outermost graph is sorted by the caller
                sort_nodes(part)
        yield from (refusal for key, refusal in self.refused.items() if key not in self.removed)

    def _refuse(self, node: gs.Node, reason: str) -> None:
        self.refused.setdefault(id(node), Refusal(_label(node), reason))

    # ---- chains ----------------------------------------------------------------------------------------------

    def _fold_after(self, node: gs.Node, part: Graph) -> Iterator[Change]:
        first = self._followers(node.outputs[0])
        if not first:
            return
        try:
            linear = self._linear(node)
        except _Refused as refused:
            for follower in first:
                self._refuse(follower, str(refused))
            return
        total: _Affine | None = None
        chain: list[gs.Node] = []
        tensor = node.outputs[0]
        while True:
            step = self._next(tensor, linear)
            if step is None:
                break
            follower, affine = step
            total = affine if total is None else total.then(affine)
            chain.append(follower)
            tensor = follower.outputs[0]
        if total is None:
            return
        shifted = bool(total.shift.any())
        if node.op == "MatMul" and shifted and len(chain) == 1 and chain[0].op != "BatchNormalization":
            return  # MatMul -> Add is as small as it gets
        try:
            self._scale_output(linear, total, chain, part)
        except _Refused as refused:
            self._refuse(chain[0], str(refused))
            return
        for follower in chain:
            yield Change("folded", _label(follower), f"{follower.op} into the {node.op} {_label(node)} before it")

    def _followers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """Affine operators with a constant operand that read ``tensor`` as data, in the same graph."""
        unique = {id(n): n for n in tensor.outputs if id(n) in self.local and id(n) not in self.removed}
        return [n for n in unique.values() if _is_affine(n, tensor, self.opset)]

    def _next(self, tensor: gs.Tensor, linear: _Linear) -> tuple[gs.Node, _Affine] | None:
        """The affine operator that alone reads ``tensor``, or None, with the reason on record."""
        followers = self._followers(tensor)
        if not followers:
            return None
        try:
            self._only_reader(tensor)
            return followers[0], self._affine(followers[0], tensor, linear.output)
        except _Refused as refused:
            for follower in followers:
                self._refuse(follower, str(refused))
            return None

    def _only_reader(self, tensor: gs.Tensor) -> None:
        if id(tensor) in self.leaving:
            raise _Refused(f"the tensor {tensor.name!r} in between is a graph output")
        readers = sum(id(n) not in self.removed for n in tensor.outputs)
        if readers != 1:
            raise _Refused(f"the tensor {tensor.name!r} in between is read {readers} times")

    def _fold_before(self, node: gs.Node, part: Graph) -> Iterator[Change]:
        data = node.inputs[_data_index(node)]
        first = self._producer(data)
        if first is None:
            return
        try:
            linear = self._linear(node)
        except _Refused as refused:
            self._refuse(first, str(refused))
            return
        total: _Affine | None = None
        chain: list[gs.Node] = []
        while (producer := self._producer(data)) is not None:
            try:
                whole = composite(producer)
                if whole is not None:
                    raise _Refused(f"it is part of a {whole} that the runtime runs as one operator")
                self._only_reader(data)
                source = _data_input(producer)
                affine = self._affine(producer, source, linear.input)
                self._check_no_growth(producer, source, linear.input)
                extended = affine if total is None else affine.then(total)
                _check_padding(linear, extended)
            except _Refused as refused:
                self._refuse(producer, str(refused))
                break
            total, data = extended, source
            chain.append(producer)
        if total is None:
            return
        shifted = bool(total.shift.any())
        if node.op == "MatMul" and shifted and len(chain) == 1 and chain[0].op != "BatchNormalization":
            return  # the Add would only move behind the MatMul
        try:
            self._scale_input(linear, total, chain, part)
        except _Refused as refused:
            self._refuse(chain[0], str(refused))
            return
        node.inputs[linear.data_index] = data
        for producer in chain:
            yield Change("folded", _label(producer), f"{producer.op} into the {node.op} {_label(node)} after it")

    def _producer(self, tensor: gs.Tensor) -> gs.Node | None:
        """The affine operator of the same graph that makes ``tensor``."""
        if len(tensor.inputs) != 1:
            return None
        node = tensor.inputs[0]
        if id(node) not in self.local or id(node) in self.removed or not node.inputs:
            return None
        return node if _is_affine(node, _data_input(node), self.opset) else None

    def _check_no_growth(self, node: gs.Node, source: gs.Tensor, layout: _Layout) -> None:
        """Refuse where broadcasting makes the data larger, for then the linear operator cannot read ``source``."""
        if node.op == "BatchNormalization":
            return
        constant = constant_value(_other_input(node, source))
        if constant is None or (constant.size == 1 and constant.ndim < layout.rank):
            return
        shape = self._shape(source)
        if shape is None:
            raise _Refused(f"the shape of {source.name!r} is not known, so its constant may enlarge the data")
        if len(shape) < max(constant.ndim, layout.from_end) or (
            constant.size > 1 and shape[len(shape) - layout.from_end] != layout.channels
        ):
            raise _Refused(f"its constant of shape {list(constant.shape)} enlarges data of shape {list(shape)}")

    # ---- what an operator computes ---------------------------------------------------------------------------

    def _linear(self, node: gs.Node) -> _Linear:
        if node.op == "MatMul":
            return self._matmul(node)
        if node.op == "Gemm" and self.opset < 7:
            raise _Refused(f"Gemm of opset {self.opset} broadcasts its bias by other rules; convert to opset 7")
        weight = self._weight(node, 1)
        if node.op == "Gemm":
            if weight.ndim != 2:
                raise _Refused(f"the weight of Gemm {_label(node)} has rank {weight.ndim} instead of 2")
            k, n = weight.shape[::-1] if attribute(node, "transB", 0) else weight.shape
            k_from_end = 2 if attribute(node, "transA", 0) else 1
            return _Linear(node, 1, 0, weight, _Layout(n, 1, 2, True), _Layout(k, k_from_end, 2, True))
        if weight.ndim < 3:
            raise _Refused(f"the weight of {node.op} {_label(node)} has rank {weight.ndim} instead of 3 or more")
        group = int(attribute(node, "group", 1))
        if node.op == "Conv":
            outputs, inputs = weight.shape[0], weight.shape[1] * group
        else:
            outputs, inputs = weight.shape[1] * group, weight.shape[0]
        rank = weight.ndim
        return _Linear(
            node, 1, 0, weight, _Layout(outputs, rank - 1, rank, True), _Layout(inputs, rank - 1, rank, True), group
        )

    def _matmul(self, node: gs.Node) -> _Linear:
        left = constant_value(node.inputs[1]) is None and constant_value(node.inputs[0]) is not None
        weight = self._weight(node, 0 if left else 1)
        if weight.ndim < 2:
            raise _Refused(f"the weight of MatMul {_label(node)} has rank {weight.ndim}; a vector has no channels")
        data = self._shape(node.inputs[1 if left else 0])
        if left:
            if data is None or len(data) < 2:
                raise _Refused(f"the rank of the right operand of MatMul {_label(node)} is not known to be 2 or more")
            m, k = weight.shape[-2:]
            rank = max(weight.ndim, len(data))
            return _Linear(node, 0, 1, weight, _Layout(m, 2, rank, True), _Layout(k, 2, len(data), True))
        k, n = weight.shape[-2:]
        least = weight.ndim if weight.ndim > 2 else 1
        if data is None:
            return _Linear(node, 1, 0, weight, _Layout(n, 1, least, False), _Layout(k, 1, 1, False))
        rank = max(least, len(data))
        return _Linear(node, 1, 0, weight, _Layout(n, 1, rank, True), _Layout(k, 1, len(data), True))

    def _weight(self, node: gs.Node, index: int) -> NDArray[Any]:
        tensor = node.inputs[index]
        label = f"the weight {tensor.name!r} of {node.op} {_label(node)}"
        value = constant_value(tensor)
        if value is None:
            producer = tensor.inputs[0].op if tensor.inputs else None
            if producer == "DequantizeLinear":
                raise _Refused(f"{label} is quantised")
            raise _Refused(f"{label} is no constant" + (f" but made by {producer}" if producer else " but an input"))
        if value.dtype.name not in _EPSILON:
            raise _Refused(f"{label} is of type {value.dtype.name}, not a float type")
        if id(tensor) in self.leaving:
            raise _Refused(f"{label} is a graph output too")
        if len(tensor.outputs) != 1:
            others = sorted({_label(n) for n in tensor.outputs if n is not node}) or [_label(node)]
            raise _Refused(f"{label} is shared with {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}")
        return value

    def _affine(self, node: gs.Node, data: gs.Tensor, layout: _Layout) -> _Affine:
        if node.op == "BatchNormalization":
            return _batch_norm(node, layout, self.opset)
        other = _other_input(node, data)
        value = constant_value(other)
        if value is None:  # _is_affine has looked already
            raise _Refused(f"{other.name!r} is no constant")
        if value.dtype.name not in _EPSILON:
            raise _Refused(f"its constant is of type {value.dtype.name}, not a float type")
        vector = layout.vector(value)
        if isinstance(vector, str):
            raise _Refused(vector)
        if not np.isfinite(vector).all():
            raise _Refused("its constant is not finite")
        one, zero = np.ones(layout.channels), np.zeros(layout.channels)
        match node.op:
            case "Mul":
                return _Affine(vector, zero)
            case "Add":
                return _Affine(one, vector)
            case "Sub":
                return _Affine(one, -vector) if node.inputs[0] is data else _Affine(-one, vector)
        if not vector.all():
            raise _Refused("it divides by zero")
        return _Affine(one / vector, zero)

    # ---- writing the result ----------------------------------------------------------------------------------

    def _scale_output(self, linear: _Linear, affine: _Affine, chain: list[gs.Node], part: Graph) -> None:
        node = linear.node
        shape = [1] * linear.weight.ndim
        if node.op == "ConvTranspose":
            in_group, out_group = linear.weight.shape[0] // linear.group, linear.weight.shape[1]
            grouped = linear.weight.astype(np.float64).reshape(linear.group, in_group, out_group, -1)
            exact = (grouped * affine.scale.reshape(linear.group, 1, out_group, 1)).reshape(linear.weight.shape)
        else:
            shape[_output_axis(linear)] = -1
            exact = linear.weight.astype(np.float64) * affine.scale.reshape(shape)
        weight = _store(exact, linear.weight.dtype)
        shifted = bool(affine.shift.any())
        if node.op == "MatMul":
            bias = _store(affine.shift, linear.weight.dtype) if shifted else None
            self._set_weight(linear, weight)
            self._end_chain(node, chain, part, bias, linear.output)
            return
        old = self._bias(linear)
        bias = None
        if old is not None or shifted:
            before = old if old is not None else np.zeros(linear.output.channels)
            bias = _store(before * affine.scale + affine.shift, linear.weight.dtype)
        self._set_weight(linear, weight)
        if bias is not None:
            self._set_bias(linear, bias)
        self._end_chain(node, chain, part, None, linear.output)

    def _scale_input(self, linear: _Linear, affine: _Affine, chain: list[gs.Node], part: Graph) -> None:
        node, wide = linear.node, linear.weight.astype(np.float64)
        shape = [1] * wide.ndim
        added: Float64 | None = None
        shifted = bool(affine.shift.any())
        if node.op == "Conv":
            per_output = affine.scale.reshape(linear.group, 1, -1)
            grouped = wide.reshape(linear.group, wide.shape[0] // linear.group, wide.shape[1], -1)
            exact = (grouped * per_output[..., None]).reshape(wide.shape)
            if shifted:
                added = (grouped * affine.shift.reshape(linear.group, 1, -1, 1)).sum(axis=(2, 3)).reshape(-1)
        else:
            axis = _input_axis(linear)
            shape[axis] = -1
            exact = wide * affine.scale.reshape(shape)
            if shifted:
                if wide.ndim != 2 or linear.weight_index != 1:
                    raise _Refused(f"a shift before {node.op} {_label(node)} is no bias by channel after it")
                added = np.tensordot(affine.shift, wide, axes=(0, axis))
        weight = _store(exact, linear.weight.dtype)
        if added is None:
            self._set_weight(linear, weight)
            self._remove(chain)
            return
        if node.op == "MatMul":
            bias = _store(added, linear.weight.dtype)
            self._set_weight(linear, weight)
            self._remove(chain)
            output = node.outputs[0]
            product = gs.Variable(self.names.free(f"{output.name}_product"), output.dtype)
            adder = gs.Node("Add", self.names.free(f"{_label(node)}_add"))
            self._add_bias(node, adder, product, output, bias, linear.output, part)
            return
        old = self._bias(linear)
        added *= float(attribute(node, "alpha", 1.0)) if node.op == "Gemm" else 1.0
        bias = _store(added + (old if old is not None else 0.0), linear.weight.dtype)
        self._set_weight(linear, weight)
        self._set_bias(linear, bias)
        self._remove(chain)

    def _bias(self, linear: _Linear) -> Float64 | None:
        """The bias by output channel, times beta for Gemm; None where there is none."""
        node = linear.node
        if len(node.inputs) < 3 or not node.inputs[2].name:
            return None
        beta = float(attribute(node, "beta", 1.0)) if node.op == "Gemm" else 1.0
        value = constant_value(node.inputs[2])
        label = f"the bias {node.inputs[2].name!r} of {node.op} {_label(node)}"
        if value is None:
            maker = node.inputs[2].inputs[0] if node.inputs[2].inputs else None
            made = maker is not None and all(constant_value(t) is not None for t in maker.inputs if t.name)
            raise _Refused(f"{label} is no constant{'; run fold_constants first' if made else ''}")
        if node.op == "Gemm" and value.ndim == 2 and value.shape[0] != 1:
            raise _Refused(f"{label} of shape {list(value.shape)} varies by row")
        channels, flat = linear.output.channels, value.astype(np.float64).reshape(-1)
        if flat.size != channels and (flat.size != 1 or node.op != "Gemm"):
            raise _Refused(f"{label} has {flat.size} values for {channels} channels")
        return beta * np.broadcast_to(flat, (channels,))

    def _set_weight(self, linear: _Linear, value: NDArray[Any]) -> None:
        self._replace(linear.node, linear.weight_index, value)
        release(linear.weight)

    def _set_bias(self, linear: _Linear, value: NDArray[Any]) -> None:
        node = linear.node
        if node.op == "Gemm":
            node.attrs.pop("beta", None)
        if len(node.inputs) > 2 and node.inputs[2].name:
            self._replace(node, 2, value)
        else:
            set_constant(node, 2, self.names.free(f"{_label(node)}_bias"), value)

    def _replace(self, node: gs.Node, index: int, value: NDArray[Any]) -> None:
        """Give ``node`` a new constant; it takes over the name where nobody else reads the old one."""
        old = node.inputs[index]
        alone = len(old.outputs) == 1 and id(old) not in self.leaving
        for producer in list(old.inputs):  # a Constant node
            if alone:
                self.removed[id(producer)] = producer
        set_constant(node, index, old.name if alone else self.names.free(old.name), value)

    def _remove(self, nodes: list[gs.Node]) -> None:
        self.removed.update((id(node), node) for node in nodes)

    def _end_chain(
        self, node: gs.Node, chain: list[gs.Node], part: Graph, bias: NDArray[Any] | None, layout: _Layout
    ) -> None:
        """Let ``node`` end in the tensor that ``chain`` ended in, with an Add in between where there is a ``bias``."""
        last = chain[-1]
        final = last.outputs[0]
        last.outputs.clear()
        self._remove(chain)
        if bias is None:
            node.outputs[0] = final
        else:
            self._add_bias(node, gs.Node("Add", last.name), node.outputs[0], final, bias, layout, part)

    def _add_bias(
        self,
        node: gs.Node,
        adder: gs.Node,
        product: gs.Tensor,
        final: gs.Tensor,
        bias: NDArray[Any],
        layout: _Layout,
        part: Graph,
    ) -> None:
        """``node`` -> ``product`` -> ``adder`` -> ``final``; the bias broadcasts along the channels: [N] or [M, 1]."""
        operand = bias.reshape(-1, *[1] * (layout.from_end - 1))
        constant = gs.Constant(self.names.free(f"{_label(node)}_bias"), operand)
        node.outputs[0] = product
        adder.inputs = [product, constant]
        adder.outputs = [final]
        part.nodes.append(adder)
        self.local.add(id(adder))


def _label(node: gs.Node) -> str:
    return str(node.name or first_output(node))


def _data_index(node: gs.Node) -> int:
    if node.op == "MatMul" and constant_value(node.inputs[1]) is None and constant_value(node.inputs[0]) is not None:
        return 1
    return 0


def _data_input(node: gs.Node) -> gs.Tensor:
    """The operand that is not constant: the first one where none is."""
    if node.op in _ARITHMETIC and constant_value(node.inputs[0]) is not None:
        return node.inputs[1]
    return node.inputs[0]


def _other_input(node: gs.Node, data: gs.Tensor) -> gs.Tensor:
    return node.inputs[1] if node.inputs[0] is data else node.inputs[0]


def _is_affine(node: gs.Node, data: gs.Tensor, opset: int) -> bool:
    """True for BatchNormalization and for arithmetic of ``data`` with a constant."""
    if normal_domain(node) != "" or not node.outputs:
        return False
    if node.op == "BatchNormalization":
        return node.inputs[0] is data
    if node.op not in _ARITHMETIC or opset < 7 or len(node.inputs) != 2:  # until opset 6 broadcasting is an attribute
        return False
    if constant_value(data) is not None or constant_value(_other_input(node, data)) is None:
        return False
    return node.op != "Div" or node.inputs[0] is data


def _batch_norm(node: gs.Node, layout: _Layout, opset: int) -> _Affine:
    """Scale and shift of BatchNormalization; refuses training mode of every opset and unsound statistics."""
    if opset >= 14 and attribute(node, "training_mode", 0):
        raise _Refused("it is in training mode")
    if opset < 7 and not attribute(node, "is_test", 0):
        raise _Refused("it is in training mode (is_test is 0)")
    if any(t.name for t in node.outputs[1:]):
        raise _Refused("its mean and variance outputs are in use, as in training")
    if opset < 9 and not attribute(node, "spatial", 1):
        raise _Refused("it normalises each position by itself (spatial is 0)")
    if not layout.exact or layout.rank - layout.from_end != 1:
        raise _Refused("its channels (axis 1) are not known to be the channels of the linear operator")
    values: list[Float64] = []
    for label, tensor in zip(("scale", "bias", "mean", "variance"), node.inputs[1:5], strict=True):
        value = constant_value(tensor)
        if value is None:
            raise _Refused(f"its {label} {tensor.name!r} is no constant")
        if value.shape != (layout.channels,):
            raise _Refused(f"its {label} has shape {list(value.shape)} for {layout.channels} channels")
        wide = value.astype(np.float64)
        if not np.isfinite(wide).all():
            raise _Refused(f"its {label} is not finite")
        values.append(wide)
    gamma, beta, mean, variance = values
    if (variance < 0).any():
        raise _Refused("its variance is negative")
    denominator = variance + float(attribute(node, "epsilon", np.float32(1e-5)))
    if (denominator <= 0).any():
        raise _Refused("its variance and epsilon are both zero")
    scale = gamma / np.sqrt(denominator)
    return _Affine(scale, beta - mean * scale)


def _output_axis(linear: _Linear) -> int:
    """Axis of the weight along which the output channels of Conv, Gemm and MatMul lie."""
    if linear.node.op == "Conv":
        return 0
    if linear.node.op == "Gemm":
        return 0 if attribute(linear.node, "transB", 0) else 1
    return linear.weight.ndim - (1 if linear.weight_index == 1 else 2)


def _input_axis(linear: _Linear) -> int:
    """Axis of the weight along which the input channels of ConvTranspose, Gemm and MatMul lie."""
    if linear.node.op == "ConvTranspose":
        return 0
    if linear.node.op == "Gemm":
        return 1 if attribute(linear.node, "transB", 0) else 0
    return linear.weight.ndim - (2 if linear.weight_index == 1 else 1)


def _check_padding(linear: _Linear, affine: _Affine) -> None:
    """Refuse a shift before an operator at whose borders some kernel positions see no data."""
    node = linear.node
    if node.op not in ("Conv", "ConvTranspose") or not affine.shift.any():
        return
    if node.op == "ConvTranspose":
        raise _Refused(f"ConvTranspose {_label(node)} overlaps unevenly, so the shift is no bias after it")
    auto_pad = attribute(node, "auto_pad", "NOTSET")
    pads = attribute(node, "pads", [])
    pointwise = all(size == 1 for size in linear.weight.shape[2:])
    if auto_pad in ("SAME_UPPER", "SAME_LOWER") and pointwise:
        return  # a kernel of one position is never padded
    if auto_pad not in ("NOTSET", "VALID", "") or (auto_pad != "VALID" and any(pads)):
        raise _Refused(f"Conv {_label(node)} pads with zeros, which the shift would have to change")


def _store(exact: Float64, dtype: np.dtype[Any]) -> NDArray[Any]:
    """``exact`` in ``dtype``; refuses where the type cannot hold it."""
    with np.errstate(all="ignore"):
        stored = exact.astype(dtype)
        back = stored.astype(np.float64)
        if not np.isfinite(back).all():
            raise _Refused(f"the folded weight overflows {dtype.name}")
        size = float(np.linalg.norm(exact))
        error = float(np.linalg.norm(back - exact))
    if error > STORAGE_ERROR * _EPSILON[dtype.name] * size:
        raise _Refused(f"the folded weight underflows {dtype.name}")
    return stored


def _why_alone(node: gs.Node) -> str:
    """Why a BatchNormalization that no linear operator took is still there."""
    data = node.inputs[0]
    if not data.inputs:
        return "it reads a graph input and no linear operator that could take it follows"
    return f"it reads the output of {data.inputs[0].op} and no linear operator that could take it follows"
