"""A quantised model in floats whose quantisers can be switched on and off, one by one, within one session.

What a layer costs is asked of dozens of variants of one model. Each as a graph of its own would need a session of its
own, which takes longer than running it. Here every quantiser and every stored weight is written beside its float
counterpart, and a Boolean input of the graph chooses between them::

    T -> QuantizeLinear -> DequantizeLinear -> Where(flag, ., T) -> reader

So any variant is one run with other flags. With the flags of a whole placement it computes what the quantised graph
does, up to the rounding of the runtime's integer kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.graph import Graph, Names, attribute, constant_value, copy_graph, sort_nodes
from onnxcompress.quantization.affine import QParams
from onnxcompress.quantization.placement import Placement, Unit
from onnxcompress.quantization.qdq import class_qparams
from onnxcompress.quantization.variants import Variants
from onnxcompress.session import Feeds, Session
from onnxcompress.spill import spill_weights
from onnxcompress.targets import Role

__all__ = ["Simulation", "Switches"]

#: names of what is switched on
Switches = frozenset[str]


@dataclass(frozen=True)
class _Edge:
    """A reader of a tensor that may see it rounded."""

    flag: str
    tensor: str
    representative: str
    #: the node that reads; None for an output of the graph
    reader: str | None
    #: it moves values on, so that they are integers for it where they are so anywhere in their class
    moves: bool


class Simulation:
    """The model of ``variants`` with switches.

    Args:
        variants: the float graph and its ranges.
        student: the quantised graph; its stored weights and biases are the quantised ones, however they were rounded.
            Default: as :meth:`Variants.written` has them.
        threads: intra-op threads of the runtime; 0: its choice.
    """

    def __init__(self, variants: Variants, student: Graph | None = None, *, threads: int = 0) -> None:
        self.variants = variants
        self.placement = variants.placement
        self._graph = copy_graph(variants.graph)
        self._names = Names(self._graph)
        self._edges: list[_Edge] = []
        self._owners: dict[str, str] = {}  # flag of a constant -> node of the unit that it belongs to
        self._flags: list[gs.Variable] = []
        self._add_quantizers(class_qparams(self.placement, variants.ranges_of(self.placement)))
        self._add_constants(student if student is not None else variants.written())
        self._graph.inputs = [*self._graph.inputs, *self._flags]
        sort_nodes(self._graph)
        spill_weights(self._graph)
        # Nothing of the graph is to be fused into integers: the float operators are what is wanted.
        config = {"session.disable_quant_qdq": "1"}
        self._session = Session(self._graph, optimization="extended", threads=threads, config=config)

    # ---- which switches

    def of(self, placement: Placement) -> Switches:
        """The switches of ``placement``, which is one of ``variants``."""
        integer = {unit.node.name for unit in placement.integer_units}
        classes = {self.placement.classes[name] for name in placement.quantized if name in self.placement.classes}
        on = {flag for flag, owner in self._owners.items() if owner in integer}
        for edge in self._edges:
            if edge.representative not in classes:
                continue
            floats = placement.writes_float(edge.tensor)
            if not floats or edge.reader in integer or (edge.moves and edge.reader is not None):
                on.add(edge.flag)
        return frozenset(on)

    def weights(self, unit: Unit) -> Switches:
        """The stored constants of ``unit``: weight, bias, constant operands."""
        return frozenset(flag for flag, owner in self._owners.items() if owner == unit.node.name)

    def tensors(self, representative: str) -> Switches:
        """Every reader of a class of tensors that sees integers where all is integer that can be."""
        whole = self.of(self.placement)
        return frozenset(e.flag for e in self._edges if e.representative == representative and e.flag in whole)

    def alone(self, unit: Unit) -> Switches:
        """``unit`` as if nothing else were quantised: its constants, what it reads and what it writes."""
        read = {e.flag for e in self._edges if e.reader == unit.node.name and e.flag in self.of(self.placement)}
        written: set[str] = set()
        if not unit.keeps_float:
            names = {t.name for t in unit.outputs}
            written = {e.flag for e in self._edges if e.tensor in names}
        return self.weights(unit) | read | written

    # ---- running

    def run(self, feeds: Feeds, on: Switches) -> dict[str, NDArray[Any]]:
        """One batch with the switches ``on`` and no others."""
        flags = {flag.name: np.array(flag.name in on) for flag in self._flags}
        return self._session.run({**feeds, **flags})

    # ---- building

    def _flag(self, label: str) -> gs.Variable:
        flag = gs.Variable(self._names.free(f"switch_{label}"), np.dtype(np.bool_), [])
        self._flags.append(flag)
        return flag

    def _node(self, op: str, inputs: list[gs.Tensor], like: gs.Tensor, dtype: Any, attrs: dict[str, Any]) -> gs.Tensor:
        shape = list(like.shape) if like.shape is not None else None
        made = gs.Variable(self._names.free(f"{like.name}_{op}"), np.dtype(dtype), shape)
        self._graph.nodes.append(gs.Node(op, self._names.free(f"{made.name}_node"), attrs, inputs, [made]))
        return made

    def _add_quantizers(self, params: Mapping[str, QParams]) -> None:
        tensors = self._graph.tensors()
        readers = {name: list(tensors[name].outputs) for name in tensors}
        for representative, sources in self.placement.sources.items():
            found = params[representative]
            for name in sources:
                self._add_quantizer(tensors[name], readers[name], representative, found)

    def _add_quantizer(
        self, tensor: gs.Tensor, readers: Iterable[gs.Node], representative: str, params: QParams
    ) -> None:
        label = self._names.free(f"{tensor.name}_parameters")
        inputs = [gs.Constant(f"{label}_scale", params.scale), gs.Constant(f"{label}_zero", params.zero_point)]
        integers = self._node("QuantizeLinear", [tensor, *inputs], tensor, params.zero_point.dtype, {})
        rounded = self._node("DequantizeLinear", [integers, *inputs], tensor, np.float32, {})
        units = {unit.node.name: unit for unit in self.placement.units}
        for reader in {id(node): node for node in readers}.values():
            unit = units.get(reader.name)
            values = [i for i, t in enumerate(reader.inputs) if t is tensor]
            if unit is not None and unit.rule is not None and unit.rule.inputs is not None:
                values = [i for i in values if i in unit.rule.inputs]
            moves = unit is not None and unit.rule is not None and unit.rule.role in (Role.MOVEMENT, Role.ACTIVATION)
            if values:
                flag = self._flag(tensor.name)
                self._edges.append(_Edge(flag.name, tensor.name, representative, reader.name, moves))
                chosen = self._node("Where", [flag, rounded, tensor], tensor, np.float32, {})
                for index in values:
                    reader.inputs[index] = chosen
        if any(tensor is output for output in self._graph.outputs):
            self._switch_output(tensor, rounded, representative)

    def _switch_output(self, tensor: gs.Tensor, rounded: gs.Tensor, representative: str) -> None:
        """An output keeps its name, so what computes it gets another."""
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is None:
            return
        position = next(i for i, t in enumerate(maker.outputs) if t is tensor)
        before = gs.Variable(self._names.free(f"{tensor.name}_float"), tensor.dtype, tensor.shape)
        for node in list(tensor.outputs):
            for index, read in enumerate(node.inputs):
                if read is tensor:
                    node.inputs[index] = before
        maker.outputs[position] = before
        flag = self._flag(tensor.name)
        self._edges.append(_Edge(flag.name, tensor.name, representative, None, False))
        self._graph.nodes.append(
            gs.Node("Where", self._names.free(f"{tensor.name}_switch"), {}, [flag, rounded, before], [tensor])
        )

    def _add_constants(self, student: Graph) -> None:
        """Switch between the constants of each node and those that the node of that name has in ``student``."""
        twins = {node.name: node for node in student.nodes}
        integer = {unit.node.name for unit in self.placement.integer_units}
        made = {t.name: u.node.name for u in self.placement.integer_units for t in u.node.outputs}
        for node in list(self._graph.nodes):
            twin = twins.get(node.name)
            # The bias behind a matrix product is a constant of the product's unit.
            owner = (
                node.name if node.name in integer else next((made[t.name] for t in node.inputs if t.name in made), "")
            )
            if twin is None or not owner or twin.op != node.op or len(twin.inputs) < len(node.inputs):
                continue
            flag: gs.Variable | None = None
            for index, tensor in enumerate(twin.inputs):
                pair = _pair(node, twin, index, tensor)
                if pair is None or np.array_equal(*pair):
                    continue
                if flag is None:
                    flag = self._flag(owner)
                    self._owners[flag.name] = owner
                label = self._names.free(f"{node.name}_{index}")
                stored, quantised = (gs.Constant(f"{label}_{i}", value) for i, value in enumerate(pair))
                chosen = self._node("Where", [flag, quantised, stored], stored, np.float32, {})
                if index < len(node.inputs):
                    node.inputs[index] = chosen
                else:
                    node.inputs.append(chosen)


def _pair(
    node: gs.Node, twin: gs.Node, index: int, tensor: gs.Tensor
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """(float, quantised) value of a constant input; None where it is no float constant in both."""
    quantised = _dequantised(tensor)
    if quantised is None or quantised.dtype != np.float32:
        return None
    if index < len(node.inputs) and node.inputs[index].name:
        stored = constant_value(node.inputs[index])
    else:
        stored = np.zeros_like(quantised)  # a bias that the layer did not have
    if stored is None or stored.dtype != np.float32:
        return None
    if node.op == "Gemm" and index in (1, 2):  # its factors were multiplied into the stored values
        factor = np.float32(attribute(node, "alpha" if index == 1 else "beta", 1.0))
        if factor == 0:
            return None
        quantised = (quantised / factor).astype(np.float32)
    if stored.shape != quantised.shape:
        if stored.size not in (1, quantised.size):
            return None
        stored = np.broadcast_to(stored.reshape(-1), (quantised.size,)).reshape(quantised.shape)
    return stored, quantised


def _dequantised(tensor: gs.Tensor) -> NDArray[Any] | None:
    """A constant, or what a DequantizeLinear of constants makes."""
    value = constant_value(tensor)
    if value is not None:
        return value
    if len(tensor.inputs) != 1 or tensor.inputs[0].op != "DequantizeLinear":
        return None
    reader = tensor.inputs[0]
    parts = [constant_value(t) for t in reader.inputs if t.name]
    if len(parts) < 2 or any(part is None for part in parts):
        return None
    integers, scale = parts[0], parts[1]
    assert integers is not None and scale is not None
    axis = attribute(reader, "axis", 1)
    shape = [-1 if scale.ndim and i == axis % integers.ndim else 1 for i in range(integers.ndim)] if scale.ndim else []
    shifted = integers.astype(np.int32)
    if len(parts) > 2 and parts[2] is not None:
        shifted = shifted - (parts[2].astype(np.int32).reshape(shape) if parts[2].ndim else np.int32(parts[2]))
    result: NDArray[Any] = (shifted * scale.reshape(shape)).astype(np.float32)
    return result
