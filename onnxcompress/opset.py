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
    _check_functions(graph, version)
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
    for node in walk_nodes(graph):  # what such nodes hold is left out, too, and then looks like an input
        if node.op == "Constant" and isinstance(node.attrs.get("value"), gs.Constant):
            constants.setdefault(node.outputs[0].name, node.attrs["value"])
    declared = {t.name for t in graph.inputs}
    for tensor in list(result.inputs):
        if tensor.name in constants and tensor.name not in declared:
            tensor.to_constant(constants[tensor.name]._values)
    result.inputs = [t for t in result.inputs if not isinstance(t, gs.Constant)]
    for tensor, known in zip(result.outputs, graph.outputs, strict=True):  # as declared, not as inferred
        tensor.shape = known.shape
    info = model_info(graph)
    replace_contents(graph, result)
    graph.__dict__["onnxcompress_info"] = info


def _check_functions(graph: Graph, version: int) -> None:
    """ONNX's converter leaves local functions as they are, and a model may not hold two versions of an operator."""
    info = model_info(graph)
    for function in info.keepsake.functions if info.keepsake is not None else ():
        imported = next((o.version for o in function.opset_import if o.domain in ("", "ai.onnx")), graph.opset)
        for op in {node.op_type for node in function.node if node.domain in ("", "ai.onnx")}:
            if _since(op, imported) != _since(op, version):
                raise ModelError(
                    f"the model has opset {graph.opset} and this needs {version}, but its function {function.name!r} "
                    f"calls {op} of opset {imported}; export the model again with a newer opset"
                )


def _since(op: str, opset: int) -> int | None:
    """The opset in which ``op`` took the form that it has in ``opset``; None where it is not known."""
    try:
        return int(onnx.defs.get_schema(op, opset, "").since_version)
    except onnx.defs.SchemaError:
        return None
