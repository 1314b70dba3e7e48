"""Static INT8: QuantizeLinear and DequantizeLinear where the target's runtime turns them into integer operators.

::

    x -> Conv -> Relu -> y        x -> Q -> DQ -> Conv(DQ(w_int8)) -> Relu -> Q -> DQ -> y
                                                  └──────── one QLinearConv ───────┘

Where quantisers go is decided by :mod:`onnxcompress.placement` from the target's rule table, ranges come from
:mod:`onnxcompress.calibration`, and the result is proven by :mod:`onnxcompress.audit`: the runtime optimises the graph,
and what did not become integer as planned is stripped and reported.

Source: ONNX operator specification of QuantizeLinear; B. Jacob et al., "Quantization and Training of Neural Networks
for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field

from onnxcompress.audit import FusionAudit, audit
from onnxcompress.base import Change, Context, Decision, Detail, Guarantee, Pass, Refusal
from onnxcompress.calibration import calibrate
from onnxcompress.canonical import to_canonical_form
from onnxcompress.environment import cpu_flags, has_int8_dot_product
from onnxcompress.errors import DataError
from onnxcompress.graph import Graph, copy_graph, replace_contents, sort_nodes
from onnxcompress.opset import raise_opset
from onnxcompress.placement import Placement, place, why
from onnxcompress.qdq import insert_quantizers
from onnxcompress.quantization import Range
from onnxcompress.shapes import infer_shapes
from onnxcompress.targets import Target, get_target

__all__ = ["InsertQdq"]

_HERE = {True: "this one has it", False: "this one does not", None: "this one is not known"}


class InsertQdq(Pass):
    """Quantise activations and weights to 8 bits, calibrated on data."""

    name: ClassVar[str] = "insert_qdq"

    observer: Literal["min_max", "percentile", "entropy", "mse"] = Field(
        "min_max", description="How ranges are found from calibration data"
    )
    percentile: float = Field(
        99.99, ge=50, le=100, description="Percent of the values that observer percentile keeps, cut on both sides"
    )
    exclude_nodes: tuple[str, ...] = Field((), description="Node names that stay float; * and ? match as in a shell")
    exclude_operators: tuple[str, ...] = Field((), description="Operator types that stay float, such as Gemm")
    audit: bool = Field(True, description="Check on the optimised graph what became integer, and strip what did not")

    @property
    def guarantee(self) -> Guarantee:
        """Rounds to 256 levels: judged by the task metric."""
        return Guarantee.APPROXIMATE

    @property
    def needs_data(self) -> bool:
        """Ranges come from samples."""
        return True

    def requires(self, graph: Graph, context: Context) -> None:
        """Data must be there."""
        get_target(context.target)
        if context.data is None:
            raise DataError("insert_qdq needs calibration data; give some samples with --data")

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail]:
        """Place, calibrate, write, audit; strip what the runtime did not make integer, and audit once more."""
        target = get_target(context.target)
        if graph.opset < target.minimum_opset and _has_candidates(graph, target, self):
            before = graph.opset
            raise_opset(graph, target.minimum_opset)
            yield Change("opset", "", f"raised from {before} to {graph.opset}: per-channel weights need it")
        for node, detail in to_canonical_form(graph, infer_shapes(graph)):
            yield Change("rewritten", node.name, detail)
        sort_nodes(graph)

        prepared = copy_graph(graph)
        placement = self._place(prepared, target, ())
        ranges = self._ranges(prepared, placement, context)
        changes = _write(prepared, placement, ranges)
        stripped: dict[str, str] = {}
        if self.audit and target.audited:
            proof = audit(prepared, target, placement)
            if proof.mismatches:
                stripped = {m.node: m.found for m in proof.mismatches}
                prepared = copy_graph(graph)
                placement = self._place(prepared, target, tuple(stripped))
                missing = [s for sources in placement.sources.values() for s in sources if s not in ranges]
                ranges |= self._calibrate(copy_graph(graph), placement, missing, context)
                changes = _write(prepared, placement, ranges)
                proof = audit(prepared, target, placement)
            yield Detail("audit", proof.to_dict())
            _warn_about(proof, context)
        replace_contents(graph, prepared)
        _warn_of_the_target(placement, context)

        yield from changes
        for unit in placement.units:
            if not unit.integer:
                found = stripped.get(unit.node.name)
                reason = why(unit) if found is None else f"the runtime did not make it integer (it became {found})"
                yield Refusal(unit.node.name, f"{unit.node.op} stays float: {reason}")
        if stripped:
            yield Decision("exclude_nodes", [*self.exclude_nodes, *stripped])

    def _place(self, graph: Graph, target: Target, stripped: tuple[str, ...]) -> Placement:
        return place(
            graph,
            target,
            exclude_nodes=(*self.exclude_nodes, *stripped),
            exclude_operators=self.exclude_operators,
        )

    def _ranges(self, graph: Graph, placement: Placement, context: Context) -> dict[str, Range]:
        sources = [s for names in placement.sources.values() for s in names]
        return self._calibrate(graph, placement, sources, context)

    def _calibrate(self, graph: Graph, placement: Placement, tensors: list[str], context: Context) -> dict[str, Range]:
        assert context.data is not None
        return calibrate(
            graph,
            tensors,
            context.data,
            self.observer,
            shared=placement.sources.values(),
            scheme=placement.target.activations,
            percentile=self.percentile,
            threads=context.threads,
            progress=context.progress,
        )


def _has_candidates(graph: Graph, target: Target, options: InsertQdq) -> bool:
    return any(node.op in target.rules for node in graph.nodes)


def _write(graph: Graph, placement: Placement, ranges: Mapping[str, Range]) -> list[Change]:
    changes = [Change("quantised", node.name, detail) for node, detail in insert_quantizers(graph, placement, ranges)]
    sort_nodes(graph)
    return changes


def _warn_about(proof: FusionAudit, context: Context) -> None:
    if proof.mismatches:
        names = ", ".join(m.node for m in proof.mismatches[:5])
        context.warn(f"{len(proof.mismatches)} nodes did not become integer as planned: {names}")


def _warn_of_the_target(placement: Placement, context: Context) -> None:
    """What the target's table says about INT8, and that int8 weights times uint8 activations saturate without VNNI."""
    target = placement.target
    if target.int8_note is not None:
        context.warn(target.int8_note)
    weights = any(unit.rule is not None and unit.rule.weight is not None for unit in placement.integer_units)
    if weights and target.saturates:
        context.warn(
            "on x86 processors without VNNI or AMX int8 weights saturate and accuracy drops "
            f"({_HERE[has_int8_dot_product(cpu_flags())]}); there, use --target x86-any, or set "
            "session.x64quantprecision=1 in onnxruntime"
        )
