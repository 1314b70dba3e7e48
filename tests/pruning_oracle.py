"""Two independent checks of coupling and surgery: the masked original, and NaN that may only go where coupling says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from models import make_feeds
from numpy.typing import NDArray

from onnxcompress.graph import Graph, Names, copy_graph, redirect, sort_nodes
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.pruning.coupling import Coupling, CouplingGroup, couple
from onnxcompress.pruning.surgery import Cuts, masked, removal_mask, remove_channels
from onnxcompress.session import Session
from onnxcompress.shapes import infer_shapes

__all__ = ["Keep", "assert_exact", "assert_taint_stays", "coupled", "free_groups", "group_of", "random_keep"]

Keep = dict[str, NDArray[np.int64]]

SIZES = ({}, {"N": 1, "S": 3, "H": 6})


def coupled(model: onnx.ModelProto) -> tuple[Graph, Coupling]:
    """The folded graph of ``model`` and its coupling."""
    graph = FoldConstants()(from_proto(model)).graph
    return graph, couple(graph)


def free_groups(coupling: Coupling) -> list[CouplingGroup]:
    return [group for group in coupling.groups if group.pinned is None]


def group_of(coupling: Coupling, node: str) -> CouplingGroup:
    """The only group that ``node`` produces."""
    (found,) = [group for group in coupling.groups if node in group.producers]
    return found


def random_keep(coupling: Coupling, seed: int) -> Keep:
    """One to all channels of every free group."""
    rng = np.random.default_rng(seed)
    return {
        g.name: np.sort(rng.choice(g.channels, int(rng.integers(1, g.channels + 1)), replace=False))
        for g in free_groups(coupling)
    }


def assert_exact(
    model: onnx.ModelProto, keep: Keep | None = None, *, seed: int = 0, run: bool = True, tolerance: float = 1e-5
) -> tuple[Graph, Cuts]:
    """The cut graph is valid, has the interface of the model, and computes what the masked one does."""
    graph, coupling = coupled(model)
    before = to_proto(graph).SerializeToString()
    keep = random_keep(coupling, seed) if keep is None else keep
    pruned, cuts = remove_channels(graph, coupling.groups, keep, coupling)
    reference = masked(graph, coupling.groups, keep, coupling)
    assert to_proto(graph).SerializeToString() == before
    written = to_proto(pruned)
    onnx.checker.check_model(written, full_check=True)
    assert list(written.graph.input) == list(model.graph.input)
    assert list(written.graph.output) == list(model.graph.output)
    if run:
        sessions = [Session(g, optimization="disabled", threads=1) for g in (reference, pruned)]
        for number, sizes in enumerate(SIZES):
            feeds = make_feeds(model, seed=seed + number, sizes=sizes)
            wanted, found = (session.run(feeds) for session in sessions)
            for name, value in wanted.items():
                assert found[name].shape == value.shape
                if value.dtype.kind == "f":
                    difference = np.linalg.norm(found[name].astype(np.float64) - value.astype(np.float64))
                    assert difference <= tolerance * np.linalg.norm(value.astype(np.float64))
                else:
                    assert np.array_equal(found[name], value)
    return pruned, cuts


def assert_taint_stays(model: onnx.ModelProto, *, seed: int = 0) -> int:
    """NaN in removed channels, where they are made, reaches only the positions that are removed with them.

    Answers how many elements were NaN: a test that taints nothing proves nothing.
    """
    graph, coupling = coupled(model)
    if graph.opset < 9:
        return 0  # there is no Where to taint with
    keep = random_keep(coupling, seed)
    masks = removal_mask(coupling.groups, keep)
    makers = {name for group in free_groups(coupling) for name in group.producers}
    tainted = copy_graph(graph)
    types = infer_shapes(tainted)
    names = Names(tainted)
    read = {(node.name, index): tensor.name for node in graph.nodes for index, tensor in enumerate(node.inputs)}
    nodes = {node.name: node for node in tainted.nodes}
    for node in list(tainted.nodes):
        for tensor in node.outputs if node.name in makers else ():
            for axis, stays in masks.get(tensor.name, {}).items():
                rank = len(coupling.dims[tensor.name])
                _insert(tainted, names, tensor, _along(stays, axis, rank), np.nan, types)
    for name, index, axis in coupling.reads:
        node = nodes[name]
        tensor = node.inputs[index]
        source = read[name, index]
        stays = masks.get(source, {}).get(axis)
        if stays is not None:
            shape = _along(stays, axis, len(coupling.dims[source]))
            node.inputs[index] = _where(tainted, names, tensor, shape, 0.0, _dtype(types, source))
    watched = _watched(tainted, coupling, types)
    tainted.outputs = [*tainted.outputs, *watched]
    sort_nodes(tainted)
    found = Session(tainted, optimization="disabled", threads=1).run(make_feeds(model, seed=seed))
    count = 0
    for name, value in found.items():
        if value.dtype.kind != "f":
            continue
        wrong = np.isnan(value)
        count += int(wrong.sum())
        allowed = np.zeros(value.shape, bool)
        for axis, stays in masks.get(name, {}).items():
            periodic = np.resize(~stays, value.shape[axis])
            allowed |= periodic.reshape([-1 if a == axis else 1 for a in range(value.ndim)])
        assert not (wrong & ~allowed).any(), name
    return count


def _dtype(types: Mapping[str, Any], name: str) -> Any:
    """float32 where inference does not know."""
    known = types.get(name)
    return np.float32 if known is None or known.dtype is None else known.dtype


def _along(stays: NDArray[np.bool_], axis: int, rank: int) -> NDArray[np.bool_]:
    return stays.reshape([-1 if a == axis else 1 for a in range(rank)])


def _where(
    graph: Graph, names: Names, tensor: gs.Tensor, stays: NDArray[np.bool_], value: float, dtype: Any
) -> gs.Variable:
    out = gs.Variable(names.free(f"{tensor.name}_tainted"), dtype)
    mask = gs.Constant(names.free("stays"), stays)
    other = gs.Constant(names.free("value"), np.array(value, dtype))
    graph.nodes.append(gs.Node("Where", names.free("where"), inputs=[mask, tensor, other], outputs=[out]))
    return out


def _insert(
    graph: Graph,
    names: Names,
    tensor: gs.Tensor,
    stays: NDArray[np.bool_],
    value: float,
    types: Mapping[str, Any],
) -> None:
    if not tensor.outputs:
        return  # nothing reads it
    dtype = _dtype(types, tensor.name)
    out = gs.Variable(names.free(f"{tensor.name}_nan"), dtype)
    redirect(tensor, out)
    mask = gs.Constant(names.free("stays"), stays)
    nan = gs.Constant(names.free("nan"), np.array(value, dtype))
    graph.nodes.append(gs.Node("Where", names.free("where"), inputs=[mask, tensor, nan], outputs=[out]))


def _watched(graph: Graph, coupling: Coupling, types: Mapping[str, Any]) -> list[gs.Variable]:
    """Every float tensor of the original but those inside of channel shuffles, which are replaced as a whole."""
    inside = {name for permutation in coupling.permutations for name in permutation.nodes[:2]}
    outputs = {tensor.name for tensor in graph.outputs}
    return [
        tensor
        for node in graph.nodes
        if node.name not in inside and node.op != "Constant"
        for tensor in node.outputs
        if tensor.name in types
        and tensor.name not in outputs
        and types[tensor.name].dtype is not None
        and types[tensor.name].dtype.kind == "f"
    ]
