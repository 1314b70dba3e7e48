"""Raising a model's opset, which a pass does only when it needs an operator form that the model's opset lacks."""

from __future__ import annotations

import onnx
import onnx.version_converter
import onnx_graphsurgeon as gs

from onnxcompress.errors import ModelError
from onnxcompress.graph import Graph, model_info, replace_contents, walk_nodes
from onnxcompress.proto import from_proto, to_proto

__all__ = ["raise_opset"]


def raise_opset(graph: Graph, version: int) -> None:
    """Convert ``graph`` in place to opset ``version`` by ONNX's own converter; weights are not copied.

    Raises:
        ModelError: the converter does not know an operator of the model.
    """
    if graph.opset >= version:
        return
    model = to_proto(graph, weights="omit")
    try:
        converted = onnx.version_converter.convert_version(model, version)
    except Exception as error:  # the converter raises RuntimeError and its own types
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the model has opset {graph.opset} and this needs {version}, but ONNX's converter failed: {reason}; "
            "export the model again with a newer opset"
        ) from error
    result = from_proto(converted)
    constants = {t.name: t for node in walk_nodes(graph) for t in node.inputs if isinstance(t, gs.Constant)}
    declared = {t.name for t in graph.inputs}
    for tensor in list(result.inputs):
        if tensor.name in constants and tensor.name not in declared:
            tensor.to_constant(constants[tensor.name]._values)
    result.inputs = [t for t in result.inputs if not isinstance(t, gs.Constant)]
    info = model_info(graph)
    replace_contents(graph, result)
    graph.__dict__["onnxcompress_info"] = info
