"""insert_qdq on every hazard model: it never breaks a model, whatever it can or cannot quantise."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from models import HAZARDS, Hazard, make_feeds

from onnxcompress.base import Context, PassResult
from onnxcompress.data import open_data
from onnxcompress.graph import Graph, input_specs
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.session import Session

RUNNABLE = [h for h in HAZARDS if h.runnable]
every_hazard = pytest.mark.parametrize("hazard", RUNNABLE, ids=lambda h: h.name)

#: outputs that a comparison of values says nothing about
RANDOM = {"random_and_stateful", "dropout_training"}


def load(hazard: Hazard) -> tuple[onnx.ModelProto, Graph, dict[str, np.ndarray]]:
    model = hazard.build()
    return model, from_proto(model), make_feeds(model)


def quantise(graph: Graph, feeds: dict[str, np.ndarray]) -> tuple[PassResult, Context]:
    context = Context(data=open_data([feeds], input_specs(graph)), threads=1)
    return InsertQdq()(graph, context), context


@every_hazard
def test_the_model_stays_valid_and_every_float_node_has_a_reason(hazard: Hazard) -> None:
    model, graph, feeds = load(hazard)
    before = to_proto(graph).SerializeToString()
    result, _ = quantise(graph, feeds)
    written = to_proto(result.graph)
    onnx.checker.check_model(written)
    assert to_proto(graph).SerializeToString() == before
    assert [o.name for o in written.graph.output] == [o.name for o in model.graph.output]
    assert {i.name for i in written.graph.input} <= {i.name for i in model.graph.input}
    assert all(refusal.reason for refusal in result.report.refusals)
    proof = result.report.details["audit"]
    assert proof["mismatches"] == () and proof["stranded"] == ()
    assert len({node.name for node in written.graph.node}) == len(written.graph.node)


@every_hazard
def test_the_values_stay_close(hazard: Hazard) -> None:
    if hazard.name in RANDOM:
        pytest.skip("its outputs are random")
    model, graph, feeds = load(hazard)
    result, _ = quantise(graph, feeds)
    for level in ("disabled", "all"):
        reference = Session(model, optimization=level, threads=1).run(feeds)
        found = Session(result.graph, optimization=level, threads=1).run(feeds)
        for name, value in reference.items():
            if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or not value.size:
                continue
            noise = np.linalg.norm((value - found[name]).astype(np.float64).ravel())
            assert noise <= 0.1 * np.linalg.norm(value.astype(np.float64).ravel()) + 1e-12, (name, level)


@every_hazard
def test_a_second_run_changes_nothing(hazard: Hazard) -> None:
    _, graph, feeds = load(hazard)
    once, _ = quantise(graph, feeds)
    if not once.report.changed:
        return
    again, _ = quantise(once.graph, feeds)
    assert not [c for c in again.report.changes if c.kind == "quantised"]
