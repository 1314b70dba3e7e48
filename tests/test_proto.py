"""Everything in an ONNX file survives the way through graphsurgeon's IR and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.errors import ModelError, OnnxCompressError
from onnxcompress.graph import (
    RawAttribute,
    constant_value,
    copy_graph,
    input_specs,
    model_info,
    redirect,
    set_constant,
    walk_graphs,
    walk_nodes,
)
from onnxcompress.proto import checkable, from_proto, to_proto, to_skeleton
from onnxcompress.shapes import infer_shapes

FLOAT = TensorProto.FLOAT
value_info = helper.make_tensor_value_info


def model_of(
    nodes: Iterable[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto] = (),
    outputs: Iterable[onnx.ValueInfoProto] = (),
    initializers: Iterable[onnx.TensorProto] = (),
    *,
    ir_version: int = 10,
    opset: int = 21,
    **graph_fields: object,
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers), **graph_fields)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def tensor(name: str, array: object) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def same(left: onnx.ModelProto, right: onnx.ModelProto) -> bool:
    return bool(left.SerializeToString(deterministic=True) == right.SerializeToString(deterministic=True))


def assert_round_trip(model: onnx.ModelProto) -> gs.Graph:
    """Byte for byte the same, for copies too, and neither the proto nor the graph is changed by it."""
    before = model.SerializeToString(deterministic=True)
    graph = from_proto(model)
    out = to_proto(graph)
    assert str(out) == str(model)
    assert same(out, model)
    assert same(to_proto(copy_graph(graph)), model)
    assert same(to_proto(graph), model)
    assert model.SerializeToString(deterministic=True) == before
    return graph


def add_properties(message: object, **entries: str) -> None:
    for key, value in entries.items():
        message.metadata_props.add(key=key, value=value)  # type: ignore[attr-defined]


def sparse(name: str) -> onnx.SparseTensorProto:
    values = tensor(name, np.array([5.0, 7.0], np.float32))
    return helper.make_sparse_tensor(values, tensor("", np.array([1, 3], np.int64)), [2, 3])


def branch(name: str, output: str, *nodes: onnx.NodeProto, **fields: object) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [value_info(output, FLOAT, ["n", 4])], **fields)


def if_model() -> onnx.ModelProto:
    """If with weights in the outer graph and in a branch, one of them read by both branches only."""
    then = branch(
        "then",
        "t_out",
        helper.make_node("Add", ["x", "only_nested"], ["t1"], "t_add", doc_string="in a branch"),
        helper.make_node("Mul", ["t1", "inner"], ["t_out"], "t_mul"),
        initializer=[tensor("inner", np.full(4, 2.0, np.float32))],
        value_info=[value_info("t1", FLOAT, ["n", 4])],
        doc_string="then branch",
    )
    add_properties(then, place="then")
    other = branch(
        "else",
        "e_out",
        helper.make_node("Sub", ["x", "only_nested"], ["e1"], "e_sub"),
        helper.make_node("Mul", ["e1", "inner"], ["e_out"], "e_mul"),
        initializer=[tensor("inner", np.full((1, 4), 3.0, np.float32))],
    )
    return model_of(
        [helper.make_node("If", ["c"], ["y"], "choose", then_branch=then, else_branch=other)],
        [value_info("c", TensorProto.BOOL, []), value_info("x", FLOAT, ["n", 4])],
        [value_info("y", FLOAT, ["n", 4])],
        [tensor("only_nested", np.arange(4, dtype=np.float32)), tensor("unread", np.arange(3, dtype=np.float32))],
    )


def rich_model() -> onnx.ModelProto:
    """One of everything that graphsurgeon has no place for."""
    inner = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["inner_y"], "inner_neg")], "inner", [], [value_info("inner_y", FLOAT, [])]
    )
    odd = helper.make_node("Odd", ["x", "", "w"], ["h", "", "h2"], "odd", domain="my.domain", doc_string="a note")
    attributes = {
        "graphs": [inner, branch("second", "second_y", helper.make_node("Abs", ["w"], ["second_y"], "inner_abs"))],
        "tensors": [tensor("", np.arange(3)), tensor("named", np.float32([1, 2]))],
        "type": helper.make_tensor_type_proto(FLOAT, ["n", 3]),
        "types": [helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, []))],
        "sparse": sparse("values"),
        "sparse_list": [sparse("a"), sparse("b")],
        "bytes": b"\xff\xfe not utf-8",
        "text": "grüß",
        "texts": ["a", b"\xff", ""],
        "floats": [1.0, 2.5],
        "number": 3,
        "ratio": 0.1,
        "graph": branch("single", "single_y", helper.make_node("Exp", ["x"], ["single_y"], "inner_exp")),
    }
    odd.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    for kind in ("FLOATS", "INTS", "STRINGS", "TENSORS", "GRAPHS"):
        odd.attribute.add(name=f"empty_{kind.lower()}", type=onnx.AttributeProto.AttributeType.Value(kind))
    odd.attribute[5].doc_string = "documented"
    odd.overload = "fast"
    add_properties(odd, origin="layer1", other="")
    sharding = odd.device_configurations.add(configuration_id="two", pipeline_stage=1).sharding_spec.add()
    sharding.tensor_name = "x"
    sharding.device.extend([0, 1])

    call = helper.make_node("Twice", ["h"], ["y"], "call", domain="my.functions")
    call.overload = "v2"
    spelled = helper.make_node("Relu", ["h2"], ["z"], "relu", domain="ai.onnx")

    x = value_info("x", FLOAT, ["batch", 3, None], doc_string="the input")
    x.type.denotation = "IMAGE"
    x.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    add_properties(x, unit="pixel")
    weight = tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    weight.doc_string = "weights"
    add_properties(weight, trained="yes")
    graph = helper.make_graph(
        [odd, call, spelled],
        "rich",
        [
            x,
            helper.make_tensor_sequence_value_info("seq", FLOAT, ["n"]),
            helper.make_value_info("opt", helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, [2]))),
            helper.make_value_info(
                "map", helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(FLOAT, []))
            ),
            helper.make_sparse_tensor_value_info("sp", FLOAT, [2, 3]),
        ],
        [value_info("y", FLOAT, ["batch", None]), value_info("z", FLOAT, ["batch", "?"])],
        [weight, tensor("scale", np.float32(0.5)), tensor("half", np.float16([1, 2]))],
        doc_string="graph notes",
        value_info=[
            value_info("h2", FLOAT, ["batch", 3], doc_string="hidden"),
            value_info("h", FLOAT, None),
            value_info("w", FLOAT, [2, 3]),
            value_info("y", FLOAT, ["batch", 3]),
        ],
        sparse_initializer=[sparse("sparse_weight")],
    )
    add_properties(graph, stage="graph")
    annotation = graph.quantization_annotation.add(tensor_name="h")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")

    body = [helper.make_node("Add", ["a", "a"], ["b"], doc_string="unnamed in a function")]
    function = helper.make_function("my.functions", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    function.overload, function.doc_string = "v2", "twice"
    add_properties(function, kind="function")
    model = helper.make_model(
        graph,
        opset_imports=[
            helper.make_opsetid("my.domain", 7),
            helper.make_opsetid("", 21),
            helper.make_opsetid("my.functions", 3),
            helper.make_opsetid("ai.onnx", 21),
            helper.make_opsetid("unused", 2),
        ],
        functions=[function],
        ir_version=11,
        producer_name="maker",
        producer_version="1.2",
        domain="org.example",
        model_version=42,
        doc_string="model notes",
    )
    add_properties(model, author="someone", license="")
    training = model.training_info.add()
    training.algorithm.CopyFrom(branch("train", "x", helper.make_node("Abs", ["w"], ["loss"])))
    training.update_binding.add(key="w", value="loss")
    model.configuration.add(name="two", num_devices=2).device.extend(["a", "b"])
    return model


def test_everything_survives() -> None:
    onnx.checker.check_model(checkable(rich_model(), b"no token"))
    graph = assert_round_trip(rich_model())
    odd = graph.nodes[0]
    assert isinstance(odd.attrs["type"], RawAttribute)
    assert odd.attrs["bytes"] == b"\xff\xfe not utf-8"
    assert [g.name for g in odd.attrs["graphs"]] == ["inner", "second"]
    assert len(list(walk_graphs(graph))) == 4
    assert graph.nodes[1].op == "Twice"


def test_nested_graphs_keep_their_weights_apart() -> None:
    graph = assert_round_trip(if_model())
    then, other = graph.nodes[0].attrs["then_branch"], graph.nodes[0].attrs["else_branch"]
    assert then.nodes[0].inputs[0] is graph.inputs[1]
    assert then.nodes[0].inputs[1] is other.nodes[0].inputs[1]
    assert then.nodes[1].inputs[1] is not other.nodes[1].inputs[1]
    assert [c.name for c in model_info(graph).unread] == ["unread"]


def test_loop_and_scan_bodies() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["cond_in"], ["cond_out"], "keep"),
            helper.make_node("Add", ["state_in", "w"], ["state_out"], "step"),
        ],
        "body",
        [
            value_info("i", TensorProto.INT64, []),
            value_info("cond_in", TensorProto.BOOL, []),
            value_info("state_in", FLOAT, [2]),
        ],
        [value_info("cond_out", TensorProto.BOOL, []), value_info("state_out", FLOAT, [2])],
        [tensor("w", np.float32([1, 2]))],
    )
    scan_body = helper.make_graph(
        [
            helper.make_node("Add", ["s", "e"], ["s_out"], "sum"),
            helper.make_node("Identity", ["s_out"], ["scanned"], "out"),
        ],
        "scan",
        [value_info("s", FLOAT, [2]), value_info("e", FLOAT, [2])],
        [value_info("s_out", FLOAT, [2]), value_info("scanned", FLOAT, [2])],
    )
    model = model_of(
        [
            helper.make_node("Loop", ["trip", "", "x"], ["looped"], "loop", body=body),
            helper.make_node("Scan", ["looped", "rows"], ["y", "ys"], "scan", body=scan_body, num_scan_inputs=1),
        ],
        [value_info("trip", TensorProto.INT64, []), value_info("x", FLOAT, [2]), value_info("rows", FLOAT, ["n", 2])],
        [value_info("y", FLOAT, [2]), value_info("ys", FLOAT, ["n", 2])],
    )
    onnx.checker.check_model(model)
    assert_round_trip(model)


ALL_TYPES = [t for t in onnx.TensorProto.DataType.values() if t not in (0, TensorProto.STRING)]


@pytest.mark.parametrize("data_type", ALL_TYPES, ids=onnx.TensorProto.DataType.Name)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("size", [5, 3001])
def test_constants_of_every_type(data_type: int, raw: bool, size: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    array = (np.arange(size) % 3).astype(np.float32).astype(dtype)
    proto = numpy_helper.from_array(array, "w")
    if not raw:
        if data_type in (TensorProto.FLOAT6E2M3, TensorProto.FLOAT6E3M2):
            pytest.skip("onnx cannot make 6-bit tensors in int32_data")
        proto = helper.make_tensor("w", data_type, [size], np.asarray(array, dtype))
        assert not proto.HasField("raw_data")
    node = helper.make_node("Odd", ["w"], ["y"], "odd", domain="my", value=proto)
    model = model_of([node], [], [value_info("y", data_type, [size])], [proto])
    model.opset_import.add(domain="my", version=1)
    graph = assert_round_trip(model)
    constant = graph.nodes[0].inputs[0]
    assert constant.dtype == dtype
    assert constant.shape == (size,)
    assert constant.values.tobytes() == array.tobytes()
    # now held as an array: the same values come out
    assert numpy_helper.to_array(to_proto(graph).graph.initializer[0]).tobytes() == array.tobytes()


def test_reading_a_constant_does_not_change_the_export() -> None:
    proto = helper.make_tensor("w", FLOAT, [3], [1.0, 2.0, 3.0])
    proto.doc_string = "kept"
    model = model_of([helper.make_node("Abs", ["w"], ["y"], "abs")], [], [value_info("y", FLOAT, [3])], [proto])
    graph = from_proto(model)
    value = constant_value(graph.nodes[0].inputs[0])
    assert value is not None
    assert not value.flags.writeable
    np.testing.assert_array_equal(value, [1, 2, 3])
    assert same(to_proto(graph), model)


def test_string_constants() -> None:
    proto = helper.make_tensor("w", TensorProto.STRING, [2], [b"a", "ß".encode()])
    node = helper.make_node("Identity", ["w"], ["y"], "id")
    model = model_of([node], [], [value_info("y", TensorProto.STRING, [2])], [proto])
    graph = assert_round_trip(model)
    assert list(graph.nodes[0].inputs[0].values) == ["a", "ß"]
    assert list(to_proto(graph).graph.initializer[0].string_data) == [b"a", "ß".encode()]


def test_constant_nodes() -> None:
    nodes = [
        helper.make_node("Constant", [], ["a"], "a", value=tensor("", np.float32([1, 2]))),
        helper.make_node("Constant", [], ["b"], "b", value_float=2.0),
        helper.make_node("Constant", [], ["c"], "c", value_ints=[1, 2]),
        helper.make_node("Constant", [], ["d"], "d", value_string="s"),
        helper.make_node("Constant", [], ["e"], "e", sparse_value=sparse("v")),
        helper.make_node("Constant", [], ["f"], "f"),
        helper.make_node("Add", ["a", "b"], ["y"], "add"),
    ]
    nodes[5].attribute.add(name="value_floats", type=onnx.AttributeProto.FLOATS)
    model = model_of(nodes, [], [value_info("y", FLOAT, [2])])
    graph = assert_round_trip(model)
    assert constant_value(graph.nodes[4].outputs[0]) is None
    np.testing.assert_array_equal(constant_value(graph.nodes[2].outputs[0]), [1, 2])


def test_sparse_initializer_decodes_to_its_dense_equivalent() -> None:
    model = model_of(
        [helper.make_node("Abs", ["s"], ["y"], "abs")],
        [],
        [value_info("y", FLOAT, [2, 3])],
        sparse_initializer=[sparse("s")],
    )
    graph = assert_round_trip(model)
    constant = graph.nodes[0].inputs[0]
    assert constant_value(constant) is None
    np.testing.assert_array_equal(constant.values, [[0, 5, 0], [7, 0, 0]])


def overridable_model(ir_version: int) -> onnx.ModelProto:
    return model_of(
        [helper.make_node("Mul", ["x", "w"], ["y"], "mul")],
        [value_info("w", FLOAT, [2], doc_string="may be fed"), value_info("x", FLOAT, [2])],
        [value_info("y", FLOAT, [2])],
        [tensor("first", np.float32([0, 0])), tensor("w", np.float32([3, 4]))]
        if ir_version >= 4
        else [tensor("w", np.float32([3, 4]))],
        ir_version=ir_version,
        opset=13,
    )


def test_overridable_initializers_stay_inputs() -> None:
    graph = assert_round_trip(overridable_model(8))
    assert isinstance(graph.inputs[0], gs.Variable)
    assert constant_value(graph.nodes[0].inputs[1]) is None
    np.testing.assert_array_equal(model_info(graph).defaults["w"].values, [3, 4])
    assert [(s.name, s.optional) for s in input_specs(graph)] == [("w", True), ("x", False)]


def test_removing_an_overridable_input_removes_its_default() -> None:
    graph = copy_graph(from_proto(overridable_model(8)))
    redirect(graph.inputs[0], gs.Constant("fixed", np.float32([1, 1])))
    del graph.inputs[0]
    out = to_proto(graph)
    assert [t.name for t in out.graph.initializer] == ["first", "fixed"]
    assert [t.name for t in out.graph.input] == ["x"]


def test_initializers_before_ir_version_4_are_constants() -> None:
    graph = from_proto(overridable_model(3))
    assert [t.name for t in graph.inputs] == ["x"]
    np.testing.assert_array_equal(constant_value(graph.nodes[0].inputs[1]), [3, 4])
    out = to_proto(graph)
    onnx.checker.check_model(out)
    assert out.ir_version == 4
    assert [t.name for t in out.graph.input] == ["x"]


def test_nodes_get_names_of_their_own() -> None:
    then = branch("then", "t", helper.make_node("Relu", ["x"], ["t"], "Relu_0"))
    other = branch("else", "e", helper.make_node("Relu", ["x"], ["e"]))
    model = model_of(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"], "twice"),
            helper.make_node("Relu", ["b"], ["d"], "twice"),
            helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
        ],
        [value_info("c", TensorProto.BOOL, []), value_info("x", FLOAT, ["n", 4])],
        [value_info("y", FLOAT, ["n", 4])],
    )
    graph = from_proto(model)
    names = [node.name for node in walk_nodes(graph)]
    assert len(set(names)) == len(names) == 6
    assert "" not in names
    assert graph.nodes[1].name == "twice"
    assert names.count("Relu_0") == 1
    assert graph.nodes[3].attrs["then_branch"].nodes[0].name == "Relu_0"
    assert [node.name for node in walk_nodes(from_proto(model))] == names
    assert same(to_proto(graph), assert_named_round_trip(to_proto(graph)))


def assert_named_round_trip(model: onnx.ModelProto) -> onnx.ModelProto:
    assert_round_trip(model)
    return model


def test_a_model_with_other_domains_only() -> None:
    graph = helper.make_graph(
        [helper.make_node("Scaler", ["x"], ["y"], "s", domain="ai.onnx.ml", offset=[0.0], scale=[2.0])],
        "ml",
        [value_info("x", FLOAT, ["n", 1])],
        [value_info("y", FLOAT, ["n", 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("ai.onnx.ml", 3)], ir_version=8)
    imported = assert_round_trip(model)
    imported.nodes.append(gs.Node("Relu", "r", inputs=[imported.outputs[0]], outputs=[gs.Variable("z", np.float32)]))
    added = to_proto(imported).opset_import
    assert [(o.domain, o.version) for o in added] == [("ai.onnx.ml", 3), ("", imported.opset)]
    assert onnx.helper.find_min_ir_version_for(added) <= 8


def test_raising_the_opset_raises_the_ir_version() -> None:
    graph = copy_graph(from_proto(overridable_model(8)))
    graph.opset = 21
    out = to_proto(graph)
    assert [(o.domain, o.version) for o in out.opset_import] == [("", 21)]
    assert out.ir_version == 10


def test_a_change_of_type_or_shape_reaches_the_file() -> None:
    graph = copy_graph(from_proto(rich_model()))
    x, h2 = graph.inputs[0], graph.nodes[2].inputs[0]
    x.shape = ["batch", 4, None]
    h2.dtype = np.dtype(np.float16)
    out = to_proto(graph).graph
    dims = out.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", 4, 0]
    assert dims[0].denotation == "DATA_BATCH"
    assert out.input[0].type.denotation == "IMAGE"
    assert out.input[0].doc_string == "the input"
    assert out.value_info[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert out.value_info[0].doc_string == "hidden"


def test_a_changed_copy_leaves_the_original_alone() -> None:
    model = rich_model()
    graph = from_proto(model)
    copy = copy_graph(graph)
    copy.nodes[0].attrs["tensors"][0].values = np.zeros(2, np.float32)
    copy.nodes[0].attrs["texts"].append("more")
    copy.nodes[0].attrs["graphs"][0].nodes[0].op = "Abs"
    copy.nodes[0].inputs[2].name = "renamed"
    copy.nodes[0].inputs[2].values = np.zeros((2, 3), np.float32)
    copy.inputs[0].shape[0] = 7
    model_info(copy).unread.clear()
    model_info(copy).metadata["author"] = "else"
    copy.import_domains[0].version = 99
    changed = to_proto(copy)
    assert same(to_proto(graph), model)
    assert not same(changed, model)
    assert [t.name for t in changed.graph.initializer] == ["renamed"]


def test_a_node_that_changed_its_operator_keeps_its_notes_but_no_overload() -> None:
    graph = copy_graph(from_proto(rich_model()))
    graph.nodes[1].op = "Thrice"
    node = to_proto(graph).graph.node[1]
    assert node.overload == ""
    graph.nodes[0].op = "Even"
    node = to_proto(graph).graph.node[0]
    assert node.doc_string == "a note"
    assert {p.key: p.value for p in node.metadata_props} == {"origin": "layer1", "other": ""}


def test_initializers_that_lose_their_readers_go() -> None:
    graph = copy_graph(from_proto(if_model()))
    model_info(graph).unread.clear()
    for part in walk_graphs(graph.nodes[0].attrs["then_branch"]):
        set_constant(part.nodes[1], 1, "inner", np.ones(4, np.float32))
    for part in ("then_branch", "else_branch"):
        set_constant(graph.nodes[0].attrs[part].nodes[0], 1, f"own_{part}", np.ones(4, np.float32))
    out = to_proto(graph)
    onnx.checker.check_model(out)
    assert not out.graph.initializer
    then, other = (a.g for a in out.graph.node[0].attribute)
    if then.name != "then":
        then, other = other, then
    assert [t.name for t in then.initializer] == ["inner", "own_then_branch"]
    assert [t.name for t in other.initializer] == ["inner", "own_else_branch"]
    np.testing.assert_array_equal(numpy_helper.to_array(then.initializer[0]), np.ones(4))


def test_a_new_constant_belongs_to_the_graph_around_all_its_readers() -> None:
    graph = copy_graph(from_proto(if_model()))
    shared = gs.Constant("shared", np.ones(4, np.float32))
    for part in ("then_branch", "else_branch"):
        graph.nodes[0].attrs[part].nodes[1].inputs[1] = shared
    out = to_proto(graph)
    onnx.checker.check_model(out)
    assert [t.name for t in out.graph.initializer] == ["only_nested", "unread", "shared"]


def test_two_constants_of_one_name_are_an_error() -> None:
    graph = copy_graph(from_proto(overridable_model(8)))
    graph.nodes[0].inputs[0] = gs.Constant("c", np.float32([1, 2]))
    graph.nodes[0].inputs[1] = gs.Constant("c", np.float32([3, 4]))
    with pytest.raises(OnnxCompressError, match="two constants are called 'c'"):
        to_proto(graph)


def test_detached_nodes_are_not_written() -> None:
    graph = copy_graph(from_proto(if_model()))
    inner = graph.nodes[0].attrs["then_branch"]
    inner.nodes.append(gs.Node("Relu", "detached"))
    assert same(to_proto(graph), if_model())


@pytest.mark.parametrize(
    ("op", "name", "value", "kind"),
    [
        ("LeakyRelu", "alpha", 1, onnx.AttributeProto.FLOAT),
        ("LeakyRelu", "alpha", np.float32(0.5), onnx.AttributeProto.FLOAT),
        ("Cast", "to", np.float16, onnx.AttributeProto.INT),
        ("Conv", "pads", np.array([1, 1]), onnx.AttributeProto.INTS),
        ("Conv", "pads", [], onnx.AttributeProto.INTS),
        ("Constant", "value_floats", [], onnx.AttributeProto.FLOATS),
        ("Constant", "value_floats", [1, 2], onnx.AttributeProto.FLOATS),
        ("Constant", "value_floats", [1, 2.5], onnx.AttributeProto.FLOATS),
        ("Constant", "value_strings", ["a", b"b"], onnx.AttributeProto.STRINGS),
        ("Softmax", "axis", np.int64(-1), onnx.AttributeProto.INT),
    ],
)
def test_attributes_that_passes_write(op: str, name: str, value: object, kind: int) -> None:
    graph = gs.Graph(nodes=[gs.Node(op, "n", {name: value}, outputs=[gs.Variable("y", np.float32)])], opset=13)
    (attribute,) = to_proto(graph).graph.node[0].attribute
    assert attribute.type == kind


def test_an_attribute_that_onnx_cannot_hold() -> None:
    graph = gs.Graph(nodes=[gs.Node("Relu", "n", {"a": object()}, outputs=[gs.Variable("y")])], opset=13)
    with pytest.raises(OnnxCompressError, match="'a' of node 'n' is a object"):
        to_proto(graph)


def test_graphs_from_graphsurgeon_are_exported() -> None:
    model = if_model()
    graph = gs.import_onnx(model)
    out = to_proto(graph)
    onnx.checker.check_model(out)
    assert [n.op_type for n in out.graph.node] == ["If"]
    assert same(model, if_model()), "the shared TensorProtos keep their names"


def test_external_references_are_not_imported_unresolved() -> None:
    proto = TensorProto(name="w", data_type=FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    model = model_of([helper.make_node("Abs", ["w"], ["y"])], [], [value_info("y", FLOAT, [2])], [proto])
    with pytest.raises(ModelError, match=r"onnxcompress\.io\.load"):
        from_proto(model)


def test_unknown_types_are_refused() -> None:
    proto = TensorProto(name="w", data_type=999, dims=[2], raw_data=b"1234")
    model = model_of([helper.make_node("Abs", ["w"], ["y"])], [], [value_info("y", FLOAT, [2])], [proto])
    with pytest.raises(ModelError, match="data type 999"):
        from_proto(model)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    array = np.ones(3, helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    model = model_of(
        [helper.make_node("Abs", ["w"], ["y"]), helper.make_node("Abs", ["w"], ["z"])],
        [],
        [value_info("y", TensorProto.BFLOAT16, [3]), value_info("z", TensorProto.BFLOAT16, [3])],
        [numpy_helper.from_array(array, "w")],
    )
    graph = from_proto(model)
    assert graph.nodes[0].inputs[0].values.dtype == array.dtype
    to_proto(copy_graph(graph))
    to_proto(from_proto(rich_model()))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_omitted_weights_become_inputs_of_their_type() -> None:
    large = np.ones((400, 4), np.float32)
    model = if_model()
    then = model.graph.node[0].attribute[0].g
    if then.name != "then":
        then = model.graph.node[0].attribute[1].g
    then.initializer.append(tensor("large_inner", large))
    then.node.insert(0, helper.make_node("Gemm", ["large_outer", "large_inner"], ["unused"], "gemm", transA=1))
    model.graph.initializer.append(tensor("large_outer", large))
    model.graph.node.insert(
        0, helper.make_node("Constant", [], ["large_node"], "const", value=tensor("", large.astype(np.float16)))
    )
    model.graph.node.append(helper.make_node("Abs", ["large_node"], ["abs"], "abs"))
    onnx.checker.check_model(model)
    graph = assert_round_trip(model)
    omitted = to_proto(graph, weights="omit")
    onnx.checker.check_model(omitted)
    assert omitted.ByteSize() < 2000
    added = {v.name: (v.type.tensor_type.elem_type, len(v.type.tensor_type.shape.dim)) for v in omitted.graph.input}
    assert added["large_outer"] == added["large_inner"] == (FLOAT, 2)
    assert added["large_node"] == (TensorProto.FLOAT16, 2)
    types = infer_shapes(graph)
    assert types["abs"].shape == (400, 4)
    assert types["abs"].dtype == np.float16
    assert types["large_outer"].shape == (400, 4)


def test_weights_of_one_name_in_two_branches_are_not_confused() -> None:
    model = if_model()
    for attribute, rows in zip(model.graph.node[0].attribute, (400, 500), strict=True):
        attribute.g.initializer.append(tensor("big", np.ones((rows, 4), np.float32)))
        attribute.g.node.append(helper.make_node("Abs", ["big"], [f"abs_{rows}"], f"abs_{rows}"))
    onnx.checker.check_model(model)
    graph = assert_round_trip(model)
    omitted = to_proto(graph, weights="omit")
    onnx.checker.check_model(omitted)
    assert "big" not in {v.name for v in omitted.graph.input}


def test_a_skeleton_holds_no_weights() -> None:
    array = np.arange(2000, dtype=np.float32)
    model = model_of(
        [helper.make_node("Abs", ["w"], ["y"], "abs")], [], [value_info("y", FLOAT, [2000])], [tensor("w", array)]
    )
    skeleton = to_skeleton(from_proto(model))
    assert skeleton.model.ByteSize() < 300
    ((proto, payload),) = skeleton.weights
    assert proto.name == "w"
    assert payload.nbytes == skeleton.weight_bytes == 8000
    np.testing.assert_array_equal(payload.read().view(np.float32), array)


def test_weights_are_not_copied_into_the_skeleton() -> None:
    array = np.arange(2000, dtype=np.float32)
    graph = gs.Graph(
        nodes=[gs.Node("Abs", "abs", inputs=[gs.Constant("w", array)], outputs=[gs.Variable("y", np.float32, [2000])])],
        opset=17,
    )
    ((_, payload),) = to_skeleton(graph).weights
    assert np.shares_memory(payload.read(), array)


def backend_models() -> list[tuple[str, onnx.ModelProto]]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [(case.name, case.model) for case in collect_testcases(None)]


def without_node_names(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.name = ""
        for attribute in node.attribute:
            if attribute.HasField("g"):
                without_node_names(attribute.g)
            for nested in attribute.graphs:
                without_node_names(nested)


def test_operator_tests_of_onnx() -> None:
    """Every operator test model, byte for byte but for node names; onnx makes them on the fly since 1.20."""
    models = backend_models()
    assert len(models) > 1500
    for name, model in models:
        expected = onnx.ModelProto()
        expected.CopyFrom(model)
        out = to_proto(copy_graph(from_proto(model)))
        onnx.checker.check_model(out)
        names = [node.name for node in out.graph.node]
        assert len(set(names)) == len(names), name
        for proto in (expected, out):
            without_node_names(proto.graph)
        if expected.ir_version < 4:
            expected.ir_version = 4
        assert same(expected, out), name


@pytest.mark.parametrize("spelling", ["?", "*", "-1", "None"])
def test_a_size_that_nobody_knows_is_no_symbol(spelling: str) -> None:
    """Height and width of PaddlePaddle's and InsightFace's networks are both called "?", and need not be one size."""
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Relu", ["x"], ["y"])],
            "detector",
            [value_info("x", FLOAT, ["batch", 3, spelling, spelling])],
            [value_info("y", FLOAT, None)],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    graph = from_proto(model)
    assert list(graph.inputs[0].shape) == ["batch", 3, None, None]
    dims = to_proto(graph).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in dims] == ["batch", "", spelling, spelling]
    graph.inputs[0].shape = ["batch", 4, None, 7]
    dims = to_proto(graph).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", 4, spelling, 7]
