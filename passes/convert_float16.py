"""Convert to float16 what computes in float32, except where float16 would be wrong.

::

    x -> Conv -> Softmax -> y        x -> Cast -> Conv(w as float16) -> Softmax -> Cast -> y

A node stays float32 for one of these reasons, which the report tells:

- the ONNX schema of its operator, at the model's opset, does not take float16;
- it is among the protected operators (:data:`PROTECTED`): sums that grow with the length, powers and exponentials,
  selections by comparison, coordinates, random numbers, control flow with its nested graphs;
- a constant that it reads overflows float16 or loses all but noise when it is rounded;
- a value that it reads or makes may be outside of float16's range: the observed range with calibration data, without it
  whatever such a constant reaches before an operator of bounded output (:data:`BOUNDED`);
- it computes with counts: values cast from wide integers, which float16 holds exactly only up to 2048;
- conversions around it would move more bytes than it saves. Which of the others become float16 is a minimum cut, so
  that no conversion is made for the sake of a cheap operator between float32 neighbours.

A tensor is converted once in each direction, and conversions that are in the file already are used, not doubled.
Tensors keep their names; the other form of a tensor ``t`` is ``t_float16`` or ``t_float32``. Graphs that hold
QuantizeLinear or DequantizeLinear are left alone.

Source: ONNX operator schemas (``onnx.defs``); P. Micikevicius et al., "Mixed Precision Training", ICLR 2018, for which
operators accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from pydantic import Field

from onnxcompress.base import Change, Context, Detail, Guarantee, Pass, Refusal
from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    constant_value,
    model_info,
    normal_domain,
    remove_nodes,
    tensors_read_inside,
    walk_graphs,
    walk_nodes,
)
from onnxcompress.quantization.affine import Range
from onnxcompress.quantization.calibration import calibrate
from onnxcompress.quantization.mincut import MinCut
from onnxcompress.shapes import TensorType, infer_shapes, node_macs

__all__ = ["BOUNDED", "PROTECTED", "ConvertFloat16"]

HALF, FLOAT = np.dtype(np.float16), np.dtype(np.float32)
#: the largest finite float16
LARGEST = float(np.finfo(np.float16).max)
#: observed ranges may be this many times wider on other data
HEADROOM = 2.0
#: relative L2 error of a constant (of a weight's output channel) that rounding to float16 may cause; 2^-11 is usual
ROUNDING = 2.0**-8
#: output channels this much weaker than the strongest may lose all digits, unless an operator behind scales them up
WEAK = 2.0**-10
#: a mean over more elements than this stays float32
LONGEST_MEAN = 4096

#: operators that stay float32 although their schema takes float16, and why
PROTECTED: Mapping[str, str] = {
    "Pow": "powers overflow float16: a square does above 255",
    "Exp": "it overflows float16 above 11",
    "Log": "it takes small values to large ones, and float16 has none below 6e-8",
    "Sinh": "it overflows float16 above 11",
    "Cosh": "it overflows float16 above 11",
    "Tan": "it has poles",
    "Reciprocal": "it overflows float16 below 1.5e-5",
    "Softplus": "its exponential overflows float16 above 11",
    **dict.fromkeys(("ReduceSum", "ReduceProd"), "its result grows with the number of elements"),
    **dict.fromkeys(("ReduceSumSquare", "ReduceL1", "ReduceL2", "LpNormalization", "LpPool"), "its sums overflow"),
    **dict.fromkeys(("ReduceLogSum", "ReduceLogSumExp"), "its sums overflow"),
    "GlobalLpPool": "its sums overflow",
    "MeanVarianceNormalization": "its squares overflow",
    "GroupNormalization": "its variance is computed in the type of its input",
    "LRN": "its squares overflow",
    "CumSum": "rounding errors add up along the axis",
    "CumProd": "rounding errors multiply along the axis",
    "Det": "its products overflow",
    **dict.fromkeys(("DFT", "STFT", "MelWeightMatrix"), "its sums need more digits than float16 has"),
    **dict.fromkeys(("HannWindow", "HammingWindow", "BlackmanWindow"), "its arguments need more digits"),
    **dict.fromkeys(("Range", "EyeLike", "ConstantOfShape"), "its type is part of its definition"),
    **dict.fromkeys(
        ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"),
        "its random numbers are repeated in float32 only",
    ),
    **dict.fromkeys(("TopK", "Unique", "NonMaxSuppression"), "it selects by comparing, and rounding makes ties"),
    **dict.fromkeys(
        ("GridSample", "RoiAlign", "MaxRoiPool", "AffineGrid", "CenterCropPad", "DeformConv"),
        "its coordinates need more digits than float16 has",
    ),
    **dict.fromkeys(("ImageDecoder", "StringNormalizer", "TfIdfVectorizer"), "it does not compute with activations"),
    **dict.fromkeys(("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"), "losses are computed in float32"),
    **dict.fromkeys(("Adam", "Adagrad", "Momentum", "Gradient"), "training stays in float32"),
    **dict.fromkeys(("If", "Loop", "Scan", "SequenceMap"), "it is control flow, and nested graphs stay as they are"),
}

#: operators whose output is bounded (or normalised), whatever they read
BOUNDED = frozenset(
    """
    Softmax Sigmoid HardSigmoid Tanh Erf Softsign Sin Cos Atan Acos Asin Sign
    LayerNormalization InstanceNormalization GroupNormalization LpNormalization MeanVarianceNormalization Hardmax
    """.split()  # noqa: SIM905 - a table of words is easier to read
)

#: operators that multiply with weights: where float16 pays, whatever its conversions cost
COMPUTE = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "Attention"))

#: type variables that are parameters of the operator and stay float32: the data does not share them
_PARAMETERS = {("Resize", "T2"), ("Dropout", "T1")}

#: operators that read no values, so either form of a tensor will do
_ANY_FORM = frozenset(("Shape", "Size"))

_RESCALES = frozenset(
    ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "Mul", "Div")
)

_QUANTIZERS = frozenset(
    """
    QuantizeLinear DequantizeLinear DynamicQuantizeLinear QLinearConv QLinearMatMul ConvInteger MatMulInteger
    """.split()  # noqa: SIM905
)

# What the cut is paid in: bytes moved.
_HALF_BYTES, _CAST_BYTES, _NODE_BYTES = 2, 6, 20_000
_ALWAYS, _FOREVER = 1 << 50, 1 << 60
_UNKNOWN_SIZE = 1000


class ConvertFloat16(Pass):
    """Convert weights and activations to float16, except where that would be wrong."""

    name: ClassVar[str] = "convert_float16"

    keep_io: bool = Field(True, description="Inputs and outputs stay float32, by a Cast each; otherwise float16")
    exclude_nodes: tuple[str, ...] = Field((), description="Node names that stay float32; * and ? match as in a shell")
    exclude_operators: tuple[str, ...] = Field((), description="Operator types that stay float32, such as Softmax")

    @property
    def guarantee(self) -> Guarantee:
        """Rounds to 11 bits: judged by the task metric."""
        return Guarantee.APPROXIMATE

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Detail]:
        """Decide for each node, then write; calibration data is used where it is there."""
        quantiser = next((n for n in walk_nodes(graph) if n.op in _QUANTIZERS or n.op.startswith("QLinear")), None)
        if quantiser is not None:
            yield Refusal(quantiser.name, "the graph is quantised, and what its integers leave in float32 stays so")
            return
        plan = _Plan(graph, self, context)
        plan.decide()
        yield from _Writer(plan, self.keep_io).run()
        for key, node in plan.nodes.items():
            if key not in plan.half and key in plan.reasons:
                yield Refusal(node.name, f"{node.op} stays float32: {plan.reasons[key]}")


@dataclass
class _Roles:
    """Which inputs and outputs of a node are float32 now and float16 after its conversion, by position."""

    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)


class _Plan:
    """Which nodes become float16, and why the others do not. Keys are ``id()`` of nodes and tensors."""

    def __init__(self, graph: Graph, options: ConvertFloat16, context: Context) -> None:
        self.graph = graph
        self.options = options
        self.context = context
        self.types: Mapping[str, TensorType] = infer_shapes(graph)
        self.macs = node_macs(graph, self.types)
        self.outputs = {id(t) for t in graph.outputs}
        self.defaults = set(model_info(graph).defaults)
        #: tensors of this graph that nested graphs read: they stay available in float32
        self.captured = {id(t) for t in tensors_read_inside(graph)}
        self.nodes = {id(n): n for n in graph.nodes}
        #: every tensor of this graph, which keeps their ids from being given away, and those that hold float32
        self.tensors = {id(t): t for n in graph.nodes for t in (*n.inputs, *n.outputs)}
        self.tensors |= {id(t): t for t in (*graph.inputs, *graph.outputs)}
        self.floats = {key for key, t in self.tensors.items() if t.name and self.dtype(t) == FLOAT}
        #: conversions of the file, from float32 to float16 and back
        casts = [n for n in graph.nodes if _is_cast(n)]
        self.narrowing = {id(n) for n in casts if self.is_float(n.inputs[0]) and self.dtype(n.outputs[0]) == HALF}
        self.widening = {id(n) for n in casts if self.dtype(n.inputs[0]) == HALF and self.is_float(n.outputs[0])}
        self.roles: dict[int, _Roles] = {}
        self.reasons: dict[int, str] = {}
        self.half: set[int] = set()
        self.ranges: dict[str, Range] = {}

    # ---- what a tensor is

    def dtype(self, tensor: gs.Tensor) -> Any:
        if isinstance(tensor, gs.Constant):
            return tensor.dtype
        value = constant_value(tensor)
        if value is not None:
            return value.dtype
        if (tensor.type or "tensor_type") != "tensor_type":
            return None
        known = self.types.get(tensor.name)
        return known.dtype if known is not None and known.dtype is not None else tensor.dtype

    def is_float(self, tensor: gs.Tensor) -> bool:
        """True where ``tensor`` held float32 when the plan was made."""
        return id(tensor) in self.floats

    def size(self, tensor: gs.Tensor) -> int:
        value = tensor.shape if isinstance(tensor, gs.Constant) else None
        if value is None:
            known = self.types.get(tensor.name)
            value = known.shape if known is not None else None
        return _UNKNOWN_SIZE if value is None else prod(d if isinstance(d, int) else 1 for d in value)

    # ---- decisions

    def decide(self) -> None:
        for node in self.graph.nodes:
            if not any(self.is_float(t) for t in (*node.inputs, *node.outputs)):
                continue
            if (
                _is_constant_node(node)
                or node.op in _ANY_FORM
                or id(node) in self.narrowing
                or id(node) in self.widening
            ):
                continue
            roles, reason = self.roles_of(node)
            reason = reason or self.excluded(node) or self.protected(node) or self.constants(node)
            if reason is None:
                self.roles[id(node)] = roles
            else:
                self.reasons[id(node)] = reason
        self.keep_counts()
        self.keep_large()
        self.cut()

    def roles_of(self, node: gs.Node) -> tuple[_Roles, str | None]:
        """What would change its type, by the schema of the operator, or why nothing can."""
        roles = _Roles()
        if normal_domain(node) != "":
            return roles, f"it is an operator of domain {node.domain!r}, which is not known"
        if node.op in PROTECTED:  # before the schema: the reason is the better one
            return roles, PROTECTED[node.op]
        try:
            schema = onnx.defs.get_schema(node.op, int(self.graph.opset), "")
        except onnx.defs.SchemaError:
            return roles, f"opset {self.graph.opset} has no operator {node.op}"
        takes = {c.type_param_str: "tensor(float16)" in c.allowed_type_strs for c in schema.type_constraints}
        sequences = {
            c.type_param_str
            for c in schema.type_constraints
            if all(kind.startswith(("seq(", "optional(")) for kind in c.allowed_type_strs)
        }
        variables = set()
        for index, tensor in enumerate(node.inputs):
            if not self.is_float(tensor):
                continue
            kind = _formal(schema.inputs, index).type_str
            if kind not in takes or (node.op, kind) in _PARAMETERS:
                continue  # the operator itself asks for float32
            if not takes[kind]:
                return roles, f"{node.op} of opset {self.graph.opset} does not take float16"
            variables.add(kind)
            roles.inputs.append(index)
        for index, tensor in enumerate(node.outputs):
            if self.is_float(tensor) and _formal(schema.outputs, index).type_str in variables:
                roles.outputs.append(index)
        named = [_formal(schema.inputs, i).type_str for i, t in enumerate(node.inputs) if t.name]
        named += [_formal(schema.outputs, i).type_str for i, t in enumerate(node.outputs) if t.name]
        if any(kind in takes and kind not in variables and kind in sequences for kind in named):
            return roles, "it reads or makes a sequence, and sequences stay as they are"
        unknown = next((t for t in node.inputs if t.name and self.dtype(t) is None), None)
        if unknown is not None:
            return roles, f"the type of tensor {unknown.name!r} is not known"
        if not roles.inputs:
            return roles, f"{node.op} makes float32 from what is not float32"
        if all(constant_value(t) is not None for t in node.inputs if t.name):
            return roles, "its inputs are constant; fold_constants removes it"
        return roles, None

    def excluded(self, node: gs.Node) -> str | None:
        if node.op in self.options.exclude_operators:
            return f"operator {node.op} is excluded"
        patterns = self.options.exclude_nodes
        if node.name in patterns or any(fnmatchcase(node.name, p) for p in patterns):
            return "it is excluded by name"
        return None

    def protected(self, node: gs.Node) -> str | None:
        if node.op in ("Mul", "MatMul") and node.inputs[0] is node.inputs[1]:
            return "squares overflow float16 above 255"
        if node.op == "BatchNormalization" and (
            attribute(node, "training_mode", 0) or any(t.name for t in node.outputs[1:])
        ):
            return "it computes statistics"
        if node.op == "Dropout" and len(node.inputs) > 2 and node.inputs[2].name:
            mode = constant_value(node.inputs[2])
            if mode is None or mode.any():
                return "it is in training mode, and its random numbers are repeated in float32 only"
        if node.op == "ReduceMean":
            length = self.reduced_length(node)
            if length is None or length > LONGEST_MEAN:
                found = "an unknown number of" if length is None else str(length)
                return f"it sums {found} elements, and float16 is trusted with {LONGEST_MEAN}"
        return None

    def reduced_length(self, node: gs.Node) -> int | None:
        """Elements per mean; None where the shape is not known."""
        known = self.types.get(node.inputs[0].name)
        if known is None or known.shape is None:
            return None
        axes = attribute(node, "axes")
        if len(node.inputs) > 1 and node.inputs[1].name:
            value = constant_value(node.inputs[1])
            if value is None:
                return None
            axes = value.reshape(-1).tolist()
        chosen = known.shape if not axes else [known.shape[a] for a in axes]
        return prod(d for d in chosen if isinstance(d, int)) if all(isinstance(d, int) for d in chosen) else None

    def constants(self, node: gs.Node) -> str | None:
        """Why a constant of ``node`` cannot be float16, or None."""
        for index, tensor in enumerate(node.inputs):
            if not self.is_float(tensor) or (isinstance(tensor, gs.Constant) and constant_value(tensor) is None):
                if isinstance(tensor, gs.Constant) and tensor.name and self.is_float(tensor):
                    return f"constant {tensor.name!r} is sparse"
                continue
            value = constant_value(tensor)
            if value is None or (node.op == "Clip" and index > 0):
                continue  # no float16 exceeds a bound that becomes infinite
            reason = _unrepresentable(value, _channel_axis(node, index), 0.0 if _is_rescaled(node) else WEAK)
            if reason is not None:
                return f"constant {tensor.name!r} {reason}"
        return None

    def keep_counts(self) -> None:
        """Refuse what computes with values cast from wide integers only: lengths, positions, sizes."""
        counts: set[int] = set()
        for node in self.graph.nodes:
            variable = [t for t in node.inputs if t.name and constant_value(t) is None]
            floats = [t for t in variable if self.is_float(t)]
            if _is_cast(node) and self.is_float(node.outputs[0]):
                kind = np.dtype(self.dtype(node.inputs[0]) or FLOAT)
                made = kind.kind in "iu" and kind.itemsize > 1
            else:
                made = bool(floats) and all(id(t) in counts for t in floats)
                made = made and node.op not in COMPUTE and node.op not in BOUNDED
            if not made:
                continue
            counts.update(id(t) for t in node.outputs if self.is_float(t))
            if id(node) in self.roles:
                self.refuse(node, "it computes with counts, which float16 holds exactly only up to 2048")

    def keep_large(self) -> None:
        """Refuse what reads or makes values outside of float16's range, as far as that is known."""
        self.observe()
        large: dict[int, str] = {}
        inputs = {t.name: t for t in self.graph.inputs if self.is_float(t)}
        for tensor in inputs.values():
            self.judge(tensor, None, large)
        for node in self.graph.nodes:
            floats = [t for t in node.inputs if self.is_float(t)]
            source = next((large[id(t)] for t in floats if id(t) in large), None)
            if source is None:
                source = next((f"constant {t.name!r}" for t in floats if self.overflows(node, t)), None)
            bounded = node.op in BOUNDED or _clips(node)
            for tensor in node.outputs:
                if self.is_float(tensor):
                    self.judge(tensor, None if bounded else source, large)
            if id(node) not in self.roles:
                continue
            roles = self.roles[id(node)]
            touched = [node.inputs[i] for i in roles.inputs] + [node.outputs[i] for i in roles.outputs]
            beyond = next((t for t in touched if id(t) in large), None)
            if beyond is not None:
                found = self.ranges.get(beyond.name)
                if found is not None:
                    why = f"ranges from {found.low:g} to {found.high:g}"
                else:
                    why = f"may exceed float16, for {large[id(beyond)]} does; calibration data would tell"
                self.refuse(node, f"tensor {beyond.name!r} {why}")

    def judge(self, tensor: gs.Tensor, source: str | None, large: dict[int, str]) -> None:
        """Record ``tensor`` as large where its range says so, or without a range where its source is."""
        found = self.ranges.get(tensor.name)
        if found is not None:
            if max(-found.low, found.high) * HEADROOM > LARGEST:
                large[id(tensor)] = f"tensor {tensor.name!r}"
        elif source is not None:
            large[id(tensor)] = source

    def overflows(self, node: gs.Node, tensor: gs.Tensor) -> bool:
        value = constant_value(tensor)
        return value is not None and node.op != "Clip" and _overflowing(value) > 0

    def observe(self) -> None:
        """Fill in ranges from calibration data; tensors that infinite constants reach are not looked at."""
        if self.context.data is None:
            return
        infinite: set[int] = set()
        wanted = [t.name for t in self.graph.inputs if self.is_float(t) and t.name not in self.defaults]
        for node in self.graph.nodes:
            values = [constant_value(t) for t in node.inputs if self.is_float(t)]
            reached = any(v is not None and not np.isfinite(v).all() for v in values)
            reached = reached or any(id(t) in infinite for t in node.inputs)
            if reached and node.op not in BOUNDED and not _clips(node):
                infinite.update(id(t) for t in node.outputs)
            elif not _is_constant_node(node):
                wanted += [t.name for t in node.outputs if self.is_float(t) and self.size(t)]
        self.ranges = calibrate(
            self.graph, wanted, self.context.data, threads=self.context.threads, progress=self.context.progress
        )

    def refuse(self, node: gs.Node, reason: str) -> None:
        self.reasons[id(node)] = reason
        del self.roles[id(node)]

    def cut(self) -> None:
        """Choose among the candidates: a minimum cut between float16 (the source's side) and float32."""
        cut = MinCut()
        vertex = {key: cut.vertex() if key in self.roles else cut.SINK for key in self.nodes}
        for key in self.roles:
            cut.edge(cut.SOURCE, vertex[key], self.gain(self.nodes[key]))
        keep = self.options.keep_io
        made: dict[int, int] = {}  # vertex of the maker, by tensor
        tensors: dict[int, gs.Tensor] = {}
        for tensor in self.graph.inputs:
            if self.is_float(tensor):
                tensors[id(tensor)] = tensor
                free = not keep and tensor.name not in self.defaults and id(tensor) not in self.captured
                made[id(tensor)] = cut.SOURCE if free else cut.SINK
        for key, node in self.nodes.items():
            converted = self.roles[key].outputs if key in self.roles else []
            for index, tensor in enumerate(node.outputs):
                if self.is_float(tensor) and not _is_constant_node(node):
                    tensors[id(tensor)] = tensor
                    made[id(tensor)] = vertex[key] if index in converted else cut.SINK
                    if id(node) in self.widening:
                        made[id(tensor)] = cut.SOURCE
        for key, tensor in tensors.items():
            readers = self.reader_vertices(tensor, vertex, cut)
            if key in self.outputs:
                readers.append(cut.SINK if keep else cut.SOURCE)
            if key in self.captured:
                readers.append(cut.SINK)
            price = _CAST_BYTES * self.size(tensor) + _NODE_BYTES
            widen, narrow = cut.vertex(), cut.vertex()
            cut.edge(made[key], widen, price)
            cut.edge(narrow, made[key], price)
            for reader in readers:
                cut.edge(widen, reader, _FOREVER)
                cut.edge(reader, narrow, _FOREVER)
        side = cut.source_side()
        for key in list(self.roles):
            if vertex[key] in side:
                self.half.add(key)
            else:
                reason = "conversions around it would cost more than it saves, for its neighbours are float32"
                self.refuse(self.nodes[key], reason)

    def reader_vertices(self, tensor: gs.Tensor, vertex: Mapping[int, int], cut: MinCut) -> list[int]:
        found = []
        for reader in {id(n): n for n in tensor.outputs}.values():
            if id(reader) not in self.nodes or reader.op in _ANY_FORM:
                continue  # inside a nested graph, or not interested in values
            if id(reader) in self.narrowing:
                found.append(cut.SOURCE)
                continue
            positions = self.roles[id(reader)].inputs if id(reader) in self.roles else []
            for index, read in enumerate(reader.inputs):
                if read is tensor:
                    found.append(vertex[id(reader)] if index in positions else cut.SINK)
        return found

    def gain(self, node: gs.Node) -> int:
        if node.op in COMPUTE:
            return _ALWAYS
        roles = self.roles[id(node)]
        values = [node.inputs[i] for i in roles.inputs] + [node.outputs[i] for i in roles.outputs]
        return _HALF_BYTES * sum(self.size(t) for t in values)


class _Writer:
    """Writes a plan into its graph."""

    def __init__(self, plan: _Plan, keep_io: bool) -> None:
        self.plan = plan
        self.graph = plan.graph
        self.keep_io = keep_io
        self.names = Names(plan.graph)
        #: the other form of a tensor, by id of the tensor; alive as long as the graph is
        self.narrow: dict[int, gs.Tensor] = {}
        self.wide: dict[int, gs.Tensor] = {}
        self.became_half: set[int] = set()
        self.casts: list[Change] = []
        self.rounded: dict[str, int] = {}
        self.obsolete: list[gs.Node] = []

    def run(self) -> Iterator[Change | Detail]:
        plan = self.plan
        if not plan.half and self.keep_io:
            return
        nodes = list(self.graph.nodes)
        readers = {
            key: [(i, plan.nodes[key].inputs[i]) for i in plan.roles[key].inputs]
            for key in plan.nodes
            if key in plan.half
        }
        for node in nodes:  # conversions of the file are the other form of what they read or make
            if id(node) in plan.narrowing:
                self.narrow.setdefault(id(node.inputs[0]), node.outputs[0])
            elif id(node) in plan.widening:
                self.narrow[id(node.outputs[0])] = node.inputs[0]
        kept = [t for t in self.graph.inputs if plan.is_float(t)]
        for tensor in kept:
            free = tensor.name not in plan.defaults and id(tensor) not in plan.captured
            if not self.keep_io and free:
                self.make_half(tensor)
        for key in readers:
            node = plan.nodes[key]
            for index in plan.roles[key].outputs:
                self.make_half(node.outputs[index])
        self.mend_float_readers(nodes)
        for key, inputs in readers.items():
            node = plan.nodes[key]
            for index, tensor in inputs:
                node.inputs[index] = self.half_form(node, index, tensor)
        self.mend_outputs()
        self.cancel_casts(nodes)
        remove_nodes(self.graph, self.obsolete)
        for key in readers:
            yield Change("converted", plan.nodes[key].name, f"{plan.nodes[key].op} in float16")
        yield from self.casts
        if self.rounded:
            yield Detail("rounded_to_zero", self.rounded)

    def make_half(self, tensor: gs.Tensor) -> None:
        self.became_half.add(id(tensor))
        tensor.dtype = HALF

    # ---- forms of a tensor

    def half_form(self, node: gs.Node, index: int, tensor: gs.Tensor) -> gs.Tensor:
        """``tensor`` as float16."""
        if id(tensor) in self.became_half:
            return tensor
        if id(tensor) in self.narrow:
            return self.narrow[id(tensor)]
        value = constant_value(tensor)
        if value is not None:
            return self.half_constant(node, tensor, value)
        result = self.cast(tensor, HALF)
        self.narrow[id(tensor)] = result
        return result

    def half_constant(self, node: gs.Node, tensor: gs.Tensor, value: NDArray[Any]) -> gs.Tensor:
        """A constant's float16 form, under its own name where nothing else reads it."""
        with np.errstate(over="ignore"):  # bounds of Clip
            rounded = value.astype(np.float16)
        lost = int(np.count_nonzero((rounded == 0) & (value != 0)))
        if lost:
            self.rounded[tensor.name] = lost
        plan = self.plan
        alone = isinstance(tensor, gs.Constant) and id(tensor) not in plan.captured and id(tensor) not in plan.outputs
        everyone = all(
            id(reader) in plan.half
            and all(read is not tensor or i in plan.roles[id(reader)].inputs for i, read in enumerate(reader.inputs))
            for reader in tensor.outputs
        )
        name = tensor.name if alone and everyone else self.names.free(f"{tensor.name}_float16")
        result = gs.Constant(name, _frozen(rounded))
        self.narrow[id(tensor)] = result
        return result

    def wide_form(self, tensor: gs.Tensor) -> gs.Tensor:
        """``tensor``, which became float16, as float32 for those who stay."""
        if id(tensor) not in self.wide:
            self.wide[id(tensor)] = self.cast(tensor, FLOAT)
        return self.wide[id(tensor)]

    def cast(self, source: gs.Tensor, dtype: np.dtype[Any], result: gs.Tensor | None = None) -> gs.Tensor:
        if result is None:
            name = self.names.free(f"{source.name}_{dtype.name}")
            result = gs.Variable(name, dtype)  # without a shape: what the file states may be wrong
        to = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        name = self.names.free(f"{result.name}_Cast")
        self.graph.nodes.append(gs.Node("Cast", name, {"to": to}, [source], [result]))
        self.casts.append(Change("cast", name, f"{source.name} to {dtype.name}"))
        return result

    # ---- whoever stays float32

    def mend_float_readers(self, nodes: list[gs.Node]) -> None:
        plan = self.plan
        for node in nodes:
            positions = set(plan.roles[id(node)].inputs) if id(node) in plan.half else set()
            if id(node) in plan.narrowing or node.op in _ANY_FORM:
                continue
            for index, tensor in enumerate(node.inputs):
                if id(tensor) in self.became_half and index not in positions:
                    node.inputs[index] = self.wide_form(tensor)
        for part in walk_graphs(self.graph):
            if part is self.graph:
                continue
            for node in part.nodes:
                for index, tensor in enumerate(node.inputs):
                    if id(tensor) in self.became_half:
                        node.inputs[index] = self.wide_form(tensor)
            for index, tensor in enumerate(part.outputs):
                if id(tensor) in self.became_half:
                    part.outputs[index] = self.wide_form(tensor)
                    part.outputs[index].shape = tensor.shape

    def mend_outputs(self) -> None:
        """Graph outputs keep name and type with ``keep_io``; without it those of float32 become float16."""
        plan = self.plan
        swapped: dict[int, gs.Tensor] = {}
        for index, tensor in enumerate(self.graph.outputs):
            if self.keep_io and id(tensor) in self.became_half:
                self.graph.outputs[index] = self.swap(tensor, FLOAT, self.wide, swapped)
            elif not self.keep_io and id(tensor) not in self.became_half and plan.is_float(tensor) and tensor.inputs:
                maker = tensor.inputs[0]
                if id(maker) in plan.widening and not tensor.outputs:
                    maker.op, maker.attrs, tensor.dtype = "Identity", {}, HALF
                    self.became_half.add(id(tensor))
                    continue
                self.graph.outputs[index] = self.swap(tensor, HALF, self.narrow, swapped)

    def swap(
        self, tensor: gs.Tensor, dtype: np.dtype[Any], forms: dict[int, gs.Tensor], swapped: dict[int, gs.Tensor]
    ) -> gs.Tensor:
        """The form of ``tensor`` in ``dtype`` takes over its name, which the outside knows."""
        if id(tensor) in swapped:
            return swapped[id(tensor)]
        other = forms.get(id(tensor))
        if other is None or any(other is o for o in self.graph.outputs) or not any(_is_cast(n) for n in other.inputs):
            other = self.cast(tensor, dtype)
        made = HALF if dtype == FLOAT else FLOAT
        name = tensor.name
        tensor.name = self.names.free(f"{name}_{made.name}")
        other.name = name
        other.shape = tensor.shape  # an output states its shape
        swapped[id(tensor)] = other
        return other

    def cancel_casts(self, nodes: list[gs.Node]) -> None:
        """Conversions of the file that do nothing any more, or that can go to float16 at once."""
        plan = self.plan
        kept = {id(t) for t in self.graph.outputs} | {id(t) for t in tensors_read_inside(self.graph)}
        for node in nodes:
            if not _is_cast(node) or not node.outputs:
                continue
            source, result = node.inputs[0], node.outputs[0]
            if id(node) in plan.narrowing and id(source) in self.became_half:
                if id(result) in kept:
                    node.op, node.attrs = "Identity", {}
                    continue
                for reader in list({id(n): n for n in result.outputs}.values()):
                    for index, tensor in enumerate(reader.inputs):
                        if tensor is result:
                            reader.inputs[index] = source
                self.obsolete.append(node)
            elif id(node) in plan.widening and _is_cast(node) and not result.outputs and id(result) not in kept:
                self.obsolete.append(node)
            elif plan.is_float(result) and id(result) not in kept and id(result) in self.narrow:
                self.merge(node, result)

    def merge(self, node: gs.Node, result: gs.Tensor) -> None:
        """``Cast(integer to float32) -> Cast(float32 to float16)`` as one, where nothing else reads the float32."""
        kind = np.dtype(self.plan.dtype(node.inputs[0]) or FLOAT)
        readers = list(result.outputs)
        if kind.kind not in "iub" or len(readers) != 1 or not _is_cast(readers[0]):
            return
        second = readers[0]
        second.inputs[0] = node.inputs[0]
        self.obsolete.append(node)


# ----------------------------------------------------------------------------------------------------------------------
# Facts of nodes and constants


def _formal(parameters: Any, index: int) -> Any:
    """The formal parameter of position ``index``; the last one is variadic where there are fewer."""
    return parameters[min(index, len(parameters) - 1)]


def _is_cast(node: gs.Node) -> bool:
    return node.op == "Cast" and normal_domain(node) == "" and len(node.inputs) == 1


def _is_constant_node(node: gs.Node) -> bool:
    return node.op == "Constant" and normal_domain(node) == ""


def _clips(node: gs.Node) -> bool:
    """True for a Clip whose two bounds are constants inside of float16's range."""
    if node.op != "Clip":
        return False
    bounds = [constant_value(t) if t.name else None for t in node.inputs[1:3]]
    values = [None if b is None else float(b.reshape(-1)[0]) for b in bounds]
    if len(node.inputs) == 1:
        values = [attribute(node, "min"), attribute(node, "max")]
    return len(values) == 2 and all(v is not None and abs(v) <= LARGEST for v in values)


def _channel_axis(node: gs.Node, index: int) -> int | None:
    """The axis of a weight's output channels; None for constants that are not weights."""
    if index != 1 or node.op not in ("Conv", "Gemm", "MatMul"):
        return None
    if node.op == "Conv":
        return 0
    return 0 if node.op == "Gemm" and attribute(node, "transB", 0) else -1


def _overflowing(value: NDArray[Any]) -> int:
    """How many finite numbers float16 does not reach."""
    return int(np.count_nonzero(np.isfinite(value) & (np.abs(value) > LARGEST)))


def _is_rescaled(node: gs.Node) -> bool:
    """True where an operator behind may scale single channels up again."""
    return any(reader.op in _RESCALES for tensor in node.outputs for reader in tensor.outputs)


def _unrepresentable(value: NDArray[Any], axis: int | None, weak: float) -> str | None:
    """Why rounding ``value`` to float16 would lose more than its digits, or None.

    Channels below ``weak`` times the norm of the strongest are judged as if they were that strong.
    """
    beyond = _overflowing(value)
    if beyond:
        return f"holds {beyond} of {value.size} values beyond 65504"
    exact = np.where(np.isfinite(value), value, 0).astype(np.float64)
    error = exact - exact.astype(np.float16)
    if axis is None or value.ndim < 2:
        rows, errors = exact.reshape(1, -1), error.reshape(1, -1)
    else:
        rows, errors = (np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1) for a in (exact, error))
    norms = np.linalg.norm(rows, axis=1)
    lost = np.linalg.norm(errors, axis=1) > ROUNDING * np.maximum(norms, weak * norms.max(initial=0.0))
    if not lost.any():
        return None
    zeros = int(np.count_nonzero((exact != 0) & (exact.astype(np.float16) == 0)))
    where = "" if len(rows) == 1 else f" in {int(lost.sum())} of {len(rows)} channels"
    return f"is too small for float16{where}: {zeros} of {value.size} values would become zero"


def _frozen(value: NDArray[Any]) -> NDArray[Any]:
    value.flags.writeable = False
    return value
