"""Which integer regions are timed, and what becomes of the answer."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hard_models import samples, spoiled, wobbly
from models import BY_NAME

from onnxcompress.base import Context
from onnxcompress.compress import compress
from onnxcompress.data import Dataset, open_data
from onnxcompress.graph import Graph, input_specs
from onnxcompress.islands import TimedIslands, doubtful_regions, real_types, time_islands
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.proto import from_proto
from onnxcompress.quantization.placement import costly_conversions, find_islands, place, saved_nanoseconds
from onnxcompress.quantization.variants import Variants
from onnxcompress.recipe import parse_recipe
from onnxcompress.shapes import node_macs


def quantised(model: onnx.ModelProto, feeds: dict[str, Any]) -> tuple[Variants, Dataset]:
    graph = from_proto(model)
    data = open_data(feeds, input_specs(graph), batch=8)
    context = Context(data=data, threads=1)
    InsertQdq()(graph, context)
    assert context.variants is not None
    return context.variants, data


def test_a_network_that_is_integer_as_a_whole_is_one_island_without_doubt() -> None:
    variants, data = quantised(spoiled(()), samples(16))
    types = real_types(variants, data)
    macs = node_macs(variants.graph, types)
    islands = find_islands(variants.placement, macs)
    assert len(islands) == 1
    assert islands[0].gain > 10 * islands[0].conversions
    assert doubtful_regions(variants.placement, types, macs) == []
    assert time_islands(variants, data) == TimedIslands()
    assert saved_nanoseconds(variants.placement, macs) == pytest.approx(islands[0].gain - islands[0].conversions)


def test_layers_between_functions_without_an_integer_form_are_islands_of_their_own() -> None:
    variants, data = quantised(wobbly(), samples(16))
    types = real_types(variants, data)
    macs = node_macs(variants.graph, types)
    regions = doubtful_regions(variants.placement, types, macs)
    assert len(regions) == 5  # four convolutions, and pool and Gemm together
    assert sum(map(len, regions)) == len([u for u in variants.placement.integer_units if not u.moves])
    assert len(costly_conversions(variants.placement)) >= 4


def test_functions_on_integers_make_all_of_it_doubtful() -> None:
    hazard = BY_NAME["silu"]
    feeds = {"x": np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)}
    variants, data = quantised(hazard.build(), feeds)
    types = real_types(variants, data)
    regions = doubtful_regions(variants.placement, types, node_macs(variants.graph, types))
    integer = {unit.node.name for unit in variants.placement.integer_units if not unit.moves}
    assert {name for region in regions for name in region} == integer


class Clock:
    """Stands in for the benchmark: a model's time is that of its operators, a quantised Conv costing what is said."""

    def __init__(self, integer: float, conv: float = 1.0, slow: tuple[str, ...] = ()) -> None:
        self.integer, self.conv, self.slow = integer, conv, slow

    def time(self, graph: Graph) -> float:
        total = 10.0
        for node in graph.nodes:
            if node.op == "Conv":
                quantised = node.inputs[1].inputs and node.inputs[1].inputs[0].op == "DequantizeLinear"
                cost = self.integer if not self.slow or node.name in self.slow else 0.5
                total += cost if quantised else self.conv
        return total

    def __call__(self, reference: Graph, candidate: Graph, *arguments: Any, **options: Any) -> Any:
        ratio = self.time(reference) / self.time(candidate)
        return SimpleNamespace(ratio=ratio, low=0.995 * ratio, high=1.005 * ratio)


def test_islands_that_cost_time_return_together(monkeypatch: pytest.MonkeyPatch) -> None:
    variants, data = quantised(wobbly(), samples(16))
    monkeypatch.setattr(import_module("onnxcompress.islands"), "benchmark", Clock(integer=2.0))
    found = time_islands(variants, data)
    assert set(found.returned) == {u.node.name for u in variants.placement.integer_units if not u.moves}
    assert found.comparisons[0].ratio > 1.2
    # Each half was tried as integers again.
    assert len(found.comparisons) > 1
    monkeypatch.setattr(import_module("onnxcompress.islands"), "benchmark", Clock(integer=0.5))
    assert time_islands(variants, data).returned == ()


def test_only_the_slow_half_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    variants, data = quantised(wobbly(), samples(16))
    convs = [u.node.name for u in variants.placement.integer_units if u.node.op == "Conv"]
    monkeypatch.setattr(import_module("onnxcompress.islands"), "benchmark", Clock(3.0, slow=tuple(convs[:1])))
    found = time_islands(variants, data)
    assert convs[0] in found.returned
    assert set(convs) - set(found.returned)


def test_compress_writes_what_was_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    onnx.save(wobbly(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **samples(32))
    monkeypatch.setattr(import_module("onnxcompress.islands"), "benchmark", Clock(integer=2.0))
    options: dict[str, Any] = {"benchmark_seconds": 0.2, "threads": 1}
    first = compress(tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "o.onnx", **options)
    assert first.islands.returned
    (step,) = [step for step in first.recipe.passes if step.name == "insert_qdq"]
    assert set(step.model_dump()["exclude_nodes"]) == set(first.islands.returned)
    assert first.audit is not None and "QLinearConv" not in first.audit["integer"]
    assert any("no part of the model is faster as integers" in warning for warning in first.warnings)
    reasons = {node["reason"] for node in first.audit["floats"] if node["node"] in first.islands.returned}
    assert reasons == {"returned to float: faster so, by measurement"}
    again = compress(
        tmp_path / "m.onnx",
        tmp_path / "d.npz",
        tmp_path / "p.onnx",
        recipe=parse_recipe(first.recipe.to_yaml()),
        **options,
    )
    assert again.islands == TimedIslands()
    assert first.saved is not None and again.saved is not None
    assert again.saved.sha256 == first.saved.sha256
    untimed = compress(tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "q.onnx", benchmark=False, threads=1)
    assert untimed.islands == TimedIslands()
    assert untimed.audit is not None and untimed.audit["integer"]["QLinearConv"] == 4


@pytest.mark.parametrize("side", [None, "side"], ids=["unknown", "symbolic"])
def test_conversions_are_priced_by_the_sizes_of_the_data(side: str | None) -> None:
    """Height and width left open make no other network than the same sizes in the file."""
    fixed, loose = wobbly(), wobbly()
    for dim in loose.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.Clear()
        if side is not None:
            dim.dim_param = side
    feeds = {"x": np.random.default_rng(0).normal(size=(8, 3, 64, 64)).astype(np.float32)}
    for dim in fixed.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = 64
    (expected, _), (found, data) = quantised(fixed, feeds), quantised(loose, feeds)
    assert find_islands(found.placement, found.macs) == find_islands(expected.placement, expected.macs)
    assert found.macs == expected.macs == node_macs(found.graph, real_types(found, data))
    blind = place(found.graph, found.target)
    assert [u.integer for u in blind.units] != [u.integer for u in found.placement.units]


def test_regions_that_lose_together_are_all_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate vouched for them, but integers as a whole were slower."""
    module = import_module("onnxcompress.islands")
    variants, data = quantised(wobbly(), samples(16))
    convs = {u.node.name for u in variants.placement.integer_units if u.node.op == "Conv"}
    monkeypatch.setattr(module, "_DOUBTFUL", 0.0)
    monkeypatch.setattr(module, "benchmark", Clock(integer=0.5))
    kept = time_islands(variants, data)
    assert len(kept.comparisons) == 1 and not kept.returned
    monkeypatch.setattr(module, "benchmark", Clock(integer=2.0))
    assert convs <= set(time_islands(variants, data).returned)
