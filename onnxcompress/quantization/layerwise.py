"""Teacher and student side by side: pairs of tensors, layer by layer, with every earlier change in effect.

The student is a graph that :class:`~onnxcompress.passes.insert_qdq.InsertQdq` wrote, the teacher the float graph that
it was made from. Both advance in lockstep (:mod:`onnxcompress.lockstep`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.base import Change, Detail, Refusal
from onnxcompress.errors import UsageError
from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    constant_value,
    copy_graph,
    graph_output_ids,
    nested_graphs,
    normal_domain,
    replace_contents,
    sort_nodes,
    tensors_read_inside,
)
from onnxcompress.lockstep import Advance, Judge, SampleErrors, decibels, samples_that_fit, split_samples
from onnxcompress.quantization.affine import MAX_BIAS

if TYPE_CHECKING:
    from onnxcompress.base import Context
    from onnxcompress.data import Dataset
    from onnxcompress.session import Optimization

__all__ = [
    "Layer",
    "Lockstep",
    "Mended",
    "find_layers",
    "keep_best",
    "mend",
    "mismatch",
    "require_teacher",
    "settle",
    "unlike",
]

Array = NDArray[Any]

_LAYERS = ("Conv", "Gemm", "MatMul")
#: fewer samples tell nothing about chance: there the error has to fall
_FEWEST_JUDGED = 16
#: what the error of all samples together may rise by, be it chance or not: 1 dB
_MOST_RISE = 10**0.1


# ----------------------------------------------------------------------------------------------------------------------
# Layers


@dataclass(eq=False)
class Layer:
    """A node with a stored int8 weight, in the student, and the tensor of the teacher that it should reproduce.

    Attributes:
        graph: the student, to which nodes can be added; they have to be sorted afterwards.
        node: the Conv, Gemm or MatMul.
        reader: the DequantizeLinear of its weight.
        output: the student's tensor behind the bias and before any activation, with channels on ``axis``.
        target: name of the teacher's tensor of the same meaning.
        bias_node: the node that adds the bias: ``node`` itself, or the Add behind a MatMul; None where there is none
            and none can be added.
        bias_index: the input of ``bias_node`` that is the bias, be it there or not.
        input_scale: scale of the data input; None where it is not quantised with one scale.
        shared: True where other nodes read the weight, too.
        outputs: ``id()`` of every tensor that leaves the graph.
        shortcut: the student's other operand where ``output`` only goes into an Add. Then ``target`` is the sum, and
            what the layer should reproduce is the target less the student's shortcut: so it mends what went wrong on
            the shortcut, too.
        own_target: name of the teacher's tensor that means the same as ``output``.
    """

    graph: Graph = field(repr=False)
    node: gs.Node
    reader: gs.Node
    output: gs.Tensor
    axis: int
    target: str
    bias_node: gs.Node | None
    bias_index: int
    input_scale: float | None
    shared: bool
    outputs: frozenset[int] = field(repr=False, default=frozenset())
    shortcut: gs.Tensor | None = None
    own_target: str = ""

    @property
    def name(self) -> str:
        """The node's name."""
        return str(self.node.name)

    @property
    def integers(self) -> NDArray[np.int8]:
        """The stored weight, as the file has it."""
        value = constant_value(self.reader.inputs[0])
        assert value is not None
        return value

    @property
    def channel_axis(self) -> int:
        """Axis of the weight that counts output channels."""
        if self.node.op == "Conv":
            return 0
        if self.node.op == "Gemm":
            return 0 if attribute(self.node, "transB", 0) else 1
        return 1

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return int(self.integers.shape[self.channel_axis])

    @property
    def scale(self) -> NDArray[np.float32]:
        """Scales of the weight, one per output channel."""
        value = constant_value(self.reader.inputs[1])
        assert value is not None
        return np.broadcast_to(value.reshape(-1), (self.channels,))

    def set_integers(self, integers: NDArray[np.int8]) -> None:
        """Store another weight under the same name; only where it is not shared."""
        old = self.reader.inputs[0]
        self.reader.inputs[0] = gs.Constant(old.name, _read_only(integers))

    # -- the bias

    @property
    def has_bias(self) -> bool:
        """True where a bias is stored."""
        node, index = self.bias_node, self.bias_index
        return node is not None and len(node.inputs) > index and bool(node.inputs[index].name)

    def bias(self) -> NDArray[np.float64]:
        """The bias as the layer adds it, one value a channel; zeros where there is none."""
        if not self.has_bias:
            return np.zeros(self.channels)
        assert self.bias_node is not None
        tensor = self.bias_node.inputs[self.bias_index]
        value = constant_value(tensor)
        if value is None:
            reader = tensor.inputs[0]
            integers, scale = (constant_value(t) for t in reader.inputs[:2])
            assert integers is not None and scale is not None
            value = integers.astype(np.float32) * scale
        return np.broadcast_to(value.reshape(-1).astype(np.float64), (self.channels,))

    def set_bias(self, bias: NDArray[np.float64], names: Names) -> NDArray[np.float64]:
        """Store ``bias``, where needed as a new constant, and return what the layer adds from now on.

        As integers a bias must stay below ``MAX_BIAS`` units of input scale times weight scale: beyond that it is cut.
        """
        assert self.bias_node is not None
        node, index = self.bias_node, self.bias_index
        if self.input_scale is not None:
            bound = MAX_BIAS * (self.input_scale * self.scale.astype(np.float64))
            bias = np.clip(bias, np.minimum(-bound, self.bias()), np.maximum(bound, self.bias()))
        stored = node.inputs[index] if self.has_bias else None
        if stored is not None and constant_value(stored) is None:
            return self._set_integer_bias(bias, stored, names)
        value = np.array(bias, np.float32)
        if stored is None:
            while len(node.inputs) < index:
                node.inputs.append(gs.Variable.empty())
            made = self._new_bias(value, names)
            if len(node.inputs) > index:
                node.inputs[index] = made
            else:
                node.inputs.append(made)
            return self.bias()
        known = constant_value(stored)
        assert known is not None
        if known.size == value.size:
            value = value.reshape(known.shape)
        node.inputs[index] = gs.Constant(self._name_for(stored, names), _read_only(value))
        return self.bias()

    def _new_bias(self, value: NDArray[np.float32], names: Names) -> gs.Tensor:
        """A bias for a layer that has none: float for Conv, and for Gemm the int32 that its integer kernel asks for."""
        label = f"{self.node.name}_bias"
        if self.node.op == "Conv" or self.input_scale is None:
            return gs.Constant(names.free(label), _read_only(value))
        scale = constant_value(self.reader.inputs[1])
        assert scale is not None
        unit = (np.float32(self.input_scale) * scale).astype(np.float32)
        inputs = [
            gs.Constant(names.free(f"{label}_quantized"), _in_units(value.astype(np.float64), unit)),
            gs.Constant(names.free(f"{label}_scale"), _read_only(unit)),
        ]
        made = gs.Variable(names.free(f"{label}_dequantized"), np.dtype(np.float32), list(value.shape))
        attrs = {"axis": 0} if unit.ndim else {}
        self.graph.nodes.append(gs.Node("DequantizeLinear", names.free(f"{made.name}_node"), attrs, inputs, [made]))
        return made

    def _set_integer_bias(self, bias: NDArray[np.float64], stored: gs.Tensor, names: Names) -> NDArray[np.float64]:
        assert self.bias_node is not None
        reader = stored.inputs[0]
        scale = constant_value(reader.inputs[1])
        assert scale is not None
        integers = _in_units(bias, scale)
        label = self._name_for(reader.inputs[0], names)
        if len(stored.outputs) == 1 and id(stored) not in self.outputs:
            reader.inputs[0] = gs.Constant(label, integers)
        else:
            own = gs.Variable(names.free(stored.name), np.dtype(np.float32), list(integers.shape))
            inputs = [gs.Constant(label, integers), *reader.inputs[1:]]
            self.graph.nodes.append(gs.Node(reader.op, names.free(reader.name), dict(reader.attrs), inputs, [own]))
            self.bias_node.inputs[self.bias_index] = own
        return self.bias()

    def _name_for(self, old: gs.Tensor, names: Names) -> str:
        """The old constant's name where nobody else reads it, otherwise a free one."""
        alone = len(old.outputs) == 1 and id(old) not in self.outputs and isinstance(old, gs.Constant)
        return str(old.name) if alone else names.free(old.name)


def find_layers(student: Graph, teacher: Graph) -> tuple[list[Layer], list[tuple[str, str]]]:
    """Layers of the outermost graph in order, and (node, reason) of those that have no counterpart.

    Args:
        student: the quantised graph, sorted.
        teacher: the float graph.
    """
    outputs = frozenset(graph_output_ids(student))
    known = {t.name for node in teacher.nodes for t in node.outputs if t.name}
    inside = {t.name for t in tensors_read_inside(student)}
    found: list[Layer] = []
    skipped: list[tuple[str, str]] = []
    for node in student.nodes:
        if node.op not in _LAYERS or normal_domain(node) != "" or len(node.inputs) < 2:
            continue
        reader = _weight_reader(node)
        if reader is None:
            continue
        layer = _layer(student, node, reader, outputs, inside, known)
        if isinstance(layer, Layer):
            found.append(layer)
        else:
            skipped.append((node.name, layer))
    position = {id(layer.node): i for i, layer in enumerate(found)}
    for i, layer in enumerate(found):
        _join(layer, i, position, outputs, known)
    return found, skipped


def _join(layer: Layer, position: int, positions: Mapping[int, int], outputs: frozenset[int], known: set[str]) -> None:
    """Let ``layer`` aim at the sum that its output goes into, where the other operand holds no later layer."""
    tensor = layer.output
    while len(tensor.outputs) == 1 and id(tensor) not in outputs:
        reader = tensor.outputs[0]
        if reader.op not in ("QuantizeLinear", "DequantizeLinear"):
            break
        tensor = reader.outputs[0]
    if len(tensor.outputs) != 1 or id(tensor) in outputs or tensor.outputs[0].op != "Add":
        return
    add = tensor.outputs[0]
    other = add.inputs[1] if add.inputs[0] is tensor else add.inputs[0]
    target = _target(add.outputs[0], known)
    if other is tensor or target is None or target == layer.target or not _is_computed(other):
        return
    stack, seen = [other], set()
    while stack:
        source = stack.pop()
        if id(source) in seen:
            continue
        seen.add(id(source))
        for node in source.inputs:
            # Nested graphs read what the inputs do not show: there no promise about the order can be made.
            if positions.get(id(node), -1) >= position or any(True for _ in nested_graphs(node)):
                return
            stack.extend(node.inputs)
    layer.shortcut, layer.target = other, target


def _is_computed(tensor: gs.Tensor) -> bool:
    """False for a constant, also for a quantised one."""
    if len(tensor.inputs) == 1 and tensor.inputs[0].op == "DequantizeLinear":
        tensor = tensor.inputs[0].inputs[0]
    return constant_value(tensor) is None


def _weight_reader(node: gs.Node) -> gs.Node | None:
    """The DequantizeLinear of a stored int8 weight that is symmetric, or None."""
    producers = node.inputs[1].inputs
    if len(producers) != 1 or producers[0].op != "DequantizeLinear":
        return None
    reader = producers[0]
    values = [constant_value(t) for t in reader.inputs]
    if any(value is None for value in values) or values[0].dtype != np.int8:  # type: ignore[union-attr]
        return None
    if len(values) > 2 and np.any(values[2]):
        return None
    return reader


def _layer(
    graph: Graph, node: gs.Node, reader: gs.Node, outputs: frozenset[int], inside: set[str], known: set[str]
) -> Layer | str:
    """The layer, or why it cannot be one."""
    weight = reader.inputs[0]
    rank = len(weight.shape)
    if node.op != "Conv" and rank != 2:
        return "its weight is no matrix"
    if node.op == "Gemm" and (attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0):
        return "a Gemm with transA or alpha is not a plain layer"
    if node.op == "Gemm" and attribute(node, "beta", 1.0) != 1.0:
        return "a Gemm with beta is not a plain layer"
    output, bias_node, bias_index = node.outputs[0], node, 2
    if node.op == "MatMul":
        add = _bias_add(node, outputs)
        bias_node, bias_index = (None, 0) if add is None else add
        if bias_node is not None and _target(bias_node.outputs[0], known) is not None:
            output = bias_node.outputs[0]
    stored = bias_node.inputs[bias_index : bias_index + 1] if bias_node is not None else []
    if stored and stored[0].name and not _is_bias(stored[0]):
        return "its bias is computed"
    target = _target(output, known)
    if target is None:
        return f"the float model has no tensor {output.name!r} to compare with"
    scale = constant_value(reader.inputs[1])
    channels = weight.shape[{"Conv": 0, "Gemm": 0 if attribute(node, "transB", 0) else 1}.get(node.op, 1)]
    if scale is None or scale.size not in (1, channels):
        return "its weight is not quantised per output channel"
    shared = len(weight.outputs) > 1 or len(reader.outputs[0].outputs) > 1 or id(reader.outputs[0]) in outputs
    shared = shared or id(weight) in outputs or reader.outputs[0].name in inside or weight.name in inside
    axis = 1 if node.op == "Conv" else -1
    return Layer(
        graph,
        node,
        reader,
        output,
        axis,
        target,
        bias_node,
        bias_index,
        _input_scale(node),
        shared,
        outputs,
        None,
        target,
    )


def _bias_add(node: gs.Node, outputs: frozenset[int]) -> tuple[gs.Node, int] | None:
    """The Add behind a MatMul that adds one constant a channel, and which of its inputs that is."""
    product = node.outputs[0]
    if len(product.outputs) != 1 or product.outputs[0].op != "Add" or id(product) in outputs:
        return None
    add = product.outputs[0]
    index = 1 if add.inputs[0] is product else 0
    channels = node.inputs[1].inputs[0].inputs[0].shape[-1]
    return (add, index) if _bias_shape(add.inputs[index]) == (channels,) else None


def _bias_shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """Shape of a stored bias: a float constant, or an int32 constant behind a DequantizeLinear."""
    if not _is_bias(tensor):
        return None
    value = constant_value(tensor)
    if value is None:
        value = constant_value(tensor.inputs[0].inputs[0])
    return None if value is None else value.shape


def _is_bias(tensor: gs.Tensor) -> bool:
    """True for a float constant, and for an int32 constant behind a DequantizeLinear."""
    value = constant_value(tensor)
    if value is not None:
        return value.dtype == np.float32
    if len(tensor.inputs) != 1 or tensor.inputs[0].op != "DequantizeLinear":
        return False
    values = [constant_value(t) for t in tensor.inputs[0].inputs]
    return all(v is not None for v in values) and values[0].dtype == np.int32  # type: ignore[union-attr]


def _target(output: gs.Tensor, known: set[str]) -> str | None:
    """What the teacher calls ``output``: where a quantiser follows directly, the name went to its dequantised form."""
    for reader in output.outputs:
        if reader.op == "QuantizeLinear":
            integers = reader.outputs[0]
            names = [r.outputs[0].name for r in integers.outputs if r.op == "DequantizeLinear"]
            names.append(integers.name.removesuffix("_quantized"))
            for name in names:
                if name in known and output.name.startswith(f"{name}_float"):
                    return str(name)
    return str(output.name) if output.name in known else None


def _input_scale(node: gs.Node) -> float | None:
    producers = node.inputs[0].inputs
    if len(producers) != 1 or producers[0].op != "DequantizeLinear":
        return None
    value = constant_value(producers[0].inputs[1])
    return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


def _in_units(bias: NDArray[np.float64], scale: NDArray[np.float32]) -> NDArray[np.int32]:
    integers: NDArray[np.int32] = np.clip(np.rint(bias / scale.astype(np.float64)), -MAX_BIAS, MAX_BIAS).astype(
        np.int32
    )
    return _read_only(integers)


def _read_only(array: Array) -> Array:
    array = np.ascontiguousarray(array) if array.ndim else array
    array.flags.writeable = False
    return array


# ----------------------------------------------------------------------------------------------------------------------
# Judging


@dataclass(frozen=True)
class Mended:
    """What a layer got, and the relative squared error of its output on held-out samples.

    ``position`` counts what :func:`find_layers` finds; None stands for a weight or bias that stays.
    """

    position: int
    node: str
    integers: NDArray[np.int8] | None
    bias: NDArray[np.float64] | None
    before: float
    after: float

    def gain(self) -> str:
        """For the report."""
        return f"error at its output {decibels(self.before):.2f} -> {decibels(self.after):.2f} dB on held-out samples"


def mend(graph: Graph, teacher: Graph, changes: Sequence[Mended]) -> None:
    """Write ``changes`` into ``graph``, which is the one that they were found for, or a copy."""
    layers, _ = find_layers(graph, teacher)
    names = Names(graph)
    for change in changes:
        layer = layers[change.position]
        if change.integers is not None:
            layer.set_integers(change.integers)
        if change.bias is not None:
            layer.set_bias(change.bias, names)
    sort_nodes(graph)


def keep_best(
    start: Graph, teacher: Graph, changes: Sequence[Mended], data: Dataset, threads: int = 0
) -> tuple[Graph, int, float, float]:
    """``start`` with as many of ``changes`` applied, from the first on, as do the model's outputs no harm.

    All of them, unless the error of the outputs then rises by more than chance; else the first three quarters, half or
    quarter, or none. Each change made its own layer better on samples held out, and how rounding errors add up on the
    way to the outputs is all but random: of a network of fifty layers the same integers run by other kernels are 0.5 dB
    off. A change that is good on average would fail by chance, were the error asked to fall each time.

    Returns:
        A graph (``start`` itself where nothing is kept), how many changes it holds, and the relative squared error of
        the outputs on ``data`` before and after.
    """
    # With the integer kernels that will serve it, and as it is written: two draws of the same chance.
    levels: tuple[Optimization, ...] = ("extended", "disabled")
    with Judge(teacher, data, threads) as judge:
        before = judge.sample_errors(start, levels)
        for count in sorted({len(changes) * share // 4 for share in (1, 2, 3, 4)} - {0}, reverse=True):
            candidate = copy_graph(start)
            mend(candidate, teacher, changes[:count])
            after = judge.sample_errors(candidate, levels)
            if _no_worse(before, after):
                return candidate, count, before.relative, after.relative
    return start, 0, before.relative, before.relative


def _no_worse(before: SampleErrors, after: SampleErrors) -> bool:
    """True where the outputs are as good as before, for all that these samples can tell."""
    if not np.isfinite(after.relative):
        return False
    if len(after.errors) < _FEWEST_JUDGED:
        return after.relative < before.relative
    rise, deviation = after.rise(before)
    return rise < deviation and after.relative < _MOST_RISE * before.relative


# ----------------------------------------------------------------------------------------------------------------------
# Teacher and student together


class Lockstep:
    """Both networks, advancing from layer to layer.

    ::

        lockstep = Lockstep(student, layers, context, samples=256, reads=lambda layer: layer.output.name)
        for layer in layers:
            for found, expected, held_out in lockstep.pairs():   # of this layer, batch by batch
                ...
            # the layer may be changed now; the next one sees what it does

    Args:
        student: the quantised graph, sorted; its layers may be changed on the way.
        layers: in graph order.
        context: data, teacher, seed and threads.
        samples: most samples to use.
        reads: the student's tensor that a layer asks for; of the teacher it is always the layer's target.

    Raises:
        ModelError: the networks cannot be run in pieces.
    """

    def __init__(
        self,
        student: Graph,
        layers: Sequence[Layer],
        context: Context,
        *,
        samples: int,
        reads: Callable[[Layer], str],
    ) -> None:
        teacher, data = context.teacher, context.data
        assert teacher is not None and data is not None
        wanted = [[reads(layer), *((layer.shortcut.name,) if layer.shortcut is not None else ())] for layer in layers]
        expected = [[layer.target] for layer in layers]
        self._wanted = list(zip(wanted, expected, strict=True))
        limit = min(samples, samples_that_fit([(student, wanted), (teacher, expected)], data))
        self.samples = split_samples(data, context.seed, limit)
        batches = self.samples.feeds()
        feeds = [given for given, _ in batches]
        self.held = [held for _, held in batches]
        # The student as it will be served, with its integer kernels: that is several times faster, too.
        self.student = Advance(student, feeds, wanted, optimization="extended", threads=context.threads)
        self.teacher = Advance(teacher, feeds, expected, threads=context.threads)
        self._next = 0

    def pairs(self) -> Iterator[tuple[Array, Array, bool]]:
        """(student's tensor, what the layer should reproduce, held out?) of the next layer, for every batch."""
        (mine, theirs), self._next = self._wanted[self._next], self._next + 1
        for found, expected, held in zip(self.student.step(), self.teacher.step(), self.held, strict=True):
            aim = expected[theirs[0]]
            yield found[mine[0]], aim - found[mine[1]] if len(mine) > 1 else aim, held

    def counts(self) -> dict[str, int]:
        """How many samples were learned from and judged by, for the report."""
        return {"train": self.samples.train.samples, "held_out": self.samples.held_out.samples}


def require_teacher(name: str, graph: Graph, context: Context) -> None:
    """Raise where a pass of this kind cannot start on ``graph``.

    Raises:
        UsageError: there is no float model.
    """
    if context.teacher is None or context.teacher is graph:
        raise UsageError(f"{name} compares with the float model; run it in one recipe, behind insert_qdq")


def mismatch(found: Array, expected: Array) -> str | None:
    """Why two tensors of a layer cannot be compared, or None."""
    if found.shape != expected.shape:
        return f"its output is {list(found.shape)} where the float model's tensor is {list(expected.shape)}"
    return None


def unlike(error: float, signal: float) -> str | None:
    """Why a layer's target is not its target after all, from squared error and squared signal; None where it is.

    A pass between may have given a name to another tensor. Quantisation does not cost half of the signal.
    """
    if not np.isfinite(error) or not np.isfinite(signal):
        return "values at its output are not finite"
    if error == 0.0:
        return "the student computes what the float model does"
    if signal == 0.0 or error > 0.5 * signal:
        return "its output has little in common with the float model's tensor of that name"
    return None


def settle(
    graph: Graph, changes: Sequence[Mended], lockstep: Lockstep, context: Context, kind: str
) -> Iterator[Change | Refusal | Detail]:
    """Write what does the outputs good into ``graph`` and report it; ``kind`` names the changes."""
    teacher = context.teacher
    assert teacher is not None
    if lockstep.samples.overlap:
        context.warn("too few calibration samples to hold any out; changes were judged on what they were learned from")
    best, kept, before, after = keep_best(graph, teacher, changes, lockstep.samples.judging, context.threads)
    if best is not graph:
        replace_contents(graph, best)
    for change in changes[:kept]:
        yield Change(kind, change.node, change.gain())
    for change in changes[kept:]:
        yield Refusal(change.node, f"not {kind}: the error of the model's outputs rises by it")
    yield Detail("output_sqnr_db", {"before": _rounded(before), "after": _rounded(after), **lockstep.counts()})


def _rounded(error: float) -> float | None:
    """Decibels for the report; None stands for infinite, which JSON lacks."""
    value = decibels(error)
    return round(value, 3) if np.isfinite(value) else None
