from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from models import HAZARDS, Hazard, make_feeds
from test_correct_bias import audit, build, context_for, node, planted, residual_network, sqnr, weight

from onnxcompress.base import Context
from onnxcompress.data import open_data
from onnxcompress.errors import DataError, UsageError
from onnxcompress.graph import Graph, constant_value, copy_graph, input_specs
from onnxcompress.passes.equalize_layers import EqualizeLayers
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.round_weights import Moments, Patches, RoundWeights
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.quantization.layerwise import Layer, find_layers
from onnxcompress.quantization.rounding import integer_bounds, round_columns
from onnxcompress.session import Session
from onnxcompress.targets import CPU


def gram_matrix(columns: int, rng: np.random.Generator) -> np.ndarray:
    mixed = rng.normal(size=(columns, columns)) @ np.diag(rng.uniform(0.1, 3, columns))
    rows = rng.normal(size=(200, columns)) @ mixed
    gram: np.ndarray = rows.T @ rows / 200
    return gram


def one_group(wanted: np.ndarray, gram: np.ndarray, start: np.ndarray, *bounds: Any) -> np.ndarray:
    """``round_columns`` of a layer that is not grouped."""
    limits = [tuple(end[None] for end in pair) for pair in bounds]
    (found,) = round_columns(wanted[None], gram[None], start[None], *limits)
    return found


def cost(integers: np.ndarray, wanted: np.ndarray, gram: np.ndarray) -> np.ndarray:
    away = integers - wanted
    return np.einsum("ij,jk,ik->i", away, gram, away)


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_rounding_against_every_possible_rounding(columns: int) -> None:
    """Within 5 % of the optimum for at least 9 of 10 filters, and never worse than the nearest integers."""
    rng = np.random.default_rng(columns)
    optimal = total = 0
    for _ in range(40):
        gram = gram_matrix(columns, rng)
        wanted = rng.uniform(-4, 4, (8, columns))
        found = cost(one_group(wanted, gram, np.rint(wanted)), wanted, gram)
        base = np.floor(wanted)
        every = np.stack(
            [cost(base + np.array(steps), wanted, gram) for steps in product(range(-1, 3), repeat=columns)]
        )
        best = every.min(axis=0)
        assert (found <= cost(np.rint(wanted), wanted, gram) + 1e-9).all()
        optimal += int((found <= best * 1.05 + 1e-12).sum())
        total += len(best)
    assert optimal >= 0.9 * total


def test_integers_stay_in_their_bounds_and_a_good_start_is_kept() -> None:
    rng = np.random.default_rng(0)
    gram = gram_matrix(30, rng)
    wanted = rng.uniform(-200, 200, (6, 30))
    start = np.clip(np.rint(wanted), -127, 127)
    found = one_group(wanted, gram, start)
    assert np.abs(found).max() <= 127 and (found == np.rint(found)).all()
    assert (cost(found, wanted, gram) <= cost(start, wanted, gram)).all()
    exact = np.rint(rng.uniform(-100, 100, (6, 30)))
    np.testing.assert_array_equal(one_group(exact, gram, exact), exact)


def test_pairs_of_weights_stay_within_the_bound_of_the_target() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        start = np.rint(rng.uniform(-60, 60, (5, 12)))
        start[0, 3], start[0, 5:] = 100, np.clip(start[0, 5:], -28, 28)
        start[0, :3], start[0, 4] = 20, -64
        wanted = start + rng.normal(size=start.shape) * 30
        bounds = integer_bounds(start, 128)
        assert (bounds[0] <= start).all() and (start <= bounds[1]).all()
        found = one_group(wanted, gram_matrix(12, rng), start, bounds)
        for values in (found, -found):
            two = np.sort(np.maximum(values, 0), axis=1)[:, -2:]
            assert two.sum(axis=1).max() <= 128


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any], list[int | str]]] = {
    "plain": ((6, 4, 3, 3), {"pads": [1, 1, 1, 1]}, ["N", 4, 9, 8]),
    "strided": ((6, 4, 3, 3), {"pads": [0, 1, 1, 0], "strides": [2, 1]}, ["N", 4, 9, 8]),
    "dilated": ((6, 4, 3, 2), {"dilations": [2, 3]}, ["N", 4, 9, 8]),
    "same_upper": ((6, 4, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, ["N", 4, 9, 8]),
    "same_lower": ((6, 4, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, ["N", 4, 9, 8]),
    "grouped": ((6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}, ["N", 4, 9, 8]),
    "depthwise": ((8, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}, ["N", 4, 9, 8]),
    "pointwise": ((6, 4, 1, 1), {}, ["N", 4, 9, 8]),
    "one_dimension": ((6, 4, 5), {"pads": [2, 2]}, ["N", 4, 20]),
    "three_dimensions": ((6, 4, 2, 2, 2), {"pads": [1, 0, 1, 0, 1, 0]}, ["N", 4, 5, 4, 6]),
}


def layer_network(kind: str) -> Graph:
    """The layer "c_node" between two others, so that all of them become integer."""
    if kind in CONVOLUTIONS:
        shape, attrs, inputs = CONVOLUTIONS[kind]
        channels, ones = int(inputs[1]), [1] * (len(shape) - 2)
        nodes = [node("Conv", ["x", "w0"], "a"), node("Conv", ["r", "w", "b"], "c", **attrs)]
        nodes.append(node("Conv", ["s", "w1"], "y"))
        weights = {"w": weight(*shape), "b": weight(shape[0])}
        weights |= {"w0": weight(channels, channels, *ones), "w1": weight(4, shape[0], *ones)}
    else:
        inputs = ["N", 3, 16] if kind == "matmul" else ["N", 16]
        weights = {"w": weight(12, 16) if kind == "gemm_transposed" else weight(16, 12)}
        weights |= {"w0": weight(16, 16), "w1": weight(12, 4)}
        if kind == "matmul":
            layer = node("MatMul", ["r", "w"], "c")
        else:
            layer = node("Gemm", ["r", "w", "b"], "c", transB=int(kind == "gemm_transposed"))
            weights["b"] = weight(12)
        nodes = [node("MatMul", ["x", "w0"], "a"), layer, node("MatMul", ["s", "w1"], "y")]
    nodes.insert(1, node("Relu", ["a"], "r"))
    nodes.insert(3, node("Relu", ["c"], "s"))
    return build(nodes, weights, inputs)


def the_layer(student: Graph, teacher: Graph) -> Layer:
    return next(layer for layer in find_layers(student, teacher)[0] if layer.name == "c_node")


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, "gemm", "gemm_transposed", "matmul"])
def test_columns_and_rows_compute_what_the_layer_computes(kind: str) -> None:
    graph = layer_network(kind)
    context = context_for(graph)
    student = InsertQdq(audit=False)(graph, context).graph
    layers, skipped = find_layers(student, graph)
    assert len(layers) == 3 and not skipped
    layer = the_layer(student, graph)
    assert context.data is not None
    feeds = context.data.first().feeds
    whole = copy_graph(student)
    whole.outputs = [whole.tensors()[name] for name in (layer.node.inputs[0].name, layer.output.name)]
    inputs, outputs = Session(whole, optimization="disabled", threads=1).run(feeds).values()
    for samples in (1, 10**6):  # few samples: every position; many: one position of each
        patches = Patches(layer, samples, np.random.default_rng(0))
        rows = patches.rows(inputs, outputs)
        assert not isinstance(rows, str)
        columns, aim = rows
        weights = patches.filters(layer.integers) * patches.per_filter(layer.scale)[:, :, None]
        made = weights @ columns + patches.per_filter(layer.bias())[:, :, None]
        np.testing.assert_allclose(made, aim, atol=1e-5)
    np.testing.assert_array_equal(patches.weight(patches.filters(layer.integers).astype(np.float64)), layer.integers)


@pytest.mark.parametrize("kind", ["grouped", "gemm", "matmul"])
def test_moments_foretell_the_error_of_changed_weights(kind: str) -> None:
    graph = layer_network(kind)
    context = context_for(graph)
    student = InsertQdq(audit=False)(graph, context).graph
    layer = the_layer(student, graph)
    rng = np.random.default_rng(0)
    assert context.data is not None
    inputs = np.maximum(context.data.first().feeds["x"], 0)  # any input of the right shape will do
    patches = Patches(layer, 1, rng)
    width = layer.channels if kind != "grouped" else 6
    shape = (*inputs.shape[:-1], width) if kind != "grouped" else (len(inputs), width, *inputs.shape[2:])
    aim = rng.normal(size=shape).astype(np.float32)
    moments = Moments(patches)
    moments.update(inputs, aim)
    start = patches.filters(layer.integers)
    change = rng.normal(size=start.shape) * 0.01
    shift = rng.normal(size=start.shape[:2]) * 0.1
    rows = patches.rows(inputs, aim)
    assert not isinstance(rows, str)
    weights = start * patches.per_filter(layer.scale)[:, :, None] + change
    made = weights @ rows[0] + (patches.per_filter(layer.bias()) + shift)[:, :, None]
    expected = ((rows[1] - made) ** 2).sum() / (rows[1] ** 2).sum()
    assert moments.relative(change, shift) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["plain", "grouped", "depthwise", "pointwise", "gemm", "gemm_transposed", "matmul"])
def test_every_kind_of_layer_gets_closer_to_the_float_model(kind: str) -> None:
    graph = layer_network(kind)
    context = context_for(graph, 128)
    student = InsertQdq()(graph, context)
    rough = coarse(student.graph, graph)
    before = to_proto(rough).SerializeToString()
    result = RoundWeights()(rough, context)
    assert to_proto(rough).SerializeToString() == before
    start, end = sqnr_of(result)
    assert end > start + 1
    assert "c_node" in [c.node for c in result.report.changes]
    assert audit(result.graph, CPU).integer == student.report.details["audit"]["integer"]
    layer, old = the_layer(result.graph, graph), the_layer(rough, graph)
    np.testing.assert_array_equal(layer.scale, old.scale)
    assert layer.integers.min() >= -127
    assert not np.array_equal(layer.integers, old.integers)


def sqnr_of(result: Any) -> tuple[float, float]:
    start, end = sqnr(result)
    return float(start), float(end)


def coarse(student: Graph, teacher: Graph, factor: int = 12) -> Graph:
    """``student`` with scales ``factor`` times as large: rounding weights is then what its errors come from."""
    rough = copy_graph(student)
    for layer in find_layers(rough, teacher)[0]:
        layer.set_integers(np.rint(layer.integers / factor).astype(np.int8))
        old = layer.reader.inputs[1]
        value = constant_value(old)
        assert value is not None
        layer.reader.inputs[1] = gs.Constant(old.name, value * np.float32(factor))
        if layer.has_bias and constant_value(layer.bias_node.inputs[layer.bias_index]) is None:  # type: ignore[union-attr]
            reader = layer.bias_node.inputs[layer.bias_index].inputs[0]  # type: ignore[union-attr]
            integers, scale = (constant_value(t) for t in reader.inputs[:2])
            assert integers is not None and scale is not None
            reader.inputs[0] = gs.Constant(reader.inputs[0].name, np.rint(integers / factor).astype(np.int32))
            reader.inputs[1] = gs.Constant(reader.inputs[1].name, scale * np.float32(factor))
    return rough


def test_the_whole_network_gains_and_a_second_run_does_not_worsen() -> None:
    graph = residual_network()
    context = context_for(graph, 128)
    rough = coarse(InsertQdq()(graph, context).graph, graph)
    once, replay = RoundWeights()(rough, context), RoundWeights()(rough, context)
    assert to_proto(once.graph).SerializeToString() == to_proto(replay.graph).SerializeToString()
    start, end = sqnr_of(once)
    assert end > start + 3
    again = RoundWeights()(once.graph, context)
    assert sqnr_of(again)[0] == pytest.approx(end, abs=1e-3)
    assert sqnr_of(again)[1] >= sqnr_of(again)[0]


def test_errors_of_earlier_layers_are_made_up_for() -> None:
    """A planted gain error in the first layer, which keeps its weights, is mended by the second."""
    nodes = [
        node("Conv", ["x", "w0", "b0"], "c", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], "r"),
        node("Conv", ["r", "w1", "b1"], "y"),
    ]
    weights = {"w0": weight(6, 3, 3, 3), "b0": weight(6), "w1": weight(4, 6, 1, 1, seed=2), "b1": weight(4)}
    graph = build(nodes, weights, ["N", 3, 8, 8])
    context = context_for(graph, 64)
    student = copy_graph(InsertQdq()(graph, context).graph)
    first, second = find_layers(student, graph)[0]
    scale = first.reader.inputs[1]
    first.reader.inputs[1] = gs.Constant(scale.name, scale.values * np.float32(0.8))
    second.set_integers(np.rint(second.integers * 0.8).astype(np.int8))
    scale = second.reader.inputs[1]
    second.reader.inputs[1] = gs.Constant(scale.name, scale.values / np.float32(0.8) * np.float32(1.3))
    spoiled = planted(student, graph, {1: 0.1})
    result = RoundWeights(ridge=(1e-4,))(spoiled, context)
    start, end = sqnr_of(result)
    assert end > start + 6
    assert "y_node" in [c.node for c in result.report.changes]


def test_a_weight_that_several_nodes_read_is_refused() -> None:
    nodes = [
        node("Conv", ["x", "w", "b"], "c", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], "r"),
        node("Conv", ["r", "w", "b"], "y", pads=[1, 1, 1, 1]),
    ]
    graph = build(nodes, {"w": weight(3, 3, 3, 3), "b": weight(3)}, ["N", 3, 8, 8])
    context = context_for(graph)
    result = RoundWeights()(InsertQdq()(graph, context).graph, context)
    assert not result.report.changed
    assert [r.node for r in result.report.refusals] == ["c_node", "y_node"]
    assert all("read by other nodes" in r.reason for r in result.report.refusals)


def test_inputs_that_hardly_vary_give_a_matrix_that_can_be_factorised() -> None:
    """About their means nothing is left of them but the errors of float32 sums, and these have any sign."""
    graph = layer_network("pointwise")
    context = context_for(graph)
    student = InsertQdq()(graph, context).graph
    layer = the_layer(student, graph)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        moments = Moments(Patches(layer, 1, rng))
        for _ in range(4):
            inputs = np.broadcast_to(rng.random((1, 4, 1, 1), np.float32) + 100, (50, 4, 9, 8)) if seed % 2 else None
            if inputs is None:
                inputs = np.broadcast_to(np.float32([0.1, 0.7, 1.3, 3.3]).reshape(1, 4, 1, 1), (50, 4, 9, 8))
            moments.update(inputs, rng.normal(size=(50, 6, 9, 8)).astype(np.float32))
        gram, _ = moments.normal_equations(centred=True)
        assert np.linalg.eigvalsh(gram).min() > 0


def test_without_adjust_bias_the_biases_stay() -> None:
    graph = residual_network()
    context = context_for(graph)
    rough = coarse(InsertQdq()(graph, context).graph, graph)
    result = RoundWeights(adjust_bias=False)(rough, context)
    assert result.report.changed
    for old, new in zip(find_layers(rough, graph)[0], find_layers(result.graph, graph)[0], strict=True):
        np.testing.assert_array_equal(old.bias(), new.bias())


def test_without_data_or_without_the_float_model() -> None:
    graph = residual_network()
    with pytest.raises(DataError, match="needs calibration data"):
        RoundWeights()(graph, Context(original=graph))
    with pytest.raises(UsageError, match="compares with the float model"):
        RoundWeights()(graph, Context(data=context_for(graph).data))
    with pytest.raises(UsageError, match="compares with the float model"):
        RoundWeights()(graph, context_for(graph))


@pytest.mark.parametrize("hazard", [h for h in HAZARDS if h.runnable], ids=lambda h: h.name)
def test_every_hazard_survives(hazard: Hazard) -> None:
    model = hazard.build()
    graph = from_proto(model)
    feeds = make_feeds(model)
    context = Context(original=graph, data=open_data([feeds], input_specs(graph)), threads=1)
    student = InsertQdq()(graph, context)
    result = RoundWeights()(student.graph, context)
    written = to_proto(result.graph)
    onnx.checker.check_model(written)
    assert [o.name for o in written.graph.output] == [o.name for o in model.graph.output]
    assert audit(result.graph, CPU).integer == student.report.details["audit"]["integer"]
    Session(result.graph, threads=1).run(feeds)
    if "output_sqnr_db" in result.report.details:
        start, end = sqnr(result)
        assert start is None or end is None or end >= start


def test_the_teacher_is_what_was_quantised_not_what_was_scaled_since() -> None:
    """equalize_layers scales tensors that keep their names; compared with the original's, every layer is far off."""
    graph = residual_network()
    context = context_for(graph)
    equal = EqualizeLayers(strength=1.0)(graph, context)
    assert equal.report.changed
    quantised = InsertQdq()(equal.graph, context)
    rounded = RoundWeights()(quantised.graph, context)
    assert not [r for r in rounded.report.refusals if "little in common" in r.reason]
    before, after = sqnr(rounded)
    assert rounded.report.changed and after > before
    context.reference = None
    against_the_original = RoundWeights()(quantised.graph, context)
    assert sqnr(against_the_original)[1] < after


def test_large_models_are_left_where_the_recipe_asks_for_small_ones() -> None:
    graph = build([node("Conv", ["x", "w"], "y", pads=[1, 1, 1, 1])], {"w": weight(64, 64, 3, 3)}, ["N", 64, 104, 104])
    context = context_for(graph, 4)
    student = InsertQdq()(graph, context).graph
    report = RoundWeights(large_models=False)(student, context).report
    assert not report.changes
    assert [refusal.reason for refusal in report.refusals] == [
        "no weights rounded anew: a model of 399 M MACs, and large_models is false"
    ]
    small = residual_network()
    context = context_for(small)
    student = InsertQdq()(small, context).graph
    assert RoundWeights(large_models=False)(student, context).report.changes
