"""Dynamic INT8: matrix products with int8 weights, whose inputs are quantised at run time by their own range.

::

    MatMul(x, W) + b      x -> DynamicQuantizeLinear -> q, s_x, z_x
                          Cast(MatMulInteger(q, W_int8, z_x)) * (s_x * s_W) + b

ONNX Runtime fuses each such group into one DynamicQuantizeMatMul, or, where several products share the quantised
input, into MatMulIntegerToFloat behind one DynamicQuantizeLinear; the bias goes along. The range of an input is that of
the sample at hand, so that no calibration data is needed and no value is cut off; a range has to be found at every run.

Gemm is taken apart: alpha goes into the scales of the weight, ``transB`` into the stored weight, ``beta * C`` becomes
the addition behind, ``transA`` a Transpose in front. Weights have one scale per output channel. Embedding tables are
what ``quantize_embeddings`` is for.

With ``use: measured`` the pass also makes the static form (``insert_qdq``), judges both by the error at the outputs on
calibration samples and times them in pairs. It takes the dynamic form where ``SQNR + 10 log2(speed)`` is larger: 10 dB
are worth a doubling of speed, 1 dB is worth 7 %; times that do not surely differ count as equal, and then
within 0.5 dB the dynamic form is taken, which cuts off no value that calibration did not see. The decision is part of
the saved recipe. Models without a matrix product on sequences (rank three or more) stay static, and nothing is
measured.

Source: ONNX operator specification of DynamicQuantizeLinear and MatMulInteger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log2
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from pydantic import Field

from onnxcompress.base import Change, Context, Decision, Detail, Guarantee, Pass, Refusal
from onnxcompress.environment import saturation_note
from onnxcompress.errors import DataError
from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    constant_value,
    copy_graph,
    normal_domain,
    release,
    remove_node,
    sort_nodes,
)
from onnxcompress.lockstep import Judge, decibels, split_samples
from onnxcompress.opset import raise_opset
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.patches import damped
from onnxcompress.quantization.affine import QParams, quantize_weight, weight_qparams
from onnxcompress.quantization.audit import audit
from onnxcompress.quantization.calibration import observe
from onnxcompress.quantization.placement import excluded_reason
from onnxcompress.quantization.rounding import GramWatcher, integer_bounds, round_columns
from onnxcompress.shapes import TensorType, infer_shapes
from onnxcompress.targets import Target, get_target

__all__ = ["Comparison", "QuantizeDynamic"]

#: what the runtime makes of a group
_FUSED = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
#: seconds of the paired timing of the two forms
_SECONDS = 3.0
#: samples that the forms are made from and judged by; one of four is held out to judge
_SAMPLES = 256
#: dB that a doubling of speed is worth
_DECIBELS_PER_OCTAVE = 10.0
#: dB below which forms that are as fast count as equally accurate; the dynamic one cuts off nothing that is new to it
_TIE = 0.5
#: multiplications that rounding all weights may take: about half a minute
_MOST_WORK = 2e11

#: ridge of their Gram matrices: tokens are few and alike, so that errors must not cancel on these alone
_DAMPING = 0.3

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Both forms of one model: SQNR of the outputs in dB, and the speed of the dynamic one over the static one."""

    static_sqnr_db: float
    dynamic_sqnr_db: float
    speed: float
    speed_low: float
    speed_high: float
    samples: int

    @property
    def dynamic(self) -> bool:
        """True where the dynamic form is the better one."""
        if not (self.speed_low > 1 or self.speed_high < 1):
            return self.dynamic_sqnr_db > self.static_sqnr_db - _TIE
        return self.dynamic_sqnr_db + _DECIBELS_PER_OCTAVE * log2(self.speed) > self.static_sqnr_db


class QuantizeDynamic(Pass):
    """Matrix products on 8-bit integers, with the ranges of activations found at run time."""

    name: ClassVar[str] = "quantize_dynamic"

    use: Literal["always", "measured", "never"] = Field(
        "always", description="measured: only where it beats static INT8 in accuracy and time"
    )
    observer: Literal["min_max", "percentile", "entropy", "mse", "weighted_mse"] = Field(
        "weighted_mse", description="How the static form is calibrated that measured compares with"
    )
    exclude_nodes: tuple[str, ...] = Field((), description="Node names that stay float; * and ? match as in a shell")
    exclude_operators: tuple[str, ...] = Field((), description="Operator types that stay float, such as Gemm")
    minimum_weights: int = Field(1024, ge=0, description="Products with fewer weights stay float: they save no time")
    round_weights: bool = Field(
        True, description="Where the target leaves weights fewer bits, round them so that errors cancel on the data"
    )
    audit: bool = Field(True, description="Check on the optimised graph that the runtime fused what was written")

    @property
    def guarantee(self) -> Guarantee:
        """Rounds to 256 levels: judged by the task metric."""
        return Guarantee.APPROXIMATE

    @property
    def needs_data(self) -> bool:
        """Only a comparison with the static form reads samples."""
        return self.use == "measured"

    def requires(self, graph: Graph, context: Context) -> None:
        """The target must be known."""
        get_target(context.target)

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail]:
        """Rewrite every MatMul and Gemm with a constant weight, or decide first whether to."""
        target = get_target(context.target)
        types = infer_shapes(graph)
        candidates, refusals = self._candidates(graph, target)
        if self.use == "never" or (self.use == "measured" and not _on_sequences(candidates, types)):
            return
        if self.use == "measured" and target.audited:
            try:
                found = self._compare(graph, context)
            except DataError as error:
                context.warn(f"{error}; dynamic INT8 was not tried")
                return
            yield Detail("comparison", asdict(found) | {"taken": "dynamic" if found.dynamic else "static"})
            yield Decision("use", "always" if found.dynamic else "never")
            if not found.dynamic:
                yield Refusal(
                    "",
                    f"static INT8 is the better form: {found.static_sqnr_db:.1f} dB against "
                    f"{found.dynamic_sqnr_db:.1f} dB, and dynamic runs at {found.speed:.2f} of its speed",
                )
                return
        elif self.use == "measured":
            return
        reference = copy_graph(graph)
        yield from refusals
        if candidates and graph.opset < 11:
            before = graph.opset
            raise_opset(graph, 11)
            candidates, _ = self._candidates(graph, target)
            yield Change("opset", "", f"raised from {before} to {graph.opset}: DynamicQuantizeLinear needs it")
        grams = self._grams(graph, candidates, context) if self.round_weights else {}
        writer = _Writer(graph, target, types, grams)
        for node in candidates:
            yield Change("quantised", node.name, writer.write(node))
        if not candidates:
            return
        if context.reference is None:
            context.reference = reference
        sort_nodes(graph)
        if self.audit and target.audited:
            proof = audit(graph, target)
            yield Detail("audit", proof.to_dict())
            fused = sum(proof.integer.get(op, 0) for op in _FUSED)
            if fused < len(candidates):
                context.warn(f"the runtime fused {fused} of {len(candidates)} dynamically quantised matrix products")
        if target.saturates:
            context.warn(saturation_note())

    def _candidates(self, graph: Graph, target: Target) -> tuple[list[gs.Node], list[Refusal]]:
        """Nodes of the outermost graph to rewrite, and those that were refused."""
        found, refusals = [], []
        for node in graph.nodes:
            if node.op not in ("MatMul", "Gemm") or normal_domain(node) != "":
                continue
            reason = excluded_reason(node, self.exclude_nodes, self.exclude_operators) or self._reason(node)
            if reason is None:
                found.append(node)
            else:
                refusals.append(Refusal(node.name, f"{node.op} stays float: {reason}"))
        return found, refusals

    def _reason(self, node: gs.Node) -> str | None:
        if constant_value(node.inputs[0]) is not None:
            return "its left operand is constant, and weights are read from the right one"
        weight = constant_value(node.inputs[1])
        if weight is None:
            quantised = any(maker.op == "DequantizeLinear" for maker in node.inputs[1].inputs)
            return "it is quantised in the file already" if quantised else "both operands are activations"
        if weight.ndim != 2:
            return f"its weight has rank {weight.ndim}, and per-channel scales need rank 2"
        if weight.dtype != np.float32:
            return f"its weight is {weight.dtype}, not float32"
        if weight.size < self.minimum_weights:
            return f"{weight.size} weights are too few to save time"
        finite = bool(weight.size) and np.isfinite(weight).all()
        release(weight)
        return None if finite else "its weight is empty or holds values that are not finite"

    def _grams(self, graph: Graph, nodes: Sequence[gs.Node], context: Context) -> dict[int, Floats]:
        """By ``id()`` of the weight, the Gram matrix of what it multiplies."""
        readers: dict[int, list[gs.Node]] = {}
        for node in nodes:
            readers.setdefault(id(node.inputs[1]), []).append(node)
        # With all eight bits the ranges of activations cost so much more that it would gain 0.1 dB.
        # A weight that several inputs meet has no one Gram matrix, and that of a transposed input has other columns.
        alone = [found[0] for found in readers.values() if len(found) == 1 and not attribute(found[0], "transA", 0)]
        shapes = [_rows_and_columns(node) for node in alone]
        bounded = get_target(context.target).weights.largest_pair is not None
        if (
            context.data is None
            or not bounded
            or not alone
            or sum(k**3 + 2 * k * k * f for k, f in shapes) > _MOST_WORK
        ):
            return {}
        watchers = {node.inputs[0].name: GramWatcher() for node in alone}
        data = context.data
        if data.samples > _SAMPLES:
            data = data.take(_SAMPLES)
        observe(graph, watchers, data, threads=context.threads, progress=context.progress)
        grams = {}
        for node, (columns, _) in zip(alone, shapes, strict=True):
            gram = watchers[node.inputs[0].name].gram
            if gram is not None and len(gram) == columns:
                grams[id(node.inputs[1])] = gram
        return grams

    def _compare(self, graph: Graph, context: Context) -> Comparison:
        """Both forms, on the samples that calibration has."""
        from onnxcompress.benchmark import benchmark

        assert context.data is not None
        parts = split_samples(context.data, context.seed, _SAMPLES)
        options = {"exclude_nodes": self.exclude_nodes, "exclude_operators": self.exclude_operators, "audit": False}
        static = InsertQdq(observer=self.observer, **options)
        always = self.model_copy(update={"use": "always", "round_weights": False, "audit": False})
        forms: list[Graph] = []
        for passes in ((static,), (always, static)):
            own = Context(
                original=context.original,
                data=parts.train,
                target=context.target,
                seed=context.seed,
                threads=context.threads,
                progress=context.progress,
            )
            made = graph
            for step in passes:
                made = step(made, own).graph
            forms.append(made)
        with Judge(graph, parts.held_out, context.threads) as judge:
            errors = [decibels(judge.error(form)) for form in forms]
        timing = benchmark(
            forms[0], forms[1], context.data, threads=1, seconds=_SECONDS, seed=context.seed, progress=context.progress
        )
        return Comparison(errors[0], errors[1], timing.ratio, timing.low, timing.high, parts.held_out.samples)


def _rows_and_columns(node: gs.Node) -> tuple[int, int]:
    """(inputs, outputs) of the weight of ``node``."""
    weight = constant_value(node.inputs[1])
    assert weight is not None
    inputs, outputs = weight.shape[::-1] if node.op == "Gemm" and attribute(node, "transB", 0) else weight.shape
    return int(inputs), int(outputs)


def _on_sequences(nodes: list[gs.Node], types: dict[str, TensorType]) -> bool:
    """True where a product works on tensors of rank three or more, as transformers do and convolutional nets do not."""
    for node in nodes:
        known = types.get(node.inputs[0].name)
        if node.op == "MatMul" and known is not None and known.shape is not None and len(known.shape) >= 3:
            return True
    return False


class _Writer:
    """Writes groups in the form that the runtime fuses."""

    def __init__(self, graph: Graph, target: Target, types: dict[str, TensorType], grams: Mapping[int, Floats]) -> None:
        self.graph = graph
        self.grams = grams
        self.target = target
        self.types = types
        self.names = Names(graph)
        #: integers, scale and zero point of an input, by its id
        self.inputs: dict[int, tuple[gs.Variable, gs.Variable, gs.Variable]] = {}
        self.transposed: dict[int, gs.Variable] = {}
        self.weights: dict[tuple[int, bool, float], tuple[gs.Constant, gs.Constant]] = {}

    def write(self, node: gs.Node) -> str:
        """Replace ``node``; returns what the report says."""
        source, result = node.inputs[0], node.outputs[0]
        gemm = node.op == "Gemm"
        if gemm and attribute(node, "transA", 0):
            source = self._transposed(source)
        integers, scale, zero_point = self._quantised(source)
        weight, weight_scale = self._weight(
            node.inputs[1], bool(gemm and attribute(node, "transB", 0)), float(attribute(node, "alpha", 1.0))
        )
        label = node.name
        product = self._variable(f"{result.name}_integers", np.int32)
        self._node("MatMulInteger", f"{label}_quantized", [integers, weight, zero_point], product)
        floats = self._variable(f"{result.name}_cast", np.float32)
        self._node("Cast", f"{label}_cast", [product], floats, {"to": onnx.TensorProto.FLOAT})
        scales = self._variable(f"{result.name}_scales", np.float32)
        self._node("Mul", f"{label}_scales", [scale, weight_scale], scales)
        bias = self._bias(node) if gemm else None
        scaled = result if bias is None else self._variable(f"{result.name}_scaled", np.float32)
        node.outputs = []
        self._node("Mul", f"{label}_scaled", [floats, scales], scaled)
        if bias is not None:
            self._node("Add", f"{label}_bias", [scaled, bias], result)
        remove_node(node)
        return f"{node.op} with weights {list(weight.shape)} in int8"

    def _variable(self, label: str, dtype: Any) -> gs.Variable:
        return gs.Variable(self.names.free(label), np.dtype(dtype))

    def _node(
        self, op: str, label: str, inputs: list[gs.Tensor], output: gs.Tensor, attrs: dict[str, Any] | None = None
    ) -> None:
        self.graph.nodes.append(gs.Node(op, self.names.free(label), attrs or {}, inputs, [output]))

    def _transposed(self, source: gs.Tensor) -> gs.Variable:
        if id(source) not in self.transposed:
            made = self.transposed[id(source)] = self._variable(f"{source.name}_transposed", np.float32)
            self._node("Transpose", f"{made.name}_node", [source], made, {"perm": [1, 0]})
        return self.transposed[id(source)]

    def _quantised(self, source: gs.Tensor) -> tuple[gs.Variable, gs.Variable, gs.Variable]:
        if id(source) not in self.inputs:
            kinds = (("quantized", np.uint8), ("scale", np.float32), ("zero_point", np.uint8))
            made = [self._variable(f"{source.name}_dynamic_{label}", kind) for label, kind in kinds]
            name = self.names.free(f"{source.name}_DynamicQuantizeLinear")
            self.graph.nodes.append(gs.Node("DynamicQuantizeLinear", name, {}, [source], made))
            self.inputs[id(source)] = (made[0], made[1], made[2])
        return self.inputs[id(source)]

    def _weight(self, tensor: gs.Tensor, transposed: bool, alpha: float) -> tuple[gs.Constant, gs.Constant]:
        """int8 [inputs, outputs] and float32 scales [outputs], shared where the weight is."""
        key = (id(tensor), transposed, alpha)
        if key not in self.weights:
            value = constant_value(tensor)
            assert value is not None
            weight = value.T if transposed else value
            params = weight_qparams(weight, self.target.weights, 1)
            integers: NDArray[Any] = quantize_weight(weight, params, self.target.weights)
            gram = self.grams.get(id(tensor))
            if gram is not None:
                integers = self._rounded(weight, params, integers, gram)
            release(value)
            scale = (params.scale * np.float32(alpha)).astype(np.float32)
            self.weights[key] = (
                gs.Constant(self.names.free(f"{tensor.name}_quantized"), np.ascontiguousarray(integers)),
                gs.Constant(self.names.free(f"{tensor.name}_scale"), scale),
            )
        return self.weights[key]

    def _rounded(self, weight: NDArray[Any], params: QParams, start: NDArray[Any], gram: Floats) -> NDArray[np.int8]:
        """Integers [inputs, outputs] whose errors cancel on inputs of this Gram matrix."""
        filters = start.T[None].astype(np.float64)
        bounds = integer_bounds(filters, self.target.weights.largest_pair)
        wanted = (weight.astype(np.float64) / params.scale).T[None]
        rounded = round_columns(wanted, damped(gram[None], _DAMPING), filters, bounds)[0].T
        return np.ascontiguousarray(rounded.astype(np.int8))

    def _bias(self, node: gs.Node) -> gs.Tensor | None:
        """``beta * C`` of a Gemm, or None."""
        if len(node.inputs) < 3 or not node.inputs[2].name:
            return None
        tensor, beta = node.inputs[2], np.float32(attribute(node, "beta", 1.0))
        if beta == 0:
            return None
        if beta == 1:
            return tensor
        value = constant_value(tensor)
        if value is not None:
            return gs.Constant(self.names.free(f"{tensor.name}_beta"), np.asarray(value * beta, value.dtype))
        made = self._variable(f"{tensor.name}_beta", np.float32)
        factor = gs.Constant(self.names.free(f"{node.name}_beta"), np.array(beta, np.float32))
        self._node("Mul", f"{made.name}_node", [tensor, factor], made)
        return made
