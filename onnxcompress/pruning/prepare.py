"""Making a graph ready for coupling, and undoing what of it turned out not to be needed.

Exporters merge parameters that happen to hold equal values: the zero biases of all layers, the ones and zeros of all
GroupNorms. Layers that share such a vector could only be cut together. So each use of a vector gets its own copy, and
after surgery copies that are still equal are one again. Matrices and kernels that are shared are shared on purpose and
stay so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.graph import Graph, Names, constant_value, graph_output_ids

__all__ = ["share_vectors", "unshare_vectors"]


def unshare_vectors(graph: Graph) -> dict[str, str]:
    """Give each use of a constant vector in the outermost graph its own constant; {name of a copy: original}.

    A vector has one axis longer than one. The first use keeps the name; integers of 64 bits are shapes and stay.
    """
    names = Names(graph)
    leaving = graph_output_ids(graph)
    outermost = {id(node) for node in graph.nodes}
    seen: set[int] = set()
    copies: dict[str, str] = {}
    for node in graph.nodes:
        for index, tensor in enumerate(node.inputs):
            if not isinstance(tensor, gs.Constant) or not _is_vector(tensor) or id(tensor) in leaving:
                continue
            if id(tensor) not in seen:
                seen.add(id(tensor))
                if all(id(user) in outermost for user in tensor.outputs):
                    continue
            twin = gs.Constant(names.free(f"{tensor.name}_of_{node.name}"), tensor._values)
            node.inputs[index] = twin
            copies[twin.name] = copies.get(tensor.name, tensor.name)
            seen.add(id(twin))
    return copies


def _is_vector(tensor: gs.Constant) -> bool:
    return bool(tensor.dtype != np.int64) and sum(n > 1 for n in tensor.shape) == 1


def share_vectors(graph: Graph, copies: Mapping[str, str]) -> None:
    """Undo :func:`unshare_vectors` for the copies that are still equal to their original or to each other."""
    families: dict[str, list[gs.Constant]] = defaultdict(list)
    origins, seen = set(copies.values()), set()
    for node in graph.nodes:
        for tensor in node.inputs:
            origin = copies.get(tensor.name, tensor.name)
            if isinstance(tensor, gs.Constant) and origin in origins and id(tensor) not in seen:
                seen.add(id(tensor))
                families[origin].append(tensor)
    for origin, members in families.items():
        members.sort(key=lambda tensor: tensor.name != origin)  # stable: the original first, then in graph order
        kept: dict[Any, gs.Constant] = {}
        for tensor in members:
            value = constant_value(tensor)
            if value is None:
                continue
            first = kept.setdefault((value.shape, value.dtype.str, value.tobytes()), tensor)
            if first is not tensor:
                _replace(tensor, first)


def _replace(old: gs.Constant, new: gs.Constant) -> None:
    for node in list({id(n): n for n in old.outputs}.values()):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
