"""Fold what is constant: nodes with constant inputs, and shape arithmetic that is constant for every input.

Three things are done, in topological order and in nested graphs too.

1. A node whose inputs are all constant is evaluated (:mod:`onnxcompress.node_evaluation`) and its outputs become
   initializers under their own names; so do Constant nodes. What leaves the graph becomes a Constant node, because an
   output needs a producer.
2. Shapes are propagated element by element. ``Shape(x)`` of ``[N, 3, 32, 32]`` is the vector ``(N, 3, 32, 32)``, and
   Gather, Slice, Concat, Unsqueeze, Add, Mul and their like carry known numbers, symbols and unknowns along. A node
   whose result holds only numbers is folded although its input is dynamic.
3. A target of Reshape or Expand whose unknown elements equal dimensions of the data becomes constant: 0 (copy) for a
   dimension of the same position, one -1 for a single unknown among positive numbers, 1 for Expand.

Where the branches of an If prepare the same weights (those of an LSTM, say), they share one result, which the graph
around them holds.

Symbols are believed where ONNX Inference derives them from the graph inputs; shapes that the file states for inner
tensors are not. Quantisation (QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear), random operators, control flow
and operators of other domains are never folded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from pydantic import Field

from onnxcompress.base import Change, Context, Decision, Guarantee, Pass, Refusal
from onnxcompress.errors import ModelError
from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    constant_value,
    element_type,
    first_output,
    graph_output_ids,
    normal_domain,
    redirect,
    release,
    remove_nodes,
    set_constant,
    sort_nodes,
    walk_graphs,
)
from onnxcompress.node_evaluation import DATA_MOVEMENT, NotEvaluable, evaluate_node, move_data, shape_range
from onnxcompress.shapes import DerivedTypes, derive_types

__all__ = ["FoldConstants"]

#: elements of the largest tensor that is propagated as a shape; longer ones are data
LONGEST_SHAPE = 64
#: inference is repeated while it still finds something; each round costs one inference of the whole graph
MOST_ROUNDS = 16
#: bytes from which nested graphs share equal results
WORTH_SHARING = 1024


class FoldConstants(Pass):
    """Evaluate constant nodes and constant shape arithmetic."""

    name: ClassVar[str] = "fold_constants"

    #: results above this many bytes are kept as nodes, unless they replace constants that are as large
    size_limit: int = Field(default=1 << 20, ge=0)

    @property
    def guarantee(self) -> Guarantee:
        """Equal but for rounding: the runtime's own kernels may round the last bit of Exp and its like otherwise."""
        return Guarantee.EQUIVALENT

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision]:
        """Fold until nothing more is constant."""
        folder = _Folder(graph, self.size_limit)
        yield from folder.run()


@dataclass(frozen=True)
class _Partial:
    """A partly known integer tensor: Python ints, and strings that name unknown numbers.

    A name that starts with ``?`` is any number; every other one is a dimension and so not negative. Equal names are
    equal numbers.
    """

    elements: NDArray[np.object_]
    dtype: np.dtype[Any]

    @property
    def known(self) -> bool:
        return all(isinstance(e, int) for e in self.elements.reshape(-1))

    def array(self) -> NDArray[Any]:
        return self.elements.astype(self.dtype)


_SHAPE_OPERATORS = frozenset(
    (*DATA_MOVEMENT, "Shape", "Size", "Cast", "Add", "Sub", "Mul", "Div", "Min", "Max", "Equal", "Where")
) - {"Expand", "Flatten"}


class _Folder:
    def __init__(self, graph: Graph, size_limit: int) -> None:
        self.graph = graph
        self.opset = int(graph.opset)
        self.size_limit = size_limit
        self.names = Names(graph)
        self.leaving = graph_output_ids(graph)
        self.removed: dict[int, gs.Node] = {}
        self.refused: dict[int, Refusal] = {}
        self.partial: dict[int, _Partial] = {}
        self.types = DerivedTypes()
        #: constant targets by graph, by what they replace and hold: readers of one computed target share one constant
        self.targets: dict[tuple[int, str, tuple[int, ...]], gs.Constant] = {}
        #: results in nested graphs that are worth sharing
        self.nested: list[gs.Tensor] = []
        self.unknowns = 0
        self.progress = False

    def run(self) -> Iterator[Change | Refusal]:
        parts = list(walk_graphs(self.graph))
        for part in parts:
            for node in list(part.nodes):
                yield from self._fold_constant(node, part)
        for _ in range(MOST_ROUNDS):
            remove_nodes(self.graph, self.removed.values())
            if not any(node.op in ("Shape", "Size") for part in parts for node in part.nodes):
                break
            self.progress = False
            self.partial.clear()
            try:
                self.types = derive_types(self.graph)
            except ModelError as error:
                yield Refusal(str(self.graph.name), f"shapes are not known: {error}")
                break
            for part in parts:
                for node in list(part.nodes):
                    yield from self._fold_shape(node, part)
                    yield from self._fold_constant(node, part)
            if not self.progress:
                break
        remove_nodes(self.graph, self.removed.values())
        yield from self._share()
        for part in parts:
            if part is not self.graph:  # the outermost graph is sorted by the caller
                sort_nodes(part)
        yield from (refusal for key, refusal in self.refused.items() if key not in self.removed)

    # ---- constant inputs -------------------------------------------------------------------------------------

    def _fold_constant(self, node: gs.Node, part: Graph) -> Iterator[Change]:
        if id(node) in self.removed:
            return
        if node.op == "Constant" and normal_domain(node) == "":
            yield from self._store_constant_node(node)
            return
        named = [t for t in node.inputs if t.name]
        if not named or not all(_is_constant(t) for t in named):  # asked first: a value may have to be decoded
            return
        values = [constant_value(t) if t.name else None for t in node.inputs]
        if any(v is None for t, v in zip(node.inputs, values, strict=True) if t.name):
            self.refused[id(node)] = Refusal(_label(node), "an input is sparse, text or of less than a byte")
            return
        freed = sum(v.nbytes for t, v in zip(node.inputs, values, strict=True) if v is not None and self._only_here(t))
        limit = max(self.size_limit, freed)
        try:
            results = evaluate_node(node, values, self.opset, limit)
            for result in results:
                if result.nbytes > limit:
                    raise NotEvaluable(f"the result of {result.nbytes} bytes is above the limit of {limit} bytes")
        except NotEvaluable as reason:
            self.refused[id(node)] = Refusal(_label(node), str(reason))
            return
        yield self._replace(node, results, part, "all inputs are constant")
        for value in values:
            if value is not None:
                release(value)

    def _only_here(self, tensor: gs.Tensor) -> bool:
        return len(tensor.outputs) == 1 and id(tensor) not in self.leaving

    def _store_constant_node(self, node: gs.Node) -> Iterator[Change]:
        tensor = node.outputs[0]
        if id(tensor) in self.leaving:
            return
        value = constant_value(tensor)
        if value is None:
            self.refused[id(node)] = Refusal(_label(node), "its value is sparse, text or of less than a byte")
            return
        self._become_constant(tensor, value)
        self.removed[id(node)] = node
        yield Change("stored", _label(node), "Constant node as an initializer")

    def _replace(self, node: gs.Node, results: Sequence[NDArray[Any]], part: Graph, detail: str) -> Change:
        """Let ``results`` take the place of the outputs of ``node``."""
        label = _label(node)
        for tensor, value in zip(list(node.outputs), results, strict=True):
            if not tensor.name:
                continue
            if id(tensor) not in self.leaving:
                self._become_constant(tensor, value)
                if part is not self.graph and value.nbytes >= WORTH_SHARING:
                    self.nested.append(tensor)
            else:
                list.clear(tensor.inputs)
                holder = gs.Constant(tensor.name, _frozen(value))
                part.nodes.append(gs.Node("Constant", self.names.free(f"{label}_folded"), {"value": holder}))
                part.nodes[-1].outputs.append(tensor)
        list.clear(node.outputs)  # the links on the other side are gone already
        self.removed[id(node)] = node
        self.progress = True
        return Change("folded", label, f"{node.op}: {detail}")

    def _share(self) -> Iterator[Change]:
        """Let the readers of equal results in nested graphs read one.

        A constant belongs to the innermost graph around all its readers, where its name must be free.
        """
        equal: dict[tuple[str, tuple[int, ...], bytes], list[gs.Tensor]] = {}
        for tensor in self.nested:
            if tensor.outputs:  # else it went into another result
                value = tensor.values
                key = (value.dtype.str, value.shape, hashlib.sha256(np.ascontiguousarray(value).data).digest())
                equal.setdefault(key, []).append(tensor)
        for first, *others in equal.values():
            if others:
                first.name = self.names.free(f"{first.name}_shared")
            for other in others:
                redirect(other, first)
                yield Change("shared", other.name, f"equal to {first.name}")

    @staticmethod
    def _become_constant(tensor: gs.Tensor, value: NDArray[Any]) -> None:
        """Turn a variable into a constant in place, so that its readers in every graph see it."""
        for producer in list(tensor.inputs):
            list.clear(producer.outputs)
        list.clear(tensor.inputs)
        tensor.to_constant(_frozen(value))

    # ---- shapes ----------------------------------------------------------------------------------------------

    def _fold_shape(self, node: gs.Node, part: Graph) -> Iterator[Change]:
        if id(node) in self.removed or normal_domain(node) != "" or not node.outputs:
            return
        if node.op in ("Reshape", "Expand"):
            yield from self._fold_target(node, part)
        if node.op not in _SHAPE_OPERATORS:
            return
        result = self._propagate(node)
        if result is None:
            return
        if result.known:
            yield self._replace(node, [result.array()], part, "a shape that does not depend on the input")
        else:
            self.partial[id(node.outputs[0])] = result

    def _dimensions(self, tensor: gs.Tensor) -> list[int | str] | None:
        """The dimensions of ``tensor``, with a name of their own for those without a symbol; None: unknown rank."""
        shape: Sequence[int | str | None] | None
        if isinstance(tensor, gs.Constant):
            shape = tensor.shape
        else:
            known = self.types.of(tensor)
            shape = known.shape if known is not None else None
        if shape is None:
            return None
        return [d if isinstance(d, int) else (d or f"!{tensor.name}:{axis}") for axis, d in enumerate(shape)]

    def _known(self, tensor: gs.Tensor) -> _Partial | None:
        """``tensor`` as a shape: propagated, or a small integer constant."""
        found = self.partial.get(id(tensor))
        if found is not None or not tensor.name:
            return found
        value = constant_value(tensor)
        if value is None or value.dtype.kind not in "iub" or value.size > LONGEST_SHAPE:
            return None
        elements = np.empty(value.shape, object)
        elements.reshape(-1)[:] = [int(v) for v in value.reshape(-1)]
        return _Partial(elements, value.dtype)

    def _propagate(self, node: gs.Node) -> _Partial | None:
        """What is known of the first output of ``node``; None where nothing is."""
        if node.op in ("Shape", "Size"):
            return self._shape_of(node)
        if not any(id(t) in self.partial for t in node.inputs):
            return None
        try:
            if node.op in DATA_MOVEMENT:
                return self._moved(node)
            if node.op == "Cast":
                return self._cast(node)
            return self._computed(node)
        except (IndexError, ValueError, TypeError, KeyError, NotEvaluable):
            return None  # an invalid shape fails when the model runs, as before

    def _shape_of(self, node: gs.Node) -> _Partial | None:
        dims = self._dimensions(node.inputs[0])
        if dims is None:
            return None
        int64 = np.dtype(np.int64)
        if node.op == "Size":
            numbers = [d for d in dims if isinstance(d, int)]
            return _Partial(np.array(prod(numbers), object), int64) if len(numbers) == len(dims) else None
        start, end = shape_range(node, len(dims))
        return _Partial(_objects(dims[start:end]), int64)

    def _moved(self, node: gs.Node) -> _Partial | None:
        # Concat has data only; the other operators have data first and parameters after it
        count = len(node.inputs) if node.op == "Concat" else 1
        data = [self._known(t) for t in node.inputs[:count]]
        if any(d is None for d in data):
            return None
        parameters = [constant_value(t) if t.name else None for t in node.inputs[count:]]
        if any(p is None and t.name for p, t in zip(parameters, node.inputs[count:], strict=True)):
            return None
        arrays = [d.elements for d in data if d is not None]
        (moved,) = move_data(node, [*arrays, *parameters], self.opset, 8 * LONGEST_SHAPE)
        first = data[0]
        return None if first is None or moved.size > LONGEST_SHAPE else _Partial(moved, first.dtype)

    def _cast(self, node: gs.Node) -> _Partial | None:
        data, to = self._known(node.inputs[0]), node.attrs["to"]
        dtype = element_type(to) if isinstance(to, int) else np.dtype(to)
        if data is None or dtype.kind not in "iu" or data.dtype.kind == "b":
            return None
        if dtype.itemsize < 4 or (dtype.kind == "u" and not all(_not_negative(e) for e in data.elements.reshape(-1))):
            return None
        return _Partial(data.elements, dtype)

    def _computed(self, node: gs.Node) -> _Partial | None:
        inputs = [self._known(t) for t in node.inputs]
        if any(x is None for x in inputs) or self.opset < 7:
            return None
        arrays = [x.elements for x in inputs if x is not None]
        if prod(np.broadcast_shapes(*(a.shape for a in arrays))) > LONGEST_SHAPE:
            return None
        dtype = inputs[-1].dtype if inputs[-1] is not None else np.dtype(np.int64)
        if node.op == "Where":
            result = _elementwise(self._choose, *arrays)
        elif node.op == "Equal":
            result, dtype = _elementwise(self._equal, *arrays), np.dtype(np.bool_)
        else:
            rule = _RULES[node.op]
            result = arrays[0]
            for other in arrays[1:]:
                result = _elementwise(lambda a, b: self._or_unknown(rule(a, b)), result, other)
        bounds = np.iinfo(dtype) if dtype.kind in "iu" else None
        if bounds is not None:
            for element in result.reshape(-1):
                if isinstance(element, int) and not bounds.min <= element <= bounds.max:
                    return None
        return _Partial(result, dtype)

    def _or_unknown(self, element: int | str | None) -> int | str:
        if element is not None:
            return element
        self.unknowns += 1
        return f"?{self.unknowns}"

    def _choose(self, condition: int | str, a: int | str, b: int | str) -> int | str:
        if isinstance(condition, int):
            return a if condition else b
        return a if a == b else self._or_unknown(None)

    def _equal(self, a: int | str, b: int | str) -> int | str:
        if a == b or (isinstance(a, int) and isinstance(b, int)):
            return int(a == b)
        for number, other in ((a, b), (b, a)):
            if isinstance(number, int) and number < 0 and _not_negative(other):
                return 0
        return self._or_unknown(None)

    # ---- targets of Reshape and Expand -----------------------------------------------------------------------

    def _fold_target(self, node: gs.Node, part: Graph) -> Iterator[Change]:
        """Make the target of a Reshape or Expand constant where its unknown elements are the data's own dimensions."""
        if len(node.inputs) < 2:
            return
        known = self.partial.get(id(node.inputs[1]))
        if known is None or known.elements.ndim != 1:
            return
        target = list(known.elements)
        data = self._dimensions(node.inputs[0])
        if node.op == "Reshape":
            constant = _reshape_target(target, data, bool(attribute(node, "allowzero", 0)))
        else:
            constant = _expand_target(target, data)
        if constant is None:
            return
        old = node.inputs[1].name
        key = (id(part), old, tuple(constant))
        shared = self.targets.get(key)
        if shared is None:
            value = np.array(constant, np.int64)
            self.targets[key] = set_constant(node, 1, self.names.free(f"{old}_folded"), value)
        else:
            node.inputs[1] = shared
        self.progress = True
        yield Change("folded", _label(node), f"target {old} of {node.op} as {constant}")


def _reshape_target(target: list[int | str], data: list[int | str] | None, allowzero: bool) -> list[int] | None:
    """``target`` as numbers for all inputs: 0 copies the dimension at the same position, -1 is what remains."""
    if allowzero and 0 in target:
        return None  # here 0 is a length
    result: list[int | None] = []
    for axis, element in enumerate(target):
        if isinstance(element, int):
            result.append(element)
        else:
            copied = not allowzero and data is not None and axis < len(data) and data[axis] == element
            result.append(0 if copied else None)
    if None in result:
        # -1 needs all other lengths to be positive: with an empty batch it would be ambiguous
        if result.count(None) > 1 or any(r is not None and r < 1 for r in result):
            return None
        result = [-1 if r is None else r for r in result]
    return [r for r in result if r is not None]


def _expand_target(target: list[int | str], data: list[int | str] | None) -> list[int] | None:
    """``target`` as numbers for all inputs: 1 keeps a dimension of the data as it is."""
    result = []
    for from_end, element in enumerate(reversed(target), start=1):
        if isinstance(element, int):
            result.append(element)
        elif data is not None and from_end <= len(data) and data[-from_end] == element:
            result.append(1)
        else:
            return None
    return result[::-1]


def _add(a: int | str, b: int | str) -> int | str | None:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if a == 0:
        return b
    return a if b == 0 else None


def _subtract(a: int | str, b: int | str) -> int | str | None:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    if a == b:
        return 0
    return a if b == 0 else None


def _multiply(a: int | str, b: int | str) -> int | str | None:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if a == 0 or b == 0:
        return 0
    if a == 1:
        return b
    return a if b == 1 else None


def _divide(a: int | str, b: int | str) -> int | str | None:
    if b == 0:
        raise ValueError("division by zero")
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a if b == 1 else None


def _least(a: int | str, b: int | str) -> int | str | None:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return a if a == b else None


def _greatest(a: int | str, b: int | str) -> int | str | None:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return a if a == b else None


_RULES: dict[str, Callable[[int | str, int | str], int | str | None]] = {
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
    "Min": _least,
    "Max": _greatest,
}


def _elementwise(rule: Callable[..., int | str], *arrays: NDArray[np.object_]) -> NDArray[np.object_]:
    broadcast = np.broadcast_arrays(*arrays)
    result = np.empty(broadcast[0].shape, object)
    result.reshape(-1)[:] = [rule(*elements) for elements in zip(*(b.reshape(-1) for b in broadcast), strict=True)]
    return result


def _objects(elements: Sequence[int | str]) -> NDArray[np.object_]:
    result = np.empty(len(elements), object)
    result[:] = elements
    return result


def _not_negative(element: int | str) -> bool:
    return element >= 0 if isinstance(element, int) else not element.startswith("?")


def _frozen(value: NDArray[Any]) -> NDArray[Any]:
    value = np.array(value, order="C", copy=None)
    value = value.view()
    value.flags.writeable = False
    return value


def _is_constant(tensor: gs.Tensor) -> bool:
    """True for initializers and for outputs of Constant nodes, whatever their type."""
    return isinstance(tensor, gs.Constant) or (len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant")


def _label(node: gs.Node) -> str:
    return str(node.name or first_output(node))
