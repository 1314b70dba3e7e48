"""Importance, allocation and repair, each held to what it claims: optima, budgets, and errors that fall."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from models import Net, image, make_feeds
from numpy.typing import NDArray
from pruning_oracle import coupled, free_groups

from onnxcompress.base import Context
from onnxcompress.data import Dataset, open_data
from onnxcompress.errors import UsageError
from onnxcompress.graph import Graph, Names, constant_value, input_specs
from onnxcompress.lockstep import Advance
from onnxcompress.passes.prune_channels import PruneChannels
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.pruning import reconstruct
from onnxcompress.pruning.allocation import CostBudget, Curve, Size, allocate, output_effects, uniform
from onnxcompress.pruning.branches import drop_branches, drop_constants, vanishing
from onnxcompress.pruning.choose import Aim, Chooser
from onnxcompress.pruning.costs import ChannelCosts
from onnxcompress.pruning.importance import Readers, Removal, batch_norm_scales, eliminate, scores
from onnxcompress.pruning.mixing import find_mixing_layers
from onnxcompress.pruning.outputs import OutputError, judged_outputs
from onnxcompress.pruning.reconstruct import Recovery, recover
from onnxcompress.pruning.surgery import remove_channels
from onnxcompress.pruning.timing import _saved, saved_times
from onnxcompress.quantization.audit import optimized_structure
from onnxcompress.quantization.integer_form import integer_form
from onnxcompress.session import Session
from onnxcompress.shapes import infer_shapes
from onnxcompress.targets import CPU

Floats = NDArray[np.float64]


def residual_net(channels: int = 8, inner: int = 12, *, twins: bool = False, norm: bool = False) -> onnx.ModelProto:
    """Two residual blocks; with ``twins`` the second half of each inner layer repeats the first."""
    net = Net()
    x = net.add("Relu", net.conv(image(net), 3, channels, bias=True))
    for _ in range(2):
        y = net.conv(x, channels, inner, bias=True)
        if twins:
            for index in (-1, -2):
                values = onnx.numpy_helper.to_array(net.initializers[index]).copy()
                values[inner // 2 :] = values[: inner // 2]
                net.initializers[index].CopyFrom(onnx.numpy_helper.from_array(values, net.initializers[index].name))
        y = net.add("Relu", y)
        if norm:
            y = net.add("Relu", net.batch_norm(y, inner))
        x = net.add("Relu", net.add("Add", net.conv(y, inner, channels, bias=True), x))
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    net.add("Gemm", x, net.random(channels, 5), net.random(5), to="y")
    net.output("y", ["N", 5])
    return net.model()


def samples(model: onnx.ModelProto, count: int = 128) -> Dataset:
    return open_data(dict(make_feeds(model, sizes={"N": count})), input_specs(from_proto(model)), batch=32)


def inner_groups(model: onnx.ModelProto) -> tuple[Graph, Any, list[Any]]:
    graph, coupling = coupled(model)
    groups = [g for g in free_groups(coupling) if len(g.consumers) == 1 and g.consumers[0].endswith("Conv")]
    assert len(groups) == 2
    return graph, coupling, groups


def relative_error(graph: Graph, model: onnx.ModelProto) -> float:
    feeds = make_feeds(model, seed=5, sizes={"N": 64})
    wanted, found = (Session(m, threads=1).run(feeds)["y"] for m in (from_proto(model), graph))
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


# ---- importance ----------------------------------------------------------------------------------------------------


def test_block_obs_knows_the_least_squares_error_of_what_is_left() -> None:
    model = residual_net(inner=6)
    graph, _, groups = inner_groups(model)
    group = groups[0]
    layers = {layer.name: layer for layer in find_mixing_layers(graph)}
    layer = layers[group.consumers[0]]
    feeds = [dict(batch.feeds) for batch in samples(model)]
    ((_, moments),) = list(Readers(graph, [layer], feeds).run())
    removal = eliminate(group, [(layer, moments, np.arange(6))])
    assert sorted(removal.order) == list(range(6))
    assert np.all(np.diff(removal.error) >= 0)

    gram = moments.normal_equations(centred=True)[0][0]
    weights = layer.filters()[0]
    signal = np.einsum("ij,jk,ik->", weights, gram, weights)

    def lost(kept: NDArray[np.int64]) -> float:
        columns = (kept[:, None] * 9 + np.arange(9)).reshape(-1)
        cross = weights @ gram[:, columns]
        solved = np.linalg.solve(gram[np.ix_(columns, columns)], cross.T).T
        return float((signal - np.einsum("ij,ij->", solved, cross)) / signal)

    for gone in (1, 3, 5):
        assert removal.error[gone - 1] == pytest.approx(lost(removal.kept(gone)), rel=0.05, abs=1e-3)
    # The first to go is the best single one.
    best = min(range(6), key=lambda c: lost(np.delete(np.arange(6), c)))
    assert removal.order[0] == best


def test_twins_cost_nothing() -> None:
    model = residual_net(inner=8, twins=True)
    graph, _, groups = inner_groups(model)
    chooser = Chooser(graph, groups, costs_of(graph, groups), samples(model))
    for removal in chooser.removals().values():
        assert removal.error[3] < 2e-3  # of the order of the ridge
        assert removal.error[3] < 0.1 * removal.error[5]


def costs_of(graph: Graph, groups: Any) -> ChannelCosts:
    return ChannelCosts(graph, groups, infer_shapes(graph))


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "batch_norm", "activation", "random"])
@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
def test_every_criterion_orders_all_channels(criterion: Any, combine: Any) -> None:
    model = residual_net(norm=True)
    graph, _, groups = inner_groups(model)
    chooser = Chooser(
        graph,
        groups,
        costs_of(graph, groups),
        samples(model),
        criterion=criterion,
        combine=combine,
        scales=batch_norm_scales(graph),
    )
    for removal in chooser.removals().values():
        assert sorted(removal.order) == list(range(12))
        assert np.all(np.diff(removal.error) >= -1e-12)
        assert removal.error[-1] == pytest.approx(1.0)
    assert not chooser.notes


def test_norms_are_those_of_the_weights() -> None:
    graph, _, groups = inner_groups(residual_net())
    node = next(n for n in graph.nodes if n.name == groups[0].producers[0])
    weight = constant_value(node.inputs[1])
    assert weight is not None
    for criterion, norm in (("l1", 1), ("l2", 2)):
        found = scores(groups[0], graph, criterion)  # type: ignore[arg-type]
        wanted = np.linalg.norm(weight.reshape(12, -1), norm, axis=1)
        assert found is not None
        np.testing.assert_allclose(found, wanted / wanted.mean(), rtol=1e-6)


# ---- effects and allocation ----------------------------------------------------------------------------------------


def test_effects_are_measured_at_the_outputs_and_nothing_is_changed() -> None:
    model = residual_net()
    graph, _, groups = inner_groups(model)
    before = to_proto(graph).SerializeToString()
    chooser = Chooser(graph, groups, costs_of(graph, groups), samples(model))
    removals = chooser.removals()
    feeds = [dict(batch.feeds) for batch in samples(model, 32)]
    effects = output_effects(graph, list(removals.values()), feeds)
    assert to_proto(graph).SerializeToString() == before
    for name, effect in effects.items():
        removal = removals[name]
        assert effect[0] == 0.0
        assert np.all(np.diff(effect) >= 0)
        gone = max(removal.mended)
        student = from_proto(model)
        layers = {layer.name: layer for layer in find_mixing_layers(student)}
        for layer, weights, bias in removal.mended[gone]:
            layers[layer.name].set_filters(weights, Names(student))
            layers[layer.name].set_bias(bias, Names(student))
        found, wanted = (Session(m, threads=1).run(feeds[0])["y"] for m in (student, from_proto(model)))
        error = np.square(found - wanted).sum() / np.square(wanted).sum()
        assert effect[gone] == pytest.approx(error, rel=1e-3)


def test_peeking_leaves_the_graph_where_it_stands() -> None:
    model = residual_net()
    graph = from_proto(model)
    feeds = [dict(batch.feeds) for batch in samples(model, 32)]
    layers = find_mixing_layers(graph)
    advance = Advance(graph, feeds, [[layers[2].data], ["y"]])
    for _ in advance.step():
        pass
    peeked = [values["y"] for values in advance.peek(["y"])]
    stepped = [values["y"] for values in advance.step()]
    for one, other in zip(peeked, stepped, strict=True):
        np.testing.assert_array_equal(one, other)


def test_probabilities_are_judged_in_front_of_their_softmax() -> None:
    net = Net()
    x = net.add("Gemm", net.add("Flatten", image(net)), net.random(192, 4))
    net.add("Softmax", x, to="y", axis=1)
    net.output("y", ["N", 4])
    assert judged_outputs(from_proto(net.model())) == {x: (1, 2)}


def test_axes_of_probabilities_follow_the_operator_set() -> None:
    for opset, expected in ((11, (1, 0)), (13, (-2, -1))):
        net = Net(opset=opset)
        x = net.add("Reshape", image(net), net.ints(0, 48, 4))
        net.add("Softmax", x, to="y", axis=1 if opset < 13 else -2)
        net.output("y", ["N", 48, 4])
        assert judged_outputs(from_proto(net.model())) == {x: expected}


def test_probabilities_are_judged_by_their_divergence() -> None:
    rng = np.random.default_rng(0)
    expected, found = (3 * rng.standard_normal((2, 5, 7)).astype(np.float32) for _ in range(2))

    def chances(logits: Any, axis: Any) -> Any:
        values = np.exp(logits.astype(np.float64))
        return values / values.sum(axis=axis, keepdims=True)

    for axes, summed in (((1, 2), (1,)), ((-1, 0), (2,)), ((1, 0), (1, 2)), ((-2, -1), (1,))):
        p, q = (np.moveaxis(chances(x, summed), summed, range(-len(summed), 0)) for x in (expected, found))
        p, q = (x.reshape(-1, np.prod([expected.shape[a] for a in summed])) for x in (p, q))
        mean = p.mean(axis=0)
        wanted = (p * np.log(p / q)).sum() / (p * np.log(p / mean)).sum()
        errors = OutputError({"y": axes})
        for one, other in zip(expected, found, strict=True):
            errors.add({"y": one[None]}, {"y": other[None]})
        assert errors.relative() == pytest.approx(wanted, rel=1e-6)
        shifted = OutputError({"y": axes})
        shifted.add({"y": expected}, {"y": expected + np.float32(3)})
        assert shifted.relative() == pytest.approx(0.0, abs=1e-5)


def test_one_mean_answer_to_all_is_worth_nothing_and_no_number_counts_as_the_worst() -> None:
    logits = np.log(np.array([[0.9, 0.1], [0.2, 0.8]], np.float32))
    mean = np.log(np.array([[0.55, 0.45]] * 2, np.float32))
    errors = OutputError({"y": (1, 2)})
    errors.add({"y": logits}, {"y": mean})
    assert errors.relative() == pytest.approx(1.0, rel=1e-5)
    for judged in (None, (1, 2)):
        broken = OutputError({"y": judged})
        broken.add({"y": logits}, {"y": np.full_like(logits, np.nan)})
        assert broken.relative() > 1e100


def budgeted() -> tuple[CostBudget, dict[str, Curve], dict[str, int]]:
    graph, _, groups = inner_groups(residual_net())
    full = {group.name: group.channels for group in groups}
    rates = (1.0, 4.0)
    curves = {
        group.name: Curve(rate * np.arange(13.0) ** 2, np.arange(12)) for group, rate in zip(groups, rates, strict=True)
    }
    return CostBudget(costs_of(graph, groups)), curves, full


def test_error_and_time_are_weighed_and_the_best_of_both_is_taken() -> None:
    budget, curves, full = budgeted()
    first, second = curves
    # The second group is the dearer one by error alone; only its channels save time.
    for saves in (0.0, 0.05):
        saved = {first: np.zeros(13), second: saves * np.arange(13.0)}
        timed = {name: Curve(curve.error, curve.allowed, saved[name]) for name, curve in curves.items()}
        found = allocate(budget, timed, 0.7, full)
        each = [allocate(budget, timed, 0.7, full, time_weights=(weight,)) for weight in (0.0, 0.75)]

        def worth(kept: Mapping[str, int], timed: Mapping[str, Curve] = timed) -> float:
            gone = {name: full[name] - count for name, count in kept.items()}
            error = sum(timed[name].error[count] for name, count in gone.items())
            time = 1 - sum(curve.saved[gone[name]] for name, curve in timed.items() if curve.saved is not None)
            return float(10 * np.log10(error) + 15 * np.log2(time))  # dB; 15 of them a doubling of speed

        assert worth(found) <= min(worth(kept) for kept in each) + 1e-9
        assert each[1][second] <= each[0][second]
        assert (found == each[0]) == (saves == 0.0)


@pytest.mark.parametrize("target", [0.95, 0.7, 0.5])
def test_the_budget_is_met_with_the_least_error(target: float) -> None:
    budget, curves, full = budgeted()
    found = allocate(budget, curves, target, full)
    assert budget.remaining(found) <= target
    first, second = curves

    def error(kept: Mapping[str, int]) -> float:
        return sum(float(curves[name].error[12 - count]) for name, count in kept.items())

    every = [{first: a, second: b} for a in range(1, 13) for b in range(1, 13)]
    best = min(error(kept) for kept in every if budget.remaining(kept) <= target)
    assert error(found) == pytest.approx(best)
    even = uniform(budget, curves, target, full)
    assert budget.remaining(even) <= target
    assert even[first] == even[second]
    assert error(found) <= error(even)


def test_what_is_out_of_reach_is_said() -> None:
    budget, curves, full = budgeted()
    for share in (allocate, uniform):
        with pytest.raises(UsageError, match="of the cost remain"):
            share(budget, curves, 0.01, full)


def test_time_draws_the_choice_to_where_it_is_saved() -> None:
    budget, curves, full = budgeted()
    first, second = curves
    same = {name: Curve(np.arange(13.0), np.arange(12), np.zeros(13)) for name in curves}
    same[second] = Curve(same[second].error, same[second].allowed, np.arange(13.0) / 20)
    found = allocate(budget, same, 0.8, full)
    assert found[second] < found[first]


def test_size_draws_the_choice_to_where_parameters_are() -> None:
    budget, curves, full = budgeted()
    first, second = curves
    even = {name: Curve(np.arange(13.0), np.arange(12)) for name in curves}

    class Parameters:
        """All of them belong to the second group."""

        def remaining(self, counts: Mapping[str, int]) -> float:
            return counts[second] / full[second]

        def slopes(self, counts: Mapping[str, int]) -> Mapping[str, float]:
            return {first: 0.0, second: 1 / full[second]}

    found = allocate(budget, even, 0.8, full, size=Size(Parameters(), 10.0))
    assert found[second] < found[first]
    assert budget.remaining(found) <= 0.8
    # A worth of nothing changes nothing: the weights are tried, and the error alone decides.
    assert allocate(budget, curves, 0.8, full, size=Size(Parameters(), 0.0)) == allocate(budget, curves, 0.8, full)


def test_neurons_and_heads_have_budgets_of_their_own() -> None:
    model = residual_net()
    graph, coupling = coupled(model)
    groups = free_groups(coupling)
    chooser = Chooser(graph, groups, costs_of(graph, coupling.groups), samples(model))
    kept = chooser.choose(Aim(params=0.8))
    counts = {name: len(positions) for name, positions in kept.items()}
    costs = costs_of(graph, coupling.groups)
    assert costs.parameters(counts) <= 0.8 * costs.parameters()


# ---- repair --------------------------------------------------------------------------------------------------------


def cut(model: onnx.ModelProto, kept: int) -> tuple[Graph, Graph, Any]:
    graph, coupling, groups = inner_groups(model)
    keep = {group.name: np.arange(kept) for group in groups}
    pruned, cuts = remove_channels(graph, coupling.groups, keep, coupling)
    return graph, pruned, cuts


def test_what_twins_did_is_made_up_for() -> None:
    model = residual_net(twins=True)
    graph, pruned, cuts = cut(model, 6)
    found = recover(pruned, graph, cuts, samples(model), Recovery(threads=1))
    assert found.before > 0.05
    assert found.after < 1e-3 * found.before
    assert relative_error(found.graph, model) < 1e-2 * relative_error(pruned, model)
    assert {step.method for step in found.steps} == {"weights"}
    assert all(step.after < step.before for step in found.steps)


@pytest.mark.parametrize("norm", [False, True])
def test_repair_lowers_the_error_on_new_samples(norm: bool) -> None:
    model = residual_net(norm=norm)
    graph, pruned, cuts = cut(model, 6)
    errors = [relative_error(pruned, model)]
    for method in ("bias", "weights"):
        found = recover(pruned, graph, cuts, samples(model), Recovery(threads=1, method=method))  # type: ignore[arg-type]
        assert found.after < found.before
        errors.append(relative_error(found.graph, model))
    assert errors[0] > errors[1] > errors[2]
    if norm:
        assert any("BatchNormalization" in step.node for step in found.steps)


def test_repair_repeats_and_leaves_its_arguments_alone() -> None:
    model = residual_net()
    graph, pruned, cuts = cut(model, 6)
    before = [to_proto(g).SerializeToString() for g in (graph, pruned)]
    found = [recover(pruned, graph, cuts, samples(model), Recovery(threads=1)).graph for _ in range(2)]
    assert [to_proto(g).SerializeToString() for g in (graph, pruned)] == before
    assert to_proto(found[0]).SerializeToString() == to_proto(found[1]).SerializeToString()


def test_nothing_is_repaired_where_nothing_was_cut() -> None:
    model = residual_net()
    graph = from_proto(model)
    found = recover(graph, graph, {}, samples(model), Recovery(threads=1))
    assert found.graph is graph
    assert not found.steps
    assert found.sweeps == 0
    assert {reason for _, reason in found.skipped} == {"its output is the original's"}


def test_a_sweep_that_makes_the_outputs_worse_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual_net()
    graph, pruned, cuts = cut(model, 6)
    real = reconstruct._sweep

    def spoilt(*arguments: Any) -> Any:
        student, steps, skipped = real(*arguments)
        last = find_mixing_layers(student)[-1]
        last.set_filters(-last.filters(), Names(student))
        return student, steps, skipped

    monkeypatch.setattr(reconstruct, "_sweep", spoilt)
    found = recover(pruned, graph, cuts, samples(model), Recovery(threads=1))
    assert found.graph is pruned
    assert found.sweeps == 0
    assert found.after == found.before


# ---- branches and time ---------------------------------------------------------------------------------------------


def test_a_branch_without_channels_is_the_constant_of_its_bias() -> None:
    model = residual_net()
    graph, coupling, groups = inner_groups(model)
    types = infer_shapes(graph)
    layers = {layer.name: layer for layer in find_mixing_layers(graph)}
    assert vanishing(free_groups(coupling), layers, types) == {group.name for group in groups}
    reader = layers[groups[0].consumers[0]]
    total = reader.sum_output
    assert total is not None
    dropped = drop_branches(graph, [reader.name])
    assert len(dropped.nodes) < len(graph.nodes) - 2
    silenced = from_proto(model)
    own = {layer.name: layer for layer in find_mixing_layers(silenced)}[reader.name]
    own.set_filters(np.zeros_like(own.filters()), Names(silenced))
    feeds = make_feeds(model, sizes={"N": 4})
    found, wanted = (Session(g, threads=1).run(feeds)["y"] for g in (dropped, silenced))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)

    bare = drop_constants(dropped, [str(total.name)])
    assert len(bare.nodes) == len(dropped.nodes) - 2  # the Add, and the Relu of a Relu
    own.set_bias(np.zeros_like(own.bias()), Names(silenced))
    found, wanted = (Session(g, threads=1).run(feeds)["y"] for g in (bare, silenced))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_choice_may_leave_nothing_of_a_branch_and_is_replayed() -> None:
    model = residual_net()
    _, _, groups = inner_groups(model)
    keep = {groups[0].name: "", groups[1].name: "0-5"}
    step = PruneChannels(keep=keep)
    result = step(from_proto(model), Context(data=samples(model), threads=1))
    names = {node.name for node in result.graph.nodes}
    assert not names & {*groups[0].producers, *groups[0].consumers}
    assert {*groups[1].producers, *groups[1].consumers} <= names
    assert relative_error(result.graph, model) < 0.5


def times_saved(**options: Any) -> list[Floats]:
    """What :func:`saved_times` says of both inner groups of a network."""
    model = residual_net(channels=16, inner=48)
    graph, coupling, groups = inner_groups(model)

    def cut_to(keep: Mapping[str, Any]) -> Graph:
        return remove_channels(graph, coupling.groups, {n: np.array(k) for n, k in keep.items()}, coupling)[0]

    feeds = make_feeds(model, sizes={"N": 8})
    types = infer_shapes(graph, {name: value.shape for name, value in feeds.items()})
    found = saved_times(groups, cut_to, types, feeds, **options)
    assert set(found) == {group.name for group in groups}
    return list(found.values())


def test_time_saved_grows_with_the_channels_removed() -> None:
    for saved in times_saved():
        assert saved.shape == (49,)
        assert saved[0] == 0.0
        known = saved[np.isfinite(saved)]  # where odd widths are slow, only those that were timed
        assert np.all(np.diff(known) >= 0)
        assert known[-1] > known[-2] > 0.0


def test_time_saved_by_what_will_be_quantised() -> None:
    for saved in times_saved(integers=CPU):
        assert saved[0] == 0.0
        assert saved[-1] == np.nanmax(saved) > 0.0


def test_widths_that_fall_out_of_a_fast_kernel_are_not_offered() -> None:
    times = {16: 1.0, 15: 2.0, 14: 1.9, 8: 1.2, 4: 0.6, 1: 0.3}
    saved = _saved(times, 16, 4.0)
    assert [16 - int(gone) for gone in np.flatnonzero(np.isfinite(saved))] == [16, 4, 1, 0]
    assert saved[[0, 12, 15, 16]].tolist() == [0.0, pytest.approx(0.1), pytest.approx(0.175), pytest.approx(0.25)]


def test_an_integer_form_has_integer_kernels() -> None:
    graph = from_proto(residual_net(channels=16, inner=48))
    before = to_proto(graph).SerializeToString()
    feeds = make_feeds(residual_net(channels=16, inner=48), sizes={"N": 8})
    form = integer_form(graph, CPU, {name: value.shape for name, value in feeds.items()}, whole=False)
    assert to_proto(graph).SerializeToString() == before
    operators = [node.op_type for node in optimized_structure(form).graph.node]
    assert operators.count("QLinearConv") == 5 and "Conv" not in operators
    Session(form, threads=1).run(feeds)


def test_a_removal_keeps_what_is_last_in_its_order() -> None:
    removal = Removal("g", np.array([2, 0, 1]), np.array([0.1, 0.2, 1.0]))
    assert removal.kept(0).tolist() == [0, 1, 2]
    assert removal.kept(2).tolist() == [1]
