"""Helpers on graphsurgeon's IR that keep its traps out of the passes.

What graphsurgeon gets wrong for us, and where it is mended here:

- ``Graph.copy`` drops tensor types and the producer, and shares attribute lists: :func:`copy_graph`.
- ``Graph.toposort`` recurses as deep as the graph: :func:`sort_nodes`.
- ``Node`` and ``Tensor`` compare structurally and are unhashable: use ``is`` and ``id()``.
- ``len(tensor.outputs)`` does not count a graph output: :func:`graph_output_ids`.
- Import drops metadata, doc strings and overridable initializers: :class:`ModelInfo` and :func:`extra` carry them.
- ``LazyValues`` lets its export rename the shared tensor, and logs to stdout for bfloat16: :class:`StoredValues`.
"""

from __future__ import annotations

import copy
import heapq
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcompress.errors import ModelError

__all__ = [
    "Graph",
    "InputSpec",
    "ModelInfo",
    "Names",
    "RawAttribute",
    "StoredValues",
    "attribute",
    "change_constant",
    "change_own_constant",
    "constant_value",
    "copy_graph",
    "default_values",
    "element_type",
    "extra",
    "first_output",
    "graph_output_ids",
    "input_specs",
    "map_below",
    "model_info",
    "nested_graphs",
    "normal_domain",
    "part_info",
    "redirect",
    "release",
    "release_weights",
    "remove_node",
    "remove_nodes",
    "replace_contents",
    "set_constant",
    "set_extra",
    "sort_nodes",
    "walk_constants",
    "walk_graphs",
    "walk_nodes",
]

Graph: TypeAlias = gs.Graph


@cache
def element_type(data_type: int) -> np.dtype[Any]:
    """The numpy dtype for ONNX's number of a type.

    Raises:
        ModelError: there is no such type.
    """
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type))
    except KeyError as error:
        raise ModelError(
            f"data type {data_type} is unknown to onnx {onnx.__version__}; if the file is newer, upgrade onnx"
        ) from error


@dataclass
class ModelInfo:
    """What an ONNX file holds beside the graph and graphsurgeon has no place for.

    It travels on the graph (see :func:`model_info`) and is shared between copies except for the
    dictionaries and lists, which are copied. A nested graph has one too, of which only ``keepsake``, ``defaults``,
    ``initializer_order`` and ``unread`` are used.
    """

    #: metadata_props of the model
    metadata: dict[str, str] = field(default_factory=dict)
    #: the imported ModelProto without nodes and weights: doc strings, value types, annotations, local functions
    keepsake: onnx.ModelProto | None = None
    #: default values of overridable initializers, by the name of the graph input
    defaults: dict[str, gs.Constant] = field(default_factory=dict)
    #: SHA-256 of the source file and its external data, hexadecimal
    source_sha256: str | None = None
    #: True where the source kept its weights in external files
    external_data: bool = False
    #: names of this graph's initializers in the order of the file: says which scope owns a constant
    initializer_order: tuple[str, ...] = ()
    #: initializers that nothing reads; exported until a pass empties the list
    unread: list[gs.Constant] = field(default_factory=list)
    #: the files that the graph was read from, which saving never overwrites
    files: tuple[Path, ...] = ()

    def copy(self) -> ModelInfo:
        """A copy whose dictionaries and lists can be changed without changing this one."""
        unread = [_copy_tensor(constant) for constant in self.unread]
        return replace(self, metadata=dict(self.metadata), defaults=dict(self.defaults), unread=unread)


@dataclass(frozen=True)
class RawAttribute:
    """An attribute that is carried through as it is: sparse tensors, types, references.

    ``proto`` is shared between copies and must not be changed.
    """

    proto: onnx.AttributeProto


class StoredValues(LazyValues):  # type: ignore[misc]
    """Values of a constant as the file stores them, decoded when they are first needed.

    graphsurgeon's own ``LazyValues`` logs to stdout for bfloat16 and fails for the newest types.

    Args:
        tensor: a TensorProto, or a SparseTensorProto, which loads as its dense equivalent. Shared, never changed.
        payload: the raw bytes, where ``tensor`` holds all but these.
    """

    def __init__(
        self, tensor: onnx.TensorProto | onnx.SparseTensorProto, payload: NDArray[np.uint8] | None = None
    ) -> None:
        self.tensor = tensor
        self.payload = payload
        self.sparse = isinstance(tensor, onnx.SparseTensorProto)
        self.shape: tuple[int, ...] = tuple(tensor.dims)
        self.data_type: int = tensor.values.data_type if self.sparse else tensor.data_type
        self.dtype: np.dtype[Any] = element_type(self.data_type)
        self.nbytes: int = prod(self.shape) * self.dtype.itemsize
        self._array: NDArray[Any] | None = None

    def load(self) -> NDArray[Any]:
        """The read-only array; types below one byte are unpacked."""
        if self._array is None:
            self._array = _frozen(self._decoded())
        return self._array

    def _decoded(self) -> NDArray[Any]:
        if self.sparse:
            values = onnx.numpy_helper.to_array(self.tensor.values)
            indices = onnx.numpy_helper.to_array(self.tensor.indices)
            dense = np.zeros(self.shape, values.dtype)
            dense[tuple(indices.T) if indices.ndim == 2 else np.unravel_index(indices, self.shape)] = values
            return dense
        if self.payload is None:
            return onnx.numpy_helper.to_array(self.tensor)
        whole = onnx.TensorProto(data_type=self.data_type, dims=self.shape, raw_data=self.payload.tobytes())
        return onnx.numpy_helper.to_array(whole)


_EXTRA = "onnxcompress_extra"


def extra(item: gs.Node | gs.Constant) -> onnx.NodeProto | onnx.TensorProto | None:
    """What the file says about a node or a constant beside its contents: doc string, metadata_props, overload."""
    return item.__dict__.get(_EXTRA)  # type: ignore[no-any-return]


def set_extra(item: gs.Node | gs.Constant, proto: onnx.NodeProto | onnx.TensorProto | None) -> None:
    """Attach ``proto``, which copies of the graph share, so it must not be changed afterwards."""
    if proto is not None:
        item.__dict__[_EXTRA] = proto


@dataclass(frozen=True)
class InputSpec:
    """One graph input: its name, numpy dtype and shape (an int, a symbol or None per axis; None: unknown rank)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None
    #: True for an overridable initializer, which need not be fed
    optional: bool = False


def model_info(graph: Graph) -> ModelInfo:
    """The :class:`ModelInfo` that travels with ``graph``; an empty one is attached where there is none."""
    info = graph.__dict__.get("onnxcompress_info")
    if info is None:
        info = graph.__dict__["onnxcompress_info"] = ModelInfo()
    return info  # type: ignore[no-any-return]


def default_values(graph: Graph) -> dict[str, NDArray[Any]]:
    """What inputs hold that need not be fed, by name, where it can be computed with."""
    values = {name: constant_value(constant) for name, constant in model_info(graph).defaults.items()}
    return {name: value for name, value in values.items() if value is not None}


def part_info(whole: Graph) -> ModelInfo:
    """What a graph of some nodes of ``whole`` needs of its :class:`ModelInfo`: scopes of constants, local functions."""
    info = model_info(whole)
    part = ModelInfo(initializer_order=info.initializer_order)
    if info.keepsake is not None and info.keepsake.functions:
        part.keepsake = onnx.ModelProto()
        part.keepsake.functions.MergeFrom(info.keepsake.functions)
    return part


def input_specs(graph: Graph) -> list[InputSpec]:
    """Graph inputs in order, overridable initializers marked optional."""
    defaults = model_info(graph).defaults
    specs = []
    for tensor in graph.inputs:
        kind = getattr(tensor, "type", None) or "tensor_type"
        if kind != "tensor_type":
            raise ModelError(f"graph input {tensor.name!r} is a {kind.removesuffix('_type')}; only tensors can be fed")
        if tensor.dtype is None:
            raise ModelError(f"graph input {tensor.name!r} has no type; declare one before compressing")
        dtype = tensor.dtype
        if isinstance(dtype, int):  # graphsurgeon keeps ONNX's number for types that numpy lacks
            dtype = element_type(dtype)
        shape = None if tensor.shape is None else tuple(_dimension(d) for d in tensor.shape)
        specs.append(InputSpec(tensor.name, np.dtype(dtype), shape, tensor.name in defaults))
    return specs


def _dimension(value: Any) -> int | str | None:
    if isinstance(value, str):
        return value or None
    if value is None or value < 0:
        return None
    return int(value)


def normal_domain(node: gs.Node) -> str:
    """The operator domain of ``node``: '' for ONNX's own operators, however the file spells it."""
    domain = node.domain or ""
    return "" if domain == "ai.onnx" else domain


def nested_graphs(node: gs.Node) -> Iterator[Graph]:
    """The graphs in the attributes of ``node``, without those nested in them."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield value
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, gs.Graph))


def walk_graphs(graph: Graph) -> Iterator[Graph]:
    """``graph`` and every graph nested in its nodes' attributes, outermost first."""
    queue = [graph]
    while queue:
        current = queue.pop()
        yield current
        for node in current.nodes:
            queue.extend(nested_graphs(node))


def walk_nodes(graph: Graph) -> Iterator[gs.Node]:
    """Every node of ``graph`` and of the graphs nested in it."""
    for part in walk_graphs(graph):
        yield from part.nodes


def walk_constants(graph: Graph) -> Iterator[gs.Constant]:
    """Every constant that nodes of ``graph`` and of the graphs nested in it read or hold, each once."""
    seen: set[int] = set()
    for node in walk_nodes(graph):
        for tensor in (*node.inputs, *node.attrs.values()):
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def tensors_read_inside(graph: Graph) -> list[gs.Tensor]:
    """What nested graphs read and hand out; tensors of their own are among it and do no harm."""
    return [
        tensor
        for part in walk_graphs(graph)
        if part is not graph
        for tensor in (*(t for node in part.nodes for t in node.inputs), *part.outputs)
    ]


def graph_output_ids(graph: Graph) -> set[int]:
    """``id()`` of every tensor that leaves ``graph`` or a nested graph; ``len(tensor.outputs)`` omits these."""
    return {id(tensor) for part in walk_graphs(graph) for tensor in part.outputs}


def first_output(node: gs.Node) -> str:
    """Name of the first named output: the one identity of a node that every ONNX file has."""
    return next((t.name for t in node.outputs if t.name), "")


def attribute(node: gs.Node, name: str, default: Any = None) -> Any:
    """Value of an attribute, or ``default`` where the file leaves it out."""
    value = node.attrs.get(name)
    return default if value is None else value


_CONSTANT_SCALARS = {
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_float": np.float32,
    "value_floats": np.float32,
}


def constant_value(tensor: gs.Tensor) -> NDArray[Any] | None:
    """The read-only value of an initializer or of a Constant node's output; None where it is not constant.

    Sparse constants, strings and types below one byte are answered with None: no pass computes with them.
    """
    if isinstance(tensor, gs.Constant):
        return _dense_values(tensor)
    if len(tensor.inputs) != 1:
        return None
    node = tensor.inputs[0]
    if node.op != "Constant" or normal_domain(node) != "":
        return None
    value = node.attrs.get("value")
    if isinstance(value, gs.Constant):
        return _dense_values(value)
    for name, dtype in _CONSTANT_SCALARS.items():
        if isinstance(node.attrs.get(name), int | float | list):
            return _frozen(np.array(node.attrs[name], dtype))
    return None


def _dense_values(constant: gs.Constant) -> NDArray[Any] | None:
    values = constant._values
    if isinstance(values, StoredValues):
        if values.sparse or not _is_numeric(values.dtype):
            return None
        return values.load()  # the constant keeps its stored form, so that reading does not change the file
    if not isinstance(values, np.ndarray) or not _is_numeric(values.dtype):
        return None
    return _frozen(values)


_PACKED_TYPES = frozenset({"int2", "uint2", "int4", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"})


def _is_numeric(dtype: np.dtype[Any]) -> bool:
    """False for strings and for types below one byte."""
    return dtype.kind not in "OSU" and dtype.name not in _PACKED_TYPES


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    if array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array


def map_below(array: NDArray[Any]) -> mmap.mmap | None:
    """The memory map that ``array`` is a view of; None where its values lie in memory."""
    owner: object = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    return owner if isinstance(owner, mmap.mmap) else None


def release(array: NDArray[Any]) -> None:
    """Let the system take back the pages of a memory map that were read; they come back from the file when needed."""
    owner = map_below(array)
    if owner is None or not hasattr(mmap, "MADV_DONTNEED"):  # Windows has none
        return
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        return
    start = array.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
    first, last = -(-start // mmap.PAGESIZE), (start + array.nbytes) // mmap.PAGESIZE
    if last > first:
        owner.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def release_weights(graph: Graph) -> None:
    """:func:`release` all constants of ``graph`` that lie in files: what a pass has read need not stay in memory."""
    for constant in walk_constants(graph):
        values = constant._values.payload if isinstance(constant._values, StoredValues) else constant._values
        if isinstance(values, np.ndarray):
            release(values)


def set_constant(node: gs.Node, index: int, name: str, value: NDArray[Any]) -> gs.Constant:
    """Make input ``index`` of ``node`` a new constant; other users of the old tensor are not touched.

    ``name`` must be free (see :class:`Names`) unless the old constant had no other user.
    """
    constant = gs.Constant(name, _frozen(np.asarray(value, order="C")))  # ascontiguousarray has no scalars
    while len(node.inputs) <= index:
        node.inputs.append(gs.Variable.empty())
    node.inputs[index] = constant
    return constant


def change_constant(tensor: gs.Tensor, value: NDArray[Any]) -> None:
    """Give a constant new values, for all who read it: an initializer, or the output of a Constant node."""
    values = np.asarray(value, order="C")
    if isinstance(tensor, gs.Constant):
        tensor.values = _frozen(values)
    else:
        tensor.inputs[0].attrs = {"value": gs.Constant(tensor.name, _frozen(values))}
        tensor.shape = list(values.shape)


def change_own_constant(node: gs.Node, index: int, value: NDArray[Any], names: Names) -> None:
    """Give constant input ``index``, which ``node`` alone reads, new values.

    An initializer changes in place: a new one would leave its old values to the garbage collector.
    """
    old = node.inputs[index]
    if isinstance(old, gs.Constant):
        change_constant(old, value)
    else:
        set_constant(node, index, names.free(f"{old.name}_scaled"), value)


class Names:
    """Hands out tensor and node names that are free in a graph and in every graph nested in it."""

    def __init__(self, graph: Graph) -> None:
        self._used: set[str] = set()
        for part in walk_graphs(graph):
            self._used.update(t.name for t in (*part.inputs, *part.outputs))
            for node in part.nodes:
                self._used.add(node.name)
                self._used.update(t.name for t in node.inputs)
                self._used.update(t.name for t in node.outputs)

    def free(self, wanted: str) -> str:
        """``wanted``, or ``wanted`` with the first number that makes it free; the answer is taken from now on."""
        name, number = wanted, 1
        while name in self._used or not name:
            name, number = f"{wanted}_{number}", number + 1
        self._used.add(name)
        return name


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every consumer of ``old`` read ``new`` instead; graph outputs are not touched."""
    for consumer in list({id(n): n for n in old.outputs}.values()):
        for index, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[index] = new


def remove_node(node: gs.Node) -> None:
    """Detach ``node`` from its tensors; :func:`sort_nodes` drops it from the list.

    Removal from ``graph.nodes`` by position is linear, so passes detach and the list is filtered once.
    """
    node.inputs.clear()
    node.outputs.clear()


def remove_nodes(graph: Graph, nodes: Iterable[gs.Node]) -> None:
    """Detach ``nodes`` from their tensors and drop them from ``graph`` and the graphs nested in it.

    All at once, because graphsurgeon searches a tensor's whole list of consumers for each node that is detached: a
    constant that 20,000 nodes read would make that quadratic.
    """
    doomed = {id(node): node for node in nodes}
    if not doomed:
        return
    for end, opposite in (("inputs", "outputs"), ("outputs", "inputs")):
        touched = {id(t): t for node in doomed.values() for t in getattr(node, end)}
        for tensor in touched.values():
            links = getattr(tensor, opposite)
            list.__setitem__(links, slice(None), [n for n in links if id(n) not in doomed])
        for node in doomed.values():
            list.clear(getattr(node, end))
    for part in list(walk_graphs(graph)):
        part.nodes = [n for n in part.nodes if id(n) not in doomed]


def sort_nodes(graph: Graph) -> None:
    """Sort the nodes topologically, in place and stably; detached nodes (no output left) are dropped.

    Iterative, so that depth does not matter, and linear but for a heap that keeps the old order.

    Raises:
        ModelError: the graph has a cycle.
    """
    nodes = [n for n in graph.nodes if n.inputs or n.outputs]
    position = {id(node): i for i, node in enumerate(nodes)}
    waiting: list[int] = []
    followers: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        read = [t for t in node.inputs if t.name]
        for value in nested_graphs(node):
            read.extend(t for inner in walk_nodes(value) for t in inner.inputs)
            read.extend(t for part in walk_graphs(value) for t in part.outputs)
        producers = {position[id(p)] for t in read for p in t.inputs if id(p) in position}
        waiting.append(len(producers))
        for p in producers:
            followers[p].append(i)
    ready = [i for i, count in enumerate(waiting) if count == 0]  # in order, so a heap
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for j in followers[i]:
            waiting[j] -= 1
            if waiting[j] == 0:
                heapq.heappush(ready, j)
    if len(order) != len(nodes):
        stuck = next(nodes[i].name for i, count in enumerate(waiting) if count > 0)
        raise ModelError(f"the graph has a cycle through node {stuck!r}; an ONNX graph must be acyclic")
    graph.nodes = [nodes[i] for i in order]


def copy_graph(graph: Graph) -> Graph:
    """A copy that shares only weights, which become read-only in both.

    Nodes, tensors, attributes (nested graphs too) and the :class:`ModelInfo` dictionaries are new objects.
    """
    return _copy_graph(graph, {})


def _copy_graph(graph: Graph, mapping: dict[int, gs.Tensor]) -> Graph:
    def mapped(tensor: gs.Tensor) -> gs.Tensor:
        twin = mapping.get(id(tensor))
        if twin is None:
            twin = mapping[id(tensor)] = _copy_tensor(tensor)
        return twin

    inputs = [mapped(t) for t in graph.inputs]
    nodes = []
    for node in graph.nodes:
        copied = gs.Node(
            node.op,
            node.name,
            {name: _copy_attribute(value, mapping) for name, value in node.attrs.items()},
            [mapped(t) for t in node.inputs],
            [mapped(t) for t in node.outputs],
            node.domain,
        )
        set_extra(copied, extra(node))
        nodes.append(copied)
    twin = gs.Graph(
        nodes=nodes,
        inputs=inputs,
        outputs=[mapped(t) for t in graph.outputs],
        name=graph.name,
        doc_string=graph.doc_string,
        opset=graph.opset,
        import_domains=copy.deepcopy(graph.import_domains) if graph.import_domains is not None else None,
        producer_name=graph.producer_name,
        producer_version=graph.producer_version,
        functions=list(graph.functions),
        ir_version=graph.ir_version,
    )
    if "onnxcompress_info" in graph.__dict__:
        twin.__dict__["onnxcompress_info"] = model_info(graph).copy()
    return twin


def _copy_tensor(tensor: gs.Tensor) -> gs.Tensor:
    if isinstance(tensor, gs.Constant):
        values = tensor._values
        if isinstance(values, np.ndarray):
            values = _frozen(values)
        twin = gs.Constant(tensor.name, values, tensor.data_location, tensor._export_dtype)
        set_extra(twin, extra(tensor))
        return twin
    shape = list(tensor.shape) if tensor.shape is not None else None
    return gs.Variable(tensor.name, tensor.dtype, shape, tensor.type)


def _copy_attribute(value: Any, mapping: dict[int, gs.Tensor]) -> Any:
    if isinstance(value, gs.Graph):
        return _copy_graph(value, mapping)
    if isinstance(value, gs.Tensor):
        return _copy_tensor(value)
    if isinstance(value, list):
        return [_copy_attribute(item, mapping) for item in value]
    if isinstance(value, dict | np.ndarray):
        return copy.deepcopy(value)
    return value


def replace_contents(graph: Graph, other: Graph) -> None:
    """Make ``graph`` what ``other`` is; ``other`` must not be used afterwards."""
    graph.nodes = other.nodes
    graph.inputs = other.inputs
    graph.outputs = other.outputs
    graph.opset = other.opset
    graph.import_domains = other.import_domains
    graph.ir_version = other.ir_version
    if "onnxcompress_info" in other.__dict__:
        graph.__dict__["onnxcompress_info"] = other.__dict__["onnxcompress_info"]
