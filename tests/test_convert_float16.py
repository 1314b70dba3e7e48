"""convert_float16: on every hazard model, and one test for each way in which float16 can go wrong."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from models import BOOL, BY_NAME, F16, F32, HAZARDS, I64, Hazard, Net, branch, image, make_feeds
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxcompress.base import Context, PassResult
from onnxcompress.data import open_data
from onnxcompress.errors import UsageError
from onnxcompress.graph import input_specs, walk_nodes
from onnxcompress.passes.convert_float16 import PROTECTED, ConvertFloat16
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.recipe import load_recipe
from onnxcompress.session import Session

every_hazard = pytest.mark.parametrize("hazard", HAZARDS, ids=lambda h: h.name)
keep_or_not = pytest.mark.parametrize("keep_io", [True, False])

#: relative L2 that rounding to float16 may cause at an output
TOLERANCE = 5e-3
#: outputs that a comparison of values says nothing about
RANDOM = {"random_and_stateful", "dropout_training"}


@cache
def converted(name: str, keep_io: bool) -> PassResult:
    return ConvertFloat16(keep_io=keep_io)(from_proto(BY_NAME[name].build()))


def convert(model: onnx.ModelProto, data: dict[str, Any] | None = None, **options: Any) -> PassResult:
    graph = from_proto(model)
    context = Context(threads=1)
    if data is not None:
        context.data = open_data(data, input_specs(graph))
    result = ConvertFloat16(**options)(graph, context)
    onnx.checker.check_model(to_proto(result.graph), full_check=True)
    return result


def run(model: Any, feeds: dict[str, NDArray[Any]], level: str = "disabled") -> dict[str, NDArray[Any]]:
    session = Session(model, optimization=level, threads=1)  # type: ignore[arg-type]
    wanted = {s.name: s.dtype for s in session.input_specs()}
    return session.run({name: value.astype(wanted[name]) for name, value in feeds.items()})


def error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))


def agrees(model: onnx.ModelProto, result: PassResult, feeds: dict[str, NDArray[Any]]) -> None:
    expected = run(model, feeds)
    for level in ("disabled", "all"):
        for name, value in run(result.graph, feeds, level).items():
            assert error(value, expected[name]) <= TOLERANCE, (name, level)


def operators(result: PassResult, kind: str = "converted") -> list[str]:
    return sorted(c.detail.split()[0] for c in result.report.changes if c.kind == kind)


def reason(result: PassResult, op: str) -> str:
    found = [r.reason for r in result.report.refusals if r.reason.startswith(f"{op} stays")]
    assert found, f"{op} was not refused"
    return found[0]


def casts(result: PassResult) -> int:
    return result.report.after.operators.get("Cast", 0)


def output(net: Net, name: str, shape: list[int | str | None], dtype: int | None = None) -> onnx.ModelProto:
    net.output(name, shape, dtype)
    return net.model()


# ---- hazards -----------------------------------------------------------------------------------------------------


@keep_or_not
@every_hazard
def test_the_model_stays_valid(hazard: Hazard, keep_io: bool) -> None:
    before = to_proto(from_proto(hazard.build()))
    result = converted(hazard.name, keep_io)
    after = to_proto(result.graph)
    onnx.checker.check_model(after, full_check=True)
    assert [i.name for i in after.graph.input] == [i.name for i in before.graph.input]
    assert [o.name for o in after.graph.output] == [o.name for o in before.graph.output]
    assert len({node.name for node in walk_nodes(result.graph)}) == len(list(walk_nodes(result.graph)))
    if keep_io:
        assert list(after.graph.input) == list(before.graph.input)
        assert list(after.graph.output) == list(before.graph.output)
    assert list(after.opset_import) == list(before.opset_import)


@keep_or_not
@every_hazard
def test_the_argument_is_untouched_and_bytes_repeat(hazard: Hazard, keep_io: bool) -> None:
    graph = from_proto(hazard.build())
    before = to_proto(graph).SerializeToString()
    again = ConvertFloat16(keep_io=keep_io)(graph)
    assert to_proto(graph).SerializeToString() == before
    first = converted(hazard.name, keep_io)
    assert to_proto(again.graph).SerializeToString() == to_proto(first.graph).SerializeToString()
    assert again.report.changes == first.report.changes
    assert again.report.refusals == first.report.refusals


@every_hazard
def test_a_second_run_changes_nothing(hazard: Hazard) -> None:
    once = converted(hazard.name, True).graph
    twice = ConvertFloat16()(once)
    assert twice.report.changes == ()
    assert to_proto(twice.graph).SerializeToString() == to_proto(once).SerializeToString()


@keep_or_not
@every_hazard
def test_the_report_tells_the_truth(hazard: Hazard, keep_io: bool) -> None:
    result = converted(hazard.name, keep_io)
    plain = to_proto(from_proto(hazard.build()))
    after = to_proto(result.graph)
    assert result.report.changed == (after.SerializeToString() != plain.SerializeToString())
    nodes = {node.name for node in plain.graph.node}
    changed = {c.node for c in result.report.changes if c.kind == "converted"}
    refused = {r.node for r in result.report.refusals}
    assert changed <= nodes and refused <= nodes and not changed & refused
    assert all(r.reason and "\n" not in r.reason for r in result.report.refusals)


@keep_or_not
@every_hazard
def test_tensors_keep_their_names(hazard: Hazard, keep_io: bool) -> None:
    def shapes(model: onnx.ModelProto) -> dict[str, int | None]:
        inferred = onnx.shape_inference.infer_shapes(model)
        return {
            v.name: len(v.type.tensor_type.shape.dim) if v.type.tensor_type.HasField("shape") else None
            for v in inferred.graph.value_info
        }

    before, after = (
        shapes(to_proto(from_proto(hazard.build()))),
        shapes(to_proto(converted(hazard.name, keep_io).graph)),
    )
    for name in before.keys() & after.keys():
        assert before[name] is None or before[name] == after[name]
    made = {t.name for node in converted(hazard.name, keep_io).graph.nodes for t in node.outputs}
    nodes = to_proto(from_proto(hazard.build())).graph.node  # of two Casts that became one the first is gone
    assert {o for node in nodes for o in node.output if o and node.op_type != "Cast"} <= made


@keep_or_not
@every_hazard
def test_the_values_stay_close(hazard: Hazard, keep_io: bool) -> None:
    if not hazard.runnable or hazard.name in RANDOM:
        pytest.skip("onnxruntime's CPU provider has no kernel for this model, or its outputs are random")
    model = hazard.build()
    for seed, sizes in ((0, {}), (1, {"N": 1, "S": 1, "H": 6})):
        feeds = make_feeds(model, seed=seed, sizes=sizes)
        expected, found = run(model, feeds), run(converted(hazard.name, keep_io).graph, feeds)
        for name, value in expected.items():
            assert found[name].shape == value.shape
            if value.dtype.kind == "f":
                assert error(found[name], value) <= TOLERANCE
            else:
                assert found[name].tolist() == value.tolist()


# ---- what other converters get wrong -----------------------------------------------------------------------------


def test_conversions_are_in_order_and_at_the_borders_only() -> None:
    """microsoft/onnxconverter-common issue 208: nodes no longer sorted. resnet-like: one Cast in, one out."""
    result = converted("residual", True)
    assert casts(result) == 2
    assert len(operators(result)) == 13
    assert casts(converted("residual", False)) == 0


@pytest.mark.parametrize("opset", [10, 11, 13, 18])
def test_resize_keeps_scales_and_roi(opset: int) -> None:
    """microsoft/onnxconverter-common issues 207, 272 and 306: scales are float32 by the schema."""
    net = Net(opset)
    x = net.conv(image(net), 3, 4)
    scales = net.const([1, 1, 2, 2], np.float32, "scales")
    inputs = [scales] if opset == 10 else [net.const([], np.float32, "roi"), scales]
    x = net.add("Resize", x, *inputs, mode="nearest")
    net.conv(x, 4, 2, to="y")
    model = output(net, "y", ["N", 2, 16, 16])
    result = convert(model)
    assert "Resize" in operators(result)
    assert casts(result) == 2
    stored = {t.name: t.data_type for t in to_proto(result.graph).graph.initializer}
    assert stored["scales"] == F32
    agrees(model, result, make_feeds(model))


@pytest.mark.parametrize("kind", [np.int64, np.bool_, np.uint8])
def test_casts_of_the_file_to_float32_are_heard(kind: type) -> None:
    """microsoft/onnxconverter-common issue 320: a Cast to float32 whose output was declared float16."""
    net = Net()
    mask = net.input("mask", ["N", 1, 1, 1], onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
    x = net.conv(image(net), 3, 4)
    x = net.add("Mul", x, net.add("Cast", mask, to_=F32))
    net.conv(x, 4, 2, to="y")
    model = output(net, "y", ["N", 2, 8, 8])
    result = convert(model)
    assert operators(result) == ["Conv", "Conv", "Mul"]
    assert casts(result) == 3  # input, mask in one step, output
    agrees(model, result, make_feeds(model))


def test_weights_are_never_clamped() -> None:
    """The converters clamp to 1e4 and 6e-8 silently; here the consumer stays float32."""
    net = Net()
    weight = net.rng.standard_normal((4, 3, 1, 1)).astype(np.float32)
    weight[1, 2] = 70000.0
    x = net.add("Conv", image(net), net.const(weight, name="huge"))
    x = net.add("Sigmoid", net.add("Relu", x))
    net.conv(x, 4, 2, to="y")
    model = output(net, "y", ["N", 2, 8, 8])
    result = convert(model)
    assert "holds 1 of 12 values beyond 65504" in reason(result, "Conv")
    assert "Relu" not in operators(result)  # what it reads may be as large
    assert operators(result) == ["Conv"]
    agrees(model, result, make_feeds(model))
    # 65504 is the largest float16, not beyond it
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.where(weight > 6e4, 65504, weight), "huge"))
    assert "Conv" in operators(convert(model)) and len(operators(convert(model))) == 4


def test_an_epsilon_that_becomes_zero_keeps_its_node() -> None:
    net = Net()
    x = net.add("Relu", net.conv(image(net), 3, 4))
    x = net.add("Div", x, net.add("Add", x, net.const(1e-12, np.float32, "epsilon")))
    net.conv(x, 4, 2, to="y")
    model = output(net, "y", ["N", 2, 8, 8])
    result = convert(model)
    assert "too small for float16: 1 of 1 values would become zero" in reason(result, "Add")
    zero = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    assert np.isfinite(run(result.graph, zero)["y"]).all()


def test_small_values_among_large_ones_are_counted() -> None:
    net = Net()
    weight = net.rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    weight[0, 0, 0, :2] = 1e-9
    net.add("Conv", image(net), net.const(weight, name="weight"), to="y")
    model = output(net, "y", ["N", 4, 6, 6])
    result = convert(model)
    assert operators(result) == ["Conv"]
    assert result.report.details["rounded_to_zero"] == {"weight": 2}
    # a channel of nothing else is as good as zero, unless an operator behind scales it up
    weight[0] = 1e-9
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))
    assert operators(convert(model)) == ["Conv"]
    model.graph.node[0].output[0] = "weak"
    model.graph.node.append(onnx.helper.make_node("Mul", ["weak", "gain"], ["y"], name="gain"))
    gain = np.array([1e9, 1, 1, 1], np.float32).reshape(4, 1, 1)
    model.graph.initializer.append(numpy_helper.from_array(gain, "gain"))
    assert "in 1 of 4 channels: 27 of 108 values would become zero" in reason(convert(model), "Conv")


def masked_attention() -> onnx.ModelProto:
    """A mask of the smallest float32: as float16 it is -inf, and a row of nothing but -inf is NaN behind Softmax."""
    net = Net()
    mask = net.add("Cast", net.input("mask", ["N", 1, "S"], I64), to_=F32)
    mask = net.add("Mul", net.add("Sub", net.floats(1.0), mask), net.const(np.finfo(np.float32).min, np.float32))
    x = net.add("MatMul", net.input("x", ["N", "S", 8]), net.random(8, 8))
    scores = net.add("Add", net.add("MatMul", x, net.add("Transpose", x, perm=[0, 2, 1])), mask)
    y = net.add("MatMul", net.add("Softmax", scores, axis=-1), x)
    net.add("MatMul", y, net.random(8, 8), to="y")
    return output(net, "y", ["N", "S", 8])


def test_a_mask_beyond_float16_stays_and_gives_no_nan() -> None:
    model = masked_attention()
    result = convert(model)
    assert "may exceed float16" in reason(result, "Softmax")
    assert operators(result).count("MatMul") == 4
    feeds = make_feeds(model)
    feeds["mask"] = np.array([[[1, 1, 0, 0, 0]], [[0, 0, 0, 0, 0]], [[1, 1, 1, 1, 1]]])
    agrees(model, result, feeds)


def test_infinite_masks_are_representable() -> None:
    net = Net()
    keep = net.input("keep", ["N", 8], BOOL)
    x = net.add("MatMul", net.input("x", ["N", 8]), net.random(8, 8))
    x = net.add("Where", keep, x, net.const(-np.inf, np.float32))
    net.add("MatMul", net.add("Softmax", x, axis=-1), net.random(8, 4), to="y")
    model = output(net, "y", ["N", 4])
    feeds = {"x": np.ones((2, 8), np.float32), "keep": np.eye(2, 8, dtype=bool)}
    for result in (convert(model), convert(model, feeds)):  # ranges of infinite tensors are not asked for
        assert operators(result) == ["MatMul", "MatMul", "Softmax", "Where"]
        agrees(model, result, feeds)


def test_clip_bounds_may_become_infinite() -> None:
    net = Net()
    x = net.add("Clip", net.conv(image(net), 3, 4), net.floats(0.0), net.const(np.finfo(np.float32).max, np.float32))
    net.conv(x, 4, 2, to="y")
    model = output(net, "y", ["N", 2, 8, 8])
    result = convert(model)
    assert operators(result) == ["Clip", "Conv", "Conv"]
    agrees(model, result, make_feeds(model))


def test_data_decides_what_is_too_large() -> None:
    net = Net()
    x = net.conv(image(net), 3, 4)
    x = net.add("Mul", x, net.floats(30000.0))
    x = net.add("Tanh", net.add("Mul", x, net.floats(1e-4)))
    net.conv(x, 4, 2, to="y")
    model = output(net, "y", ["N", 2, 8, 8])
    feeds = make_feeds(model)
    blind, seen = convert(model), convert(model, feeds)
    assert operators(blind) == ["Conv", "Conv", "Mul", "Mul", "Tanh"]
    assert "ranges from" in reason(seen, "Mul")
    assert "Mul" not in operators(seen)
    agrees(model, seen, feeds)


def test_data_frees_what_constants_taint() -> None:
    net = Net()
    x = net.conv(image(net), 3, 4)
    x = net.add("Min", x, net.const(1e9, np.float32))
    x = net.add("Relu", x)
    net.conv(x, 4, 2, to="y")
    model = output(net, "y", ["N", 2, 8, 8])
    assert operators(convert(model)) == ["Conv"]  # the first: its output is not known to be large
    assert operators(convert(model, make_feeds(model))) == ["Conv", "Conv", "Relu"]


# ---- protected operators -----------------------------------------------------------------------------------------


def test_a_decomposed_layer_norm_keeps_its_squares() -> None:
    net = Net()
    x = net.add("MatMul", net.input("x", ["N", 6, 8]), net.floats(300 * net.rng.standard_normal((8, 8))))
    centred = net.add("Sub", x, net.add("ReduceMean", x, axes=[-1]))
    variance = net.add("ReduceMean", net.add("Pow", centred, net.floats(2.0)), axes=[-1])
    deviation = net.add("Sqrt", net.add("Add", variance, net.floats(1e-5)))
    y = net.add("MatMul", net.add("Div", centred, deviation), net.random(8, 8))
    net.add("Identity", y, to="y")
    model = output(net, "y", ["N", 6, 8])
    result = convert(model)
    assert "a square does above 255" in reason(result, "Pow")
    assert operators(result).count("MatMul") == 2
    agrees(model, result, {"x": 3 * make_feeds(model)["x"]})


@pytest.mark.parametrize("op", ["Exp", "Log", "Reciprocal", "Softplus", "ReduceSum", "ReduceL2", "CumSum", "TopK"])
def test_protected_operators_stay_with_their_reason(op: str) -> None:
    net = Net()
    x = net.add("Abs", net.add("MatMul", net.input("x", ["N", 8]), net.random(8, 8)))
    x = net.add("Add", x, net.floats(1.0))
    inputs, attributes = {
        "ReduceSum": ([net.ints(1)], {"keepdims": 1}),
        "ReduceL2": ([], {"axes": [1], "keepdims": 1}),
        "CumSum": ([net.const(1, np.int64)], {}),
        "TopK": ([net.ints(8)], {}),
    }.get(op, ([], {}))
    to = ["values", "indices"] if op == "TopK" else ["values"]
    net.add(op, x, *inputs, to=to, **attributes)
    net.add("MatMul", net.add("Add", "values", x), net.random(8, 4), to="y")
    model = output(net, "y", ["N", 4])
    result = convert(model)
    assert PROTECTED[op] in reason(result, op)
    assert operators(result).count("MatMul") == 2
    agrees(model, result, make_feeds(model))


def test_a_product_with_itself_is_a_square() -> None:
    net = Net()
    x = net.add("MatMul", net.input("x", ["N", 8]), net.random(8, 8))
    net.add("MatMul", net.add("Tanh", net.add("Mul", x, x)), net.random(8, 4), to="y")
    assert "squares overflow" in reason(convert(output(net, "y", ["N", 4])), "Mul")


@pytest.mark.parametrize(("length", "stays"), [(64, False), (80, True)])
def test_long_means_stay(length: int, stays: bool) -> None:
    net = Net()
    x = net.conv(image(net, size=length), 3, 4)
    x = net.add("ReduceMean", net.add("Relu", x), axes=[2, 3], keepdims=0)
    net.add("MatMul", x, net.random(4, 2), to="y")
    result = convert(output(net, "y", ["N", 2]))
    assert ("ReduceMean" not in operators(result)) == stays
    if stays:
        assert f"it sums {length * length} elements" in reason(result, "ReduceMean")


def test_what_the_schema_does_not_take_stays() -> None:
    net = Net(10)
    x = net.add("MatMul", net.input("x", ["N", 8]), net.random(8, 8))
    net.add("IsInf", x, to="z")
    net.add("MatMul", x, net.random(8, 4), to="y")
    net.output("z", ["N", 8], BOOL)
    result = convert(output(net, "y", ["N", 4]))
    assert reason(result, "IsInf") == "IsInf stays float32: IsInf of opset 10 does not take float16"


@pytest.mark.parametrize("opset", [7, 11, 13, 17, 21])
def test_every_converted_operator_takes_float16_by_its_schema(opset: int) -> None:
    """All operators of an opset that float32 could flow through: the pass refuses exactly what the schema refuses."""
    from onnxcompress.passes.convert_float16 import _Plan

    tried = 0
    for name in sorted({s.name for s in onnx.defs.get_all_schemas() if not s.domain} - set(PROTECTED)):
        if not onnx.defs.has(name, opset, ""):
            continue
        schema = onnx.defs.get_schema(name, opset, "")
        takes = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        if not schema.inputs or schema.min_input > 1 or "tensor(float)" not in takes.get(schema.inputs[0].type_str, ()):
            continue
        made = takes.get(schema.outputs[0].type_str, ("tensor",)) if schema.min_output < 2 else ()
        if not any(kind.startswith("tensor") for kind in made):
            continue  # a sequence, or several outputs
        net = Net(opset)
        net.input("x", ["N", 4])
        net.nodes.append(onnx.helper.make_node(name, ["x"], ["y"], name="n"))
        net.output("y", None)
        graph = from_proto(net.model())
        _, why = _Plan(graph, ConvertFloat16(), Context()).roles_of(graph.nodes[0])
        expected = "tensor(float16)" in takes[schema.inputs[0].type_str]
        assert (why is None) == expected, (name, why)
        tried += 1
    assert tried > 20


# ---- the borders -------------------------------------------------------------------------------------------------


def test_a_tensor_is_converted_once_in_each_direction() -> None:
    net = Net()
    x = image(net)
    heads = [net.conv(x, 3, 4) for _ in range(3)]
    y = net.add("Concat", *heads, axis=1)
    for op in ("Exp", "Softplus", "Exp"):
        net.add(op, y, to=f"{op}_{len(net.outputs)}")
        net.output(net.nodes[-1].output[0], ["N", 12, 8, 8])
    result = convert(net.model())
    assert casts(result) == 2


def test_cheap_operators_between_float32_neighbours_are_not_worth_a_conversion() -> None:
    net = Net()
    x = net.add("Softplus", net.add("Exp", image(net)))
    x = net.add("Exp", net.add("Neg", x))
    net.add("Identity", x, to="y")
    result = convert(output(net, "y", ["N", 3, 8, 8]))
    assert result.report.changes == ()
    assert "conversions around it would cost more than it saves" in reason(result, "Neg")


def test_casts_that_meet_cancel() -> None:
    net = Net()
    half = net.add("Cast", net.conv(image(net), 3, 4), to_=F16)
    x = net.add("Cast", net.add("Relu", half), to_=F32)
    net.conv(x, 4, 2, to="y")
    model = output(net, "y", ["N", 2, 8, 8])
    result = convert(model)
    assert casts(result) == 2
    agrees(model, result, make_feeds(model))


def test_float16_of_the_file_is_used_and_kept() -> None:
    net = Net()
    x = net.input("x", ["N", 8], F16)
    wide = net.add("Cast", x, to_=F32)
    y = net.add("MatMul", wide, net.random(8, 8))
    net.add("Exp", wide, to="z")
    net.add("Cast", y, to="y", to_=F16)
    net.output("z", ["N", 8])
    model = output(net, "y", ["N", 8], F16)
    result = convert(model)
    assert operators(result) == ["MatMul"]
    assert casts(result) == 1  # the one that Exp reads; the last became an Identity, for an output needs a name
    agrees(model, result, make_feeds(model))


def test_a_weight_with_float32_readers_keeps_both_forms() -> None:
    net = Net()
    weight = net.random(8, 8, name="weight")
    x = net.add("MatMul", net.input("x", ["N", 8]), weight)
    net.add("Exp", net.add("Add", x, net.add("Exp", weight)), to="y")
    model = output(net, "y", [8, 8])
    result = convert(model)
    stored = {t.name: t.data_type for t in to_proto(result.graph).graph.initializer}
    assert stored == {"weight": F32, "weight_float16": F16}
    alone = converted("residual", True)
    assert {t.data_type for t in to_proto(alone.graph).graph.initializer if t.data_type != I64} == {F16}
    assert not [t.name for t in to_proto(alone.graph).graph.initializer if "float16" in t.name]


def test_branches_read_float32() -> None:
    net = Net()
    x = net.add("Relu", net.conv(image(net), 3, 3))
    then, other = branch(net, "then"), branch(net, "else")
    then.add("Exp", x, to="then_out")
    other.add("Identity", x, to="else_out")
    for inner in (then, other):
        inner.output(inner.nodes[-1].output[0], ["N", 3, 8, 8])
    y = net.add("If", net.input("go", [], BOOL), then_branch=then.body("then"), else_branch=other.body("else"))
    net.conv(net.add("Add", x, y), 3, 2, to="y")
    model = output(net, "y", ["N", 2, 8, 8])
    result = convert(model)
    assert "nested graphs stay as they are" in reason(result, "If")
    assert operators(result) == ["Add", "Conv", "Conv", "Relu"]
    assert casts(result) == 4  # in, for the branches, from the branches, out
    for go in (True, False):
        agrees(model, result, {**make_feeds(model), "go": np.array(go)})


def test_shape_arithmetic_is_untouched() -> None:
    net = Net()
    x = net.conv(image(net, size="H"), 3, 4)
    size = net.add("Cast", net.add("Gather", net.add("Shape", x), net.ints(2)), to_=F32)
    half = net.add("Cast", net.add("Floor", net.add("Div", size, net.floats([2.0]))), to_=I64)
    net.add("Slice", x, net.ints(0), half, net.ints(2), to="y")
    model = output(net, "y", ["N", 4, None, "H"])
    result = convert(model)
    assert "it computes with counts" in reason(result, "Div")
    assert operators(result) == ["Conv", "Slice"]
    assert casts(result) == 4  # two of the file, one in, one out
    feeds = {"x": np.ones((1, 3, 6, 4102), np.float32).transpose(0, 1, 3, 2)}
    assert run(result.graph, feeds)["y"].shape == (1, 4, 2051, 6)


def test_interface_without_keep_io_is_float16() -> None:
    for name in ("residual", "loop_body", "scan_body", "if_branches", "output_is_input"):
        model = to_proto(converted(name, False).graph)
        for value in (*model.graph.input, *model.graph.output):
            assert value.type.tensor_type.elem_type in (F16, BOOL, I64), (name, value.name)


def test_overridable_initializers_keep_their_type() -> None:
    model = BY_NAME["overridable_initializer"].build()
    result = converted("overridable_initializer", False)
    feeds = make_feeds(model)
    feeds["weight"] = np.random.default_rng(5).standard_normal((4, 3, 3, 3)).astype(np.float32)
    agrees(model, result, feeds)


def test_quantised_graphs_are_left_alone() -> None:
    result = converted("existing_qdq", True)
    assert result.report.changes == ()
    assert [r.reason for r in result.report.refusals] == [
        "the graph is quantised, and what its integers leave in float32 stays so"
    ]


def test_exclusions() -> None:
    model = BY_NAME["residual"].build()
    result = convert(model, exclude_operators=("Gemm",), exclude_nodes=("n0_*",))
    assert reason(result, "Gemm").endswith("operator Gemm is excluded")
    assert [r.node for r in result.report.refusals if "excluded by name" in r.reason] == ["n0_Conv"]
    agrees(model, result, make_feeds(model))


# ---- recipe ------------------------------------------------------------------------------------------------------


def test_the_recipe_folds_first() -> None:
    recipe = load_recipe("fp16")
    assert recipe.target == "cuda" and not recipe.needs_data
    result = recipe.pipeline()(from_proto(BY_NAME["residual"].build()))
    assert "BatchNormalization" not in result.report.after.operators
    assert casts(result) == 2
    with pytest.raises(UsageError):
        load_recipe("fp17")


@pytest.mark.cases
@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2_cifar10", "squeezenet1.1", "minilm"])
def test_real_models(name: str, cases: Any) -> None:
    original = onnx.load(cases[name].model)
    graph = from_proto(original)
    batches = list(cases[name].calibration(samples=8, batch=8))
    context = Context(data=open_data(batches, input_specs(graph)), threads=2)
    result = load_recipe("fp16").pipeline()(graph, context)
    onnx.checker.check_model(to_proto(result.graph), full_check=True)
    expected = Session(original, optimization="disabled", threads=2).run(batches[0])
    found = Session(result.graph, optimization="all", threads=2).run(batches[0])
    for output_name, wanted in expected.items():
        assert error(found[output_name], wanted) <= 5e-3
    if name != "minilm":
        assert casts(result) == 2
    assert result.report.after.weight_bytes <= 0.52 * result.report.before.weight_bytes
