"""What a model is made of, and what static quantisation would do with each of its nodes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcompress.base import Context, Progress, SilentProgress
from onnxcompress.data import open_data
from onnxcompress.errors import UsageError
from onnxcompress.graph import Graph, first_output, input_specs, model_info
from onnxcompress.io import load, model_bytes
from onnxcompress.islands import real_types
from onnxcompress.passes import load_pass
from onnxcompress.passes.prune_channels import prepare
from onnxcompress.pipeline import Pipeline
from onnxcompress.quantization.canonical import canonicalize
from onnxcompress.quantization.gauge import Gauge
from onnxcompress.quantization.placement import explain
from onnxcompress.quantization.sensitivity import Sensitivity, affordable_samples, measure_sensitivity, weighing_units
from onnxcompress.quantization.simulation import Simulation
from onnxcompress.recipe import Recipe, load_recipe
from onnxcompress.session import Session
from onnxcompress.shapes import GraphStats, Shape, graph_stats, infer_shapes, node_macs
from onnxcompress.targets import get_target

if TYPE_CHECKING:
    from onnxcompress.data import Preprocess

__all__ = [
    "CoupledChannels",
    "Inspection",
    "NodeInfo",
    "PlannedNode",
    "TensorInfo",
    "coupled_channels",
    "inspect_model",
    "inspect_sensitivity",
    "plan",
    "total_macs",
]

#: share of the samples that layers are measured on; the others calibrate
_MEASURED = 0.25


@dataclass(frozen=True)
class TensorInfo:
    """A graph input or output; an axis of unknown size is None or its symbol, an unknown rank None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class NodeInfo:
    """One node of the outermost graph. ``macs`` is None for operators that multiply nothing or of unknown shape."""

    name: str
    op: str
    macs: int | None
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class PlannedNode:
    """Whether a node would become integer, and why or why not."""

    name: str
    op: str
    integer: bool
    reason: str


@dataclass(frozen=True)
class CoupledChannels:
    """Channels that can only be removed one whole unit at a time, and the nodes that shrink with them.

    ``macs`` are those of all nodes that shrink, as they are. ``pinned`` says why nothing can be removed.
    """

    name: str
    kind: str
    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    passing: tuple[str, ...]
    macs: int
    pinned: str | None


@dataclass(frozen=True)
class Inspection:
    """A model file: where it comes from, its tensors, its nodes, and what would become integer on ``target``."""

    path: Path
    bytes: int
    sha256: str | None
    ir_version: int | None
    opset: int
    domains: dict[str, int]
    metadata: dict[str, str]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    stats: GraphStats
    macs: int
    nodes: tuple[NodeInfo, ...]
    target: str
    planned: tuple[PlannedNode, ...]
    #: None where nobody asked
    coupling: tuple[CoupledChannels, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema": 1, **asdict(self), "path": str(self.path)}


def inspect_model(
    path: str | os.PathLike[str],
    *,
    target: str = "cpu",
    coupling: bool = False,
    trusted: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Read the model at ``path`` and describe it; with ``coupling`` also which channels could be removed together.

    Raises:
        ModelError: it is no valid model.
        UsageError: ``target`` is unknown.
    """
    get_target(target)
    graph = load(path, trusted=trusted)
    info = model_info(graph)
    types = infer_shapes(graph)
    macs = node_macs(graph, types)
    nodes = tuple(
        NodeInfo(
            node.name,
            node.op,
            macs.get(node.name),
            known.shape if (known := types.get(first_output(node))) is not None else None,
        )
        for node in graph.nodes
    )
    inputs = tuple(TensorInfo(s.name, s.dtype.name, s.shape) for s in input_specs(graph))
    outputs = tuple(
        TensorInfo(t.name, known.dtype.name, known.shape)
        if (known := types.get(t.name)) is not None and known.dtype is not None
        else TensorInfo(t.name, "unknown", None)
        for t in graph.outputs
    )
    domains = {d.domain or "ai.onnx": d.version for d in graph.import_domains or ()}
    return Inspection(
        path=Path(path),
        bytes=model_bytes(path),
        sha256=info.source_sha256,
        ir_version=graph.ir_version,
        opset=graph.opset,
        domains=domains,
        metadata=dict(info.metadata),
        inputs=inputs,
        outputs=outputs,
        stats=graph_stats(graph),
        macs=sum(macs.values()),
        nodes=nodes,
        target=target,
        planned=plan(graph, target, progress=progress),
        coupling=coupled_channels(graph) if coupling else None,
    )


def coupled_channels(graph: Graph) -> tuple[CoupledChannels, ...]:
    """The coupling groups of ``graph`` as ``prune_channels`` sees them: constants and BatchNormalization are folded."""
    ready = prepare(graph, fold_batch_norm=True)
    hanging = ready.costs.hanging()
    return tuple(
        CoupledChannels(g.name, g.kind, g.channels, g.producers, g.consumers, g.passing, hanging[g.name], g.pinned)
        for g in ready.coupling.groups
    )


def inspect_sensitivity(
    path: str | os.PathLike[str],
    data: Any,
    *,
    recipe: str | os.PathLike[str] | Recipe = "int8",
    target: str = "cpu",
    preprocess: Preprocess | None = None,
    batch: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    threads: int = 0,
    trusted: bool = False,
    progress: Progress | None = None,
) -> Sensitivity:
    """What each layer of the model at ``path`` costs in accuracy once it is quantised.

    Args:
        path: an ONNX file.
        data: samples, anything that :func:`~onnxcompress.data.open_data` opens; a quarter of them measures, at most 32,
            and the others calibrate.
        recipe: what quantises; a recipe without ``insert_qdq`` has nothing to measure.
        target: what to quantise for.
        preprocess: how images become arrays.
        batch: samples a batch; None: as the data comes.
        samples: read at most this many samples of ``data``.
        seed: says which samples measure.
        threads: threads of the runtime; 0: its choice.
        trusted: skip the limits on untrusted files.
        progress: where progress is shown.

    Raises:
        ModelError: it is no valid model.
        DataError: there are fewer than two samples, or they do not fit the model.
        UsageError: ``target`` is unknown, or nothing becomes integer.
    """
    get_target(target)
    shown = progress if progress is not None else SilentProgress()
    graph = load(path, trusted=trusted)
    opened = open_data(data, input_specs(graph), batch=batch, preprocess=preprocess, limit=samples)
    with opened:
        rest, held_out = opened.split(_MEASURED, seed)
        context = Context(data=rest, target=target, seed=seed, threads=threads, progress=shown)
        quantised = load_recipe(recipe).pipeline()(graph, context).graph
        variants = context.variants
        units = weighing_units(variants.placement.units) if variants is not None else []
        if variants is None or not units:
            raise UsageError("nothing of this model becomes integer, so no layer has a sensitivity; see inspect MODEL")
        macs = sum(node_macs(variants.graph, real_types(variants, held_out)).values())
        count = affordable_samples(2 * len(units), macs)
        gauge = Gauge(Session(graph, threads=threads).run, held_out, count)
        return measure_sensitivity(Simulation(variants, quantised, threads=threads), gauge, shown)


def plan(
    graph: Graph,
    target: str,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    shapes: Mapping[str, Shape] | None = None,
) -> tuple[PlannedNode, ...]:
    """What would become integer on ``target``, and why the rest would not, when ``recipe`` reaches its quantiser.

    The passes before it run first because they change the answer: a BatchNormalization stays float, the Conv that it
    folds into does not. The default recipe is ``int8``; a recipe that does not quantise plans nothing. What conversions
    cost is estimated by ``shapes``, of the inputs for one sample; by default symbols count as 1.
    """
    steps = (recipe if recipe is not None else load_recipe("int8")).passes
    quantiser = load_pass("insert_qdq")
    position = next((i for i, step in enumerate(steps) if isinstance(step, quantiser)), None)
    if position is None:
        return ()
    context = Context(target=target, progress=progress if progress is not None else SilentProgress())
    ready = Pipeline([step for step in steps[:position] if not step.needs_data])(graph, context).graph
    rules = get_target(target)
    canonicalize(ready, rules)
    sizes = None if shapes is None else infer_shapes(ready, shapes)
    options = steps[position].model_dump(include={"exclude_nodes", "exclude_operators"})
    return tuple(PlannedNode(*node) for node in explain(ready, rules, sizes=sizes, **options))


def total_macs(graph: Graph, shapes: Mapping[str, Shape] | None = None) -> int:
    """Multiply-accumulates of the outermost graph: with inputs of ``shapes``, by default with symbols counted as 1."""
    return sum(node_macs(graph, infer_shapes(graph, shapes)).values())
