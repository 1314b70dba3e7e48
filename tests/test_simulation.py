"""A simulation with the switches of a placement computes what the graph of that placement does."""

from __future__ import annotations

import numpy as np
import pytest
from models import HAZARDS, Hazard, make_feeds

from onnxcompress.base import Context
from onnxcompress.data import open_data
from onnxcompress.graph import input_specs
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.pipeline import Pipeline
from onnxcompress.proto import from_proto
from onnxcompress.quantization.sensitivity import weighing_units
from onnxcompress.quantization.simulation import Simulation
from onnxcompress.quantization.variants import Variants
from onnxcompress.session import Feeds, Session

#: outputs that a comparison of values says nothing about
RANDOM = {"random_and_stateful", "dropout_training"}
QUANTISED = [h for h in HAZARDS if h.runnable and h.name not in RANDOM]


def difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest relative L2 of all float outputs."""
    errors = [0.0]
    for name, value in expected.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size:
            norm = np.linalg.norm(value.astype(np.float64))
            errors.append(float(np.linalg.norm((found[name] - value).astype(np.float64)) / max(norm, 1e-12)))
    return max(errors)


def variants_of(hazard: Hazard) -> tuple[Variants | None, Feeds, Context]:
    model = hazard.build()
    graph = from_proto(model)
    feeds = make_feeds(model)
    context = Context(data=open_data([feeds], input_specs(graph)), threads=1)
    InsertQdq()(graph, context)
    return context.variants, feeds, context


@pytest.mark.parametrize("hazard", QUANTISED, ids=lambda h: h.name)
def test_it_computes_what_the_written_graphs_do(hazard: Hazard) -> None:
    variants, feeds, _ = variants_of(hazard)
    assert variants is not None
    simulation = Simulation(variants, threads=1)
    floats = Session(variants.graph, optimization="extended", threads=1).run(feeds)
    assert difference(simulation.run(feeds, frozenset()), floats) < 1e-5
    if not variants.placement.integer_units:
        return
    whole = Session(variants.written(), optimization="disabled", threads=1).run(feeds)
    assert difference(simulation.run(feeds, simulation.of(variants.placement)), whole) < 1e-5
    for unit in weighing_units(variants.placement.units):
        without = Session(variants.written([unit.node.name]), optimization="disabled", threads=1).run(feeds)
        found = simulation.run(feeds, simulation.of(variants.placed([unit.node.name])))
        # How a tensor is rounded that floats read beside integers is not told apart in every case.
        assert difference(found, without) < 0.02 + 0.5 * difference(whole, floats)


def test_switches_of_a_layer_are_its_own() -> None:
    hazard = next(h for h in HAZARDS if h.name == "residual")
    variants, feeds, _ = variants_of(hazard)
    assert variants is not None
    simulation = Simulation(variants, threads=1)
    whole = simulation.of(simulation.placement)
    floats = simulation.run(feeds, frozenset())
    union: frozenset[str] = frozenset()
    for unit in weighing_units(variants.placement.units):
        alone = simulation.alone(unit)
        assert alone <= whole
        assert 0 < difference(simulation.run(feeds, alone), floats) < 0.2
        union |= alone
    assert union == whole


def test_weights_are_those_of_the_quantised_graph_as_it_is_now() -> None:
    """A pass that mends biases afterwards is part of what is simulated."""
    hazard = next(h for h in HAZARDS if h.name == "conv_bn_relu")
    model = hazard.build()
    graph = from_proto(model)
    feeds = make_feeds(model, sizes={"N": 16})
    context = Context(data=open_data([feeds], input_specs(graph)), threads=1)
    result = Pipeline([InsertQdq(weight_range="mse"), CorrectBias()])(graph, context)
    assert context.variants is not None
    simulation = Simulation(context.variants, result.graph, threads=1)
    student = Session(result.graph, optimization="disabled", threads=1).run(feeds)
    assert difference(simulation.run(feeds, simulation.of(context.variants.placement)), student) < 1e-5
