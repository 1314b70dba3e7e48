"""fold_constants: what is evaluated, what is refused and why, and shapes known in part."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BY_NAME, F32, I64, Net, make_feeds
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from onnxcompress.base import PassResult
from onnxcompress.graph import constant_value, walk_nodes
from onnxcompress.passes.eliminate_dead_nodes import EliminateDeadNodes
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.session import Session


def operators(result: PassResult) -> list[str]:
    return [node.op for node in walk_nodes(result.graph)]


def reasons(result: PassResult) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in result.report.refusals}


def checked(model: onnx.ModelProto, *, step: FoldConstants | None = None, **sizes: int) -> PassResult:
    """Fold, drop what is dead, and compare with the model before; the result of both passes."""
    onnx.checker.check_model(model, full_check=True)
    folded = (step or FoldConstants())(from_proto(model))
    result = EliminateDeadNodes()(folded.graph)
    after = to_proto(result.graph)
    onnx.checker.check_model(after, full_check=True)
    for batch in (1, 3):
        feeds = make_feeds(model, sizes={"N": batch, **sizes})
        expected = Session(model, optimization="disabled", threads=1).run(feeds)
        found = Session(after, optimization="disabled", threads=1).run(feeds)
        for name, wanted in expected.items():
            assert found[name].dtype == wanted.dtype
            np.testing.assert_allclose(found[name], wanted, rtol=2e-6, atol=1e-7)
    return PassResult(result.graph, folded.report)


# ---- evaluation --------------------------------------------------------------------------------------------------

FLOATS = np.array([[-2.5, -1.0, -0.5], [0.5, 1.0, 2.5]], np.float32)
INTS = np.array([[-7, 7, -6], [6, 5, -5]], np.int64)
AXES = np.array([1], np.int64)

#: operators whose form depends on the opset: (name, opsets, constant inputs, attributes)
EVALUATIONS: list[tuple[str, tuple[int, ...], list[NDArray[Any] | None], dict[str, Any]]] = [
    ("Div", (7, 13, 14), [INTS, np.array([2, -2, 4])], {}),
    ("Div", (7, 13), [FLOATS, np.float32([0.3])], {}),
    ("Mul", (7, 14), [INTS, np.array(3)], {}),
    ("Sub", (7, 14), [INTS.astype(np.int32), np.array(3, np.int32)], {}),
    ("Mod", (10, 13), [INTS, np.array([3, -3, 3])], {}),
    ("Mod", (10, 13), [FLOATS, np.float32(1.5)], {"fmod": 1}),
    ("Pow", (7, 12, 15), [np.abs(FLOATS), np.float32(2.0)], {}),
    ("Clip", (7, 10), [FLOATS], {"min": -1.0, "max": 1.0}),
    ("Clip", (11, 12, 13), [FLOATS, np.float32(-1.0), None], {}),
    ("Cast", (7, 9, 13), [FLOATS], {"to": TensorProto.INT32}),
    ("Cast", (7, 9, 13), [INTS], {"to": TensorProto.FLOAT16}),
    ("Cast", (9, 13), [FLOATS], {"to": TensorProto.BOOL}),
    ("Softmax", (13,), [FLOATS], {"axis": 0}),
    ("ReduceSum", (7, 11), [FLOATS], {"axes": [1], "keepdims": 0}),
    ("ReduceSum", (13, 18), [FLOATS, AXES], {"keepdims": 0}),
    ("ReduceMean", (7, 11, 13), [FLOATS], {"axes": [1]}),
    ("ReduceMean", (18,), [FLOATS, AXES], {}),
    ("ReduceMax", (7, 12, 13), [FLOATS], {"axes": [0]}),
    ("ReduceMax", (18, 20), [FLOATS, np.array([0], np.int64)], {}),
    ("ArgMax", (7, 11, 12, 13), [FLOATS], {"axis": 1, "keepdims": 0}),
    ("Pad", (7, 10), [FLOATS], {"pads": [1, 0, 0, 2], "value": 3.0}),
    ("Pad", (11, 13, 18), [FLOATS, np.array([1, 0, 0, 2]), np.float32(3.0)], {}),
    ("Pad", (11, 13), [FLOATS, np.array([0, 1, 1, 0])], {"mode": "edge"}),
    ("Tile", (7, 13), [FLOATS, np.array([2, 1])], {}),
    ("Slice", (7, 9), [FLOATS], {"starts": [0, -2], "ends": [1, 100], "axes": [0, 1]}),
    ("Slice", (10, 11, 13), [FLOATS, np.array([-1]), np.array([-(2**62)]), AXES, np.array([-2])], {}),
    ("Slice", (10, 13), [FLOATS, np.array([1]), np.array([1])], {}),
    ("Gather", (7, 11, 13), [FLOATS, np.array([[2, 0]])], {"axis": 1}),
    ("Gather", (11, 13), [FLOATS, np.array(-1)], {"axis": -1}),
    ("Squeeze", (7, 11), [FLOATS[None]], {"axes": [0]}),
    ("Squeeze", (13, 21), [FLOATS[None], np.array([0])], {}),
    ("Squeeze", (7, 13), [FLOATS[None, :, None]], {}),
    ("Unsqueeze", (7, 11), [FLOATS], {"axes": [0, 3]}),
    ("Unsqueeze", (13, 21), [FLOATS, np.array([-1, 0])], {}),
    ("Reshape", (7, 13, 14), [FLOATS, np.array([0, -1, 1])], {}),
    ("Reshape", (14, 19), [np.zeros((0, 3), np.float32), np.array([3, 0])], {"allowzero": 1}),
    ("Transpose", (7, 13), [FLOATS], {}),
    ("Transpose", (7, 13), [FLOATS[None]], {"perm": [2, 0, 1]}),
    ("Flatten", (7, 9, 11, 13), [FLOATS[None]], {"axis": 2}),
    ("Flatten", (11, 13), [FLOATS[None]], {"axis": -1}),
    ("Concat", (7, 11, 13), [FLOATS, FLOATS * 2], {"axis": 1}),
    ("Concat", (11, 13), [FLOATS, FLOATS * 2], {"axis": -1}),
    ("Expand", (8, 13), [FLOATS, np.array([2, 1, 3])], {}),
    ("Shape", (7, 13), [FLOATS], {}),
    ("Shape", (15, 19), [FLOATS[None]], {"start": -2, "end": -1}),
    ("Shape", (15,), [FLOATS[None]], {"start": 5}),
    ("Size", (7, 13), [FLOATS], {}),
    ("ConstantOfShape", (9, 20), [np.array([2, 3])], {"value": numpy_helper.from_array(np.array([7], np.int32))}),
    ("ConstantOfShape", (9, 20), [np.array([], np.int64)], {}),
    ("Range", (11,), [np.array(1), np.array(10), np.array(3)], {}),
    ("Where", (9, 16), [FLOATS > 0, FLOATS, np.float32(0.0)], {}),
    ("Equal", (7, 11, 13), [INTS, np.array(6)], {}),
    ("CumSum", (11, 14), [FLOATS, np.array(1)], {"reverse": 1}),
    ("MatMul", (7, 9, 13), [FLOATS, FLOATS.T.copy()], {}),
    ("Gemm", (7, 9, 11, 13), [FLOATS, FLOATS, np.float32([[1.0, 2.0]])], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("OneHot", (11, 13), [np.array([1, -1]), np.array(3), np.float32([0.0, 2.0])], {"axis": 0}),
    ("GatherND", (11, 12), [FLOATS, np.array([[0, 1], [1, 2]])], {}),
    ("ScatterND", (11, 13), [FLOATS, np.array([[1]]), FLOATS[:1]], {}),
    ("LeakyRelu", (7, 16), [FLOATS], {"alpha": 0.2}),
    ("Max", (8, 12, 13), [FLOATS, np.float32(0.0), np.float32([1.0])], {}),
]


@pytest.mark.parametrize(
    ("op", "opset", "inputs", "attributes"),
    [
        pytest.param(op, opset, inputs, attributes, id=f"{op}-{opset}-{number}")
        for number, (op, opsets, inputs, attributes) in enumerate(EVALUATIONS)
        for opset in opsets
    ],
)
def test_evaluates_as_onnxruntime_does(
    op: str, opset: int, inputs: list[NDArray[Any] | None], attributes: dict[str, Any]
) -> None:
    net = Net(opset)
    names = ["" if value is None else net.const(value) for value in inputs]
    while names and not names[-1]:
        names.pop()
    net.add(op, *names, to="folded", **{"to_" if k == "to" else k: v for k, v in attributes.items()})
    model = net.model()
    model.graph.output.append(helper.make_empty_tensor_value_info("folded"))
    inferred = onnx.shape_inference.infer_shapes(model)
    expected = Session(inferred, optimization="disabled", threads=1).run({})["folded"]
    result = FoldConstants()(from_proto(inferred))
    (constant,) = result.graph.nodes
    assert constant.op == "Constant"
    found = constant_value(constant.outputs[0])
    assert found is not None
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert Session(result.graph, optimization="disabled", threads=1).run({})["folded"].shape == expected.shape


def test_constant_nodes_become_initializers() -> None:
    result = FoldConstants()(from_proto(BY_NAME["constant_kinds"].build()))
    assert operators(result).count("Constant") == 2  # the sparse one, and the text that leaves the graph
    assert "sparse" in next(iter(reasons(result).values()))
    kinds = {change.kind for change in result.report.changes}
    assert kinds == {"stored", "folded"}


def test_folded_tensor_keeps_its_name_for_readers_in_bodies() -> None:
    result = checked(BY_NAME["loop_body"].build())
    (loop,) = result.graph.nodes
    assert loop.op == "Loop"
    multiply = next(node for node in walk_nodes(result.graph) if node.op == "Mul")
    assert any(constant_value(tensor) is not None for tensor in multiply.inputs)


def test_folds_inside_branches() -> None:
    result = checked(BY_NAME["if_branches"].build())
    assert "Mul" not in operators(result)


def test_output_of_the_graph_becomes_a_constant_node() -> None:
    model = BY_NAME["output_is_input"].build()
    result = checked(model)
    constants = {node.outputs[0].name for node in result.graph.nodes if node.op == "Constant"}
    assert constants == {"constant", "folded"}
    assert [o.name for o in result.graph.outputs] == [o.name for o in model.graph.output]


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hazard", "node", "reason"),
    [
        ("random_and_stateful", "n0_RandomNormalLike", "it is random"),
        ("custom_domain", "n3_Mystery", "domain 'com.example'"),
        ("sequences", "n0_SequenceConstruct", "not among the operators"),
        ("existing_qdq", "n0_DequantizeLinear", "quantisation parameters"),
    ],
)
def test_refused_with_the_reason(hazard: str, node: str, reason: str) -> None:
    result = FoldConstants()(from_proto(BY_NAME[hazard].build()))
    assert reason in reasons(result)[node]


def test_quantisation_is_never_folded() -> None:
    net = Net()
    parameters = net.floats(0.1), net.const(3, np.uint8)
    y = net.add("DequantizeLinear", net.add("QuantizeLinear", net.random(4), *parameters), *parameters)
    net.add("Add", net.input("x", ["N", 4]), net.add("Relu", y), to="y")
    net.output("y", ["N", 4])
    result = FoldConstants()(from_proto(net.model()))
    assert not result.report.changed
    assert list(reasons(result)) == ["n0_QuantizeLinear"]


def test_overridable_initializer_is_no_constant() -> None:
    assert not FoldConstants()(from_proto(BY_NAME["overridable_initializer"].build())).report.changed


def test_if_on_a_constant_is_left_alone() -> None:
    net = Net()
    branches = []
    for name in ("then", "else"):
        inner = Net()
        inner.add("Exp", inner.floats([1.0]), to=name)
        inner.output(name, [1])
        branches.append(inner.body(name))
    net.add("If", net.const(True), to="y", then_branch=branches[0], else_branch=branches[1])
    net.output("y", [1])
    assert reasons(FoldConstants()(from_proto(net.model())))["n0_If"] == "it is control flow"


@pytest.mark.parametrize(
    ("op", "inputs", "reason"),
    [
        ("Div", [np.array([1]), np.array([0])], "division by zero"),
        ("Gather", [np.array([1.0], np.float32), np.array([3])], "do not fit"),
        ("Reshape", [np.array([1.0], np.float32), np.array([3])], "do not fit"),
        ("Concat", [np.ones((1, 2), np.float32), np.ones((1, 3), np.float32)], "do not fit"),
        ("Hardmax", [np.ones(3, np.float32)], "not among the operators"),
        ("Cast", [np.array([1e20, np.nan], np.float32)], "values outside of int32"),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated_is_refused(op: str, inputs: list[NDArray[Any]], reason: str) -> None:
    net = Net()
    attributes = {"Cast": {"to_": TensorProto.INT32}, "Concat": {"axis": 0}}.get(op, {})
    y = net.add(op, *[net.const(value) for value in inputs], **attributes)
    net.add("Identity", y, to="y")
    net.output("y", None)
    result = FoldConstants()(from_proto(net.model()))
    assert reason in reasons(result)[f"n0_{op}"]
    assert "\n" not in reasons(result)[f"n0_{op}"]


def test_softmax_of_old_opsets_is_refused() -> None:
    net = Net(11)
    net.add("Add", net.input("x", ["N", 2, 3, 4]), net.add("Softmax", net.random(2, 3, 4)), to="y")
    net.output("y", ["N", 2, 3, 4])
    assert "opset 11" in reasons(FoldConstants()(from_proto(net.model())))["n0_Softmax"]


@pytest.mark.parametrize("opset", [5, 6])
def test_broadcasting_of_old_opsets_is_refused(opset: int) -> None:
    net = Net(opset)
    y = net.add("Mul", net.random(2, 3), net.random(2), broadcast=1, axis=0)
    net.add("Add", net.input("x", [2, 3]), y, to="y")
    net.output("y", [2, 3])
    assert "broadcasting" in reasons(FoldConstants()(from_proto(net.model())))["n0_Mul"]


# ---- the size limit ----------------------------------------------------------------------------------------------


def large(op: str) -> onnx.ModelProto:
    net = Net()
    shape = net.ints(1000, 1000)
    if op == "ConstantOfShape":
        y = net.add("ConstantOfShape", shape)
    elif op == "Expand":
        y = net.add("Expand", net.random(1000), shape)
    elif op == "Mul":
        y = net.add("Mul", net.random(1000, 1), net.random(1000))
    else:
        y = net.add("Tile", net.random(10, 1000), net.ints(100, 1))
    net.add("Add", net.input("x", ["N", 1000, 1000]), y, to="y")
    net.output("y", ["N", 1000, 1000])
    return net.model()


@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand", "Mul", "Tile"])
def test_size_limit(op: str) -> None:
    graph = from_proto(large(op))
    result = FoldConstants()(graph)
    assert not result.report.changed
    assert "4000000 bytes is above the limit of 1048576 bytes" in reasons(result)[f"n0_{op}"]
    assert operators(FoldConstants(size_limit=4_000_000)(graph)) == ["Add"]


def test_huge_result_is_not_even_made() -> None:
    net = Net()
    y = net.add("ConstantOfShape", net.ints(2**20, 2**20))
    net.add("Add", net.input("x", ["N"]), net.add("ReduceSum", y, keepdims=0), to="y")
    net.output("y", ["N"])
    assert "above the limit" in reasons(FoldConstants()(from_proto(net.model())))["n0_ConstantOfShape"]


def test_result_as_large_as_what_it_replaces_is_folded() -> None:
    net = Net()
    y = net.add("Transpose", net.random(4, 8))
    net.add("MatMul", net.input("x", ["N", 8]), y, to="y")
    net.output("y", ["N", 4])
    assert operators(FoldConstants(size_limit=0)(from_proto(net.model()))) == ["MatMul"]


def test_shared_input_is_not_replaced() -> None:
    """Two large tensors would be stored instead of one, since something else still reads the first."""
    net = Net()
    weight = net.random(8, 8)
    y = net.add("MatMul", net.input("x", ["N", 8]), net.add("Transpose", weight))
    net.add("MatMul", y, weight, to="y")
    net.output("y", ["N", 8])
    result = FoldConstants(size_limit=100)(from_proto(net.model()))
    assert "256 bytes is above the limit of 100 bytes" in reasons(result)["n0_Transpose"]


def test_options_are_checked() -> None:
    with pytest.raises(ValidationError):
        FoldConstants(size_limit=-1)
    with pytest.raises(ValidationError):
        FoldConstants(limit=3)  # type: ignore[call-arg]


# ---- shapes ------------------------------------------------------------------------------------------------------


def test_shortcut_of_a_residual_network() -> None:
    result = checked(BY_NAME["slice_pad_shortcut"].build())
    assert set(operators(result)) <= {
        "Add", "AveragePool", "BatchNormalization", "Conv", "Gemm", "Pad", "Relu", "Reshape", "Slice"
    }  # fmt: skip
    reshape = next(node for node in result.graph.nodes if node.op == "Reshape")
    value = constant_value(reshape.inputs[1])
    assert value is not None
    assert value.tolist() == [0, -1]


def test_reshapes_of_attention_with_dynamic_batch_and_length() -> None:
    result = checked(BY_NAME["attention"].build(), S=7)
    assert not {"Shape", "Concat"} & set(operators(result))
    targets = [constant_value(node.inputs[1]) for node in result.graph.nodes if node.op == "Reshape"]
    assert [t.tolist() for t in targets if t is not None] == [[0, 0, 2, 4]] * 3 + [[0, 0, -1]]


def test_shape_stated_by_the_file_is_not_believed() -> None:
    result = checked(BY_NAME["wrongly_declared_output"].build())
    assert "Shape" in operators(result)


def reshape_to(build: Any, shape: list[int | str], output: list[int | str | None]) -> PassResult:
    """x of ``shape`` reshaped to what ``build(net, x)`` computes."""
    net = Net()
    x = net.add("Relu", net.input("x", shape))
    net.add("Reshape", x, build(net, x), to="y")
    net.output("y", output)
    return checked(net.model())


def element(net: Net, x: str, axis: int) -> str:
    return net.add("Gather", net.add("Shape", x), net.ints(axis))


def target_of(result: PassResult) -> list[int] | None:
    (reshape,) = [node for node in result.graph.nodes if node.op == "Reshape"]
    value = constant_value(reshape.inputs[1])
    return None if value is None else [int(v) for v in value]


def test_batch_is_copied() -> None:
    result = reshape_to(
        lambda net, x: net.add("Concat", element(net, x, 0), net.ints(-1), axis=0), ["N", 2, 3], ["N", 6]
    )
    assert target_of(result) == [0, -1]


def test_unknown_length_is_what_remains() -> None:
    """The batch ends at another position than it started from: it cannot be copied, but it is all that is left."""
    result = reshape_to(
        lambda net, x: net.add("Concat", net.ints(6), element(net, x, 0), axis=0), ["N", 2, 3], [6, "N"]
    )
    assert target_of(result) == [6, -1]


def test_product_of_lengths() -> None:
    result = reshape_to(
        lambda net, x: net.add(
            "Concat", element(net, x, 0), net.add("Mul", element(net, x, 1), element(net, x, 2)), axis=0
        ),
        ["N", 2, 3],
        ["N", 6],
    )
    assert target_of(result) == [0, 6]


def test_batch_times_length_is_what_remains() -> None:
    result = reshape_to(
        lambda net, x: net.add(
            "Concat", net.add("Mul", element(net, x, 0), element(net, x, 1)), element(net, x, 2), axis=0
        ),
        ["N", "S", 4],
        [None, 4],
    )
    assert target_of(result) == [-1, 4]


def test_two_unknown_lengths_stay() -> None:
    result = reshape_to(
        lambda net, x: net.add("Concat", element(net, x, 1), element(net, x, 0), net.ints(4), axis=0),
        ["N", "S", 4],
        ["S", "N", 4],
    )
    assert target_of(result) is None


def test_remainder_is_not_given_beside_a_copied_length() -> None:
    """-1 beside 0 would be ambiguous for an empty batch."""
    net = Net()
    x = net.add("Relu", net.input("x", ["N", "S", 4]))
    half = net.add("Div", element(net, x, 1), net.ints(1))
    double = net.add("Mul", element(net, x, 1), net.ints(2))
    net.add("Reshape", x, net.add("Concat", element(net, x, 0), double, net.ints(2), axis=0), to="y")
    net.add("Identity", half, to="z")
    net.output("y", ["N", None, 2])
    net.output("z", [1], I64)
    assert target_of(checked(net.model())) is None


def test_allowzero_is_not_copied() -> None:
    net = Net()
    x = net.add("Relu", net.input("x", ["N", 2, 3]))
    net.add("Reshape", x, net.add("Concat", element(net, x, 0), net.ints(6), axis=0), to="y", allowzero=1)
    net.output("y", ["N", 6])
    assert target_of(checked(net.model())) == [-1, 6]


@pytest.mark.parametrize("symbol", ["N", None])
def test_dimension_without_a_symbol_is_copied_too(symbol: str | None) -> None:
    net = Net()
    x = net.add("Relu", net.input("x", [symbol, 2, 3]))
    net.add("Reshape", x, net.add("Concat", element(net, x, 0), net.ints(-1), axis=0), to="y")
    net.output("y", [symbol, 6])
    assert target_of(checked(net.model())) == [0, -1]


def test_lengths_of_two_inputs_are_not_mixed_up() -> None:
    net = Net()
    x, z = net.input("x", [None, 4]), net.input("z", [None, 4])
    net.add("Reshape", x, net.add("Concat", element(net, z, 0), net.ints(2), net.ints(-1), axis=0), to="y")
    net.output("y", [None, 2, None])
    assert target_of(checked(net.model())) is None


def test_static_shapes_are_folded_whole() -> None:
    net = Net()
    x = net.add("Relu", net.input("x", ["N", 6, 4]))
    size = net.add("Size", net.add("Relu", net.input("z", [3, 5])))
    tail = net.add("Slice", net.add("Shape", x), net.ints(1), net.ints(3))
    grid = net.add("ConstantOfShape", tail, value=numpy_helper.from_array(np.array([2.0], np.float32)))
    y = net.add("Mul", x, net.add("Add", grid, net.add("Cast", size, to_=F32)))
    net.add("Add", y, net.add("Cast", net.add("Shape", x, start=1, end=2), to_=F32), to="y")
    net.output("y", ["N", 6, 4])
    assert operators(checked(net.model())) == ["Relu", "Mul", "Add"]


def test_expand_to_the_own_shape() -> None:
    """How torch writes expand(): Where(Equal(shape, -1), ones, shape), which holds no -1."""
    net = Net()
    x = net.add("Relu", net.input("x", ["N", 1, 4]))
    shape = net.add("Concat", element(net, x, 0), net.ints(3), net.ints(4), axis=0)
    ones = net.add("ConstantOfShape", net.ints(3), value=numpy_helper.from_array(np.array([1], np.int64)))
    chosen = net.add("Where", net.add("Equal", shape, net.ints(-1)), ones, shape)
    net.add("Expand", x, chosen, to="y")
    net.output("y", ["N", 3, 4])
    result = checked(net.model())
    assert operators(result) == ["Relu", "Expand"]
    value = constant_value(result.graph.nodes[1].inputs[1])
    assert value is not None
    assert value.tolist() == [1, 3, 4]


def test_shape_known_only_after_another_fold() -> None:
    """Inference does not see through Abs; the second round does, when Abs is a constant."""
    net = Net()
    x = net.add("Relu", net.input("x", [2, 3, 4]))
    for target in ([6, 4], [4, 6], [24]):
        shape = net.add("Abs", net.add("Neg", net.ints(*target)))
        x = net.add("Relu", net.add("Reshape", x, shape))
    net.add("Mul", x, net.add("Cast", net.add("Shape", x), to_=F32), to="y")
    net.output("y", [24])
    result = checked(net.model())
    assert not {"Shape", "Abs", "Cast"} & set(operators(result))


def test_inference_that_fails_is_a_refusal() -> None:
    net = Net()
    x = net.input("x", ["N", 4])
    y = net.add("MatMul", x, net.random(5, 3))  # does not fit
    net.add("Add", y, net.add("Cast", net.add("Shape", y), to_=F32), to="y")
    net.output("y", None)
    result = FoldConstants()(from_proto(net.model()))
    assert not result.report.changed


def test_linear_in_graph_size() -> None:
    net = Net()
    x, half, c = net.input("x", ["N", 2]), net.floats(0.5), net.floats([1.0, 2.0])
    for _ in range(12_000):
        c = net.add("Mul", c, half)
    for _ in range(2000):
        shape = net.add("Concat", element(net, x, 0), net.ints(-1), axis=0)
        x = net.add("Reshape", x, shape)
    net.add("Add", x, c, to="y")
    net.output("y", ["N", 2])
    graph = from_proto(net.model())
    start = time.perf_counter()
    result = FoldConstants()(graph)
    assert time.perf_counter() - start < 30  # 3 s on an idle machine
    assert "Mul" not in result.report.after.operators


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(-12, 12) | st.sampled_from([-(2**63), 2**63 - 1]),
    end=st.integers(-12, 12) | st.sampled_from([-(2**63), 2**63 - 1]),
    step=st.integers(-4, 4).filter(bool),
    size=st.integers(1, 9),
)
def test_slice_as_onnxruntime_clamps(start: int, end: int, step: int, size: int) -> None:
    net = Net()
    net.add("Slice", net.const(np.arange(size)), net.ints(start), net.ints(end), net.ints(0), net.ints(step), to="y")
    net.output("y", [None], I64)
    expected = Session(net.model(), optimization="disabled", threads=1).run({})["y"]
    result = FoldConstants()(from_proto(net.model()))
    (constant,) = result.graph.nodes
    if step < 0 and end == 2**63 - 1:
        assert "runtimes disagree" in reasons(result)["n0_Slice"]
        return
    np.testing.assert_array_equal(constant_value(constant.outputs[0]), expected)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["add", "sub", "mul", "div", "min", "max", "double", "flip", "self"]), max_size=5),
    number=st.integers(1, 4),
)
def test_partial_shapes_agree_with_the_runtime(steps: list[str], number: int) -> None:
    """Arithmetic on a shape of which one element is not known: whatever is folded must hold for every batch."""
    net = Net()
    x = net.input("x", ["N", 3, 4])
    shape = net.add("Shape", x)
    for step in steps:
        match step:
            case "add" | "sub" | "mul" | "div" | "min" | "max":
                shape = net.add(step.capitalize(), shape, net.ints(number))
            case "double":
                shape = net.add("Concat", shape, shape, axis=0)
            case "flip":
                shape = net.add("Slice", shape, net.ints(-1), net.ints(-(2**62)), net.ints(0), net.ints(-1))
            case "self":
                shape = net.add("Sub", shape, net.add("Identity", shape))
    picked = [net.add("Gather", shape, net.const(i, np.int64)) for i in (0, 1, -1)]
    for i, name in enumerate(picked):
        net.add("Identity", name, to=f"y{i}")
        net.output(f"y{i}", [], I64)
    checked(net.model())


def test_branches_share_equal_results() -> None:
    """Weights that both branches of an If prepare are stored once, and those that only one has where they are read."""
    rng = np.random.default_rng(0)
    net = Net()
    x, weight = net.input("x", ["N", 16]), net.const(rng.normal(size=(16, 16)).astype(np.float32))
    branches = []
    for name in ("then", "else"):
        inner = Net()
        prepared = inner.add("Transpose", inner.add("Neg", weight), to="w", perm=[1, 0])
        own = inner.add("Exp", inner.const(rng.normal(size=(16, 16)).astype(np.float32)))
        inner.add("MatMul", inner.add("MatMul", x, prepared), own, to=name)
        inner.output(name, ["N", 16])
        branches.append(inner.body(name))
    net.add("If", net.input("which", [], TensorProto.BOOL), to="y", then_branch=branches[0], else_branch=branches[1])
    net.output("y", ["N", 16])
    model = net.model()
    result = EliminateDeadNodes()(FoldConstants()(from_proto(model)).graph).graph
    folded = to_proto(result)
    assert [tuple(t.dims) for t in folded.graph.initializer] == [(16, 16)]
    for attribute in folded.graph.node[-1].attribute:
        assert [n.op_type for n in attribute.g.node] == ["MatMul", "MatMul"]
        assert [tuple(t.dims) for t in attribute.g.initializer] == [(16, 16)]
    for which in (True, False):
        feeds = {"x": rng.normal(size=(3, 16)).astype(np.float32), "which": np.array(which)}
        expected, found = (Session(m, threads=1).run(feeds)["y"] for m in (from_proto(model), result))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
