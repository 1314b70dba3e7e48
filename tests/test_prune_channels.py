"""The pass: aims, exclusions, refusals, the proof that it runs each time, replays, and the whole way with repair."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from models import BY_NAME, HAZARDS, Hazard, Net, image, make_feeds
from pydantic import ValidationError

from onnxcompress.base import Context, PassResult
from onnxcompress.data import Dataset, open_data
from onnxcompress.errors import DataError, OnnxCompressError, UsageError
from onnxcompress.graph import Graph, input_specs
from onnxcompress.kept import read_kept, write_kept
from onnxcompress.passes import prune_channels
from onnxcompress.passes.prune_channels import PruneChannels
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.recipe import Recipe, load_recipe, with_decisions
from onnxcompress.session import Session
from onnxcompress.shapes import infer_shapes, node_macs

#: without samples, and without timing
PLAIN = {"importance": "l2", "recover": False, "allocation": "uniform", "round_to": 1}


def plain(**options: Any) -> PruneChannels:
    return PruneChannels.model_validate({**PLAIN, **options})


def macs(graph: Graph) -> int:
    return sum(node_macs(graph, infer_shapes(graph)).values())


def wide(blocks: int = 2, channels: int = 16) -> onnx.ModelProto:
    """A residual network with room to prune."""
    net = Net()
    x = net.add("Relu", net.batch_norm(net.conv(image(net), 3, channels), channels))
    for _ in range(blocks):
        y = net.add("Relu", net.batch_norm(net.conv(x, channels, channels), channels))
        x = net.add("Relu", net.add("Add", net.batch_norm(net.conv(y, channels, channels), channels), x))
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    net.add("Gemm", x, net.random(channels, 5), net.random(5), to="y")
    net.output("y", ["N", 5])
    return net.model()


def samples(model: onnx.ModelProto, count: int = 96) -> Dataset:
    graph = from_proto(model)
    feeds = make_feeds(model, sizes={"N": count})
    return open_data(dict(feeds), input_specs(graph), batch=16)


def outputs(graph: Graph, model: onnx.ModelProto, count: int = 64) -> Mapping[str, np.ndarray]:
    return Session(graph, threads=1).run(make_feeds(model, seed=9, sizes={"N": count}))


def error(graph: Graph, model: onnx.ModelProto) -> float:
    wanted = outputs(from_proto(model), model)["y"]
    return float(np.linalg.norm(outputs(graph, model)["y"] - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("aim", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("allocation", ["uniform", "local"])
def test_the_aim_in_macs_is_met_closely(aim: float, allocation: str) -> None:
    graph = from_proto(wide())
    result = plain(macs=aim, allocation=allocation)(graph)
    left = macs(result.graph) / macs(graph)
    assert aim - 0.1 < left <= aim
    assert result.report.details["pruning"]["macs"] == [macs(graph), macs(result.graph)]


def test_the_aim_in_parameters() -> None:
    graph = from_proto(wide())
    result = plain(params=0.6)(graph)
    before, after = result.report.details["pruning"]["parameters"]
    assert 0.5 < after / before <= 0.6


def test_ffn_and_heads_have_ratios_of_their_own() -> None:
    result = plain(ffn=0.5, heads=0.5)(from_proto(BY_NAME["attention"].build()))
    told = {c.node: c.detail for c in result.report.changes}
    assert told == {"n7_MatMul": "1 of 2 heads stay", "n27_MatMul": "8 of 16 neurons stay"}
    only = plain(ffn=0.25)(from_proto(BY_NAME["attention"].build()))
    assert [c.detail for c in only.report.changes] == ["4 of 16 neurons stay"]


def test_least_channels_and_multiples() -> None:
    result = plain(macs=0.5, round_to=4)(from_proto(wide()))
    for axes in result.kept.values():
        assert all(len(kept) % 4 == 0 for axis, kept in axes.items() if axis == 1)
    result = plain(macs=0.6, min_channels=12)(from_proto(wide()))
    assert min(len(k) for axes in result.kept.values() for a, k in axes.items() if a == 1) >= 12


def test_an_aim_out_of_reach_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="remain") as caught:
        plain(macs=0.3, min_channels=14)(from_proto(wide()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"macs": 0.0}, {"macs": 1.5}, {"time": 0.5, "macs": 0.5}, {"importance": "x"}])
def test_options_that_say_nothing_or_too_much(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PruneChannels.model_validate(options)


def test_three_quarters_remain_where_nothing_is_said() -> None:
    graph = from_proto(wide())
    assert 0.65 < macs(plain()(graph).graph) / macs(graph) <= 0.75


def test_exclusions_by_name_and_pattern() -> None:
    result = plain(macs=0.8, exclude_nodes=("n0_*",))(from_proto(wide()))
    refused = {r.node: r.reason for r in result.report.refusals}
    assert refused["n0_Conv"] == "its channels stay: excluded"
    assert refused["n19_Gemm"] == "its channels stay: 'y' is a graph output" or any(
        "graph output" in reason for reason in refused.values()
    )
    assert all(change.node != "n0_Conv" for change in result.report.changes)


def test_samples_are_needed_by_default() -> None:
    with pytest.raises(DataError, match="needs calibration data"):
        PruneChannels(macs=0.5)(from_proto(wide()))
    assert not plain(macs=0.5).needs_data
    assert PruneChannels.model_validate({**PLAIN, "macs": 0.5, "importance": "activation"}).needs_data


def test_the_input_is_not_touched_and_the_same_bytes_come_again() -> None:
    graph = from_proto(wide())
    before = to_proto(graph).SerializeToString()
    first, again = (plain(macs=0.5)(graph) for _ in range(2))
    assert to_proto(graph).SerializeToString() == before
    assert to_proto(first.graph).SerializeToString() == to_proto(again.graph).SerializeToString()
    assert first.report.changes == again.report.changes


def test_kept_names_what_is_left_of_each_tensor() -> None:
    model = wide()
    result = plain(macs=0.5)(from_proto(model))
    assert read_kept(write_kept(result.kept)) == result.kept
    shapes = infer_shapes(result.graph)
    assert result.kept
    for name, axes in result.kept.items():
        for axis, kept in axes.items():
            shape = shapes[name].shape
            assert shape is not None
            assert shape[axis] == len(kept)
    names = {t.name for node in from_proto(model).nodes for t in node.outputs}
    assert result.kept.keys() <= names


def test_a_saved_recipe_repeats_the_choice_without_making_it(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = from_proto(wide())
    recipe = Recipe((plain(macs=0.5),))
    result = recipe.pipeline()(graph)
    saved = with_decisions(recipe, result.report)
    monkeypatch.setattr(prune_channels, "Chooser", None)
    again = saved.pipeline()(graph)
    assert to_proto(again.graph).SerializeToString() == to_proto(result.graph).SerializeToString()
    assert again.kept == result.kept


def test_a_recipe_for_another_model_is_refused_in_one_line() -> None:
    for keep, message in (({"elsewhere": "0-3"}, "lacks"), ({"relu_9": "3-1"}, "expected positions")):
        first = plain(macs=0.5)(from_proto(wide())).report.decisions["keep"]
        named = {name if name == "elsewhere" else next(iter(first)): text for name, text in keep.items()}
        with pytest.raises(UsageError, match=message) as caught:
            plain(keep=named)(from_proto(wide()))
        assert "\n" not in str(caught.value)


def test_a_cut_that_does_not_equal_its_masked_original_is_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = prune_channels.remove_channels

    def wrong(*arguments: Any) -> Any:
        graph, cuts = honest(*arguments)
        node = next(n for n in graph.nodes if n.op == "Gemm")
        node.inputs[1].values = np.ascontiguousarray(node.inputs[1].values[::-1])
        return graph, cuts

    monkeypatch.setattr(prune_channels, "remove_channels", wrong)
    with pytest.raises(OnnxCompressError, match="please report it with the model"):
        plain(macs=0.5)(from_proto(wide()))


def test_networks_that_magnify_rounding_are_not_taken_for_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    x = net.conv(net.add("Tanh", net.conv(image(net, size=16), 3, 96, bias=True)), 96, 8)
    x = net.add("Add", x, net.floats(3e3))  # how pixels differ is to some part rounding now
    net.add("InstanceNormalization", x, net.floats(np.ones(8)), net.floats(np.zeros(8)), epsilon=1e-12, to="y")
    net.output("y", ["N", 8, 16, 16])
    assert plain(macs=0.6)(from_proto(net.model())).report.changed
    monkeypatch.setattr(prune_channels, "_NOISE", 0.0)
    with pytest.raises(OnnxCompressError, match="please report it with the model"):
        plain(macs=0.6)(from_proto(net.model()))


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.name)
def test_every_hazard(hazard: Hazard) -> None:
    """Valid, with the same interface, a report that tells the truth, and nothing changed where nothing was cut."""
    graph = from_proto(hazard.build())
    before = to_proto(graph)
    result = plain(ffn=0.5, heads=0.5)(graph, Context())
    model = to_proto(result.graph)
    onnx.checker.check_model(model, full_check=True)
    assert list(model.graph.input) == list(before.graph.input)
    assert list(model.graph.output) == list(before.graph.output)
    assert result.report.changed == (model.SerializeToString() != before.SerializeToString())
    if hazard.runnable:
        Session(model, threads=1).run(make_feeds(hazard.build()))
    names = {node.name for node in from_proto(hazard.build()).nodes}
    assert all(r.node in names and "\n" not in r.reason for r in result.report.refusals)


# ---- with samples --------------------------------------------------------------------------------------------------


def repaired(**options: Any) -> tuple[PassResult, onnx.ModelProto]:
    model = wide()
    step = PruneChannels.model_validate({"macs": 0.6, "round_to": 1, **options})
    return step(from_proto(model), Context(data=samples(model))), model


def test_choice_by_samples_and_repair_beat_norms() -> None:
    result, model = repaired()
    norms = plain(macs=0.6)(from_proto(model))
    unrepaired, _ = repaired(recover=False)
    assert error(result.graph, model) < 0.7 * error(norms.graph, model)
    assert error(result.graph, model) < error(unrepaired.graph, model)
    assert result.report.details["recovery"]["output_error"][1] < result.report.details["recovery"]["output_error"][0]
    assert macs(result.graph) <= 0.6 * macs(from_proto(model))
    assert any(change.kind == "repaired" for change in result.report.changes)


def test_a_choice_with_repair_repeats() -> None:
    first, model = repaired()
    again, _ = repaired()
    assert to_proto(again.graph).SerializeToString() == to_proto(first.graph).SerializeToString()
    step = PruneChannels.model_validate({"macs": 0.6, "round_to": 1, "keep": first.report.decisions["keep"]})
    replayed = step(from_proto(model), Context(data=samples(model)))
    assert to_proto(replayed.graph).SerializeToString() == to_proto(first.graph).SerializeToString()


def test_rounding_is_decided_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide(channels=20)
    real = prune_channels.benchmark

    def timed(low: float) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            return dataclasses.replace(real(*arguments, **{**options, "seconds": 0.05}), low=low)

        return run

    for low, rounding in ((0.9, 1), (1.1, 8)):
        monkeypatch.setattr(prune_channels, "benchmark", timed(low))
        step = PruneChannels(macs=0.7, recover=False, importance="l2", allocation="local")
        result = step(from_proto(model), Context(data=samples(model)))
        assert result.report.decisions["round_to"] == rounding
        widths = {len(kept) % 8 for axes in result.kept.values() for axis, kept in axes.items() if axis == 1}
        assert (widths == {0}) == (rounding == 8)


def test_an_aim_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide()
    real = prune_channels.benchmark

    def run(reference: Graph, candidate: Graph, data: Any, **options: Any) -> Any:
        """Time as the multiply-accumulates go."""
        result = real(reference, candidate, data, **{**options, "seconds": 0.05})
        return dataclasses.replace(result, ratio=macs(reference) / macs(candidate))

    monkeypatch.setattr(prune_channels, "benchmark", run)
    context = Context(data=samples(model))
    result = PruneChannels(time=0.6, recover=False, importance="l2")(from_proto(model), context)
    assert 0.4 < macs(result.graph) / macs(from_proto(model)) <= 0.6
    assert {"keep", "round_to"} <= result.report.decisions.keys()
    assert not context.warnings


@pytest.mark.parametrize("aim", [{"macs": 0.6, "size_worth": 10.0}, {"time": 0.8}])
def test_timed_as_it_will_be_quantised(aim: Mapping[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = prune_channels.benchmark, []

    def run(reference: Graph, candidate: Graph, data: Any, **options: Any) -> Any:
        seen.extend([reference, candidate])
        return real(reference, candidate, data, **{**options, "seconds": 0.05})

    monkeypatch.setattr(prune_channels, "benchmark", run)
    model = wide()
    step = PruneChannels.model_validate({"timed_as": "int8", **aim})
    result = step(from_proto(model), Context(data=samples(model)))
    assert macs(result.graph) < macs(from_proto(model))
    assert "QuantizeLinear" not in {node.op for node in result.graph.nodes}
    assert bool(seen) == ("time" in aim)
    assert all("QuantizeLinear" in {node.op for node in graph.nodes} for graph in seen)


def test_the_recipe_prunes_and_quantises() -> None:
    model = wide()
    recipe = load_recipe("prune-int8")
    names = [step.name for step in recipe.passes]
    assert names.index("prune_channels") < names.index("insert_qdq")
    faster = tuple(
        PruneChannels(macs=0.75, round_to=1) if isinstance(step, PruneChannels) else step for step in recipe.passes
    )
    result = dataclasses.replace(recipe, passes=faster).pipeline()(from_proto(model), Context(data=samples(model)))
    assert "QuantizeLinear" in {node.op for node in result.graph.nodes}
    assert macs(result.graph) <= 0.75 * macs(from_proto(model))
    assert error(result.graph, model) < 0.5
