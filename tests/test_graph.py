"""The helpers on graphsurgeon's IR: copies share weights alone, names stay free, order is kept, traps are mended."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from models import BY_NAME
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.errors import ModelError
from onnxcompress.graph import (
    Graph,
    InputSpec,
    ModelInfo,
    Names,
    RawAttribute,
    StoredValues,
    attribute,
    change_constant,
    change_own_constant,
    constant_value,
    copy_graph,
    default_values,
    element_type,
    extra,
    first_output,
    graph_output_ids,
    input_specs,
    map_below,
    model_info,
    nested_graphs,
    normal_domain,
    part_info,
    redirect,
    release,
    release_weights,
    remove_node,
    remove_nodes,
    replace_contents,
    set_constant,
    set_extra,
    sort_nodes,
    tensors_read_inside,
    walk_constants,
    walk_graphs,
    walk_nodes,
)
from onnxcompress.proto import from_proto, to_proto

Array = NDArray[Any]


def loaded(name: str) -> Graph:
    return from_proto(BY_NAME[name].build())


def exported(graph: Graph) -> bytes:
    return bytes(to_proto(graph).SerializeToString(deterministic=True))


def chain(*ops: str) -> Graph:
    """x -> op -> op ... -> y, with a constant as the second input of the first."""
    x, weight = gs.Variable("x", np.float32, [3]), gs.Constant("w", np.ones(3, np.float32))
    nodes: list[gs.Node] = []
    source: gs.Tensor = x
    for number, op in enumerate(ops):
        out = gs.Variable("y" if number == len(ops) - 1 else f"t{number}", np.float32, [3])
        inputs = [source, weight] if number == 0 else [source]
        nodes.append(gs.Node(op, f"n{number}", inputs=inputs, outputs=[out]))
        source = out
    return gs.Graph(nodes=nodes, inputs=[x], outputs=[source], opset=17, ir_version=8)


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_copy_is_the_same_file(name: str) -> None:
    graph = loaded(name)
    assert exported(copy_graph(graph)) == exported(graph)


@pytest.mark.parametrize(
    "name", ["if_branches", "loop_body", "scan_body", "local_function", "conv_grouped", "residual"]
)
def test_a_copy_shares_nothing_but_weights(name: str) -> None:
    graph = loaded(name)
    before = exported(graph)
    twin = copy_graph(graph)
    for part in walk_graphs(twin):
        for node in part.nodes:
            node.name += "_changed"
            node.attrs["added"] = 1
            for value in node.attrs.values():
                if isinstance(value, list):
                    value.append(0)
            for tensor in (*node.inputs, *node.outputs):
                if isinstance(tensor, gs.Variable):
                    tensor.name += "'"
                    if tensor.shape is not None:
                        tensor.shape.append(1)
        part.nodes.pop()
        part.name = "changed"
    info = model_info(twin)
    info.metadata["added"] = "1"
    info.defaults["added"] = gs.Constant("added", np.zeros(1))
    info.unread.append(gs.Constant("added", np.zeros(1)))
    twin.import_domains = []
    assert exported(graph) == before


def test_a_copy_shares_arrays_which_become_read_only() -> None:
    graph = chain("Add", "Relu")
    twin = copy_graph(graph)
    mine, other = graph.nodes[0].inputs[1], twin.nodes[0].inputs[1]
    assert mine is not other
    assert np.shares_memory(mine.values, other.values)
    assert not other.values.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        other.values[0] = 5


def test_a_tensor_that_is_read_twice_is_one_in_the_copy() -> None:
    graph = chain("Add", "Relu")
    graph.nodes.append(gs.Node("Neg", "again", inputs=[graph.nodes[0].outputs[0]], outputs=[gs.Variable("z")]))
    graph.outputs.append(graph.nodes[-1].outputs[0])
    twin = copy_graph(graph)
    assert twin.nodes[1].inputs[0] is twin.nodes[2].inputs[0] is twin.nodes[0].outputs[0]
    assert [t.name for t in twin.outputs] == ["y", "z"]
    assert twin.outputs[1] is twin.nodes[2].outputs[0]
    assert twin.inputs[0] is twin.nodes[0].inputs[0]


def test_a_copy_keeps_what_graphsurgeon_drops() -> None:
    graph = chain("Add")
    graph.producer_name, graph.producer_version, graph.doc_string, graph.name = "p", "2", "d", "g"
    graph.import_domains = [helper.make_opsetid("", 17), helper.make_opsetid("other", 3)]
    graph.functions = [gs.Function("f", domain="d", nodes=[], inputs=[], outputs=[])]
    sequence = gs.Variable("s", np.float32, None)
    sequence.type = "sequence_type"
    graph.inputs.append(sequence)
    note = onnx.NodeProto(doc_string="told")
    set_extra(graph.nodes[0], note)
    kept = onnx.TensorProto(doc_string="kept")
    set_extra(graph.nodes[0].inputs[1], kept)
    twin = copy_graph(graph)
    told = ("producer_name", "producer_version", "doc_string", "name", "opset", "ir_version", "import_domains")
    for name in told:
        assert getattr(twin, name) == getattr(graph, name), name
    assert twin.import_domains is not graph.import_domains
    assert twin.functions == graph.functions and twin.functions is not graph.functions
    assert twin.inputs[1].type == "sequence_type"
    assert twin.inputs[1].shape is None
    assert extra(twin.nodes[0]) is note
    assert extra(twin.nodes[0].inputs[1]) is kept
    assert extra(gs.Node("Relu")) is None
    bare = gs.Node("Relu")
    set_extra(bare, None)
    assert bare.__dict__.keys() == gs.Node("Relu").__dict__.keys()


def test_attributes_are_copied_deep() -> None:
    raw = RawAttribute(onnx.AttributeProto(name="raw"))
    values: dict[str, Any] = {
        "list": [1, 2],
        "tensors": [gs.Constant("c", np.ones(2))],
        "array": np.arange(3),
        "dict": {"a": [1]},
        "raw": raw,
        "tensor": gs.Constant("t", np.ones(2)),
        "text": "x",
    }
    graph = chain("Add")
    graph.nodes[0].attrs.update(values)
    copied = copy_graph(graph).nodes[0].attrs
    for name in ("list", "tensors", "array", "dict", "tensor"):
        assert copied[name] is not values[name]
    assert copied["tensors"][0] is not values["tensors"][0]
    assert copied["dict"]["a"] is not values["dict"]["a"]
    assert copied["raw"] is raw
    assert copied["text"] == "x"
    assert copied["list"] == [1, 2] and copied["array"].tolist() == [0, 1, 2]


def test_infos_are_copied_as_far_as_they_change() -> None:
    info = ModelInfo(
        metadata={"a": "b"},
        defaults={"w": gs.Constant("w", np.ones(1))},
        source_sha256="x",
        external_data=True,
        initializer_order=("w",),
        unread=[gs.Constant("u", np.ones(1))],
        files=(Path("m"),),
        keepsake=onnx.ModelProto(),
    )
    twin = info.copy()
    for name in ("metadata", "source_sha256", "external_data", "initializer_order", "files", "keepsake"):
        assert getattr(twin, name) == getattr(info, name)
    assert twin.metadata is not info.metadata
    assert twin.defaults is not info.defaults and twin.defaults["w"] is info.defaults["w"]
    assert twin.unread[0] is not info.unread[0] and twin.unread[0].name == "u"
    graph = gs.Graph()
    assert model_info(graph) is model_info(graph)
    assert model_info(graph) == ModelInfo()
    assert "onnxcompress_info" not in copy_graph(gs.Graph()).__dict__


def test_what_a_part_needs_of_the_whole() -> None:
    graph = loaded("local_function")
    whole = model_info(graph)
    whole.metadata["a"] = "b"
    part = part_info(graph)
    assert part.initializer_order == whole.initializer_order
    assert part.metadata == {}
    assert part.keepsake is not None and whole.keepsake is not None
    assert [f.name for f in part.keepsake.functions] == [f.name for f in whole.keepsake.functions]
    assert not part.keepsake.graph.ListFields()
    assert part_info(loaded("residual")).keepsake is None
    assert part_info(gs.Graph()) == ModelInfo()


def test_contents_are_replaced() -> None:
    graph, other = loaded("residual"), loaded("conv_grouped")
    expected = exported(other)
    replace_contents(graph, other)
    graph.name, graph.producer_name = other.name, other.producer_name
    assert exported(graph) == expected
    assert model_info(graph) is model_info(other)
    bare = chain("Add")
    bare.import_domains = [helper.make_opsetid("", 17)]
    bare.opset, bare.ir_version = 15, 7
    kept = model_info(graph)
    replace_contents(graph, bare)
    assert model_info(graph) is kept
    assert graph.nodes is bare.nodes
    for end in ("inputs", "outputs"):
        assert [id(t) for t in getattr(graph, end)] == [id(t) for t in getattr(bare, end)]
    assert (graph.opset, graph.ir_version) == (15, 7) and graph.import_domains is bare.import_domains


# -- walking -----------------------------------------------------------------------------------------------------------


def test_nested_graphs_are_walked_outermost_first() -> None:
    graph = loaded("if_branches")
    parts = list(walk_graphs(graph))
    assert parts[0] is graph
    assert len(parts) > 2
    inner = [value for node in graph.nodes for value in nested_graphs(node)]
    assert {id(p) for p in inner} <= {id(p) for p in parts}
    assert [id(n) for n in walk_nodes(graph)] == [id(n) for part in parts for n in part.nodes]
    node = gs.Node("X", attrs={"one": graph, "many": [chain("Relu"), 3], "none": [], "text": "x"})
    assert len(list(nested_graphs(node))) == 2


def test_outputs_of_all_graphs_leave() -> None:
    graph = loaded("if_branches")
    leaving = graph_output_ids(graph)
    for part in walk_graphs(graph):
        assert {id(t) for t in part.outputs} <= leaving
        for node in part.nodes:
            for tensor in node.outputs:
                assert (id(tensor) in leaving) == any(tensor is t for t in part.outputs)


def test_small_answers() -> None:
    assert normal_domain(gs.Node("A", domain=None)) == normal_domain(gs.Node("A", domain="ai.onnx")) == ""
    assert normal_domain(gs.Node("A", domain="com.x")) == "com.x"
    node = gs.Node("A", outputs=[gs.Variable.empty(), gs.Variable("b"), gs.Variable("c")], attrs={"a": 0, "n": None})
    assert first_output(node) == "b"
    assert first_output(gs.Node("A")) == ""
    assert attribute(node, "a", 5) == 0
    assert attribute(node, "n", 5) == attribute(node, "missing", 5) == 5
    assert attribute(node, "missing") is None
    assert element_type(TensorProto.FLOAT) == np.float32
    with pytest.raises(ModelError, match="data type 12345 is unknown"):
        element_type(12345)


def test_inputs_as_they_can_be_fed() -> None:
    graph = loaded("overridable_initializer")
    specs = {spec.name: spec for spec in input_specs(graph)}
    assert [s.optional for s in specs.values()].count(True) == 2
    shapes = [3, "N", "", -1, None, np.int64(4)]
    graph = gs.Graph(
        inputs=[
            gs.Variable("a", np.float16, shapes),
            gs.Variable("b", int(TensorProto.BFLOAT16), None),
        ]
    )
    assert input_specs(graph) == [
        InputSpec("a", np.dtype(np.float16), (3, "N", None, None, None, 4)),
        InputSpec("b", np.dtype(element_type(TensorProto.BFLOAT16)), None),
    ]
    assert input_specs(gs.Graph(inputs=[gs.Variable("z", np.int8, [0])]))[0].shape == (0,)
    with pytest.raises(ModelError, match="'a' has no type"):
        input_specs(gs.Graph(inputs=[gs.Variable("a", None, [1])]))
    plain = gs.Variable("p", np.float32, [2])
    plain.type = None  # graphsurgeon's importer leaves it out for some
    assert input_specs(gs.Graph(inputs=[plain])) == [InputSpec("p", np.dtype(np.float32), (2,))]
    sequence = gs.Variable("s", np.float32)
    sequence.type = "sequence_type"
    with pytest.raises(ModelError, match="'s' is a sequence; only tensors"):
        input_specs(gs.Graph(inputs=[sequence]))


def test_default_values_of_inputs() -> None:
    graph = loaded("overridable_initializer")
    optional = {spec.name for spec in input_specs(graph) if spec.optional}
    values = default_values(graph)
    assert set(values) == optional and all(isinstance(value, np.ndarray) for value in values.values())
    info = model_info(graph)
    name = next(iter(info.defaults))
    info.defaults[name] = gs.Constant(name, np.array(["text"], object))
    assert set(default_values(graph)) == optional - {name}


# -- constants ---------------------------------------------------------------------------------------------------------


def nested() -> tuple[Graph, gs.Constant, gs.Constant, gs.Constant]:
    """A node that reads a constant twice, one that holds another, and a branch with its own that reads the first."""
    shared, held, own = (gs.Constant(name, np.ones(3, np.float32)) for name in ("shared", "held", "own"))
    x, y, z = (gs.Variable(name, np.float32, [3]) for name in "xyz")
    inner = gs.Variable("inner", np.float32, [3])
    branch = gs.Graph([gs.Node("Sum", "sum", inputs=[x, shared, own], outputs=[inner])], [], [inner])
    nodes = [
        gs.Node("Sum", "twice", inputs=[x, shared, shared], outputs=[y]),
        gs.Node("Constant", "constant", {"value": held}, [], [gs.Variable("v")]),
        gs.Node("If", "if", {"then_branch": branch, "else_branch": branch}, [gs.Variable("c", np.bool_)], [z]),
    ]
    return gs.Graph(nodes, [x], [y, z]), shared, held, own


def test_every_constant_once() -> None:
    graph, *constants = nested()
    found = list(walk_constants(graph))
    assert sorted(c.name for c in found) == ["held", "own", "shared"]
    assert {id(c) for c in found} == {id(c) for c in constants}


def test_what_branches_read() -> None:
    graph, shared, held, own = nested()
    found = tensors_read_inside(graph)
    assert {t.name for t in found} == {"x", "shared", "own", "inner"}
    assert not {id(held), id(graph.outputs[0])} & {id(t) for t in found}
    assert {id(shared), id(own)} <= {id(t) for t in found}
    assert tensors_read_inside(chain("Relu")) == []


def mapped(path: Path, values: Array) -> Array:
    """``values`` as a view of a memory map of a file."""
    path.write_bytes(bytes(mmap.PAGESIZE) + values.tobytes())
    with path.open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(whole, values.dtype, values.size, mmap.PAGESIZE).reshape(values.shape)


def resident(array: Array) -> int:
    """Bytes of the map below ``array`` that are in memory, as the kernel tells."""
    address = array.ctypes.data - mmap.PAGESIZE
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-") or line.startswith(f"{address:08x}-"):
            return next(1024 * int(text.split()[1]) for text in lines if text.startswith("Rss:"))
    raise AssertionError("the map is not there")


def test_what_is_mapped_and_what_is_not(tmp_path: Path) -> None:
    array = mapped(tmp_path / "weights", np.arange(12, dtype=np.float32).reshape(3, 4))
    below = map_below(array)
    assert isinstance(below, mmap.mmap)
    assert map_below(array.T[1:]) is below
    assert map_below(np.arange(3)) is None and map_below(array.copy()) is None


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is in memory")
def test_pages_that_were_read_are_given_back(tmp_path: Path) -> None:
    values = np.arange(64 * mmap.PAGESIZE, dtype=np.float32).reshape(64, -1)
    array = mapped(tmp_path / "weights", values)
    assert float(array.sum()) == float(values.sum())
    assert resident(array) > 0.98 * values.nbytes
    release(array[:, ::2])  # no one piece: nothing happens
    assert resident(array) > 0.98 * values.nbytes
    release(array[0, :8])  # less than a page
    assert resident(array) > 0.98 * values.nbytes
    release(array[16:32])
    assert 0.73 * values.nbytes < resident(array) < 0.77 * values.nbytes
    release(array[32:64].T)  # in Fortran's order
    assert 0.23 * values.nbytes < resident(array) < 0.27 * values.nbytes
    release_weights(gs.Graph([gs.Node("Relu", inputs=[gs.Constant("w", array)])]))
    assert resident(array) < 0.05 * values.nbytes
    np.testing.assert_array_equal(array, values)
    stored = StoredValues(
        onnx.TensorProto(data_type=TensorProto.INT8, dims=[array.nbytes]), array.reshape(-1).view(np.uint8)
    )
    release_weights(gs.Graph([gs.Node("Relu", inputs=[gs.Constant("w", stored)])]))
    assert resident(array) < 0.05 * values.nbytes
    release(values)  # in memory: nothing happens
    np.testing.assert_array_equal(array, values)


def constant_node(**attrs: Any) -> gs.Tensor:
    return gs.Node("Constant", "c", attrs, [], [gs.Variable("v")]).outputs[0]


def test_values_of_constants() -> None:
    array = np.arange(3, dtype=np.float32)
    assert constant_value(gs.Variable("x")) is None
    found = constant_value(gs.Constant("c", array))
    assert found is not None and not found.flags.writeable and np.shares_memory(found, array)
    assert array.flags.writeable, "the caller's own array stays as it is"
    found = constant_value(constant_node(value=gs.Constant("", array)))
    assert found is not None and found.tolist() == [0, 1, 2] and not found.flags.writeable
    for name, value, dtype in (
        ("value_int", 3, np.int64),
        ("value_ints", [3, 4], np.int64),
        ("value_float", 0.5, np.float32),
        ("value_floats", [0.5], np.float32),
    ):
        found = constant_value(constant_node(**{name: value}))
        assert found is not None and found.dtype == dtype and found.tolist() == value and not found.flags.writeable
    assert constant_value(constant_node(value_string="x")) is None
    assert constant_value(constant_node(value_int=RawAttribute(onnx.AttributeProto()))) is None
    assert constant_value(gs.Constant("s", np.array(["a"]))) is None
    assert constant_value(gs.Constant("s", np.array(["a"], object))) is None
    other = gs.Node("Constant", "c", {"value_int": 1}, [], [gs.Variable("v")], domain="com.x")
    assert constant_value(other.outputs[0]) is None
    relu = gs.Node("Relu", "r", {"value_int": 1}, [], [gs.Variable("v")])
    assert constant_value(relu.outputs[0]) is None


def test_stored_values_are_decoded_once_and_late() -> None:
    proto = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "w")
    stored = StoredValues(proto)
    assert (stored.shape, stored.dtype, stored.nbytes, stored.sparse) == ((2, 3), np.float32, 24, False)
    array = stored.load()
    assert array is stored.load()
    assert not array.flags.writeable and array.tolist() == [[0, 1, 2], [3, 4, 5]]
    payload = np.frombuffer(proto.raw_data, np.uint8)
    header = onnx.TensorProto(data_type=TensorProto.FLOAT, dims=[2, 3])
    np.testing.assert_array_equal(StoredValues(header, payload).load(), array)
    constant = gs.Constant("w", stored)
    assert constant_value(constant) is array
    assert constant._values is stored
    packed = StoredValues(helper.make_tensor("q", TensorProto.INT4, [3], [1, 2, 3]))
    assert constant_value(gs.Constant("q", packed)) is None


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT2", "UINT2", "FLOAT4E2M1", "FLOAT6E2M3", "FLOAT6E3M2"])
def test_types_below_one_byte_have_no_value_to_compute_with(kind: str) -> None:
    if kind not in dict(TensorProto.DataType.items()):
        pytest.skip(f"onnx {onnx.__version__} has no {kind}")
    array = np.zeros(4, element_type(TensorProto.DataType.Value(kind)))
    assert constant_value(gs.Constant("q", array)) is None
    assert constant_value(gs.Constant("q", StoredValues(numpy_helper.from_array(array, "q")))) is None


def test_text_has_no_value_to_compute_with() -> None:
    assert constant_value(gs.Constant("t", np.array(["a", "b"], object))) is None
    assert constant_value(gs.Constant("b", np.array([True, False]))) is not None


def test_what_a_new_graph_says_of_its_source() -> None:
    info = model_info(gs.Graph())
    assert info.external_data is False and info.files == () and info.source_sha256 is None


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_values_are_their_dense_equivalent(flat: bool) -> None:
    values = numpy_helper.from_array(np.array([5, 7], np.float32), "s")
    indices = np.array([1, 5]) if flat else np.array([[0, 1], [1, 2]])
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices, ""), [2, 3])
    stored = StoredValues(sparse)
    assert stored.sparse and stored.shape == (2, 3) and stored.dtype == np.float32
    assert stored.load().tolist() == [[0, 5, 0], [0, 0, 7]]
    assert constant_value(gs.Constant("s", stored)) is None


def test_constants_are_set_and_changed() -> None:
    graph = chain("Add", "Relu")
    node = graph.nodes[0]
    old = node.inputs[1]
    made = set_constant(node, 1, "v", np.float32(2.0))
    assert node.inputs[1] is made and made.name == "v" and made.values.shape == ()
    assert old.outputs == [] and not made.values.flags.writeable
    made = set_constant(node, 4, "far", np.arange(6).reshape(2, 3).T)
    assert [t.name for t in node.inputs] == ["x", "v", "", "", "far"]
    assert made.values.flags.c_contiguous
    set_constant(graph.nodes[1], 1, "own", np.ones(1))
    assert len(graph.nodes[1].inputs) == 2

    change_constant(old, np.zeros((2, 2), np.float32))
    assert old.values.shape == (2, 2) and not old.values.flags.writeable
    tensor = constant_node(value_float=1.0)
    change_constant(tensor, np.ones((3, 1)))
    found = constant_value(tensor)
    assert found is not None and found.shape == (3, 1)
    assert list(tensor.inputs[0].attrs) == ["value"] and tensor.shape == [3, 1]


def test_a_constant_of_ones_own_changes_in_place() -> None:
    graph = chain("Add", "Relu")
    node, names = graph.nodes[0], Names(graph)
    old = node.inputs[1]
    change_own_constant(node, 1, np.zeros(3, np.float32), names)
    assert node.inputs[1] is old and old.values.tolist() == [0.0, 0.0, 0.0]
    made = constant_node(value_float=1.0)
    made.name = "made"
    node.inputs[1] = made
    change_own_constant(node, 1, np.ones(3, np.float32), names)
    assert node.inputs[1].name == "made_scaled" and node.inputs[1].values.tolist() == [1.0, 1.0, 1.0]
    found = constant_value(made)
    assert found is not None and found.shape == () and made.outputs == []


# -- names and wiring --------------------------------------------------------------------------------------------------


def test_names_are_free_everywhere() -> None:
    graph = loaded("if_branches")
    used = {n.name for n in walk_nodes(graph)} | {t.name for n in walk_nodes(graph) for t in (*n.inputs, *n.outputs)}
    used |= {t.name for part in walk_graphs(graph) for t in (*part.inputs, *part.outputs)}
    names = Names(graph)
    for name in used - {""}:
        assert names.free(name) == f"{name}_1"
        assert names.free(name) == f"{name}_2"
    assert names.free("new") == "new"
    assert names.free("new") == "new_1"
    assert names.free("") == "_1"
    loose = gs.Graph(inputs=[gs.Variable("in")], outputs=[gs.Variable("out")])
    assert [Names(loose).free(n) for n in ("in", "out")] == ["in_1", "out_1"]


def test_consumers_are_redirected() -> None:
    graph = chain("Add", "Relu")
    first = graph.nodes[0].outputs[0]
    twice = gs.Node("Mul", "m", inputs=[first, first], outputs=[gs.Variable("z")])
    graph.nodes.append(twice)
    graph.outputs = [first, twice.outputs[0]]
    new = gs.Variable("new")
    redirect(first, new)
    assert [t is new for t in twice.inputs] == [True, True]
    assert graph.nodes[1].inputs[0] is new
    assert first.outputs == [] and graph.outputs[0] is first
    assert len(new.outputs) == 3


def test_nodes_are_removed() -> None:
    graph = chain("Add", "Relu", "Neg", "Exp")
    weight, middle = graph.nodes[0].inputs[1], graph.nodes[1].outputs[0]
    remove_node(graph.nodes[3])
    assert [t.outputs for t in (graph.nodes[2].outputs[0],)] == [[]]
    sort_nodes(graph)
    assert [n.op for n in graph.nodes] == ["Add", "Relu", "Neg"]
    remove_nodes(graph, [])
    assert len(graph.nodes) == 3
    removed = [graph.nodes[0], graph.nodes[2]]
    remove_nodes(graph, removed)
    assert [n.op for n in graph.nodes] == ["Relu"]
    assert all(list(n.inputs) == list(n.outputs) == [] for n in removed)
    assert weight.outputs == [] and middle.outputs == []
    assert graph.nodes[0].inputs[0].inputs == []


def test_nodes_of_nested_graphs_are_removed() -> None:
    graph = loaded("if_branches")
    inner = next(part for part in walk_graphs(graph) if part is not graph)
    doomed = inner.nodes[0]
    count = len(list(walk_nodes(graph)))
    remove_nodes(graph, [doomed])
    assert len(list(walk_nodes(graph))) == count - 1
    assert all(n is not doomed for n in walk_nodes(graph))


# -- order -------------------------------------------------------------------------------------------------------------


def test_sorting_is_stable_and_topological() -> None:
    graph = chain(*["Add"] * 6)
    order = [n.name for n in graph.nodes]
    sort_nodes(graph)
    assert [n.name for n in graph.nodes] == order
    graph.nodes.reverse()
    sort_nodes(graph)
    assert [n.name for n in graph.nodes] == order
    free = [gs.Node("Relu", f"r{i}", inputs=[graph.inputs[0]], outputs=[gs.Variable(f"o{i}")]) for i in (3, 1, 2)]
    graph.nodes[:0] = free
    sort_nodes(graph)
    assert [n.name for n in graph.nodes] == ["r3", "r1", "r2", *order]


def test_a_late_producer_only_delays_its_readers() -> None:
    x = gs.Variable("x")
    late, mid = gs.Variable("late"), gs.Variable("mid")
    reader = gs.Node("Add", "reader", inputs=[late, late, mid], outputs=[gs.Variable("y")])
    middle = gs.Node("Neg", "middle", inputs=[late], outputs=[mid])
    other = gs.Node("Exp", "other", inputs=[x], outputs=[gs.Variable("z")])
    producer = gs.Node("Relu", "producer", inputs=[x], outputs=[late])
    graph = gs.Graph(nodes=[reader, other, middle, producer], inputs=[x], outputs=[])
    sort_nodes(graph)
    assert [n.name for n in graph.nodes] == ["other", "producer", "middle", "reader"]


def test_a_node_that_reads_or_writes_nothing_is_kept() -> None:
    made, read = gs.Variable("made"), gs.Variable("read")
    sink = gs.Node("Print", "sink", domain="custom", inputs=[read])
    nodes = [sink, gs.Node("Relu", "middle", inputs=[made], outputs=[read]), gs.Node("Draw", "source", outputs=[made])]
    graph = gs.Graph(nodes=[*nodes, gs.Node("Relu", "detached")])
    sort_nodes(graph)
    assert [n.name for n in graph.nodes] == ["source", "middle", "sink"]


def test_a_missing_input_is_nobodys_output() -> None:
    empty, a, b = gs.Variable.empty(), gs.Variable("a"), gs.Variable("b")
    first = gs.Node("Relu", "first", inputs=[gs.Variable("x"), empty], outputs=[a])
    second = gs.Node("Split", "second", inputs=[a], outputs=[b, empty])
    graph = gs.Graph(nodes=[second, first])
    sort_nodes(graph)
    assert [n.name for n in graph.nodes] == ["first", "second"]


@pytest.mark.parametrize("through", ["input", "output"])
def test_what_a_nested_graph_reads_comes_first(through: str) -> None:
    x, outer = gs.Variable("x"), gs.Variable("outer")
    if through == "input":
        inner_node = gs.Node("Relu", "inner", inputs=[outer], outputs=[gs.Variable("i")])
        inner = gs.Graph(nodes=[inner_node], outputs=inner_node.outputs)
    else:
        inner = gs.Graph(nodes=[], outputs=[outer])
    holder = gs.Node("If", "holder", {"then_branch": inner}, [gs.Variable("c")], [gs.Variable("y")])
    producer = gs.Node("Neg", "producer", inputs=[x], outputs=[outer])
    graph = gs.Graph(nodes=[holder, producer], inputs=[x], outputs=[])
    sort_nodes(graph)
    assert [n.name for n in graph.nodes] == ["producer", "holder"]


def test_cycles_are_found() -> None:
    a, b, c = gs.Variable("a"), gs.Variable("b"), gs.Variable("c")
    nodes = [
        gs.Node("Exp", "fine", inputs=[gs.Variable("x")], outputs=[c]),
        gs.Node("Relu", "first", inputs=[a], outputs=[b]),
        gs.Node("Neg", "second", inputs=[b], outputs=[a]),
    ]
    with pytest.raises(ModelError, match="cycle through node 'first'"):
        sort_nodes(gs.Graph(nodes=nodes))
    own = gs.Variable("own")
    with pytest.raises(ModelError, match="cycle through node 'itself'"):
        sort_nodes(gs.Graph(nodes=[gs.Node("Relu", "itself", inputs=[own], outputs=[own])]))


def test_depth_does_not_matter() -> None:
    graph = chain(*["Relu"] * 5000)
    graph.nodes.reverse()
    sort_nodes(graph)
    assert [n.name for n in graph.nodes] == [f"n{i}" for i in range(5000)]
    assert len(copy_graph(graph).nodes) == 5000
