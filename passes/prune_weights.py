"""Set the smallest weights to zero: unstructured, or N of every M along the summed axis.

Shapes stay, so nothing gets faster where zeros are multiplied like any number: ONNX Runtime's kernels do. What gains is
a compressed copy of the file, and a runtime with sparse kernels (2:4 on NVIDIA GPUs through TensorRT, DeepSparse).

Unstructured, a layer keeps its largest weights by magnitude, or all layers share one threshold (``scope: global``).
With ``pattern: "2:4"`` each run of four inputs of an output keeps its two largest; a rest that is shorter keeps its
share, rounded up.

Source: S. Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015; A. Mishra et
al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from pydantic import Field, field_validator

from onnxcompress.base import Change, Context, Detail, Guarantee, Pass, Refusal
from onnxcompress.graph import (
    Graph,
    attribute,
    change_constant,
    constant_value,
    graph_output_ids,
    normal_domain,
)

__all__ = ["PruneWeights"]

#: inputs that may hold a weight
_INPUTS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}


@dataclass(frozen=True, eq=False)
class _Weight:
    """A constant and the first node that multiplies with it; ``summed`` is the axis that the product sums over."""

    node: gs.Node
    tensor: gs.Tensor
    value: NDArray[Any]
    summed: int

    @property
    def magnitude(self) -> NDArray[np.float64]:
        return np.abs(self.value.astype(np.float64))


class PruneWeights(Pass):
    """Set the smallest weights to zero, for file compression and sparse runtimes; ONNX Runtime gets no faster."""

    name: ClassVar[str] = "prune_weights"

    sparsity: float = Field(0.5, ge=0, lt=1, description="Share of the weights that become zero; a pattern has its own")
    pattern: str = Field("unstructured", description='"unstructured", or N:M: N of every M inputs stay, as in "2:4"')
    scope: Literal["layer", "global"] = Field(
        "layer", description="What the sparsity is of: each layer, or all at once"
    )
    exclude_nodes: tuple[str, ...] = Field((), description="Leave the weights of these nodes; names or patterns")

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, value: str) -> str:
        if value != "unstructured":
            parts = value.split(":")
            if len(parts) != 2 or not all(p.isdigit() for p in parts) or not 0 < int(parts[0]) < int(parts[1]):
                raise ValueError('expected "unstructured" or N:M with 0 < N < M, for example "2:4"')
        return value

    @property
    def guarantee(self) -> Guarantee:
        """Removes weights: judged by the task metric."""
        return Guarantee.APPROXIMATE

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Detail]:
        """Find the weights, choose what stays, write it back."""
        weights: list[_Weight] = []
        for item in _find(graph):
            if isinstance(item, Refusal):
                yield item
            elif any(fnmatchcase(item.node.name, pattern) for pattern in self.exclude_nodes):
                yield Refusal(item.node.name, "its weights stay: excluded")
            else:
                weights.append(item)
        threshold = self._threshold(weights)
        zeros = total = 0
        for weight in context.progress.track(weights, "pruning weights", len(weights)):
            stays = self._stays(weight, threshold)
            pruned = np.where(stays, weight.value, np.zeros((), weight.value.dtype))
            zeros, total = zeros + int((pruned == 0).sum()), total + pruned.size
            if np.array_equal(pruned, weight.value):
                continue
            change_constant(weight.tensor, pruned)
            yield Change(
                "pruned", weight.node.name, f"{100 * float((pruned == 0).mean()):.1f} % of its weights are zero"
            )
        if total:
            yield Detail("sparsity", {"zeros": zeros, "weights": total})
        if zeros and (self.pattern != "unstructured" or self.sparsity > 0):
            context.warn(
                "ONNX Runtime multiplies with zeros as with any number: pruned weights make the model no faster there, "
                "only its compressed file smaller; prune_channels makes it faster"
            )

    def _threshold(self, weights: list[_Weight]) -> float:
        """The magnitude up to which weights go, where all layers share one; -1 where they do not."""
        if self.scope != "global" or self.pattern != "unstructured" or not weights:
            return -1.0
        flat = np.concatenate([weight.magnitude.reshape(-1) for weight in weights])
        gone = int(np.floor(self.sparsity * flat.size))
        return float(np.partition(flat, gone - 1)[gone - 1]) if gone else -1.0

    def _stays(self, weight: _Weight, threshold: float) -> NDArray[np.bool_]:
        magnitude = weight.magnitude
        if self.pattern != "unstructured":
            kept, run = (int(part) for part in self.pattern.split(":"))
            return _of_every(magnitude, weight.summed, kept, run)
        if self.scope == "global":
            return magnitude > threshold
        gone = int(np.floor(self.sparsity * magnitude.size))
        stays = np.ones(magnitude.size, bool)
        stays[np.argsort(magnitude, axis=None, kind="stable")[:gone]] = False
        return stays.reshape(magnitude.shape)


def _of_every(magnitude: NDArray[np.float64], axis: int, kept: int, run: int) -> NDArray[np.bool_]:
    """The ``kept`` largest of every ``run`` positions along ``axis``."""
    rows = np.moveaxis(magnitude, axis, -1)
    stays = np.zeros(rows.shape, bool)
    for start in range(0, rows.shape[-1], run):
        part = rows[..., start : start + run]
        count = -(-kept * part.shape[-1] // run)
        order = np.argsort(-part, axis=-1, kind="stable")[..., :count]
        np.put_along_axis(stays[..., start : start + run], order, True, axis=-1)
    return np.moveaxis(stays, -1, axis)


def _find(graph: Graph) -> Iterator[_Weight | Refusal]:
    """Each weight of the outermost graph once, and why others are left alone."""
    seen: dict[int, int] = {}
    leaving = graph_output_ids(graph)
    for node in graph.nodes:
        for index in _INPUTS.get(node.op, ()) if normal_domain(node) == "" else ():
            value = constant_value(node.inputs[index]) if index < len(node.inputs) else None
            if value is None or value.ndim < 2:
                continue
            if value.dtype.kind != "f" and value.dtype.name != "bfloat16":
                yield Refusal(node.name, f"its weight is {value.dtype.name}; only floating-point weights are pruned")
                continue
            tensor = node.inputs[index]
            summed = _summed_axis(node, index, value.ndim)
            known = seen.get(id(tensor))
            seen[id(tensor)] = summed if known is None else known
            if known not in (None, summed):
                yield Refusal(node.name, "it sums over another axis of a weight that it shares")
            elif id(tensor) in leaving:
                yield Refusal(node.name, "its weight is a graph output")
            elif known is None:
                yield _Weight(node, tensor, value, summed)


def _summed_axis(node: gs.Node, index: int, rank: int) -> int:
    if node.op == "Conv":
        return 1
    if node.op == "ConvTranspose":
        return 0
    if node.op == "Gemm":
        turned = bool(attribute(node, "transA" if index == 0 else "transB", 0))
        return int(turned) if index == 1 else 1 - int(turned)
    return rank - 1 if index == 0 else rank - 2
