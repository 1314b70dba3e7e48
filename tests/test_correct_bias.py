from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import HAZARDS, Hazard, make_feeds
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from random_graphs import random_model

from onnxcompress.base import Context, PassResult
from onnxcompress.data import open_data
from onnxcompress.errors import DataError, UsageError
from onnxcompress.graph import Graph, Names, copy_graph, input_specs
from onnxcompress.lockstep import Advance, samples_that_fit, split_samples
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.quantization.affine import MAX_BIAS
from onnxcompress.quantization.audit import audit
from onnxcompress.quantization.layerwise import find_layers
from onnxcompress.session import Session
from onnxcompress.targets import CPU

Array = NDArray[Any]
F = TensorProto.FLOAT


def weight(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def node(op: str, inputs: list[str], output: str, **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"{output}_node", **attrs)


def build(
    nodes: list[onnx.NodeProto], weights: dict[str, Array], shape: list[int | str], outputs: tuple[str, ...] = ("y",)
) -> Graph:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", F, shape)],
        [helper.make_tensor_value_info(name, F, None) for name in outputs],
        [numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    return from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def residual_network(bias: bool = True) -> Graph:
    """Convolutions, a residual sum, a pool and a Gemm; small in everything."""
    rest = [["b0"], ["b1"], ["b2"]] if bias else [[], [], []]
    nodes = [
        node("Conv", ["x", "w0", *rest[0]], "c0", pads=[1, 1, 1, 1]),
        node("Relu", ["c0"], "r0"),
        node("Conv", ["r0", "w1", *rest[1]], "c1", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], "r1"),
        node("Conv", ["r1", "w2", *rest[2]], "c2", pads=[1, 1, 1, 1]),
        node("Add", ["c2", "r0"], "s"),
        node("Relu", ["s"], "r2"),
        node("GlobalAveragePool", ["r2"], "p"),
        node("Flatten", ["p"], "f"),
        node("Gemm", ["f", "g", "gb"], "y", transB=1),
    ]
    weights = {
        "w0": weight(8, 3, 3, 3),
        "w1": weight(8, 8, 3, 3, seed=1),
        "w2": weight(8, 8, 3, 3, seed=2),
        "g": weight(5, 8, seed=3),
        "gb": weight(5),
    }
    if bias:
        weights |= {f"b{i}": weight(8, seed=10 + i) * np.float32(0.2) for i in range(3)}
    return build(nodes, weights, ["N", 3, 8, 8])


def context_for(graph: Graph, count: int = 48, **options: Any) -> Context:
    rng = np.random.default_rng(5)
    shapes = {s.name: [d if isinstance(d, int) else 8 for d in s.shape or ()] for s in input_specs(graph)}
    feeds = {name: rng.normal(size=[count, *dims[1:]]).astype(np.float32) for name, dims in shapes.items()}
    return Context(original=graph, data=open_data(feeds, input_specs(graph)), threads=1, **options)


def sqnr(result: PassResult) -> tuple[float, float]:
    found = result.report.details["output_sqnr_db"]
    return found["before"], found["after"]


def planted(student: Graph, teacher: Graph, amounts: dict[int, float]) -> Graph:
    """``student`` with the biases of some layers wrong by ``amounts``."""
    spoiled = copy_graph(student)
    layers, _ = find_layers(spoiled, teacher)
    names = Names(spoiled)
    for position, amount in amounts.items():
        layers[position].set_bias(layers[position].bias() + amount, names)
    return spoiled


@pytest.mark.parametrize("bias", [True, False])
def test_a_planted_bias_error_is_taken_back(bias: bool) -> None:
    graph = residual_network(bias)
    context = context_for(graph)
    student = InsertQdq()(graph, context).graph
    spoiled = planted(student, graph, {0: 0.05, 2: -0.1, 3: 0.2})
    before = to_proto(spoiled).SerializeToString()
    result = CorrectBias()(spoiled, context)
    assert to_proto(spoiled).SerializeToString() == before
    start, end = sqnr(result)
    assert end > start + 10
    # What is left of the mean error of every layer is small against what was planted.
    feeds = next(iter(context.data.rebatch(48))).feeds  # type: ignore[union-attr]
    layers, _ = find_layers(result.graph, graph)
    wanted = [[layer.output.name] for layer in layers]
    mine = Advance(result.graph, [feeds], wanted, threads=1)
    theirs = Advance(graph, [feeds], [[layer.own_target] for layer in layers], threads=1)
    for layer in layers:
        found, expected = next(mine.step()), next(theirs.step())
        away = np.moveaxis(expected[layer.own_target] - found[layer.output.name], layer.axis, 0)
        assert np.abs(away.reshape(layer.channels, -1).mean(axis=1)).max() < 0.02, layer.name
    assert audit(result.graph, CPU).dequantize == audit(student, CPU).dequantize
    assert audit(result.graph, CPU).integer == audit(student, CPU).integer


def test_it_equals_a_full_run_of_both_networks_for_every_layer() -> None:
    graph = residual_network()
    context = context_for(graph)
    student = planted(InsertQdq()(graph, context).graph, graph, {0: 0.05, 1: 0.1, 2: -0.1, 3: 0.2})
    result = CorrectBias()(student, context)
    assert len(result.report.changes) == 4
    # Brute force: the whole of both networks once more for each layer, on what the pass learned from.
    assert context.data is not None
    train = split_samples(context.data, context.seed, 512).train
    expected = copy_graph(student)
    layers, _ = find_layers(expected, graph)
    names = Names(expected)
    for layer in layers:
        shortcut = [layer.shortcut.name] if layer.shortcut is not None else []
        total, count = np.zeros(layer.channels), 0
        wanted = [[layer.output.name, *shortcut]]
        batches = [batch.feeds for batch in train]
        mine = Advance(expected, batches, wanted, threads=1).step()
        theirs = Advance(graph, batches, [[layer.target]], threads=1).step()
        for found, aim in zip(mine, theirs, strict=True):
            away = aim[layer.target] - sum(found.values())
            rows = np.moveaxis(away, layer.axis, 0).reshape(layer.channels, -1)
            total, count = total + rows.sum(axis=1, dtype=np.float64), count + rows.shape[1]
        layer.set_bias(layer.bias() + total / count, names)
    for layer, other in zip(layers, find_layers(result.graph, graph)[0], strict=True):
        np.testing.assert_allclose(other.bias(), layer.bias(), atol=2e-4)


def test_a_layer_without_bias_gets_one_only_where_that_is_worth_it() -> None:
    graph = residual_network(bias=False)
    context = context_for(graph)
    student = planted(InsertQdq()(graph, context).graph, graph, {3: 0.3})
    refused = CorrectBias(add_bias=False)(student, context)
    assert [layer.has_bias for layer in find_layers(refused.graph, graph)[0]] == [False, False, False, True]
    assert sum("has no bias" in r.reason for r in refused.report.refusals) == 3


@pytest.mark.parametrize("last", [True, False])
def test_a_gemm_without_bias_stays_integer_when_it_gets_one(last: bool) -> None:
    nodes = [node("Gemm", ["x", "w"], "y" if last else "h")]
    nodes += [] if last else [node("Relu", ["h"], "r"), node("Gemm", ["r", "w2"], "y")]
    weights = {"w": weight(16, 12)} if last else {"w": weight(16, 12), "w2": weight(12, 4)}
    graph = build(nodes, weights, ["N", 16])
    context = context_for(graph)
    student = InsertQdq()(graph, context).graph
    spoiled = planted(student, graph, {0: 0.5})
    result = CorrectBias()(spoiled, context)
    assert sqnr(result)[1] > sqnr(result)[0] + 5
    for each in (spoiled, result.graph):
        assert audit(each, CPU).integer == audit(student, CPU).integer


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("kind", ["gemm", "matmul"])
def test_bias_as_float_and_as_int32(last: bool, kind: str) -> None:
    nodes = [node("MatMul", ["x", "w"], "m"), node("Add", ["m", "b"], "h" if not last else "y")]
    if kind == "gemm":
        nodes = [node("Gemm", ["x", "w", "b"], "h" if not last else "y")]
    weights = {"w": weight(16, 12), "b": weight(12)}
    if not last:
        nodes += [node("Relu", ["h"], "r"), node("MatMul", ["r", "w2"], "y")]
        weights["w2"] = weight(12, 4)
    graph = build(nodes, weights, ["N", 16])
    context = context_for(graph)
    student = InsertQdq()(graph, context).graph
    spoiled = planted(student, graph, {0: 0.25})
    result = CorrectBias()(spoiled, context)
    start, end = sqnr(result)
    assert end > start + 5
    assert audit(result.graph, CPU).integer == audit(student, CPU).integer


def test_the_int32_bias_stays_within_its_bound() -> None:
    graph = build([node("Gemm", ["x", "w", "b"], "y")], {"w": weight(16, 4), "b": weight(4)}, ["N", 16])
    student = InsertQdq()(graph, context_for(graph)).graph
    layer = find_layers(student, graph)[0][0]
    layer.set_bias(np.full(4, 1e30), Names(student))
    stored = [t.values for t in student.tensors().values() if t.dtype == np.int32 and t.shape == (4,)]
    assert len(stored) == 1 and np.abs(stored[0].astype(np.int64)).max() <= MAX_BIAS


def test_a_shared_bias_is_corrected_for_each_reader_apart() -> None:
    nodes = [
        node("Conv", ["x", "w0", "b"], "c", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], "r"),
        node("Conv", ["r", "w1", "b"], "y", pads=[1, 1, 1, 1]),
    ]
    weights = {"w0": weight(4, 3, 3, 3), "w1": weight(4, 4, 3, 3, seed=4), "b": weight(4)}
    graph = build(nodes, weights, ["N", 3, 8, 8])
    context = context_for(graph)
    spoiled = planted(InsertQdq()(graph, context).graph, graph, {0: 0.2, 1: -0.4})
    result = CorrectBias()(spoiled, context)
    for layer in find_layers(result.graph, graph)[0]:
        np.testing.assert_allclose(layer.bias(), weights["b"], atol=0.05)


def test_a_second_run_does_not_worsen_and_a_replay_gives_the_same_bytes() -> None:
    graph = residual_network()
    context = context_for(graph)
    student = planted(InsertQdq()(graph, context).graph, graph, {1: 0.1})
    once, replay = CorrectBias()(student, context), CorrectBias()(student, context)
    assert to_proto(once.graph).SerializeToString() == to_proto(replay.graph).SerializeToString()
    again = CorrectBias()(once.graph, context)
    assert sqnr(again)[0] == pytest.approx(sqnr(once)[1], abs=1e-3)
    assert sqnr(again)[1] >= sqnr(again)[0]


def test_the_float_model_may_still_hold_its_batch_norm() -> None:
    nodes = [
        node("Conv", ["x", "w"], "c", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], "n"),
        node("Relu", ["n"], "r"),
        node("Conv", ["r", "w2"], "y", pads=[1, 1, 1, 1]),
    ]
    weights = {"w": weight(4, 3, 3, 3), "w2": weight(4, 4, 3, 3), "mean": weight(4), "shift": weight(4, seed=3)}
    weights |= {"scale": np.full(4, 1.5, np.float32), "var": np.full(4, 0.5, np.float32)}
    graph = build(nodes, weights, ["N", 3, 8, 8])
    context = context_for(graph)
    student = InsertQdq()(FoldBatchNorm()(graph).graph, context).graph
    result = CorrectBias()(planted(student, graph, {0: 0.2}), context)
    assert sqnr(result)[1] > sqnr(result)[0] + 5
    assert {layer.own_target for layer in find_layers(student, graph)[0]} == {"n", "y"}


def test_a_tensor_that_the_float_model_lacks_or_has_for_something_else_is_refused() -> None:
    graph = residual_network()
    context = context_for(graph)
    student = InsertQdq()(graph, context).graph
    other = copy_graph(graph)
    tensors = other.tensors()
    tensors["c1"].name = "elsewhere"
    tensors["s"].name, tensors["c2"].name = "sum", "conv"
    context.reference = other
    result = CorrectBias()(student, context)
    reasons = {r.node: r.reason for r in result.report.refusals}
    assert "has no tensor 'c1'" in reasons["c1_node"] and "has no tensor 'c2" in reasons["c2_node"]
    tensors["c1"].name, tensors["c0"].name = "c0", "c1"
    result = CorrectBias()(student, context)
    reasons = {r.node: r.reason for r in result.report.refusals}
    assert "little in common" in reasons["c0_node"]


def test_without_data_or_without_the_float_model() -> None:
    graph = residual_network()
    with pytest.raises(DataError, match="needs calibration data"):
        CorrectBias()(graph, Context(original=graph))
    with pytest.raises(UsageError, match="compares with the float model"):
        CorrectBias()(graph, Context(data=context_for(graph).data))
    with pytest.raises(UsageError, match="compares with the float model"):
        CorrectBias()(graph, context_for(graph))


def test_nothing_to_do_where_the_float_model_is_the_student() -> None:
    graph = residual_network()
    context = context_for(graph)
    student = InsertQdq()(graph, context).graph
    context.reference = copy_graph(student)
    result = CorrectBias()(student, context)
    assert not result.report.changed


# ---- running in pieces


@pytest.mark.parametrize("seed", range(12))
def test_pieces_compute_what_the_whole_computes(seed: int) -> None:
    graph = from_proto(random_model(seed, steps=12))
    context = context_for(graph, 6)
    student = InsertQdq(audit=False)(graph, context).graph
    names = [t.name for n in student.nodes for t in n.outputs if t.name and n.op not in ("DequantizeLinear",)]
    names = [name for name in names if student.tensors()[name].dtype == np.float32]
    assert context.data is not None
    feeds = [batch.feeds for batch in context.data.rebatch(3)]
    whole = copy_graph(student)
    whole.outputs = [whole.tensors()[name] for name in names]
    session = Session(whole, optimization="disabled", threads=1)
    expected = [session.run(given) for given in feeds]
    advance = Advance(student, feeds, [[name] for name in names], threads=1)
    for name in names:
        for found, values in zip(advance.step(), expected, strict=True):
            np.testing.assert_allclose(found[name], values[name], rtol=1e-5, atol=1e-5)
    assert advance.held_bytes() == 0


def test_the_number_of_samples_is_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = residual_network()
    context = context_for(graph, 48)
    assert context.data is not None
    plans = [(graph, [["c0"], ["c2"]])]
    assert samples_that_fit(plans, context.data) >= 48
    monkeypatch.setattr("onnxcompress.lockstep.MEMORY", 20_000)
    most = samples_that_fit(plans, context.data)
    assert 1 <= most < 48
    student = InsertQdq()(graph, context).graph
    result = CorrectBias()(planted(student, graph, {0: 0.1}), context)
    found = result.report.details["output_sqnr_db"]
    assert found["train"] + found["held_out"] <= 24
    samples = split_samples(context.data, 0, 12)
    assert samples.train.samples + samples.held_out.samples == 12


# ---- every hazard

RUNNABLE = [h for h in HAZARDS if h.runnable]


@pytest.mark.parametrize("hazard", RUNNABLE, ids=lambda h: h.name)
def test_every_hazard_survives(hazard: Hazard) -> None:
    model = hazard.build()
    graph = from_proto(model)
    feeds = make_feeds(model)
    context = Context(original=graph, data=open_data([feeds], input_specs(graph)), threads=1)
    student = InsertQdq()(graph, context)
    result = CorrectBias()(student.graph, context)
    written = to_proto(result.graph)
    onnx.checker.check_model(written)
    assert [o.name for o in written.graph.output] == [o.name for o in model.graph.output]
    assert audit(result.graph, CPU).integer == student.report.details["audit"]["integer"]
    Session(result.graph, threads=1).run(feeds)
    if "output_sqnr_db" in result.report.details:
        start, end = sqnr(result)
        assert start is None or end is None or end >= start
