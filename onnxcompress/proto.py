"""Conversion between ``onnx.ModelProto`` and graphsurgeon's IR that keeps what graphsurgeon drops.

graphsurgeon's own importer and exporter are not used: they skip attribute types, merge scopes, lose metadata and log to
stdout. The IR is the same. What it has no place for travels beside it:

- of the model and of each graph: :attr:`ModelInfo.keepsake`, a ModelProto without nodes and weights
- of nodes and constants: :func:`onnxcompress.graph.extra`, a NodeProto or TensorProto without contents
- attributes of rare types: :class:`onnxcompress.graph.RawAttribute`

``to_proto(from_proto(model))`` gives ``model`` back, except that

- unnamed nodes and all but the first of a name get unique names (``Conv_12``), in nested graphs too
- an IR version below 4 becomes 4, and initializers are no longer listed as inputs there, as they cannot be overridden
- a value_info entry of a tensor that nothing produces or reads is dropped

The default domain is imported at ``graph.opset``; other domains at ``graph.import_domains``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any, Final, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxcompress.errors import ModelError, OnnxCompressError
from onnxcompress.graph import (
    Graph,
    ModelInfo,
    RawAttribute,
    StoredValues,
    element_type,
    extra,
    model_info,
    nested_graphs,
    normal_domain,
    set_extra,
    walk_graphs,
    walk_nodes,
)
from onnxcompress.wire import Bytes, Payload, new_token

__all__ = [
    "Skeleton",
    "checkable",
    "dense_tensors",
    "from_proto",
    "spell_default_domain",
    "storage_bytes",
    "to_proto",
    "to_skeleton",
]

#: initializers above this many bytes are left out by ``to_proto(weights="omit")``
OMIT_ABOVE = 1024

_Attribute = onnx.AttributeProto
_BITS: Mapping[int, int] = {
    onnx.TensorProto.INT2: 2,
    onnx.TensorProto.UINT2: 2,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
    onnx.TensorProto.FLOAT6E2M3: 6,
    onnx.TensorProto.FLOAT6E3M2: 6,
}

TypeState = tuple[int, tuple[int | str | None, ...] | None, str]

# What exporters write for a size that they do not know. It is no symbol: two of them need not be one size (PaddlePaddle
# and InsightFace write "?" for the height and for the width).
_NAMELESS: Final = frozenset({"?", "*", "-1", "None"})


@cache
def _onnx_type(dtype: np.dtype[Any]) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


def _element_type(dtype: Any) -> int:
    """ONNX's number of a numpy type, of a scalar class, or of that number itself; 0 for None."""
    if dtype is None:
        return 0
    return int(dtype) if isinstance(dtype, int) else _onnx_type(np.dtype(dtype))


def storage_bytes(data_type: int, dims: Iterable[int]) -> int:
    """Size in bytes of ``raw_data`` for this type and shape; types below one byte are packed.

    Raises:
        ModelError: an unknown type, or one that ``raw_data`` cannot hold.
    """
    if data_type == onnx.TensorProto.STRING:
        raise ModelError("a string tensor has raw or external data; strings belong in string_data")
    bits = _BITS.get(data_type) or element_type(data_type).itemsize * 8
    dims = list(dims)
    if any(d < 0 for d in dims):
        raise ModelError(f"a tensor has the shape {dims}; no dimension can be negative")
    return (prod(dims) * bits + 7) // 8


def dense_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every dense TensorProto of ``graph``: initializers and attributes, nested graphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from dense_tensors(attribute.g)
            for nested in attribute.graphs:
                yield from dense_tensors(nested)


# ---------------------------------------------------------------------------------------------------------------------
# Import


def from_proto(model: onnx.ModelProto, *, payloads: Mapping[bytes, Bytes] | None = None) -> Graph:
    """Import ``model``; the proto is not changed but the graph may share its weights.

    Args:
        model: a valid model; external data must have been resolved (``io.load`` does).
        payloads: weights by the marker that stands for each in ``raw_data``.

    Raises:
        ModelError: a weight does not fit its shape, or refers to external data.
    """
    importer = _Importer(payloads or {}, model.ir_version if model.HasField("ir_version") else None)
    graph = importer.graph(model.graph, None)
    info = model_info(graph)
    info.metadata = {_text_of(p.key): _text_of(p.value) for p in model.metadata_props}
    keepsake = onnx.ModelProto()
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        if model.HasField(name):
            setattr(keepsake, name, getattr(model, name))
    for name in ("training_info", "functions", "configuration", "opset_import"):
        getattr(keepsake, name).MergeFrom(getattr(model, name))
    keepsake.graph.CopyFrom(info.keepsake.graph)  # type: ignore[union-attr]
    info.keepsake = keepsake

    graph.producer_name, graph.producer_version = model.producer_name, model.producer_version
    graph.ir_version = None if importer.ir_version is None else max(4, importer.ir_version)
    domains = [onnx.helper.make_opsetid(o.domain, o.version) for o in model.opset_import]
    opset = next((o.version for o in domains if o.domain in ("", "ai.onnx")), None)
    for part in walk_graphs(graph):
        part.import_domains = domains
        part.opset = opset if opset is not None else _default_opset(importer.ir_version)
    _name_nodes(graph)
    return graph


def _default_opset(ir_version: int | None) -> int:
    """The newest opset that ``ir_version`` allows: for models that use other domains only."""
    if ir_version is None:
        return int(onnx.defs.onnx_opset_version())
    allowed = [row[2] for row in onnx.helper.VERSION_TABLE if row[1] <= ir_version]
    return max(allowed, default=7)


def _name_nodes(graph: Graph) -> None:
    """Give every node a name of its own, because reports name nodes and graphsurgeon compares them by structure."""
    nodes = list(walk_nodes(graph))
    taken = {node.name for node in nodes}
    seen = {""}
    for position, node in enumerate(nodes):
        if node.name in seen:
            number = position
            while f"{node.op}_{number}" in taken:
                number += len(nodes)
            node.name = f"{node.op}_{number}"
            taken.add(node.name)
        seen.add(node.name)


class _Scope:
    """Tensors by name, in a graph and in those around it."""

    def __init__(self, parent: _Scope | None) -> None:
        self.parent = parent
        self.tensors: dict[str, gs.Tensor] = {}

    def find(self, name: str) -> gs.Tensor | None:
        scope: _Scope | None = self
        while scope is not None:
            tensor = scope.tensors.get(name)
            if tensor is not None:
                return tensor
            scope = scope.parent
        return None


class _Importer:
    def __init__(self, payloads: Mapping[bytes, Bytes], ir_version: int | None) -> None:
        self._payloads = payloads
        self.ir_version = ir_version

    def graph(self, proto: onnx.GraphProto, outer: _Scope | None) -> Graph:
        scope = _Scope(outer)
        types = _declared_types(proto)
        constants = [self.constant(tensor) for tensor in proto.initializer]
        for sparse in proto.sparse_initializer:
            element_type(sparse.values.data_type)
            _check_size(sparse.values)
            _check_size(sparse.indices)
            constants.append(gs.Constant(_checked(sparse.values.name), StoredValues(sparse)))
        info = ModelInfo(keepsake=_graph_keepsake(proto), initializer_order=tuple(c.name for c in constants))

        listed = {value.name for value in proto.input}
        fixed = self.ir_version is not None and self.ir_version < 4
        info.defaults = {c.name: c for c in constants if c.name in listed and not fixed}
        scope.tensors = {c.name: c for c in constants if c.name not in info.defaults}
        inputs = []
        for value in proto.input:
            if value.name not in scope.tensors:
                scope.tensors[value.name] = _variable(value.name, types)
                inputs.append(scope.tensors[value.name])

        for name in (proto.name, *scope.tensors, *types):
            _checked(name)
        nodes = [self.node(node, scope, types) for node in proto.node]
        outputs = []
        for value in proto.output:
            tensor = scope.find(value.name)
            if tensor is None:
                tensor = scope.tensors[value.name] = _variable(value.name, types)
            outputs.append(tensor)
        returned = {id(tensor) for tensor in outputs}
        info.unread = [c for c in constants if not c.outputs and id(c) not in returned and c.name not in info.defaults]
        graph = gs.Graph(nodes=nodes, inputs=inputs, outputs=outputs, name=proto.name, doc_string=proto.doc_string)
        graph.__dict__["onnxcompress_info"] = info
        return graph

    def node(self, proto: onnx.NodeProto, scope: _Scope, types: Mapping[str, TypeState]) -> gs.Node:
        names = (proto.op_type, proto.name, proto.domain, *proto.input, *proto.output)
        for name in (*names, *(a.name for a in proto.attribute)):
            _checked(name)
        inputs = []
        for name in proto.input:
            tensor = scope.find(name) if name else gs.Variable.empty()
            if tensor is None:
                tensor = scope.tensors[name] = _variable(name, types)
            inputs.append(tensor)
        attributes = {a.name: self.attribute(a, scope) for a in proto.attribute}
        outputs = []
        for name in proto.output:
            tensor = scope.tensors.get(name) if name else gs.Variable.empty()
            if tensor is None:
                tensor = scope.tensors[name] = _variable(name, types)
            outputs.append(tensor)
        domain = proto.domain if proto.HasField("domain") else None
        node = gs.Node(proto.op_type, proto.name, attributes, inputs, outputs, domain)
        set_extra(node, _node_extra(proto))
        return node

    def attribute(self, proto: onnx.AttributeProto, scope: _Scope) -> Any:
        if proto.ref_attr_name:  # functions, where this means something, are carried as they are
            raise ModelError(
                f"attribute {proto.name!r} refers to {proto.ref_attr_name!r} of a function, but stands in no function; "
                "the file is damaged"
            )
        match proto.type:
            case _Attribute.FLOAT:
                return proto.f
            case _Attribute.INT:
                return proto.i
            case _Attribute.STRING:
                return _text(proto.s)
            case _Attribute.TENSOR if proto.HasField("t"):
                return self.constant(proto.t)
            case _Attribute.GRAPH if proto.HasField("g"):
                return self.graph(proto.g, scope)
            case _Attribute.FLOATS:
                return list(proto.floats)
            case _Attribute.INTS:
                return list(proto.ints)
            case _Attribute.STRINGS:
                return [_text(s) for s in proto.strings]
            case _Attribute.TENSORS:
                return [self.constant(t) for t in proto.tensors]
            case _Attribute.GRAPHS:
                return [self.graph(g, scope) for g in proto.graphs]
        return _raw_attribute(proto)

    def constant(self, proto: onnx.TensorProto) -> gs.Constant:
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(f"tensor {proto.name!r} refers to external data; open the model with onnxcompress.io.load")
        _checked(proto.name)
        payload = self._payloads.get(proto.raw_data) if self._payloads and proto.HasField("raw_data") else None
        if payload is None:
            element_type(proto.data_type)
            _check_size(proto)
            return gs.Constant(proto.name, StoredValues(proto))
        _expect(proto, payload.nbytes, storage_bytes(proto.data_type, proto.dims), "bytes of data")
        header = onnx.TensorProto(data_type=proto.data_type, dims=proto.dims)
        if proto.data_type in _BITS:
            constant = gs.Constant(proto.name, StoredValues(header, payload))
        else:
            constant = gs.Constant(proto.name, payload.view(element_type(proto.data_type)).reshape(tuple(proto.dims)))
        if proto.HasField("doc_string") or proto.HasField("data_location") or proto.metadata_props:
            if proto.HasField("doc_string"):
                header.doc_string = proto.doc_string
            if proto.HasField("data_location"):
                header.data_location = proto.data_location
            header.metadata_props.MergeFrom(proto.metadata_props)
            set_extra(constant, header)
        return constant


def _check_size(proto: onnx.TensorProto) -> None:
    """Refuse a tensor whose data, raw or in a field for its type, is not as long as its shape says.

    ONNX's checker lets some of these pass, and what reads them fails much later.
    """
    if proto.HasField("raw_data"):
        _expect(proto, len(proto.raw_data), storage_bytes(proto.data_type, proto.dims), "bytes of data")
        return
    if any(d < 0 for d in proto.dims):
        raise ModelError(f"tensor {proto.name!r} has the shape {list(proto.dims)}; no dimension can be negative")
    expected = prod(proto.dims)
    if proto.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
        expected *= 2
    elif proto.data_type in (onnx.TensorProto.FLOAT6E2M3, onnx.TensorProto.FLOAT6E3M2):
        return  # neither the specification nor onnx says how the field packs them
    elif proto.data_type in _BITS:
        expected = (expected * _BITS[proto.data_type] + 7) // 8
    field_name = onnx.helper.tensor_dtype_to_field(proto.data_type)
    _expect(proto, len(getattr(proto, field_name)), expected, f"values in {field_name}")


def _expect(proto: onnx.TensorProto, found: int, expected: int, what: str) -> None:
    if found != expected:
        raise ModelError(
            f"tensor {proto.name!r} has {found} {what}, but {expected} are expected for its type "
            f"{onnx.TensorProto.DataType.Name(proto.data_type)} and shape {list(proto.dims)}; the file is damaged"
        )


def _text_of(text: str | bytes) -> str:
    """protobuf hands out a string that is no UTF-8 as bytes, which nothing downstream expects."""
    if isinstance(text, bytes):
        raise ModelError(f"the name or text {text[:40]!r} is no UTF-8; the file is damaged")
    return text


def _checked(name: str | bytes) -> str:
    """A null character ends a string in C, so that native code may take two names for one."""
    text = _text_of(name)
    if "\0" in text:
        raise ModelError(f"the name {text[:40]!r} holds a null character; the file is damaged")
    return text


def _text(value: bytes) -> str | bytes:
    """A string attribute; bytes that are no UTF-8 stay bytes."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _raw_attribute(proto: onnx.AttributeProto) -> RawAttribute:
    kept = onnx.AttributeProto()
    kept.CopyFrom(proto)
    return RawAttribute(kept)


def _graph_keepsake(proto: onnx.GraphProto) -> onnx.ModelProto:
    """All of a graph but its nodes and initializers."""
    keepsake = onnx.ModelProto()
    if proto.HasField("doc_string"):
        keepsake.graph.doc_string = proto.doc_string
    for name in ("input", "output", "value_info", "quantization_annotation", "metadata_props"):
        getattr(keepsake.graph, name).MergeFrom(getattr(proto, name))
    return keepsake


def _node_extra(proto: onnx.NodeProto) -> onnx.NodeProto | None:
    """What graphsurgeon's Node has no field for; None where there is nothing."""
    attributes = [a for a in proto.attribute if a.HasField("doc_string") or _is_empty_list(a)]
    fields = [name for name in ("overload", "doc_string") if proto.HasField(name)]
    if not (attributes or fields or proto.metadata_props or proto.device_configurations):
        return None
    kept = onnx.NodeProto(op_type=proto.op_type, domain=proto.domain)
    for name in fields:
        setattr(kept, name, getattr(proto, name))
    kept.metadata_props.MergeFrom(proto.metadata_props)
    kept.device_configurations.MergeFrom(proto.device_configurations)
    for attribute in attributes:
        header = kept.attribute.add(name=attribute.name, type=attribute.type)
        if attribute.HasField("doc_string"):
            header.doc_string = attribute.doc_string
    return kept


_LIST_FIELDS = {
    _Attribute.FLOATS: "floats",
    _Attribute.INTS: "ints",
    _Attribute.STRINGS: "strings",
    _Attribute.TENSORS: "tensors",
    _Attribute.GRAPHS: "graphs",
}


def _is_empty_list(proto: onnx.AttributeProto) -> bool:
    name = _LIST_FIELDS.get(proto.type)
    return name is not None and not getattr(proto, name)


# ---------------------------------------------------------------------------------------------------------------------
# Types of values


def _type_state(proto: onnx.TypeProto) -> TypeState:
    """Element type, shape and kind as graphsurgeon's Variable holds them: (0, None, kind) where it cannot."""
    kind = proto.WhichOneof("value")
    if kind is None:
        return 0, None, "tensor_type"
    inner = getattr(proto, kind)
    if kind == "sequence_type" and inner.elem_type.HasField("tensor_type"):
        inner = inner.elem_type.tensor_type
    elif kind not in ("tensor_type", "sparse_tensor_type"):
        return 0, None, kind
    shape = tuple(_dimension(d) for d in inner.shape.dim) if inner.HasField("shape") else None
    return inner.elem_type, shape, kind


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    kind = dim.WhichOneof("value")
    if kind == "dim_value":
        return int(dim.dim_value)
    if kind != "dim_param" or dim.dim_param in _NAMELESS:
        return None
    return _checked(dim.dim_param) or None


def _declared_types(graph: onnx.GraphProto) -> dict[str, TypeState]:
    """What the graph declares for each value; where it does so twice, inputs and outputs win and gaps are filled."""
    types: dict[str, TypeState] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        state = _type_state(value.type)
        known = types.get(value.name)
        if known is None or (known[:2] == (0, None) and known[2] == "tensor_type"):
            types[value.name] = state
        elif known[2] == state[2]:
            types[value.name] = (known[0] or state[0], known[1] if known[1] is not None else state[1], known[2])
    return types


def _variable(name: str, types: Mapping[str, TypeState]) -> gs.Variable:
    element, shape, kind = types.get(name, (0, None, "tensor_type"))
    return gs.Variable(name, element_type(element) if element else None, None if shape is None else list(shape), kind)


def _tensor_state(tensor: gs.Tensor) -> TypeState:
    if isinstance(tensor, gs.Constant):
        return _constant_type(tensor), tuple(int(d) for d in tensor.shape), "tensor_type"
    shape = None if tensor.shape is None else tuple(d if isinstance(d, str | None) else int(d) for d in tensor.shape)
    return _element_type(tensor.dtype), shape, tensor.type or "tensor_type"


def _constant_type(constant: gs.Constant) -> int:
    if constant._export_dtype is not None:
        return _element_type(constant._export_dtype)
    values = constant._values
    if isinstance(values, StoredValues):
        return values.data_type
    if isinstance(values, LazyValues) and not isinstance(values, SparseValues):
        return int(values.tensor.data_type)
    return _element_type(values.dtype)


def _is_inferred(tensor: gs.Tensor) -> bool:
    """True where shape inference tells what ``tensor`` is, so that a file need not say what the source left out."""
    return bool(tensor.inputs) and normal_domain(tensor.inputs[0]) == ""


def _is_sparse(constant: gs.Constant) -> bool:
    values = constant._values
    return values.sparse if isinstance(values, StoredValues) else isinstance(values, SparseValues)


def _write_type(proto: onnx.TypeProto, state: TypeState) -> None:
    """Put ``state`` into ``proto``; denotations of dimensions that stay the same are kept."""
    element, shape, kind = state
    if kind == "sequence_type":
        inner = proto.sequence_type.elem_type.tensor_type
    elif kind == "sparse_tensor_type":
        inner = proto.sparse_tensor_type
    elif kind == "tensor_type":
        inner = proto.tensor_type
    else:
        raise OnnxCompressError(f"a value of kind {kind} has lost its type; please report which passes were run")
    inner.elem_type = element
    if shape is None:
        inner.ClearField("shape")
        return
    old = [(_dimension(d), d.denotation, d.dim_param) for d in inner.shape.dim]
    inner.ClearField("shape")
    inner.shape.SetInParent()
    for index, size in enumerate(shape):
        dim = inner.shape.dim.add()
        if isinstance(size, str):
            dim.dim_param = size
        elif size is not None:
            dim.dim_value = size
        if len(old) == len(shape) and old[index][0] == size:
            if old[index][1]:
                dim.denotation = old[index][1]
            if size is None and old[index][2]:
                dim.dim_param = old[index][2]


# ---------------------------------------------------------------------------------------------------------------------
# Export


@dataclass
class Skeleton:
    """A model without its large weights.

    ``weights`` are the TensorProtos of ``model`` whose ``raw_data`` is a marker, in file order, each with the bytes
    that belong there.
    """

    model: onnx.ModelProto
    token: bytes
    weights: list[tuple[onnx.TensorProto, Payload]] = field(default_factory=list)

    @property
    def payloads(self) -> dict[bytes, Payload]:
        """The weights by their marker, for :func:`onnxcompress.wire.join`."""
        return {tensor.raw_data: payload for tensor, payload in self.weights}

    @property
    def weight_bytes(self) -> int:
        """Size of all weights that were left out."""
        return sum(payload.nbytes for _, payload in self.weights)


def to_proto(graph: Graph, *, weights: Literal["inline", "omit"] = "inline") -> onnx.ModelProto:
    """Export ``graph``; the graph is not changed and the proto shares nothing with it.

    ``weights="omit"`` writes constants above 1 KiB, those of nested graphs and of Constant nodes too, as inputs of the
    outermost graph with their type and shape: what shape inference and the checker need, without a copy of the weights.
    """
    return _Exporter(graph, None, omit=weights == "omit").model()


def to_skeleton(graph: Graph, *, threshold: int = 1024) -> Skeleton:
    """Export ``graph`` with a marker in place of each dense weight of at least ``threshold`` bytes."""
    skeleton = Skeleton(onnx.ModelProto(), new_token())
    skeleton.model = _Exporter(graph, skeleton, threshold=threshold).model()
    return skeleton


def checkable(model: onnx.ModelProto, token: bytes) -> onnx.ModelProto:
    """A copy of a skeleton that ONNX's checker accepts.

    Weights that were left out have no elements, and the domain ``ai.onnx``, which runtimes take for the default domain
    and the checker does not know, is spelled ''.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in dense_tensors(copy.graph):
        if tensor.HasField("raw_data") and tensor.raw_data.startswith(token):
            tensor.ClearField("raw_data")
            del tensor.dims[:]
            tensor.dims.append(0)
    spell_default_domain(copy)
    for function in copy.functions:
        spell_default_domain(function)
    return copy


def spell_default_domain(proto: onnx.ModelProto | onnx.FunctionProto) -> None:
    """Write the default domain as "" throughout: ONNX's checker and inference do not know that "ai.onnx" is it, too."""
    imports = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in reversed(proto.opset_import)}
    if any(o.domain == "ai.onnx" for o in proto.opset_import):
        del proto.opset_import[:]
        for domain, version in imports.items():
            proto.opset_import.add(domain=domain, version=version)
    graphs: list[Any] = [proto.graph if isinstance(proto, onnx.ModelProto) else proto]
    while graphs:
        for node in graphs.pop().node:
            if node.domain == "ai.onnx":
                node.domain = ""
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs.extend(attribute.graphs)


class _Exporter:
    def __init__(self, graph: Graph, skeleton: Skeleton | None, *, threshold: int = 0, omit: bool = False) -> None:
        self._graph = graph
        self._skeleton = skeleton
        self._threshold = threshold
        self._omit = omit
        self._owned = _owned_constants(graph)
        self._schemas: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._ambiguous = _ambiguous_names(graph) if omit else set()
        #: constants of nested graphs that became inputs of the outermost one
        self._hoisted: list[tuple[str, TypeState]] = []

    def model(self) -> onnx.ModelProto:
        graph, info = self._graph, model_info(self._graph)
        model = onnx.ModelProto()
        if info.keepsake is not None:
            for name in ("domain", "model_version", "doc_string", "producer_name", "producer_version"):
                if info.keepsake.HasField(name):
                    setattr(model, name, getattr(info.keepsake, name))
            for name in ("training_info", "functions", "configuration"):
                getattr(model, name).MergeFrom(getattr(info.keepsake, name))
        if graph.producer_name != model.producer_name:
            model.producer_name = graph.producer_name
        if graph.producer_version != model.producer_version:
            model.producer_version = graph.producer_version
        for function in graph.functions:
            model.functions.append(OnnxExporter.export_function(function))
        for key, value in info.metadata.items():
            model.metadata_props.add(key=key, value=value)
        self.export_graph(graph, model.graph)
        for name, state in self._hoisted:
            value = model.graph.input.add(name=name)
            _write_type(value.type, state)
        self._opsets(model)
        return model

    def _opsets(self, model: onnx.ModelProto) -> None:
        graph = self._graph
        for entry in graph.import_domains or ():
            version = graph.opset if entry.domain in ("", "ai.onnx") else entry.version
            model.opset_import.add(domain=entry.domain, version=version)
        imported = {"" if o.domain == "ai.onnx" else o.domain for o in model.opset_import}
        used = {normal_domain(node) for node in walk_nodes(graph)}
        if not imported:
            used.add("")
        for domain in sorted(used - imported):
            model.opset_import.add(domain=domain, version=graph.opset if domain == "" else 1)
        needed = int(onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True))
        if graph.ir_version is None:
            model.ir_version = max(4, needed)
            return
        model.ir_version = graph.ir_version
        keepsake = model_info(graph).keepsake
        if keepsake is None or list(keepsake.opset_import) != list(model.opset_import):
            model.ir_version = max(graph.ir_version, needed)

    def export_graph(self, graph: Graph, proto: onnx.GraphProto) -> None:
        info = model_info(graph)
        kept = info.keepsake.graph if info.keepsake is not None else onnx.GraphProto()
        types = _declared_types(kept)
        owned = self._owned[id(graph)]
        proto.name = graph.name
        if graph.doc_string or kept.HasField("doc_string"):
            proto.doc_string = graph.doc_string
        for constant in owned.values():
            self._initializer(graph, constant, proto)
        for node in graph.nodes:
            if (node.inputs or node.outputs) and not (self._omit and self._hoist_constant_node(graph, node)):
                self._node(node, proto.node.add())

        present: dict[str, gs.Tensor] = dict(owned)
        for node in graph.nodes:
            present.update((t.name, t) for t in (*node.inputs, *node.outputs) if t.name)
        local = {id(t) for node in graph.nodes for t in node.outputs} | {id(t) for t in graph.inputs}
        local |= {id(constant) for constant in owned.values()}
        for tensors, field_name in ((graph.inputs, "input"), (graph.outputs, "output")):
            declared = {value.name: value for value in getattr(kept, field_name)}
            for tensor in tensors:
                present[tensor.name] = tensor
                value = getattr(proto, field_name).add()
                foreign = id(tensor) not in local
                _write_value(value, tensor, declared.get(tensor.name), types, verbatim=foreign)
        written = {value.name for value in (*proto.input, *proto.output)}
        for declaration in kept.value_info:
            tensor = present.get(declaration.name)
            if tensor is None:
                continue
            written.add(declaration.name)
            state, foreign = _tensor_state(tensor), id(tensor) not in local
            if isinstance(tensor, gs.Constant):
                if not _contradicts(_type_state(declaration.type), state):
                    proto.value_info.add().CopyFrom(declaration)
            elif foreign or state[:2] != (0, None) or state == types[declaration.name]:
                _write_value(proto.value_info.add(), tensor, declaration, types, verbatim=foreign)
        for name, tensor in present.items():
            if name in written or id(tensor) not in local or isinstance(tensor, gs.Constant):
                continue
            if tensor.dtype is not None and not _is_inferred(tensor):
                _write_value(proto.value_info.add(), tensor, None, types)
        names = present.keys() | {c.name for c in info.unread}
        for annotation in kept.quantization_annotation:
            if annotation.tensor_name in names:
                proto.quantization_annotation.add().CopyFrom(annotation)
        proto.metadata_props.MergeFrom(kept.metadata_props)

    def _initializer(self, graph: Graph, constant: gs.Constant, proto: onnx.GraphProto) -> None:
        if _is_sparse(constant):
            sparse = proto.sparse_initializer.add()
            sparse.CopyFrom(constant._values.tensor)
            sparse.values.name = constant.name
        elif self._omit and _stored_bytes(constant) > OMIT_ABOVE and self._hoist(graph, constant.name, constant):
            return
        else:
            self._tensor(constant, proto.initializer.add())

    def _hoist(self, graph: Graph, name: str, constant: gs.Constant) -> bool:
        """Make a constant an input of the outermost graph; False where its name means something else elsewhere."""
        if graph is self._graph:
            if any(t.name == name for t in graph.inputs):
                return True
        elif name in self._ambiguous:
            return False
        self._hoisted.append((name, _tensor_state(constant)))
        return True

    def _hoist_constant_node(self, graph: Graph, node: gs.Node) -> bool:
        value = node.attrs.get("value")
        if node.op != "Constant" or normal_domain(node) != "" or not isinstance(value, gs.Constant):
            return False
        if _stored_bytes(value) <= OMIT_ABOVE or len(node.outputs) != 1:
            return False
        if graph is not self._graph and any(t is node.outputs[0] for t in graph.outputs):
            return False
        return self._hoist(graph, node.outputs[0].name, value)

    def _node(self, node: gs.Node, proto: onnx.NodeProto) -> None:
        proto.input.extend(t.name for t in node.inputs)
        proto.output.extend(t.name for t in node.outputs)
        proto.name, proto.op_type = node.name, node.op
        if node.domain is not None:
            proto.domain = node.domain
        kept = extra(node)
        headers: dict[str, onnx.AttributeProto] = {}
        if kept is not None:
            if kept.HasField("doc_string"):
                proto.doc_string = kept.doc_string
            proto.metadata_props.MergeFrom(kept.metadata_props)
            if kept.op_type == node.op and kept.domain == (node.domain or ""):
                if kept.HasField("overload"):
                    proto.overload = kept.overload
                proto.device_configurations.MergeFrom(kept.device_configurations)
                headers = {header.name: header for header in kept.attribute}
        for name, value in node.attrs.items():
            if value is None:
                continue
            attribute = proto.attribute.add(name=name)
            header = headers.get(name)
            if header is not None and header.HasField("doc_string"):
                attribute.doc_string = header.doc_string
            self._attribute(node, value, attribute, header)

    def _attribute(
        self, node: gs.Node, value: Any, proto: onnx.AttributeProto, header: onnx.AttributeProto | None
    ) -> None:
        if isinstance(value, np.ndarray | np.generic):
            value = value.tolist()
        if isinstance(value, RawAttribute):
            name = proto.name
            proto.CopyFrom(value.proto)
            proto.name = name
        elif isinstance(value, str | bytes):
            proto.type = _Attribute.STRING
            proto.s = value.encode() if isinstance(value, str) else value
        elif isinstance(value, type | np.dtype):
            proto.type = _Attribute.INT
            proto.i = _element_type(value)
        elif isinstance(value, float) or (isinstance(value, int) and self._schema_type(node, proto.name) == "FLOAT"):
            proto.type = _Attribute.FLOAT
            proto.f = value
        elif isinstance(value, int):
            proto.type = _Attribute.INT
            proto.i = int(value)
        elif isinstance(value, gs.Constant):
            if _is_sparse(value):
                proto.type = _Attribute.SPARSE_TENSOR
                proto.sparse_tensor.CopyFrom(value._values.tensor)
            else:
                proto.type = _Attribute.TENSOR
                self._tensor(value, proto.t)
        elif isinstance(value, gs.Graph):
            proto.type = _Attribute.GRAPH
            self.export_graph(value, proto.g)
        elif isinstance(value, gs.Node.AttributeRef):
            proto.MergeFrom(OnnxExporter.export_attributes({proto.name: value})[0])
        elif isinstance(value, onnx.TypeProto):
            proto.type = _Attribute.TYPE_PROTO
            proto.tp.CopyFrom(value)
        elif isinstance(value, onnx.TensorProto):
            proto.type = _Attribute.TENSOR
            proto.t.CopyFrom(value)
        elif isinstance(value, list | tuple):
            self._list_attribute(node, list(value), proto, header)
        else:
            raise OnnxCompressError(
                f"attribute {proto.name!r} of node {node.name!r} is a {type(value).__name__}, which ONNX cannot hold"
            )

    def _list_attribute(
        self, node: gs.Node, value: list[Any], proto: onnx.AttributeProto, header: onnx.AttributeProto | None
    ) -> None:
        if not value:
            proto.type = header.type if header is not None else _Attribute.INTS
            if header is None and (wanted := self._schema_type(node, proto.name)):
                proto.type = _Attribute.AttributeType.Value(wanted)
        elif all(isinstance(item, gs.Graph) for item in value):
            proto.type = _Attribute.GRAPHS
            for item in value:
                self.export_graph(item, proto.graphs.add())
        elif all(isinstance(item, gs.Constant) for item in value):
            proto.type = _Attribute.TENSORS
            for item in value:
                self._tensor(item, proto.tensors.add())
        elif all(isinstance(item, str | bytes) for item in value):
            proto.type = _Attribute.STRINGS
            proto.strings.extend(item.encode() if isinstance(item, str) else item for item in value)
        elif all(isinstance(item, int | np.integer) for item in value):
            if self._schema_type(node, proto.name) == "FLOATS":
                proto.type = _Attribute.FLOATS
                proto.floats.extend(float(item) for item in value)
            else:
                proto.type = _Attribute.INTS
                proto.ints.extend(int(item) for item in value)
        elif all(isinstance(item, int | float | np.number) for item in value):
            proto.type = _Attribute.FLOATS
            proto.floats.extend(float(item) for item in value)
        else:
            raise OnnxCompressError(
                f"attribute {proto.name!r} of node {node.name!r} mixes types, which ONNX cannot hold"
            )

    def _schema_type(self, node: gs.Node, name: str) -> str | None:
        """The type that the operator's schema gives an attribute: a pass may write 1 where 1.0 is meant, or []."""
        key = (normal_domain(node), node.op)
        known = self._schemas.get(key)
        if known is None:
            try:
                known = onnx.defs.get_schema(node.op, self._graph.opset, key[0]).attributes
            except onnx.defs.SchemaError:
                known = {}
            self._schemas[key] = known
        return str(known[name].type).rpartition(".")[2] if name in known else None

    def _tensor(self, constant: gs.Constant, proto: onnx.TensorProto) -> None:
        """Write a dense constant; a large one as a marker where there is a skeleton."""
        values = constant._values
        is_proto = isinstance(values, LazyValues) and getattr(values, "payload", None) is None
        if is_proto:
            # The encoding of the file is kept. A large one in raw_data is still left out of a skeleton.
            stored = values.tensor
            if self._skeleton is None or not stored.HasField("raw_data") or _stored_bytes(constant) < self._threshold:
                proto.CopyFrom(stored)
                if proto.name != constant.name:
                    proto.name = constant.name
                return
        kept = values.tensor if is_proto else extra(constant)
        proto.dims.extend(int(d) for d in constant.shape)
        proto.data_type = _constant_type(constant)
        if constant.name:
            proto.name = constant.name
        if kept is not None:
            if kept.HasField("doc_string"):
                proto.doc_string = kept.doc_string
            if kept.HasField("data_location"):
                proto.data_location = kept.data_location
            proto.metadata_props.MergeFrom(kept.metadata_props)
        if proto.data_type == onnx.TensorProto.STRING:
            proto.string_data.extend(_encoded(item) for item in values.ravel())
            return
        size = _stored_bytes(constant)
        if self._skeleton is not None and size >= max(self._threshold, 1):
            proto.raw_data = self._skeleton.token + len(self._skeleton.weights).to_bytes(8, "little")
            self._skeleton.weights.append((proto, Payload(size, _reader(constant))))
        else:
            proto.raw_data = _raw_bytes(constant).tobytes()


def _encoded(item: Any) -> bytes:
    return item if isinstance(item, bytes) else str(item).encode()


def _reader(constant: gs.Constant) -> Callable[[], Bytes]:
    return lambda: _raw_bytes(constant)


def _raw_bytes(constant: gs.Constant) -> Bytes:
    """The contents of ``raw_data``; without a copy where the values are contiguous in memory."""
    values = constant._values
    if isinstance(values, StoredValues) and values.payload is not None:
        return values.payload
    if isinstance(values, LazyValues):
        if values.tensor.HasField("raw_data"):
            return np.frombuffer(values.tensor.raw_data, np.uint8)
        values = onnx.numpy_helper.to_array(values.tensor)
    data_type = _constant_type(constant)
    if data_type != _onnx_type(values.dtype):
        values = values.astype(element_type(data_type))
    if data_type in _BITS:
        return np.frombuffer(onnx.numpy_helper.from_array(np.ascontiguousarray(values)).raw_data, np.uint8)
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _stored_bytes(constant: gs.Constant) -> int:
    """Size of a dense constant in a file; 0 for strings, which are never left out."""
    data_type = _constant_type(constant)
    return 0 if data_type == onnx.TensorProto.STRING else storage_bytes(data_type, constant.shape)


def _write_value(
    proto: onnx.ValueInfoProto,
    tensor: gs.Tensor,
    declared: onnx.ValueInfoProto | None,
    types: Mapping[str, TypeState],
    *,
    verbatim: bool = False,
) -> None:
    """Write name and type of ``tensor``, as the file declared it unless it has changed since.

    ``verbatim``: believe the file in any case, for values of an outer graph, whose type may come from there.
    """
    if declared is not None:
        proto.CopyFrom(declared)
    proto.name = tensor.name
    state = _tensor_state(tensor)
    if declared is not None and (verbatim or state == types[tensor.name]):
        return
    if isinstance(tensor, gs.Constant) and declared is not None and not _contradicts(_type_state(declared.type), state):
        return
    if state == (0, None, "tensor_type"):
        proto.ClearField("type")
    else:
        if proto.type.WhichOneof("value") not in (None, state[2]):
            proto.ClearField("type")
        _write_type(proto.type, state)


def _contradicts(declared: TypeState, actual: TypeState) -> bool:
    """True where a declaration cannot be true of a value of the ``actual`` type and shape."""
    if declared[2] != actual[2] or declared[0] not in (0, actual[0]):
        return True
    if declared[1] is None or actual[1] is None:
        return False
    if len(declared[1]) != len(actual[1]):
        return True
    return any(isinstance(a, int) and a >= 0 and a != b for a, b in zip(declared[1], actual[1], strict=True))


def _owned_constants(graph: Graph) -> dict[int, dict[str, gs.Constant]]:
    """The initializers of each graph, by ``id()`` of the graph and by name, in the order of the file.

    A constant belongs to the nearest graph around its reader that had an initializer of its name, or else to the
    innermost graph around all its readers.
    """
    owned: dict[int, dict[str, gs.Constant]] = {}
    orders: dict[int, dict[str, int]] = {}
    # constants that no file knows: with the path of graphs that all readers so far have in common
    fresh: dict[int, tuple[gs.Constant, tuple[Graph, ...]]] = {}

    def claim(part: Graph, constant: gs.Constant, name: str) -> None:
        other = owned[id(part)].setdefault(name, constant)
        if other is not constant:
            raise OnnxCompressError(f"two constants are called {name!r}; a pass must take a free name for a new one")

    def visit(part: Graph, outer: tuple[Graph, ...]) -> None:
        path = (*outer, part)
        info = model_info(part)
        owned[id(part)] = {}
        orders[id(part)] = {name: i for i, name in enumerate(info.initializer_order)}
        for tensor in part.inputs:
            if isinstance(tensor, gs.Variable) and tensor.name in info.defaults:
                default = info.defaults[tensor.name]
                claim(part, default, tensor.name)
        for constant in info.unread:
            claim(part, constant, constant.name)
        for node in part.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant):
                    use(tensor, path)
            for nested in nested_graphs(node):
                visit(nested, path)
        for tensor in (*part.inputs, *part.outputs):
            if isinstance(tensor, gs.Constant):
                use(tensor, path)

    def use(constant: gs.Constant, path: tuple[Graph, ...]) -> None:
        for part in reversed(path):
            if constant.name in orders[id(part)]:
                claim(part, constant, constant.name)
                return
        _, common = fresh.get(id(constant), (constant, path))
        shared = [a for a, b in zip(common, path, strict=False) if a is b]
        fresh[id(constant)] = (constant, tuple(shared))

    visit(graph, ())
    for constant, path in fresh.values():
        claim(path[-1], constant, constant.name)
    result = {}
    for key, constants in owned.items():
        order = orders[key]
        ranked = sorted(constants.items(), key=lambda item: order.get(item[0], len(order)))
        result[key] = dict(ranked)
    return result


def _ambiguous_names(graph: Graph) -> set[str]:
    """Names that stand for more than one tensor in the whole model."""
    tensors: dict[str, int] = {}
    ambiguous: set[str] = set()
    for part in walk_graphs(graph):
        for tensor in (
            *part.inputs,
            *part.outputs,
            *(t for node in part.nodes for t in (*node.inputs, *node.outputs)),
        ):
            if tensors.setdefault(tensor.name, id(tensor)) != id(tensor):
                ambiguous.add(tensor.name)
    return ambiguous
