"""A pipeline is a pass: it composes what its passes report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from pydantic import ValidationError

from onnxcompress.base import Change, Context, Cut, Decision, Detail, Guarantee, Pass, Refusal
from onnxcompress.errors import UsageError
from onnxcompress.graph import Graph, redirect, remove_node
from onnxcompress.pipeline import Pipeline


def chain(length: int = 3) -> Graph:
    """``length`` Relu nodes in a row, named relu0, relu1, ..."""
    tensors = [gs.Variable(f"t{i}", np.float32, [1, 4]) for i in range(length + 1)]
    nodes = [gs.Node("Relu", f"relu{i}", {}, [tensors[i]], [tensors[i + 1]]) for i in range(length)]
    return gs.Graph(nodes=nodes, inputs=[tensors[0]], outputs=[tensors[-1]], opset=17)


class RemoveFirst(Pass):
    """Remove the first of at least two nodes."""

    name: ClassVar[str] = "remove_first"
    weak: bool = False
    data: bool = False

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.APPROXIMATE if self.weak else Guarantee.EXACT

    @property
    def needs_data(self) -> bool:
        return self.data

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail]:
        context.warn("nodes go")
        if len(graph.nodes) < 2:
            yield Refusal(graph.nodes[0].name, "it is the last one")
            return
        node = graph.nodes[0]
        redirect(node.outputs[0], node.inputs[0])
        name = node.name
        remove_node(node)
        yield Change("removed", name)
        yield Decision("weak", self.weak)
        yield Detail("left", len(graph.nodes))


class Recorder:
    """Progress that remembers what was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, int | None]] = []

    def track(self, items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        self.shown.append((description, total))
        yield from items

    def paused(self) -> Any:
        return nullcontext()


def test_reports_are_composed_in_order() -> None:
    graph = chain()
    result = Pipeline([RemoveFirst(), RemoveFirst(weak=True), RemoveFirst()])(graph)
    report = result.report
    assert [c.node for c in report.changes] == ["relu0", "relu1"]
    assert report.refusals == (Refusal("relu2", "it is the last one"),)
    assert [child.name for child in report.children] == ["remove_first"] * 3
    assert report.children[1].options == {"weak": True}
    assert report.decisions == {"passes[0].remove_first.weak": False, "passes[1].remove_first.weak": True}
    assert (report.before.nodes, report.after.nodes) == (3, 1)
    assert [(c.before.nodes, c.after.nodes) for c in report.children] == [(3, 2), (2, 1), (1, 1)]
    assert report.details == {"passes[0].remove_first.left": 3, "passes[1].remove_first.left": 2}
    assert report.warnings == ("nodes go",)
    assert report.changed
    assert [n.name for n in graph.nodes] == ["relu0", "relu1", "relu2"]
    assert [n.name for n in result.graph.nodes] == ["relu2"]


def test_guarantee_and_need_of_data_are_the_weakest() -> None:
    assert Pipeline([RemoveFirst(), RemoveFirst()]).guarantee is Guarantee.EXACT
    assert Pipeline([RemoveFirst(weak=True), RemoveFirst()]).guarantee is Guarantee.APPROXIMATE
    assert not Pipeline([RemoveFirst()]).needs_data
    assert Pipeline([RemoveFirst(), RemoveFirst(data=True)]).needs_data


def test_an_empty_pipeline_copies() -> None:
    graph = chain()
    result = Pipeline([])(graph)
    assert result.graph is not graph
    assert not result.report.changed
    assert Pipeline([]).guarantee is Guarantee.EXACT


def test_pipelines_nest() -> None:
    result = Pipeline([Pipeline([RemoveFirst()]), RemoveFirst()])(chain())
    assert [c.name for c in result.report.children] == ["pipeline", "remove_first"]
    assert len(result.graph.nodes) == 1


def test_the_original_is_the_first_graph() -> None:
    graph = chain()
    context = Context()
    Pipeline([RemoveFirst(), RemoveFirst()])(graph, context)
    assert context.original is graph
    teacher = chain(1)
    context = Context(original=teacher)
    Pipeline([RemoveFirst()])(graph, context)
    assert context.original is teacher


def test_progress_names_the_running_pass() -> None:
    progress = Recorder()
    Pipeline([RemoveFirst(), RemoveFirst()])(chain(), Context(progress=progress))
    assert progress.shown == [("remove_first (1/2)", 1), ("remove_first (2/2)", 1)]


def test_apply_works_on_the_graph_itself() -> None:
    graph = chain()
    items = list(Pipeline([RemoveFirst(), RemoveFirst()]).apply(graph, Context()))
    assert [n.name for n in graph.nodes] == ["relu2"]
    assert [type(i) for i in items] == [Change, Change, Decision, Decision, Detail, Detail]


def test_an_error_in_a_pass_is_not_swallowed() -> None:
    class Refuses(RemoveFirst):
        name: ClassVar[str] = "refuses"

        def requires(self, graph: Graph, context: Context) -> None:
            raise UsageError("not this one")

    with pytest.raises(UsageError, match="not this one"):
        Pipeline([RemoveFirst(), Refuses()])(chain())


def test_options_are_checked_and_frozen() -> None:
    with pytest.raises(ValidationError):
        Pipeline([object()])  # type: ignore[list-item]
    with pytest.raises(ValidationError):
        Pipeline([]).passes = ()  # type: ignore[misc]


def test_a_pipeline_composes_kept_maps() -> None:
    class KeepFour(RemoveFirst):
        name: ClassVar[str] = "keep_four"

        def apply(self, graph: Graph, context: Context) -> Iterator[Change | Cut]:
            yield from super().apply(graph, context)
            yield Cut("t", 1, (1, 3, 5, 7))

    class KeepTwo(RemoveFirst):
        name: ClassVar[str] = "keep_two"

        def apply(self, graph: Graph, context: Context) -> Iterator[Change | Cut]:
            yield from super().apply(graph, context)
            yield Cut("t", 1, (0, 2))
            yield Cut("t", 2, (3,))

    pipeline = Pipeline([KeepFour(), RemoveFirst(), KeepTwo()])
    assert pipeline(chain()).kept == {"t": {1: (1, 5), 2: (3,)}}
    assert [item for item in pipeline.apply(chain(), Context()) if isinstance(item, Cut)] == [
        Cut("t", 1, (1, 5)),
        Cut("t", 2, (3,)),
    ]
