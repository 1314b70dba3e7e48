"""Transformer blocks in the form that the runtime runs fastest; what is faster is found by timing.

::

    Add(x, branch) -> LayerNormalization        Sum(x, branch) -> LayerNormalization
    MatMul(x, Wq), MatMul(x, Wk), MatMul(x, Wv)    Split(MatMul(x, [Wq Wk Wv]))

``residuals``: ONNX Runtime fuses an Add and the LayerNormalization behind it into SkipLayerNormalization. On the CPU
that kernel adds up one element at a time and takes several times as long as both operators by themselves. The operator
Sum computes the same as Add, to the bit, and is left alone.

``projections``: products that read one tensor become one product and a Split, biases included. That saves calls, and a
quantiser's work is done once; with long sequences the Split costs more than it saves.

Both are judged on the model with its matrix products on 8-bit integers, timed in pairs, one sample at a time on one
thread. Residuals become Sum unless that is surely slower, for the kernel is known; projections are merged where that is
faster. The outputs stay the same, and the decisions are part of the saved recipe.
Where nothing is to be rewritten, nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from pydantic import Field

from onnxcompress.base import Change, Context, Decision, Detail, Guarantee, Pass, Refusal
from onnxcompress.graph import (
    Graph,
    Names,
    constant_value,
    copy_graph,
    graph_output_ids,
    normal_domain,
    release,
    remove_node,
    replace_contents,
    sort_nodes,
    tensors_read_inside,
)
from onnxcompress.passes.quantize_dynamic import QuantizeDynamic
from onnxcompress.shapes import infer_shapes
from onnxcompress.spill import spill_weights
from onnxcompress.targets import get_target

__all__ = ["ArrangeBlocks"]

#: seconds of each paired timing
_SECONDS = 3.0
#: ratio of times from which projections are merged
_FASTER = 1.01


class ArrangeBlocks(Pass):
    """Residual additions and projections of transformers as the runtime likes them."""

    name: ClassVar[str] = "arrange_blocks"

    residuals: Literal["measured", "sum", "add"] = Field(
        "measured", description="Operator in front of LayerNormalization; sum is not fused by the runtime"
    )
    projections: Literal["measured", "merged", "separate"] = Field(
        "measured", description="Matrix products that read the same tensor: one for all, or as they are"
    )

    @property
    def guarantee(self) -> Guarantee:
        """A merged product may add up in another order."""
        return Guarantee.EQUIVALENT

    @property
    def needs_data(self) -> bool:
        """Timing needs samples; without any, nothing is measured and nothing changes."""
        return False

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail]:
        """Try both rewrites, one on top of the other, and keep what is faster."""
        steps: tuple[tuple[str, str, str, str, Callable[[Graph], list[Change]]], ...] = (
            ("residuals", self.residuals, "sum", "add", _sum_residuals),
            ("projections", self.projections, "merged", "separate", _merge_projections),
        )
        target = get_target(context.target)
        for option, value, new, old, rewrite in steps:
            if value == old:
                continue
            candidate = copy_graph(graph)
            changes = rewrite(candidate)
            spill_weights(candidate)
            if not changes:
                continue
            if value == "measured":
                if context.data is None or not target.audited:
                    yield Refusal("", f"{option} stay as they are: there is nothing to time them with")
                    continue
                speed, low, high = _speed(graph, candidate, context)
                taken = high > 1.0 if option == "residuals" else speed > _FASTER and low > 2 - _FASTER
                yield Detail(option, {"speed": speed, "low": low, "high": high, "taken": new if taken else old})
                yield Decision(option, new if taken else old)
                if not taken:
                    reason = f"{new} runs at {speed:.3f} [{low:.3f}, {high:.3f}] of the speed of {old}"
                    yield Refusal("", f"{option} stay as they are: {reason}")
                    continue
            replace_contents(graph, candidate)
            yield from changes


def _speed(before: Graph, after: Graph, context: Context) -> tuple[float, float, float]:
    """Speed of ``after`` over ``before`` with 95 % interval, both with integer matrix products."""
    from onnxcompress.benchmark import benchmark

    assert context.data is not None
    quantise = QuantizeDynamic(audit=False)
    forms = [
        quantise(graph, Context(target=context.target, threads=context.threads)).graph for graph in (before, after)
    ]
    found = benchmark(
        forms[0], forms[1], context.data, threads=1, seconds=_SECONDS, seed=context.seed, progress=context.progress
    )
    return found.ratio, found.low, found.high


# ----------------------------------------------------------------------------------------------------------------------
# The rewrites


def _sum_residuals(graph: Graph) -> list[Change]:
    """Every Add of two computed tensors in front of a LayerNormalization becomes a Sum."""
    changes = []
    for node in graph.nodes:
        if node.op != "Add" or normal_domain(node) != "" or any(constant_value(t) is not None for t in node.inputs):
            continue
        if _is_normalised(node.outputs[0]):
            node.op = "Sum"
            changes.append(Change("rewritten", node.name, "Add in front of LayerNormalization became Sum"))
    return changes


def _is_normalised(tensor: gs.Tensor) -> bool:
    """True where LayerNormalization reads ``tensor``, be it the operator or what exporters write for it."""
    readers = [reader for reader in tensor.outputs if normal_domain(reader) == ""]
    if any(reader.op == "LayerNormalization" and reader.inputs[0] is tensor for reader in readers):
        return True
    means = {id(reader.outputs[0]) for reader in readers if reader.op == "ReduceMean"}
    return any(reader.op == "Sub" and id(reader.inputs[1]) in means for reader in readers)


def _merge_projections(graph: Graph) -> list[Change]:
    """MatMuls with stored weights that read one tensor become one, with their biases, and a Split."""
    types = infer_shapes(graph)
    outputs = graph_output_ids(graph)
    inside = {tensor.name for tensor in tensors_read_inside(graph)}
    groups: dict[int, list[gs.Node]] = {}
    for node in graph.nodes:
        if node.op != "MatMul" or normal_domain(node) != "" or node.inputs[1] is node.inputs[0]:
            continue
        weight = constant_value(node.inputs[1])
        known = types.get(node.inputs[0].name)
        rank = None if known is None or known.shape is None else len(known.shape)
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32 or rank is None or rank < 2:
            continue
        groups.setdefault(id(node.inputs[0]), []).append(node)
    names = Names(graph)
    changes = []
    for nodes in groups.values():
        if len(nodes) < 2 or graph.opset < 13:
            continue
        adds = [_bias_add(node, outputs, inside) for node in nodes]
        biases = [found for found in adds if found is not None]
        with_bias = len(biases) == len(nodes)
        ends = [add for add, _ in biases] if with_bias else nodes
        weights = [w for node in nodes if (w := constant_value(node.inputs[1])) is not None]
        first, source = nodes[0], nodes[0].inputs[0]
        joined = np.concatenate(weights, axis=1)
        for weight in weights:
            release(weight)
        product = gs.Variable(names.free(f"{first.outputs[0].name}_merged"), np.dtype(np.float32))
        weight_name = names.free(f"{first.inputs[1].name}_merged")
        made = gs.Node(
            "MatMul", names.free(f"{first.name}_merged"), {}, [source, _constant(weight_name, joined)], [product]
        )
        graph.nodes.append(made)
        if with_bias:
            bias = np.concatenate([value for _, value in biases])
            added = gs.Variable(names.free(f"{ends[0].outputs[0].name}_merged"), np.dtype(np.float32))
            constant = _constant(names.free(f"{first.name}_merged_bias"), bias)
            graph.nodes.append(gs.Node("Add", names.free(f"{ends[0].name}_merged"), {}, [product, constant], [added]))
            product = added
        results = [end.outputs[0] for end in ends]
        sizes = np.array([w.shape[1] for w in weights], np.int64)
        parts = gs.Constant(names.free(f"{first.name}_sizes"), sizes)
        for node in (*nodes, *(add for add, _ in biases if with_bias)):
            node.outputs = []
            remove_node(node)
        graph.nodes.append(gs.Node("Split", names.free(f"{first.name}_split"), {"axis": -1}, [product, parts], results))
        changes.append(Change("merged", made.name, f"{len(nodes)} matrix products that read {source.name} became one"))
    sort_nodes(graph)
    return changes


def _constant(name: str, value: NDArray[np.float32]) -> gs.Constant:
    value.flags.writeable = False
    return gs.Constant(name, value)


def _bias_add(node: gs.Node, outputs: set[int], inside: set[str]) -> tuple[gs.Node, NDArray[np.float32]] | None:
    """The Add of one constant per channel that alone reads the product, and that constant."""
    product = node.outputs[0]
    if id(product) in outputs or product.name in inside or len(product.outputs) != 1:
        return None
    add = product.outputs[0]
    if add.op != "Add" or normal_domain(add) != "":
        return None
    value = constant_value(add.inputs[1] if add.inputs[0] is product else add.inputs[0])
    weight = constant_value(node.inputs[1])
    if value is None or weight is None or value.dtype != np.float32 or value.shape != (weight.shape[1],):
        return None
    return add, value
