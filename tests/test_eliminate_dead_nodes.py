"""eliminate_dead_nodes: what hands its input through, what only looks so, and what nothing depends on."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnx
import pytest
from models import BOOL, BY_NAME, F32, F64, I64, Net, image, make_feeds
from onnx import TensorProto

from onnxcompress.base import PassResult
from onnxcompress.graph import model_info, walk_nodes
from onnxcompress.passes.eliminate_dead_nodes import EliminateDeadNodes
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.session import Session


def operators(result: PassResult) -> list[str]:
    return [node.op for node in walk_nodes(result.graph)]


def reasons(result: PassResult) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in result.report.refusals}


def eliminated(model: onnx.ModelProto, **sizes: int) -> PassResult:
    """Run the pass and compare bit for bit."""
    onnx.checker.check_model(model, full_check=True)
    result = EliminateDeadNodes()(from_proto(model))
    after = to_proto(result.graph)
    onnx.checker.check_model(after, full_check=True)
    for batch in (1, 3):
        feeds = make_feeds(model, sizes={"N": batch, **sizes})
        expected = Session(model, optimization="disabled", threads=1).run(feeds)
        found = Session(after, optimization="disabled", threads=1).run(feeds)
        for name, wanted in expected.items():
            assert found[name].shape == wanted.shape
            assert found[name].tobytes() == wanted.tobytes()
    return result


def between_relus(
    op: str, *values: Any, opset: int = 17, shape: tuple[int | str, ...] = ("N", 3, 8), **attributes: Any
) -> onnx.ModelProto:
    """x -> Relu -> op -> Relu -> y, with ``values`` as further inputs; None omits one."""
    net = Net(opset)
    x = net.add("Relu", net.input("x", list(shape)))
    names = ["" if v is None else net.const(np.asarray(v)) for v in values]
    net.add("Relu", net.add(op, x, *names, **attributes), to="y")
    net.outputs.append(onnx.helper.make_empty_tensor_value_info("y"))
    model = onnx.shape_inference.infer_shapes(net.model(), data_prop=True)
    if not model.graph.output[0].type.tensor_type.HasField("shape"):
        model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", F32, [None] * len(shape)))
    return model


END = 2**63 - 1

NO_OPS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("Identity", (), {}),
    ("Identity", (), {"opset": 7}),
    ("Dropout", (), {}),
    ("Dropout", (np.float32(0.3),), {}),
    ("Dropout", (np.float32(0.3), False), {}),
    ("Dropout", (None, False), {}),
    ("Dropout", (), {"opset": 7, "ratio": 0.3}),
    ("Dropout", (), {"opset": 10}),
    ("Cast", (), {"to_": F32}),
    ("Cast", (), {"to_": F32, "opset": 9}),
    ("Transpose", (), {"perm": [0, 1, 2]}),
    ("Transpose", (), {"shape": (4,)}),
    ("Concat", (), {"axis": -1}),
    ("Sum", (), {}),
    ("Max", (), {}),
    ("Min", (), {}),
    ("Mean", (), {}),
    ("Pad", ([0] * 6,), {}),
    ("Pad", ([0] * 6, np.float32(2.0)), {"mode": "constant"}),
    ("Pad", ([0] * 6,), {"mode": "edge"}),
    ("Pad", (), {"opset": 7, "pads": [0] * 6}),
    ("Slice", ([0], [END]), {}),
    ("Slice", ([0, 0], [2**31 - 1, 8], [0, 2], [1, 1]), {}),
    ("Slice", ([-8], [100], [-1]), {}),
    ("Slice", ([-100, 0], [3, END], [1, 0]), {}),
    ("Slice", (), {"opset": 9, "starts": [0, 0], "ends": [END, 3], "axes": [0, 1]}),
    ("Slice", (), {"opset": 9, "starts": [0], "ends": [END]}),
    ("Reshape", ([0, 0, 0],), {}),
    ("Reshape", ([0, 0, -1],), {}),
    ("Reshape", ([-1, 3, 8],), {}),
    ("Reshape", ([0, 3, -1],), {}),
    ("Reshape", ([2, 3, 4],), {"shape": (2, 3, 4), "allowzero": 1}),
    ("Reshape", ([0, -1],), {"shape": ("N", "S")}),
    ("Expand", ([1],), {}),
    ("Expand", ([1, 3, 8],), {}),
    ("Expand", ([3, 1],), {}),
    ("Flatten", (), {"shape": ("N", 4)}),
    ("Flatten", (), {"shape": ("N", 4), "axis": -1}),
    ("Squeeze", (), {"shape": (2, 3)}),
    ("Squeeze", (), {"shape": (2, 3), "opset": 11}),
    ("Unsqueeze", (np.array([], np.int64),), {}),
]  # fmt: skip

LOOK_ALIKES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("Dropout", (np.float32(0.0), True), {}),
    ("Cast", (), {"to_": F64}),
    ("Cast", (), {"to_": TensorProto.FLOAT16}),
    ("Transpose", (), {"shape": (3, 3)}),
    ("Transpose", (), {"perm": [0, 2, 1], "shape": ("N", 3, 3)}),
    ("Concat", (np.ones((1, 3, 8), np.float32),), {"axis": 0}),
    ("Max", (np.float32(0.0),), {}),
    ("Pad", ([0, 0, 0, 0, 0, 1],), {}),
    ("Pad", ([0, 0, 1, 0, 0, -1],), {}),
    ("Pad", (), {"opset": 7, "pads": [0, 0, 0, 0, 0, 1]}),
    ("Slice", ([0], [7], [2]), {}),
    ("Slice", ([0], [-1], [2]), {}),
    ("Slice", ([0], [2], [0]), {}),
    ("Slice", ([-2], [END], [0]), {}),
    ("Slice", ([-1], [-END], [2], [-1]), {}),
    ("Slice", ([0], [END], [2], [2]), {}),
    ("Reshape", ([-1, 8, 3],), {}),
    ("Reshape", ([3, -1, 8],), {}),
    ("Reshape", ([1, -1, 3, 8],), {}),
    ("Reshape", ([-1, 1],), {}),
    ("Expand", ([2, 1, 1, 1],), {}),
    ("Expand", ([4, 1],), {"shape": ("N", 1, 8)}),
    ("Flatten", (), {"shape": ("N", 4), "axis": 0}),
    ("Flatten", (), {}),
    ("Squeeze", (), {"shape": (1, 3)}),
    ("Squeeze", ([0],), {"shape": (1, 3)}),
    ("Unsqueeze", ([0],), {}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "values", "options"), NO_OPS, ids=str)
def test_hands_its_input_through(op: str, values: tuple[Any, ...], options: dict[str, Any]) -> None:
    result = eliminated(between_relus(op, *values, **options))
    assert operators(result) == ["Relu", "Relu"]
    (change,) = result.report.changes
    assert (change.kind, change.node) == ("removed", f"n1_{op}")


@pytest.mark.parametrize(("op", "values", "options"), LOOK_ALIKES, ids=str)
def test_only_looks_so(op: str, values: tuple[Any, ...], options: dict[str, Any]) -> None:
    result = eliminated(between_relus(op, *values, **options))
    assert operators(result) == ["Relu", op, "Relu"]
    assert not result.report.changed


def test_training_mode_that_is_no_constant() -> None:
    net = Net()
    training = net.input("training", [], BOOL)
    net.add("Dropout", net.add("Relu", net.input("x", ["N"])), net.floats(0.5), training, to="y")
    net.output("y", ["N"])
    result = EliminateDeadNodes()(from_proto(net.model()))
    assert "'training' is no constant" in reasons(result)["n1_Dropout"]


@pytest.mark.parametrize("is_test", [0, 1])
def test_dropout_of_opset_6(is_test: int) -> None:
    net = Net(6)
    net.add("Relu", net.add("Dropout", net.input("x", ["N"]), is_test=is_test), to="y")
    net.output("y", ["N"])
    result = EliminateDeadNodes()(from_proto(net.model()))
    assert operators(result) == (["Relu"] if is_test else ["Dropout", "Relu"])


def test_mask_that_nobody_reads() -> None:
    net = Net()
    net.add("Dropout", net.add("Relu", net.input("x", ["N"])), to=["kept", "mask"])
    net.add("Exp", "kept", to="y")
    net.output("y", ["N"])
    assert operators(eliminated(net.model())) == ["Relu", "Exp"]


@pytest.mark.parametrize(
    ("hazard", "node", "reason"),
    [
        ("dropout_training", "n1_Dropout", "it is in training mode"),
        ("dropout_mask", "n1_Dropout", "its mask is read"),
        ("output_is_input", "n0_Identity", "names the graph output 'same', and what it reads is a graph input"),
        ("output_is_input", "n5_Identity", "'again', and what it reads is a graph output too"),
        ("weight_shared_with_branch", "n0_Identity", "belongs to an outer graph"),
        ("loop_body", "n0_Identity", "'go_on', and what it reads is a graph input"),
    ],
)
def test_refused_with_the_reason(hazard: str, node: str, reason: str) -> None:
    result = EliminateDeadNodes()(from_proto(BY_NAME[hazard].build()))
    assert reason in reasons(result)[node]


def test_all_no_ops_of_a_network() -> None:
    result = eliminated(BY_NAME["no_ops"].build())
    assert operators(result) == ["Relu"] * 11 + ["Reshape", "Pad", "Slice", "Expand", "Flatten"]


# ---- names -------------------------------------------------------------------------------------------------------


def test_producer_takes_the_name_of_the_output() -> None:
    net = Net()
    x = net.add("Relu", net.input("x", ["N", 4]), to="inner")
    net.add("Exp", x, to="z")
    net.add("Reshape", net.add("Identity", x), net.ints(0, 4), to="y")
    net.output("y", ["N", 4])
    net.output("z", ["N", 4])
    result = eliminated(net.model())
    assert operators(result) == ["Relu", "Exp"]
    relu, exp = result.graph.nodes
    assert [relu.outputs[0].name, exp.inputs[0].name] == ["y", "y"]


def test_two_outputs_of_one_tensor_stay_two() -> None:
    net = Net()
    x = net.add("Relu", net.input("x", ["N", 4]))
    for name in ("a", "b", "c"):
        net.add("Identity", x, to=name)
        net.output(name, ["N", 4])
    result = eliminated(net.model())
    assert sorted(operators(result)) == ["Identity", "Identity", "Relu"]
    assert [o.name for o in result.graph.outputs] == ["a", "b", "c"]


def test_output_of_control_flow_is_renamed() -> None:
    net = Net()
    branches = []
    x = image(net)
    for name, op in (("then", "Relu"), ("else", "Exp")):
        inner = Net()
        inner.add("Identity", inner.add(op, x, to=f"{name}_inner"), to=name)
        inner.output(name, ["N", 3, 8, 8])
        branches.append(inner.body(name))
    y = net.add("If", net.input("condition", [], BOOL), then_branch=branches[0], else_branch=branches[1])
    net.add("Identity", y, to="y")
    net.output("y", ["N", 3, 8, 8])
    result = eliminated(net.model())
    assert sorted(operators(result)) == ["Exp", "If", "Relu"]
    assert result.graph.nodes[0].outputs[0].name == "y"


def test_readers_in_nested_graphs_follow() -> None:
    result = eliminated(BY_NAME["if_branches"].build())
    assert "Identity" not in operators(result)


def test_constant_node_takes_the_name_of_the_output() -> None:
    net = Net()
    net.add("Identity", net.add("Constant", value_ints=[1, 2]), to="y")
    net.output("y", [2], I64)
    assert operators(eliminated(net.model())) == ["Constant"]


# ---- what nothing depends on -------------------------------------------------------------------------------------


def test_dead_nodes_and_unread_initializers() -> None:
    model = BY_NAME["dead_branch"].build()
    result = eliminated(model)
    assert operators(result) == ["Conv"]
    assert {t.name for t in to_proto(result.graph).graph.initializer} == {result.graph.nodes[0].inputs[1].name}
    assert "unread" in {change.node for change in result.report.changes}
    assert model_info(result.graph).unread == []


def test_dead_nodes_in_bodies() -> None:
    model = BY_NAME["if_branches"].build()
    assert "Exp" in {node.op for node in walk_nodes(from_proto(model))}
    assert "Exp" not in operators(eliminated(model))


def test_unread_initializers_in_bodies() -> None:
    net = Net()
    branches = []
    x = image(net)
    for name in ("then", "else"):
        inner = Net()
        inner.add("Exp", x, to=name)
        inner.floats([1.0], name=f"{name}_unread")
        inner.output(name, ["N", 3, 8, 8])
        branches.append(inner.body(name))
    net.add("If", net.input("condition", [], BOOL), to="y", then_branch=branches[0], else_branch=branches[1])
    net.output("y", ["N", 3, 8, 8])
    result = eliminated(net.model())
    assert {c.node for c in result.report.changes} == {"then_unread", "else_unread"}


def test_dead_control_flow_goes_with_its_bodies() -> None:
    net = Net()
    x = image(net)
    inner = Net()
    inner.add("Exp", x, to="dead")
    inner.output("dead", ["N", 3, 8, 8])
    other = Net()
    other.add("Relu", x, to="dead_too")
    other.output("dead_too", ["N", 3, 8, 8])
    net.add("If", net.input("condition", [], BOOL), then_branch=inner.body("then"), else_branch=other.body("else"))
    net.add("Relu", x, to="y")
    net.output("y", ["N", 3, 8, 8])
    result = eliminated(net.model())
    assert operators(result) == ["Relu"]
    assert [t.name for t in result.graph.inputs] == ["x", "condition"]


def test_what_only_a_body_reads_is_alive() -> None:
    net = Net()
    weight = net.add("Exp", net.input("w", ["N"]))
    branches = []
    for name in ("then", "else"):
        inner = Net()
        inner.add("Relu", weight, to=name)
        inner.output(name, ["N"])
        branches.append(inner.body(name))
    net.add("If", net.input("condition", [], BOOL), to="y", then_branch=branches[0], else_branch=branches[1])
    net.output("y", ["N"])
    assert sorted(operators(eliminated(net.model()))) == ["Exp", "If", "Relu", "Relu"]


def test_overridable_initializers_stay() -> None:
    net = Net()
    net.input(net.floats([1.0], name="unused"), [1])
    net.add("Relu", net.input("x", ["N"]), to="y")
    net.output("y", ["N"])
    after = to_proto(eliminated(net.model()).graph)
    assert [i.name for i in after.graph.input] == ["unused", "x"]
    assert [t.name for t in after.graph.initializer] == ["unused"]


def test_shape_stated_by_the_file_is_not_believed() -> None:
    net = Net()
    x = net.add("Relu", net.input("x", ["N", 4]), to="hidden")
    net.add("Reshape", net.add("Relu", net.add("Reshape", x, net.ints(1, -1))), net.ints(-1), to="y")
    net.output("y", [None])
    model = net.model()
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("hidden", F32, [1, 4]))
    result = EliminateDeadNodes()(from_proto(model))
    assert operators(result) == ["Relu", "Reshape", "Relu", "Reshape"]


def test_linear_in_graph_size() -> None:
    net = Net()
    x = net.input("x", ["N", 2])
    for _ in range(10_000):
        x = net.add("Identity", net.add("Relu", x))
    net.add("Identity", x, to="y")
    net.output("y", ["N", 2])
    graph = from_proto(net.model())
    start = time.perf_counter()
    result = EliminateDeadNodes()(graph)
    assert time.perf_counter() - start < 30  # 3 s on an idle machine
    assert result.report.after.operators == {"Relu": 10_000}


def test_the_exporters_notes_go_and_others_stay() -> None:
    model = BY_NAME["attention"].build()
    for node in model.graph.node:
        node.doc_string = "kept"
        for key in ("pkg.torch.onnx.stack_trace", "namespace", "origin"):
            node.metadata_props.add(key=key, value="somewhere " * 9)
    graph = from_proto(model)
    result = EliminateDeadNodes()(graph)
    assert [c.detail for c in result.report.changes if "notes" in c.detail]
    written = to_proto(result.graph)
    for node in written.graph.node:
        assert {p.key for p in node.metadata_props} == {"origin"} and node.doc_string == "kept"
    assert to_proto(graph).SerializeToString() == to_proto(from_proto(model)).SerializeToString()
    assert not EliminateDeadNodes()(result.graph).report.changes
