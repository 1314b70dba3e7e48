"""The search for layers finds those that ruin a model, and no others."""

from __future__ import annotations

import onnx
import pytest
from hard_models import SPOILED, ruined_everywhere, samples, spoiled

from onnxcompress.base import Context
from onnxcompress.data import open_data
from onnxcompress.graph import input_specs
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.proto import from_proto
from onnxcompress.quantization.gauge import Gauge, Goal
from onnxcompress.quantization.layer_search import LayerSearch, as_details, search_layers
from onnxcompress.quantization.sensitivity import affordable_samples, measure_sensitivity
from onnxcompress.quantization.simulation import Simulation
from onnxcompress.report import to_json
from onnxcompress.session import Session


def prepared(model: onnx.ModelProto) -> tuple[Simulation, Gauge]:
    graph = from_proto(model)
    specs = input_specs(graph)
    context = Context(data=open_data(samples(32), specs, batch=16), threads=1)
    result = InsertQdq()(graph, context)
    assert context.variants is not None
    gauge = Gauge(Session(graph, threads=1).run, open_data(samples(24, 1), specs, batch=24), 24)
    return Simulation(context.variants, result.graph, threads=1), gauge


def searched(model: onnx.ModelProto, *goals: Goal, start: tuple[str, ...] = ()) -> LayerSearch:
    simulation, gauge = prepared(model)
    return search_layers(simulation, gauge, gauge, goals, start=start)


def test_exactly_the_layers_around_the_spoiled_tensor_return() -> None:
    found = searched(spoiled(), Goal("SQNR", 20.0))
    assert found.met
    assert sorted(found.exclude) == sorted(SPOILED)
    assert len(found.steps) == 1
    step = found.steps[0]
    assert sorted(step.floats) == sorted(SPOILED)
    assert step.sqnr_before_db is not None and step.sqnr_after_db is not None
    assert step.sqnr_before_db < 10 < 20 < step.sqnr_after_db
    assert step.macs == 2 * 8 * 8 * 9 * 12 * 12
    assert step.microseconds > 0
    assert "in 8 bits, over 0 to" in step.why
    assert found.sources[0][0].startswith("tensor ")


def test_two_spoiled_tensors_are_both_found() -> None:
    found = searched(spoiled((1, 5)), Goal("SQNR", 20.0))
    assert found.met
    assert sorted(found.exclude) == ["conv1", "conv2", "conv5", "conv6"]
    assert len(found.steps) == 2


def test_a_budget_that_is_met_costs_one_look() -> None:
    found = searched(spoiled(()), Goal("SQNR", 10.0))
    assert (found.met, found.exclude, found.steps, found.variants) == (True, (), (), 1)


def test_where_everything_is_spoiled_nothing_integer_meets_the_budget() -> None:
    found = searched(ruined_everywhere(), Goal("SQNR", 60.0))
    assert not found.met
    assert found.exhausted
    assert set(found.exclude) <= {f"conv{i}" for i in range(8)} | {"head", "n17_GlobalAveragePool"}


def test_a_search_goes_on_from_where_it_was() -> None:
    found = searched(spoiled((1, 5)), Goal("SQNR", 20.0), start=("conv1", "conv2"))
    assert found.met
    assert found.exclude[:2] == ("conv1", "conv2")
    assert sorted(found.exclude) == ["conv1", "conv2", "conv5", "conv6"]


def test_the_same_search_gives_the_same_answer() -> None:
    goals = (Goal("agreement", 0.0),)
    assert searched(spoiled((2,)), *goals) == searched(spoiled((2,)), *goals)


def test_the_report_is_plain() -> None:
    found = searched(spoiled(), Goal("agreement", 1.0))
    details = as_details(found, [Goal("agreement", 1.0)], {"ranking": 24, "judging": 24})
    assert details["met"]
    assert details["returned"][0]["nodes"] == found.steps[0].nodes
    assert details["sensitivity"][0]["kind"] == "tensor"
    assert to_json(details)


def test_sensitivity_names_the_worst_layers_first() -> None:
    simulation, gauge = prepared(spoiled())
    found = measure_sensitivity(simulation, gauge)
    assert {layer.node for layer in found.layers[:2]} == set(SPOILED)
    assert found.sqnr_db is not None and found.sqnr_db < 10
    worst, best = found.layers[0], found.layers[-1]
    assert worst.sqnr_db is not None and best.sqnr_db is not None
    assert worst.sqnr_db < found.sqnr_db + 3 < 30 < best.sqnr_db
    assert [layer.error for layer in found.layers] == sorted((layer.error for layer in found.layers), reverse=True)
    # What is rounded between the two stays so when one of them returns.
    assert all(abs(layer.gain_db) < 3 for layer in found.layers)
    assert found.samples == 24


@pytest.mark.parametrize(("variants", "macs", "expected"), [(10, 10**6, 32), (100, 10**9, 4), (100, 10**8, 20)])
def test_samples_are_as_many_as_can_be_afforded(variants: int, macs: int, expected: int) -> None:
    assert affordable_samples(variants, macs) == expected
