"""Store embedding tables as int8 with one scale per row.

::

    Gather(table, ids)      Cast(Gather(table_int8, ids), float) * Gather(row_scales, ids)

A quarter of the bytes; only the rows that are looked up are turned into floats, not the whole table, as a
DequantizeLinear before the Gather would do at every run. A row's scale is its largest magnitude over 127, so the error
of an entry is at most half of that, 0.4 % of the largest entry of its row. Scales are stored as float16 where they
are large enough to keep its full precision. No data is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from pydantic import Field

from onnxcompress.base import Change, Context, Guarantee, Pass, Refusal
from onnxcompress.graph import Graph, Names, attribute, constant_value, graph_output_ids, normal_domain, release
from onnxcompress.quantization.affine import QParams, QuantScheme, quantize, weight_qparams

__all__ = ["QuantizeEmbeddings"]

_INT8 = QuantScheme("int8", symmetric=True)


class QuantizeEmbeddings(Pass):
    """Store tables that Gather looks rows up in as int8, one scale per row."""

    name: ClassVar[str] = "quantize_embeddings"

    minimum_bytes: int = Field(65536, ge=0, description="Tables smaller than this many bytes stay float")

    @property
    def guarantee(self) -> Guarantee:
        """Rounds weights: judged by the task metric."""
        return Guarantee.APPROXIMATE

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal]:
        """Rewrite every Gather of rows of a large float32 table, nested graphs left alone."""
        names = Names(graph)
        outputs = graph_output_ids(graph)
        stored: dict[int, tuple[gs.Constant, gs.Constant]] = {}
        for node in list(graph.nodes):
            if node.op != "Gather" or normal_domain(node) != "":
                continue
            table = node.inputs[0]
            value = constant_value(table)
            if value is None or value.nbytes < self.minimum_bytes:
                continue
            reason = _reason(node, table, value, outputs)
            if reason is not None:
                yield Refusal(node.name, f"its table {table.name!r} stays {value.dtype}: {reason}")
                continue
            if id(table) not in stored:
                params = weight_qparams(value, _INT8, axis=0)
                scale = _half_precision(params.scale)
                # The integers are made with the scale as it is stored, or a rounded one would shift whole rows.
                params = QParams(scale.astype(np.float32), params.zero_point, 0)
                stored[id(table)] = (
                    gs.Constant(names.free(f"{table.name}_quantized"), quantize(value, params)),
                    gs.Constant(names.free(f"{table.name}_scale"), scale.reshape(-1, 1)),
                )
                release(value)
            _rewrite(graph, node, *stored[id(table)], names)
            yield Change("quantised", node.name, f"table {table.name} {list(value.shape)} in int8")


def _reason(node: gs.Node, table: gs.Tensor, value: NDArray[Any], outputs: set[int]) -> str | None:
    if value.dtype != np.float32:
        return "only float32 tables are quantised"
    if value.ndim != 2 or attribute(node, "axis", 0) not in (0, -2):
        return "its rows are not what is looked up"
    if not np.isfinite(value).all():
        return "it holds values that are not finite"
    if id(table) in outputs or any(reader.op != "Gather" or reader.inputs[0] is not table for reader in table.outputs):
        return "other operators read it, too"
    return None


def _half_precision(scale: NDArray[np.float32]) -> NDArray[Any]:
    """``scale`` rounded up to float16, or as it is where one is out of float16's range of full precision."""
    info = np.finfo(np.float16)
    if scale.min() < info.tiny or scale.max() > info.max / 2:
        return scale
    half = scale.astype(np.float16)
    return np.where(half.astype(np.float32) < scale, np.nextafter(half, np.float16(np.inf)), half)


def _rewrite(graph: Graph, node: gs.Node, table: gs.Constant, scales: gs.Constant, names: Names) -> None:
    result, ids = node.outputs[0], node.inputs[1]
    rows = gs.Variable(names.free(f"{result.name}_int8"), np.dtype(np.int8), result.shape)
    floats = gs.Variable(names.free(f"{result.name}_float"), np.dtype(np.float32), result.shape)
    looked_up = gs.Variable(names.free(f"{result.name}_scale"), scales.dtype)
    node.inputs[0] = table
    node.outputs = [rows]
    to_float = {"to": onnx.TensorProto.FLOAT}
    graph.nodes.append(gs.Node("Cast", names.free(f"{node.name}_cast"), to_float, [rows], [floats]))
    graph.nodes.append(gs.Node("Gather", names.free(f"{node.name}_scales"), {"axis": 0}, [scales, ids], [looked_up]))
    scale = looked_up
    if scales.dtype != np.float32:
        scale = gs.Variable(names.free(f"{result.name}_scale_float"), np.dtype(np.float32))
        graph.nodes.append(gs.Node("Cast", names.free(f"{node.name}_scales_cast"), to_float, [looked_up], [scale]))
    graph.nodes.append(gs.Node("Mul", names.free(f"{node.name}_mul"), {}, [floats, scale], [result]))
