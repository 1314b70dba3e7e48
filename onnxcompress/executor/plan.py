"""An order of execution that is resolved once.

Every tensor has a slot in a list of values, every node is a step: a kernel, the slots that it reads and those that it
fills. What depends on constants alone is computed when the plan is made. What depends on nothing but the shapes of the
inputs (the shape arithmetic that exporters write) is computed once for each combination of input shapes; the steps that
are left for those shapes find it in their slots. A value is dropped after its last use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.errors import ModelError
from onnxcompress.executor.operators_quantize import fake_quantizer, quantizes
from onnxcompress.executor.spec import LATEST, Kernel, Operator, Spec, Unsupported, as_tensor
from onnxcompress.executor.table import OPERATORS
from onnxcompress.graph import Graph, constant_value, first_output, nested_graphs, normal_domain

__all__ = ["Plan", "Step", "build_kernel", "needed_nodes", "refusal", "run_step"]

#: combinations of input shapes that are remembered
_REMEMBERED = 32

#: operators that read the shape of their input and not its values
_OF_SHAPE = ("Shape", "Size")


@dataclass(frozen=True)
class Step:
    """One node, ready to run. Slot 0 holds None, for inputs that are left out."""

    node: gs.Node
    operator: Operator
    run: Kernel
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    #: positions among the inputs that have to become numbers first
    convert: tuple[int, ...] = ()
    #: slots that nobody reads afterwards
    dead: tuple[int, ...] = ()


def build_kernel(node: gs.Node, opset: int) -> tuple[Operator, Kernel]:
    """The operator of ``node`` and its kernel.

    Raises:
        ModelError: the node cannot be executed; the line names it and says why.
    """
    try:
        return _build(node, opset)
    except Unsupported as error:
        raise refusal(node, str(error)) from error


def _build(node: gs.Node, opset: int) -> tuple[Operator, Kernel]:
    if (
        node.op == "QuickGelu" and node.domain == "com.microsoft" and "alpha" in node.attrs
    ):  # SiLU, as insert_qdq has it
        return OPERATORS["Swish"], OPERATORS["Swish"].build(Spec(node, opset))
    if normal_domain(node) != "":
        raise Unsupported(f"operators of the domain {node.domain!r} are not executed")
    if any(True for _ in nested_graphs(node)):
        raise Unsupported("control flow is not executed")
    operator = OPERATORS.get(node.op)
    if operator is None:
        raise Unsupported("the operator is not in the table")
    if opset < 7:
        raise Unsupported(f"opset {opset} is older than 7")
    if not _is_known(node.op, opset):
        raise Unsupported(f"the operator as of opset {opset} is not in the table, which knows it up to {LATEST}")
    spec = Spec(node, opset)
    kernel = operator.build(spec)
    if spec.unread():
        raise Unsupported(f"attribute {spec.unread()[0]!r} is not executed")
    return operator, kernel


@cache
def _is_known(op: str, opset: int) -> bool:
    """True where the operator of ``opset`` was read for the table, or differs from it in the types that it takes."""
    try:
        schema = onnx.defs.get_schema(op, opset)
        if schema.since_version <= LATEST:
            return True
        known = onnx.defs.get_schema(op, LATEST)
    except onnx.defs.SchemaError:
        return False

    def meaning(of: Any) -> Any:
        attributes = {name: (a.type, a.required, str(a.default_value)) for name, a in of.attributes.items()}
        return " ".join(of.doc.split()), attributes, [i.name for i in of.inputs], [o.name for o in of.outputs]

    return bool(meaning(schema) == meaning(known))


def refusal(node: gs.Node, reason: str) -> ModelError:
    """The error that names ``node``."""
    name = node.name or first_output(node)
    return ModelError(f"node {name!r} ({node.op}) cannot be executed on torch: {reason}")


def needed_nodes(graph: Graph, outputs: Sequence[gs.Tensor]) -> list[gs.Node]:
    """The nodes that ``outputs`` depend on, in the order of the graph, which is sorted."""
    needed: set[int] = set()
    stack = list(outputs)
    while stack:
        for node in stack.pop().inputs:
            if id(node) not in needed:
                needed.add(id(node))
                stack.extend(node.inputs)
    return [node for node in graph.nodes if id(node) in needed]


def _fuse_pairs(nodes: Sequence[gs.Node], outputs: set[int]) -> tuple[dict[int, tuple[gs.Tensor, Kernel]], set[int]]:
    """({id of a DequantizeLinear: what it and its QuantizeLinear read, one kernel for both}, ids of the latter)."""
    fused: dict[int, tuple[gs.Tensor, Kernel]] = {}
    done: set[int] = set()
    for node in nodes:
        if node.op != "QuantizeLinear" or normal_domain(node) != "" or id(node.outputs[0]) in outputs:
            continue
        readers = node.outputs[0].outputs
        kernels = [fake_quantizer(node, reader) for reader in readers]
        if readers and all(kernels) and not isinstance(node.inputs[0], gs.Constant):
            done.add(id(node))
            fused |= {id(r): (node.inputs[0], k) for r, k in zip(readers, kernels, strict=True) if k is not None}
    return fused, done


def run_step(step: Step, values: list[Any]) -> None:
    """Run one step on ``values``."""
    arguments = [values[slot] for slot in step.inputs]
    for position in step.convert:
        arguments[position] = _numbers(arguments[position])
    try:
        result = step.run(*arguments)
    except Unsupported as error:
        raise refusal(step.node, str(error)) from error
    except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError) as error:
        raise refusal(step.node, f"torch says: {' '.join(str(error).split())[:200]}") from error
    if len(step.outputs) == 1 and not isinstance(result, tuple):
        values[step.outputs[0]] = result
    else:
        for slot, value in zip(step.outputs, result, strict=False):
            values[slot] = value
    for slot in step.dead:
        values[slot] = None


def _on_one_device(kernel: Kernel) -> Kernel:
    """``kernel`` with tensors on the processor moved to where the others are."""

    def run(*arguments: Any) -> Any:
        devices = {a.device for a in arguments if isinstance(a, Tensor) and a.device.type != "cpu"}
        if not devices:
            return kernel(*arguments)
        device = devices.pop()
        return kernel(*(a.to(device) if isinstance(a, Tensor) else a for a in arguments))

    return run


def _shapes(names: Iterable[str], feeds: Mapping[str, Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(feeds[name].shape)) for name in names if name in feeds)


def _numbers(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


class Plan:
    """How to compute ``outputs`` of a graph.

    Args:
        graph: sorted; it is not changed.
        outputs: the tensors to compute.
        parameters: {id of a constant or of a DequantizeLinear's weight: what trains in its place}.
        masters: {id of a DequantizeLinear node: the kernel that replaces it}.
        device: where tensors are computed; what only has to do with shapes stays on the processor.

    Raises:
        ModelError: a node cannot be executed.
    """

    def __init__(
        self,
        graph: Graph,
        outputs: Sequence[gs.Tensor],
        parameters: Mapping[int, Tensor],
        masters: Mapping[int, Kernel],
        device: Any = "cpu",
    ) -> None:
        self._graph = graph
        self._parameters = parameters
        self._device = device
        self._slots: dict[int, int] = {}
        self._keep: list[Any] = []  # ids are those of living objects
        self._values: list[Any] = [None]
        #: slots whose value depends on constants alone; on shapes alone; whose shape depends on input shapes alone
        self._fixed: set[int] = {0}
        self._static: set[int] = {0}
        self._shaped: set[int] = {0}
        self._carried: set[int] = set()
        self.inputs = {tensor.name: self._slot(tensor) for tensor in graph.inputs}
        self._shaped |= set(self.inputs.values())
        self._steps: list[Step] = []
        nodes = needed_nodes(graph, outputs)
        self._fused, done = _fuse_pairs(nodes, {id(tensor) for tensor in outputs})
        for node in nodes:
            if id(node) not in done:
                self._add(node, masters)
        self.outputs = [self._slot(tensor) for tensor in outputs]
        self._known: OrderedDict[Any, tuple[list[Step], list[Any]]] = OrderedDict()

    # -- making -----------------------------------------------------------------------------------------------------

    def _slot(self, tensor: gs.Tensor) -> int:
        if not tensor.name and not isinstance(tensor, gs.Constant):
            return 0
        slot = self._slots.get(id(tensor))
        if slot is not None:
            return slot
        slot = self._slots[id(tensor)] = len(self._values)
        self._keep.append(tensor)
        self._values.append(None)
        if isinstance(tensor, gs.Constant):
            self._shaped.add(slot)
            if id(tensor) in self._parameters:
                self._values[slot] = self._parameters[id(tensor)]
            else:
                self._fixed.add(slot)
                self._static.add(slot)
        return slot

    def _constant(self, tensor: gs.Tensor, node: gs.Node) -> None:
        """Give the slot of a constant that does not train its value."""
        slot = self._slot(tensor)
        if not isinstance(tensor, gs.Constant) or self._values[slot] is not None:
            return
        array = constant_value(tensor)
        if array is None:
            raise refusal(node, f"constant {tensor.name!r} holds text or numbers below one byte")
        try:
            value = as_tensor(array)
        except Unsupported as error:
            raise refusal(node, str(error)) from error
        self._values[slot] = self._placed(value)

    def _placed(self, value: Any) -> Any:
        """Real numbers belong on the device; shapes and indices stay on the processor until they meet one."""
        return value.to(self._device) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _add(self, node: gs.Node, masters: Mapping[int, Kernel]) -> None:
        operator, kernel = build_kernel(node, self._graph.opset)
        if id(node) in self._fused:
            source, kernel = self._fused[id(node)]
            place, result = self._slot(source), self._slot(node.outputs[0])
            if place in self._shaped:
                self._shaped.add(result)
            self._steps.append(Step(node, operator, kernel, (place,), (result,)))
            return
        kernel = masters.get(id(node), kernel)
        if torch.device(self._device).type != "cpu":
            kernel = _on_one_device(kernel)
        for tensor in node.inputs:
            self._constant(tensor, node)
        inputs = tuple(self._slot(t) for t in node.inputs)
        outputs = tuple(self._slot(t) if t.name else self._spare() for t in node.outputs)
        numbers = tuple(i for i in operator.numbers if i < len(inputs) and inputs[i])
        self._check_carried(node, operator, inputs, outputs)
        step = Step(node, operator, kernel, inputs, outputs, numbers)
        read = set(inputs)
        if node.op in _OF_SHAPE:
            fixed, static = False, read <= self._shaped
        else:
            fixed, static = read <= self._fixed, read <= self._static
        if node.op == "Constant" and id(node.attrs.get("value")) in self._parameters:
            parameter = self._parameters[id(node.attrs["value"])]
            self._values[outputs[0]] = parameter
            self._shaped.add(outputs[0])
            return
        if read <= self._shaped and not operator.unshaped and {inputs[i] for i in numbers} <= self._static:
            self._shaped.update(outputs)
        if static:
            self._static.update(outputs)
        if fixed:
            self._fixed.update(outputs)
            with torch.no_grad():
                run_step(step, self._values)
            for slot in outputs:
                self._values[slot] = self._placed(self._values[slot])
            return
        self._steps.append(step)

    def _spare(self) -> int:
        self._values.append(None)
        return len(self._values) - 1

    def _check_carried(
        self, node: gs.Node, operator: Operator, inputs: tuple[int, ...], outputs: tuple[int, ...]
    ) -> None:
        """Quantised tensors are carried as floats, so only what moves them or ends them may read one."""
        if quantizes(node.op):
            self._carried.update(outputs)
        elif self._carried & set(inputs):
            if operator.moves and node.op not in _OF_SHAPE:
                self._carried.update(outputs)
            elif node.op not in ("DequantizeLinear", *_OF_SHAPE):
                raise refusal(node, "it computes with quantised values, which only moves of values and Q/DQ may touch")

    def nodes(self) -> list[tuple[gs.Node, bool]]:
        """(node, True where it only computes shapes) of what is left to run; a fused pair is its DequantizeLinear."""
        return [(step.node, set(step.outputs) <= self._static) for step in self._steps]

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, feeds: Mapping[str, Tensor]) -> list[Any]:
        """The outputs for ``feeds`` (every input that is needed, by name)."""
        key = _shapes(self.inputs, feeds)
        found = self._known.get(key)
        if found is None:
            return self._first_run(key, feeds)
        self._known.move_to_end(key)
        steps, prepared = found
        values = list(prepared)
        self._feed(values, feeds)
        for step in steps:
            run_step(step, values)
        return [values[slot] for slot in self.outputs]

    def run_timed(self, feeds: Mapping[str, Tensor], clock: Callable[[], float]) -> Iterator[tuple[gs.Node, float]]:
        """(node, seconds) of each step of one run on shapes that were run before; ``clock`` waits for the device."""
        steps, prepared = self._known[_shapes(self.inputs, feeds)]
        values = list(prepared)
        self._feed(values, feeds)
        last = clock()
        for step in steps:
            run_step(step, values)
            now = clock()
            yield step.node, now - last
            last = now

    def _feed(self, values: list[Any], feeds: Mapping[str, Tensor]) -> None:
        for name, slot in self.inputs.items():
            if name in feeds:
                values[slot] = feeds[name]

    def _first_run(self, key: Any, feeds: Mapping[str, Tensor]) -> list[Any]:
        """Run every step, remember what depends on shapes alone, and what is left to do for these shapes."""
        values = list(self._values)
        self._feed(values, feeds)
        prepared = list(self._values)
        todo = []
        for step in self._steps:
            if set(step.outputs) <= self._static:
                with torch.no_grad():
                    run_step(step, values)
                for slot in step.outputs:
                    values[slot] = prepared[slot] = self._placed(values[slot])
            else:
                run_step(step, values)
                todo.append(step)
        steps = [self._with_numbers(step, prepared) for step in todo]
        self._known[key] = (list(self._with_lifetimes(steps)), prepared)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return [values[slot] for slot in self.outputs]

    def _with_numbers(self, step: Step, prepared: list[Any]) -> Step:
        """``step`` reading known numbers from slots of their own."""
        inputs, convert = list(step.inputs), []
        for position in step.convert:
            slot = inputs[position]
            if slot not in self._static:
                convert.append(position)
                continue
            prepared.append(_numbers(prepared[slot]))
            inputs[position] = len(prepared) - 1
        return replace(step, inputs=tuple(inputs), convert=tuple(convert))

    def _with_lifetimes(self, steps: Sequence[Step]) -> Iterable[Step]:
        last: dict[int, int] = {}
        for number, step in enumerate(steps):
            for slot in (*step.inputs, *step.outputs):
                last[slot] = number
        lasting = {0, *self.outputs, *self._static}
        made = {slot for step in steps for slot in step.outputs} | set(self.inputs.values())
        for number, step in enumerate(steps):
            ends = sorted({s for s in (*step.inputs, *step.outputs) if last[s] == number and s in made} - lasting)
            yield replace(step, dead=tuple(ends))
