"""Which operators run as integers, and where the quantisers go: a minimum cut over the graph.

Every conversion costs time: a quantiser where a float tensor meets an integer consumer, a dequantiser where an integer
tensor meets a float one. An operator that runs as integers saves time. Which operators become integer is then a
minimum cut: one side is integer, the other float, and what is cut is paid. So no pair is left stranded around an
operator that gains less than its conversions cost, and a small float operator between integers does not drag its
neighbours back to float.

Parameters are shared across data movement: tensors that hold the same values form one class with one scale and zero
point, whose range is observed where the values arise (the *sources*).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.composites import silu
from onnxcompress.graph import Graph, attribute, constant_value, normal_domain, tensors_read_inside
from onnxcompress.quantization.affine import Range
from onnxcompress.quantization.mincut import MinCut
from onnxcompress.shapes import TensorType, infer_shapes, node_macs
from onnxcompress.targets import OperatorRule, Role, Target

__all__ = [
    "ALREADY",
    "NESTED",
    "Island",
    "Placement",
    "Unit",
    "activation_bounds",
    "costly_conversions",
    "excluded_reason",
    "explain",
    "find_islands",
    "place",
    "saved_nanoseconds",
    "why",
]

_IMAGE_CHANNELS = 3  # at most, of what counts as an image
_IMAGE_POSITIONS = 1024  # at least, of its first layer; on fewer nothing is lost that could be measured
_UNKNOWN_SIZE = 1000
_FOREVER = 1 << 60  # a capacity that no cut pays

#: operators of which the largest values decide
_PICKS_LARGEST = ("Softmax", "LogSoftmax", "ArgMax", "TopK", "Hardmax")
#: operators that hand on values one by one
_REARRANGES = (
    *("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Slice", "Split", "Concat", "Gather"),
    *("Cast", "Relu", "Clip", "Sigmoid", "Tanh", "Log"),
)

ALREADY = "it is quantised in the file already"
NESTED = "it is inside a nested graph, and nested graphs stay as they are"
_NO_GAIN = "converting its inputs and outputs would cost more time than it saves, for its neighbours are float"


@dataclass
class Unit:
    """A node that becomes integer or stays float as a whole, with the activation that folds into its quantiser.

    ``inputs`` are the tensors of values that enter (constants included; weights, shapes and indices are not values),
    ``outputs`` those that leave; both as the float graph has them.
    """

    node: gs.Node
    rule: OperatorRule | None
    inputs: tuple[gs.Tensor, ...]
    outputs: tuple[gs.Tensor, ...]
    #: why the unit can never be integer; None for a candidate
    reason: str | None
    #: Relu or Clip behind the node that only it feeds
    activation: gs.Node | None = None
    #: values outside of this interval never leave the unit (the activation's bounds)
    bounds: Range | None = None
    integer: bool = False
    #: written on the integers as they are, without scales of its own
    moves: bool = False

    @property
    def keeps_float(self) -> bool:
        """True where the integer kernel can write floats, so that float readers need no dequantiser.

        The runtime fuses a Relu or Clip into an integer operator only through a quantiser behind it.
        """
        return self.rule is not None and self.rule.float_output and self.activation is None


@dataclass
class Placement:
    """The answer of :func:`place`.

    Attributes:
        units: every node of the outermost graph, activations folded into their producers, in graph order.
        quantized: tensors that exist as integers, in the order in which they arise.
        classes: the representative of each quantised tensor's class of shared parameters.
        sources: per class, the tensors whose values have to be observed.
        bounds: per class, the interval that its range has to lie in, where an activation folds into a quantiser.
        producer: the unit that makes a tensor.
        consumers: the units that read a tensor as values (weights and shapes do not count).
    """

    target: Target
    units: list[Unit]
    types: Mapping[str, TensorType]
    producer: dict[str, Unit] = field(default_factory=dict)
    consumers: dict[str, list[Unit]] = field(default_factory=dict)
    quantized: dict[str, gs.Tensor] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    bounds: dict[str, Range] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()
    #: shapes that costs are estimated by
    sizes: Mapping[str, TensorType] = field(default_factory=dict)
    #: scale by class, once the graph is written
    scales: dict[str, float] = field(default_factory=dict)
    #: those of quantisers that took a Mul and Add of one constant a channel in
    absorbed: set[float] = field(default_factory=set)

    @property
    def integer_units(self) -> list[Unit]:
        """Units that run as integers."""
        return [unit for unit in self.units if unit.integer]

    def shares_parameters(self, unit: Unit) -> bool:
        """True where all values entering and leaving ``unit`` share parameters, so that bytes can be copied."""
        names = [t.name for t in (*unit.inputs, *unit.outputs)]
        return len({self.classes.get(name, name) for name in names}) == 1

    def peaks(self) -> frozenset[str]:
        """Sources of which the largest values alone decide: they get to a Softmax at the end of the graph."""
        bare, decided = set(self.outputs), set[str]()
        for unit in reversed(self.units):
            made = {t.name for t in unit.outputs}
            if unit.node.op in _PICKS_LARGEST and made & (bare | decided):
                decided.update(t.name for t in unit.inputs)
            elif unit.node.op in _REARRANGES or (unit.node.op == "Add" and any(_is_constant(t) for t in unit.inputs)):
                bare.update(t.name for t in unit.inputs if made & bare)
                decided.update(t.name for t in unit.inputs if made & decided)
        classes = {self.classes[name] for name in decided if name in self.classes}
        return frozenset(name for key in classes for name in self.sources.get(key, ()))

    def writes_float(self, name: str) -> bool:
        """True where tensor ``name`` holds floats as its producer wrote them, whatever integers are made of it."""
        unit = self.producer.get(name)
        if unit is None or not unit.integer:
            return True
        if not unit.keeps_float:
            return False
        return name in self.outputs or any(not reader.integer for reader in self.consumers.get(name, []))

    def borders(self) -> tuple[set[str], set[str]]:
        """Classes whose tensors are (quantised, dequantised) at run time, because integers and floats meet there."""
        quantize: set[str] = set()
        dequantize: set[str] = set()
        for name, representative in self.classes.items():
            if self.writes_float(name):
                quantize.add(representative)
            elif name in self.outputs or any(not reader.integer for reader in self.consumers.get(name, [])):
                dequantize.add(representative)
        return quantize, dequantize


def place(
    graph: Graph,
    target: Target,
    *,
    exclude_nodes: Iterable[str] = (),
    exclude_operators: Iterable[str] = (),
    types: Mapping[str, TensorType] | None = None,
    sizes: Mapping[str, TensorType] | None = None,
) -> Placement:
    """Decide which operators of the outermost graph become integer on ``target``.

    Args:
        graph: the float model, BatchNormalization folded for best results.
        target: the rule table.
        exclude_nodes: node names that stay float; ``*``, ``?`` and ``[...]`` match as in a shell.
        exclude_operators: operator types that stay float.
        types: shapes and types, where they are known already.
        sizes: those of a real sample, by which costs are estimated; default: ``types``, symbols counted as 1.
    """
    types = infer_shapes(graph) if types is None else types
    sizes = types if sizes is None else sizes
    excluded = _Exclusions(exclude_nodes, exclude_operators)
    macs = node_macs(graph, sizes)
    placement = Placement(target, _units(graph, target, types, excluded), types, sizes=sizes)
    placement.outputs = frozenset(t.name for t in graph.outputs)
    for unit in placement.units:
        for tensor in unit.outputs:
            placement.producer[tensor.name] = unit
        for tensor in unit.inputs:
            placement.consumers.setdefault(tensor.name, []).append(unit)
        # What a node reads beside its values (an index, a weight that is computed) it reads as it is.
        values = {id(t) for t in unit.inputs}
        for tensor in unit.node.inputs:
            if tensor.name and id(tensor) not in values:
                placement.consumers.setdefault(tensor.name, []).append(_float_reader(unit.node))
    for name in _names_read_inside(graph):
        placement.consumers.setdefault(name, []).append(_float_reader(gs.Node("Nested")))
    _cut(placement, macs, {t.name for t in graph.inputs})
    _drop_regions_without_weights(placement)
    _share_parameters(placement, graph)
    return placement


def explain(
    graph: Graph,
    target: Target,
    *,
    exclude_nodes: Iterable[str] = (),
    exclude_operators: Iterable[str] = (),
    sizes: Mapping[str, TensorType] | None = None,
) -> list[tuple[str, str, bool, str]]:
    """(node name, operator, integer?, reason) for every node, nested graphs included; ``sizes`` as in :func:`place`."""
    placement = place(graph, target, exclude_nodes=exclude_nodes, exclude_operators=exclude_operators, sizes=sizes)
    answer: list[tuple[str, str, bool, str]] = []
    for unit in placement.units:
        answer.append((unit.node.name, unit.node.op, unit.integer, why(unit)))
        if unit.activation is not None:
            note = f"folds into the quantiser behind {unit.node.name}" if unit.integer else f"{unit.node.name} is float"
            answer.append((unit.activation.name, unit.activation.op, unit.integer, note))
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                answer.extend((inner.name, inner.op, False, NESTED) for inner in value.nodes)
    return answer


def why(unit: Unit) -> str:
    """One phrase: what the unit becomes, or why it stays float."""
    if unit.integer and unit.rule is not None:
        return f"becomes {unit.rule.integer_ops[0]}"
    return unit.reason or _NO_GAIN


# ----------------------------------------------------------------------------------------------------------------------
# What a placement is estimated to be worth


def saved_nanoseconds(placement: Placement, macs: Mapping[str, int]) -> float:
    """Estimated time that a run saves over floats, conversions paid; only proportions mean something.

    Args:
        placement: from :func:`place`.
        macs: multiply-accumulates by node, see :func:`onnxcompress.shapes.node_macs`.
    """
    gain = sum(_gain(unit, placement, macs) for unit in placement.integer_units)
    return gain - sum(_conversion_cost(name, placement) for name in placement.quantized)


def costly_conversions(placement: Placement) -> list[tuple[str, float]]:
    """(tensor, estimated nanoseconds) of every conversion between integers and floats, the costliest first."""
    costs = [(name, _conversion_cost(name, placement)) for name in placement.quantized]
    return sorted((entry for entry in costs if entry[1] > 0), key=lambda entry: -entry[1])


def _conversion_cost(name: str, placement: Placement) -> float:
    size, costs = _size(name, placement.sizes), placement.target.costs
    if placement.writes_float(name):
        return costs.quantize * size + costs.node
    readers = [reader for reader in placement.consumers.get(name, []) if not _reads_in_silu(reader)]
    floats = sum(not reader.integer for reader in readers) + (name in placement.outputs)
    return floats * (costs.dequantize * size + costs.node)


@dataclass(frozen=True)
class Island:
    """A connected region of integer units between floats.

    Attributes:
        units: in graph order.
        gain: nanoseconds that its operators are estimated to save.
        conversions: nanoseconds that its borders are estimated to cost.
    """

    units: tuple[Unit, ...]
    gain: float
    conversions: float


def find_islands(placement: Placement, macs: Mapping[str, int]) -> list[Island]:
    """The regions of integer units that are connected by integer tensors, in graph order."""
    roots = _regions(placement)
    members: dict[int, list[Unit]] = {}
    for unit in placement.integer_units:
        members.setdefault(roots[id(unit)], []).append(unit)
    islands = []
    for units in members.values():
        names = dict.fromkeys(t.name for unit in units for t in (*unit.inputs, *unit.outputs))
        conversions = sum(_conversion_cost(name, placement) for name in names if name in placement.quantized)
        islands.append(Island(tuple(units), sum(_gain(u, placement, macs) for u in units), conversions))
    return islands


# ----------------------------------------------------------------------------------------------------------------------
# Units


def excluded_reason(node: gs.Node, nodes: Iterable[str], operators: Iterable[str]) -> str | None:
    """Why the options ``exclude_nodes`` and ``exclude_operators`` of a pass leave ``node`` alone, or None."""
    return _Exclusions(nodes, operators).reason(node)


class _Exclusions:
    def __init__(self, nodes: Iterable[str], operators: Iterable[str]) -> None:
        nodes = list(nodes)
        self._exact = {name for name in nodes if not any(c in name for c in "*?[")}
        self._patterns = [name for name in nodes if name not in self._exact]
        self._verbatim = set(nodes)  # a name may itself hold a bracket
        self._operators = set(operators)

    def reason(self, node: gs.Node) -> str | None:
        if node.op in self._operators:
            return f"operator {node.op} is excluded"
        if node.name in self._verbatim or any(fnmatchcase(node.name, p) for p in self._patterns):
            return "it is excluded by name"
        return None


def _units(graph: Graph, target: Target, types: Mapping[str, TensorType], excluded: _Exclusions) -> list[Unit]:
    outputs = {id(t) for t in graph.outputs}
    inner = _names_read_inside(graph)
    folded: set[int] = set()
    units = []
    for node in graph.nodes:
        if id(node) in folded or (node.op == "Constant" and normal_domain(node) == ""):
            continue  # a Constant node is a constant operand of its readers
        rule = target.rules.get(node.op) if normal_domain(node) == "" else None
        inputs, results = _values(node, rule), tuple(t for t in node.outputs if t.name)
        reason = _float_reason(node, rule, inputs, results, target, types, graph.opset, excluded)
        unit = Unit(node, rule, inputs, results, reason)
        activation = _folding_activation(node, rule, target, outputs, inner, excluded)
        if activation is not None:
            unit.activation, unit.bounds = activation, activation_bounds(activation)
            unit.outputs = (activation.outputs[0],)
            folded.add(id(activation))
        units.append(unit)
    return units


def _values(node: gs.Node, rule: OperatorRule | None) -> tuple[gs.Tensor, ...]:
    """Input tensors that hold values; every input where no rule says which."""
    if rule is None or rule.inputs is None:
        return tuple(t for t in node.inputs if t.name)
    return tuple(node.inputs[i] for i in rule.inputs if i < len(node.inputs) and node.inputs[i].name)


def _float_reason(
    node: gs.Node,
    rule: OperatorRule | None,
    inputs: tuple[gs.Tensor, ...],
    outputs: tuple[gs.Tensor, ...],
    target: Target,
    types: Mapping[str, TensorType],
    opset: int,
    excluded: _Exclusions,
) -> str | None:
    """Why ``node`` can never be integer, or None."""
    if node.op in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
        return ALREADY
    if rule is None:
        if normal_domain(node) != "":
            return f"it is an operator of domain {node.domain!r}, which is not known"
        return target.float_reasons.get(node.op, f"no integer form of {node.op} is known on {target.name}")
    reason = excluded.reason(node)
    if reason is not None:
        return reason
    if _touches_quantizers(node):
        return ALREADY
    for tensor in (*inputs, *outputs):
        known = types.get(tensor.name)
        dtype = tensor.dtype if isinstance(tensor, gs.Constant) else known.dtype if known is not None else None
        if dtype is not None and dtype != np.float32:
            return f"it computes in {np.dtype(dtype).name if not isinstance(dtype, int) else dtype}, not in float32"
        if dtype is None and rule.weight is None:
            return f"the type of tensor {tensor.name!r} is not known"
    if inputs and all(_is_constant(t) for t in inputs):
        if all(_is_constant(t) for t in node.inputs if t.name):
            return "its inputs are constant; fold_constants removes it"
        return "the values that it moves are constant" + (
            "; quantize_embeddings stores large tables in int8" if node.op == "Gather" else ""
        )
    if opset < rule.since:
        return f"the 8-bit form of {node.op} needs opset {rule.since}, and the model has {opset}"
    if rule.role is Role.ACTIVATION and activation_bounds(node) is None:
        return "its bounds are not constant"
    if rule.role is Role.ACTIVATION and opset < 12:
        return f"a Clip of integers needs opset 12, and the model has {opset}"
    return rule.refuse(node, types, opset)


def _is_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) or constant_value(tensor) is not None


def _touches_quantizers(node: gs.Node) -> bool:
    if any(p.op == "DequantizeLinear" for t in node.inputs for p in t.inputs):
        return True
    return any(c.op == "QuantizeLinear" for t in node.outputs for c in t.outputs)


def _folding_activation(
    node: gs.Node,
    rule: OperatorRule | None,
    target: Target,
    outputs: set[int],
    inner: set[str],
    excluded: _Exclusions,
) -> gs.Node | None:
    """The Relu or Clip that alone reads the only output of ``node`` and whose bounds can end a quantiser's range."""
    if rule is not None and rule.role in (Role.MOVEMENT, Role.ACTIVATION):
        return None
    named = [t for t in node.outputs if t.name]
    if len(named) != 1 or len(named[0].outputs) != 1 or id(named[0]) in outputs or named[0].name in inner:
        return None
    follower = named[0].outputs[0]
    follower_rule = target.rules.get(follower.op) if normal_domain(follower) == "" else None
    if follower_rule is None or follower_rule.role is not Role.ACTIVATION or follower.inputs[0] is not named[0]:
        return None
    bounds = activation_bounds(follower)
    if bounds is None or not bounds.low <= 0 <= bounds.high or bounds.low == bounds.high:
        return None
    if excluded.reason(follower) is not None or _touches_quantizers(follower):
        return None
    return follower


def activation_bounds(node: gs.Node) -> Range | None:
    """The interval that Relu or Clip maps to, its ends possibly infinite; None where it is not constant."""
    if node.op == "Relu":
        return Range(0.0, np.inf)
    ends = []
    for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        if len(node.inputs) > index and node.inputs[index].name:
            value = constant_value(node.inputs[index])
            if value is None or value.size != 1:
                return None
            ends.append(float(value.reshape(-1)[0]))
        else:
            ends.append(float(attribute(node, name, default)))
    return Range(*ends) if ends[0] <= ends[1] else None


def _names_read_inside(graph: Graph) -> set[str]:
    return {tensor.name for tensor in tensors_read_inside(graph) if tensor.name}


def _float_reader(node: gs.Node) -> Unit:
    """A stand-in for whatever reads a tensor as it is: inputs that are not values, nested graphs."""
    return Unit(node, None, (), (), "it reads the tensor as it is")


# ----------------------------------------------------------------------------------------------------------------------
# The cut


def _cut(placement: Placement, macs: Mapping[str, int], inputs: set[str]) -> None:
    """Set ``integer`` on the units; ``inputs`` are the graph's.

    The source's side of the cut is the integer one, so that ties stay float.
    """
    cut, costs = MinCut(), placement.target.costs
    vertex = {id(u): cut.vertex() if u.reason is None else cut.SINK for u in placement.units}
    for unit in placement.units:
        if unit.reason is None:
            gain = _gain(unit, placement, macs)
            cut.edge(cut.SOURCE, vertex[id(unit)], _picoseconds(gain))
            cut.edge(vertex[id(unit)], cut.SINK, _picoseconds(-gain))
    tensors = dict.fromkeys([*placement.producer, *placement.consumers])
    for name in tensors:
        readers = placement.consumers.get(name, [])
        unit_or_none = placement.producer.get(name)
        maker = cut.SINK if unit_or_none is None else vertex[id(unit_or_none)]
        if unit_or_none is None and name not in inputs:
            continue  # a constant operand is quantised ahead of time
        size = _size(name, placement.sizes)
        ends = {vertex.get(id(reader), cut.SINK) for reader in readers} - {cut.SINK}
        writes_floats = unit_or_none is not None and unit_or_none.keeps_float
        if maker != cut.SINK and not writes_floats:
            # The runtime gives every float reader a dequantiser of its own, so each of them is paid for.
            for reader in [reader for reader in readers if not _reads_in_silu(reader)]:
                end, cost = vertex.get(id(reader), cut.SINK), costs.dequantize
                if reader.node.op == "HardSwish" and unit_or_none is not None and unit_or_none.node.op == "Conv":
                    cost += costs.unfused
                cut.edge(maker, end, _picoseconds(cost * size + costs.node))
            if name in placement.outputs:
                cut.edge(maker, cut.SINK, _picoseconds(costs.dequantize * size + costs.node))
        if ends:
            quantize = cut.vertex()
            cut.edge(quantize, maker, _picoseconds(costs.quantize * size + costs.node))
            for end in ends:
                cut.edge(end, quantize, _FOREVER)
    for before, after, size in _through_functions(placement):
        for tail, head in ((before, after), (after, before)):
            cut.edge(vertex[id(tail)], vertex[id(head)], _picoseconds(costs.layout * size))
    integer = cut.source_side()
    for unit in placement.units:
        unit.integer = unit.reason is None and vertex[id(unit)] in integer


def _through_functions(placement: Placement) -> Iterator[tuple[Unit, Unit, int]]:
    """(what a SiLU or HardSwish reads from, what reads it, elements) where both could be integer.

    It keeps the layout of its input, so where only one of both is integer, the layout changes at the other.
    """
    for unit in placement.units:
        if unit.reason is None or unit.node.op not in ("Mul", "HardSwish"):
            continue
        found = silu(unit.node) if unit.node.op == "Mul" else (unit.node, unit.node)
        if found is None:
            continue
        source, result = found[0].inputs[0], found[1].outputs[0]
        maker = placement.producer.get(source.name)
        if maker is None or maker.reason is not None:
            continue
        for reader in placement.consumers.get(result.name, []):
            if reader.rule is not None and reader.reason is None and reader.node.op in ("Conv", "Mul"):
                yield maker, reader, _size(source.name, placement.sizes)


def _drop_regions_without_weights(placement: Placement) -> None:
    """Turn back to float what is integer without a convolution or matrix product among it.

    Element-wise integers save little, and every one of them rounds.
    """
    roots = _regions(placement)
    worth = {
        roots[id(unit)] for unit in placement.integer_units if unit.rule is not None and unit.rule.role is Role.COMPUTE
    }
    for unit in placement.integer_units:
        if roots[id(unit)] not in worth:
            unit.integer = False
            unit.reason = "no convolution or matrix product is integer next to it"


def _regions(placement: Placement) -> dict[int, int]:
    """By ``id()`` of each integer unit, what stands for the region of integer units that it is connected with."""
    parent = {id(unit): id(unit) for unit in placement.integer_units}

    def find(key: int) -> int:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for unit in placement.integer_units:
        for tensor in unit.outputs:
            for reader in placement.consumers.get(tensor.name, []):
                if reader.integer:
                    parent[find(id(reader))] = find(id(unit))
    return {key: find(key) for key in parent}


def _gain(unit: Unit, placement: Placement, macs: Mapping[str, int]) -> float:
    assert unit.rule is not None
    costs = placement.target.costs
    if unit.rule.role is Role.COMPUTE:
        known = macs.get(unit.node.name)
        if known is None:
            known = _UNKNOWN_SIZE * _UNKNOWN_SIZE
        if unit.node.op == "Conv":
            return _gain_of_convolution(unit, placement, known)
        return known * costs.mac + 2 * costs.node
    size = max((_size(t.name, placement.sizes) for t in (*unit.inputs, *unit.outputs)), default=1)
    readers = [r for t in unit.outputs for r in placement.consumers.get(t.name, [])]
    if len(unit.inputs) == 1 and unit.rule.role is Role.ARITHMETIC and not readers:
        # An element-wise function at the very end: as fast after the dequantiser, and more accurate.
        return unit.rule.gain * (size - min(_size(t.name, placement.sizes) for t in unit.outputs))
    return unit.rule.gain * size


def _gain_of_convolution(unit: Unit, placement: Placement, macs: int) -> float:
    costs = placement.target.costs
    weight = unit.node.inputs[1].shape
    if weight is None:
        return macs * costs.mac + 2 * costs.node
    if attribute(unit.node, "group", 1) != 1 and weight[1] == 1:
        return macs * costs.depthwise_mac
    taps = prod(weight[2:])
    known, lost = placement.sizes.get(unit.outputs[0].name), 0.0
    if taps > 1 and weight[1] <= _IMAGE_CHANNELS and known is not None and known.shape is not None:
        positions = [d for d in known.shape[2:] if isinstance(d, int)]
        if len(positions) == len(weight) - 2 and prod(positions) >= _IMAGE_POSITIONS:
            lost = taps * prod(positions) * costs.tap
    # What a first layer loses is not held against it: it becomes what its neighbours are.
    return max(macs * costs.mac - lost, 0.0) + 2 * costs.node


def _reads_in_silu(unit: Unit) -> bool:
    """True for the Sigmoid of a SiLU: it reads what the product reads, as one operator does; see composites."""
    return unit.node.op == "Sigmoid" and not unit.integer and silu(unit.node) is not None


def _picoseconds(nanoseconds: float) -> int:
    return max(int(nanoseconds * 1000), 0)


def _size(name: str, types: Mapping[str, TensorType]) -> int:
    known = types.get(name)
    if known is None or known.shape is None:
        return _UNKNOWN_SIZE
    return prod(d if isinstance(d, int) else 1 for d in known.shape)


# ----------------------------------------------------------------------------------------------------------------------
# Shared parameters


def _share_parameters(placement: Placement, graph: Graph) -> None:
    tensors = {t.name: t for t in graph.inputs}
    for unit in placement.units:
        tensors.update((t.name, t) for t in unit.outputs)
    for name, tensor in tensors.items():
        if _is_quantized(name, placement):
            placement.quantized[name] = tensor
    parent = {name: name for name in placement.quantized}

    def find(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for unit in placement.integer_units:
        if unit.rule is not None and unit.rule.role in (Role.MOVEMENT, Role.ACTIVATION):
            unit.moves = True
            for tensor in unit.outputs:
                parent[find(tensor.name)] = find(unit.inputs[0].name)
    concats = [unit for unit in placement.integer_units if unit.node.op == "Concat"]
    for unit in concats:
        for name in _sharing_inputs(unit, placement):
            parent[find(name)] = find(unit.outputs[0].name)
    placement.classes = {name: find(name) for name in placement.quantized}
    for unit in concats:
        unit.moves = unit.activation is None and placement.shares_parameters(unit)
    for name, representative in placement.classes.items():
        maker = placement.producer.get(name)
        if maker is not None and maker.integer and maker.moves:
            continue
        placement.sources.setdefault(representative, []).append(name)
        if maker is not None and maker.bounds is not None:
            known = placement.bounds.get(representative, Range(-np.inf, np.inf))
            placement.bounds[representative] = known.clipped(maker.bounds.low, maker.bounds.high)


def _is_quantized(name: str, placement: Placement) -> bool:
    unit = placement.producer.get(name)
    if unit is not None and unit.integer and not unit.keeps_float:
        return True
    return any(reader.integer for reader in placement.consumers.get(name, []))


def _sharing_inputs(concat: Unit, placement: Placement) -> list[str]:
    """Inputs of a Concat that take its output's parameters, which saves rounding twice and lets bytes be copied.

    Only tensors that nothing else reads: another reader would lose resolution. An input with a folded activation takes
    part only where every input ends in the same bounds, for a wider range would no longer fold the activation.
    """
    makers = [placement.producer.get(t.name) for t in concat.inputs]
    bounds = [None if maker is None else maker.bounds for maker in makers]
    same = all(b == bounds[0] for b in bounds)
    sharing = []
    for tensor, maker, bound in zip(concat.inputs, makers, bounds, strict=True):
        if maker is None or not maker.integer or maker.moves or tensor.name in placement.outputs:
            continue
        if tensor.name not in placement.quantized or any(r is not concat for r in placement.consumers[tensor.name]):
            continue
        if bound is None or same:
            sharing.append(tensor.name)
    return sharing
