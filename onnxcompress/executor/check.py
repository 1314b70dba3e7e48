"""The executor against onnxruntime: whoever trains must train what is served.

Both run the same samples. Where an output differs, the node to blame is looked for: each node gets the very inputs that
onnxruntime computed for it, so that only its own error counts, and the first one that differs is named. A quantised
graph is looked through in any case, because a value on the edge between two integers can fall on either side and what
follows then differs without anybody's fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from onnxcompress.errors import ModelError
from onnxcompress.executor.network import Network
from onnxcompress.executor.plan import build_kernel, needed_nodes
from onnxcompress.executor.spec import Numbers, Unsupported, as_tensor
from onnxcompress.graph import Graph, constant_value, default_values, first_output
from onnxcompress.io import PROTOBUF_LIMIT
from onnxcompress.proto import to_proto
from onnxcompress.session import Optimization, Session

__all__ = ["Agreement", "check_network", "first_difference", "open_session"]

Arrays = Mapping[str, NDArray[Any]]

#: relative L2 of a whole network in float32, and where values are rounded to integers or halves on the way
TOLERANCE = 1e-3
ROUNDED_TOLERANCE = 0.1
#: relative L2 of one node, by the type of its output
NODE_TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
#: share of the integers of a quantised tensor that may lie one beside
NEIGHBOURS = 0.01


@dataclass(frozen=True)
class Agreement:
    """The largest relative L2 over the outputs, and the nodes that were held against onnxruntime one by one."""

    relative_l2: float
    nodes: int


def check_network(graph: Graph, feeds: Arrays, *, device: Any = "cpu", threads: int = 0) -> Agreement:
    """Hold the executor's outputs against onnxruntime's for one batch.

    Raises:
        ModelError: they differ, and the line names the first node that does; or a node cannot be executed.
    """
    session = Session(graph, optimization="disabled", threads=threads)
    network = Network(graph, trainable=False, device=device)
    with torch.no_grad():
        found = network(network.feeds(feeds))
    expected = session.run(feeds, network.output_names)
    errors = {name: _error(found[name].cpu().numpy(), value) for name, value in expected.items()}
    worst = max(errors, key=lambda name: errors[name], default="")
    rounded = any(node.op == "QuantizeLinear" or _is_half(node) for node in graph.nodes)
    limit = ROUNDED_TOLERANCE if rounded else TOLERANCE
    wrong = bool(errors) and not errors[worst] <= limit
    nodes = 0
    if wrong or rounded:
        blamed, nodes = first_difference(graph, feeds, threads=threads)
        if blamed is not None:
            raise ModelError(
                f"{blamed}; the executor and onnxruntime must compute the same before anything is trained, please "
                "report it"
            )
    if wrong:
        raise ModelError(
            f"output {worst!r} differs from onnxruntime's by {errors[worst]:.2g} (relative L2, allowed is {limit:g}), "
            "though no single node does; the network amplifies rounding too much to be trained"
        )
    return Agreement(max(errors.values(), default=0.0), nodes)


def _is_half(node: Any) -> bool:
    return any(getattr(t.dtype, "name", str(t.dtype)) in ("float16", "bfloat16") for t in node.inputs)


def first_difference(graph: Graph, feeds: Arrays, *, threads: int = 0) -> tuple[str | None, int]:
    """(what is wrong with the first node that differs, or None; how many nodes were compared).

    Every node runs on what onnxruntime computed for its inputs.
    """
    nodes = needed_nodes(graph, graph.outputs)
    reference = _all_tensors(graph, [t.name for node in nodes for t in node.outputs if t.name], feeds, threads)
    compared = 0
    for node in nodes:
        if node.op == "Constant":
            continue
        operator, kernel = build_kernel(node, graph.opset)
        arguments: list[Any] = []
        for index, tensor in enumerate(node.inputs):
            array = reference.get(tensor.name) if tensor.name else None
            if array is None and tensor.name:
                array = constant_value(tensor)
            arguments.append(_argument(array, index in operator.numbers))
        try:
            with torch.no_grad():
                result = kernel(*arguments)
        except (Unsupported, RuntimeError, IndexError, TypeError, ValueError) as error:
            return f"node {node.name!r} ({node.op}) cannot be executed: {' '.join(str(error).split())[:200]}", compared
        for tensor, value in zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=False):
            if not tensor.name or tensor.name not in reference:
                continue
            reason = _unlike(value.cpu().numpy(), reference[tensor.name], node.op == "QuantizeLinear")
            if reason is not None:
                where = f"node {node.name or first_output(node)!r} ({node.op})"
                return f"{where} is the first that differs from onnxruntime: {reason}", compared
        compared += 1
    return None, compared


def _argument(array: NDArray[Any] | None, number: bool) -> Any:
    if array is None:
        return None
    value: Numbers = array
    return value if number else as_tensor(value)


def _all_tensors(graph: Graph, names: Sequence[str], feeds: Arrays, threads: int) -> dict[str, NDArray[Any]]:
    """Every named tensor as onnxruntime computes it for ``feeds``, and what inputs hold that need not be fed."""
    found = open_session(graph, names, optimization="disabled", threads=threads).run(feeds)
    return {**default_values(graph), **feeds, **found}


def open_session(graph: Graph, names: Sequence[str], *, optimization: Optimization, threads: int = 0) -> Session:
    """A session that answers the tensors ``names``, too."""
    model = to_proto(graph)
    if model.ByteSize() > PROTOBUF_LIMIT:
        raise ModelError("the model is too large to read its inner tensors; expected less than 2 GiB")
    given = {value.name for value in model.graph.output}
    asked = [name for name in dict.fromkeys(names) if name not in given]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)  # the runtime infers the types
    # Between short runs spinning threads would only take the processor away from torch.
    config = {"session.intra_op.allow_spinning": "0"}
    return Session(model, optimization=optimization, threads=threads, config=config)


def _error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Relative L2; for whole numbers the share that is unequal. Infinite where shapes or infinities differ."""
    if found.shape != wanted.shape:
        return float("inf")
    if wanted.dtype.kind in "iub":
        return float(np.mean(found.astype(wanted.dtype) != wanted)) if wanted.size else 0.0
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    special = ~np.isfinite(b)
    if not np.array_equal(a[special], b[special], equal_nan=True) or not np.isfinite(a[~special]).all():
        return float("inf")
    size = float(np.linalg.norm(b[~special]))
    difference = float(np.linalg.norm(a[~special] - b[~special]))
    return difference / size if size else difference


def _unlike(found: NDArray[Any], wanted: NDArray[Any], quantized: bool) -> str | None:
    """What is wrong with a node's output; None where nothing is."""
    if found.shape != wanted.shape:
        return f"its output is {list(found.shape)} and should be {list(wanted.shape)}"
    if quantized:
        distance = np.abs(found.astype(np.int64) - wanted.astype(np.int64))
        beside = float(np.mean(distance > 0)) if distance.size else 0.0
        if distance.size and (distance.max() > 1 or beside > NEIGHBOURS):
            return f"its integers are up to {int(distance.max())} off, {100 * beside:.2g} % of them"
        return None
    limit = NODE_TOLERANCE.get(wanted.dtype.name, 0.0)
    error = _error(found, wanted)
    if not error <= limit:
        kind = "relative L2" if wanted.dtype.name in NODE_TOLERANCE else "share of elements"
        return f"{kind} {error:.2g}, allowed is {limit:g}"
    return None
