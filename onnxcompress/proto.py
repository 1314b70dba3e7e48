"""Conversion between ``onnx.ModelProto`` and graphsurgeon's IR that keeps what graphsurgeon drops."""

from __future__ import annotations

from typing import Literal

import onnx
import onnx_graphsurgeon as gs

from onnxcompress.graph import Graph, model_info

__all__ = ["from_proto", "to_proto"]


def from_proto(model: onnx.ModelProto) -> Graph:
    """Import ``model``; the proto is not changed but the graph may share its weights."""
    graph = gs.import_onnx(model)
    model_info(graph).metadata = {p.key: p.value for p in model.metadata_props}
    return graph


def to_proto(graph: Graph, *, weights: Literal["inline", "omit"] = "inline") -> onnx.ModelProto:
    """Export ``graph``.

    ``weights="omit"`` writes every initializer above 1 KiB as a graph input of its type and shape: what shape
    inference needs, without a copy of the weights.
    """
    model = gs.export_onnx(graph)
    if weights == "omit":
        small = [t for t in model.graph.initializer if t.ByteSize() <= 1024]
        large = [t for t in model.graph.initializer if t.ByteSize() > 1024]
        del model.graph.initializer[:]
        model.graph.initializer.extend(small)
        model.graph.input.extend(
            onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in large
        )
    return model
