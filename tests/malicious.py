"""Files that are made to do harm, each by a function that writes it into a folder of its own."""

from __future__ import annotations

import gzip
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["MALICIOUS", "SLOW", "Maker"]

#: writes a model and what belongs to it below a folder; the name of the model file, if it is not ``model.onnx``
Maker = Callable[[Path], None]

MALICIOUS: dict[str, Maker] = {}
#: those that are stopped by a limit, with what the environment sets it to
SLOW: dict[str, dict[str, str]] = {}

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
SIZE = 64


def malicious(maker: Maker) -> Maker:
    MALICIOUS[maker.__name__] = maker
    return maker


def limited(**environment: str) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        SLOW[maker.__name__] = environment
        return malicious(maker)

    return register


def info(name: str, kind: int = FLOAT, shape: Sequence[Any] | None = ("n", SIZE)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def weight(name: str = "w") -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones((SIZE, SIZE), np.float32), name)


def model(
    nodes: Sequence[onnx.NodeProto] | None = None,
    initializers: Sequence[onnx.TensorProto] | None = None,
    *,
    opset: int = 17,
    outputs: Sequence[onnx.ValueInfoProto] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    sparse: Sequence[onnx.SparseTensorProto] = (),
    ir_version: int = 9,
) -> onnx.ModelProto:
    """MatMul of the input ``x`` by ``w`` to ``y``, or other nodes."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")] if nodes is None else list(nodes),
        "g",
        [info("x")],
        [info("y")] if outputs is None else list(outputs),
        [weight()] if initializers is None else list(initializers),
        sparse_initializer=list(sparse),
    )
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid("f", 1)] if functions else [])
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=list(functions))


def write(folder: Path, proto: onnx.ModelProto | bytes) -> None:
    data = proto if isinstance(proto, bytes) else proto.SerializeToString()
    (folder / "model.onnx").write_bytes(data)


def int64s(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


# -- external data ---------------------------------------------------------------------------------------------------


def external(folder: Path, *, name: str = "w.bin", **entries: str | None) -> onnx.TensorProto:
    """A weight in the file ``name``, which is written, with entries replaced (None: left out)."""
    (folder / name).write_bytes(weight().raw_data)
    return reference(**{"location": name, "offset": "0", "length": str(SIZE * SIZE * 4)} | entries)


def reference(tensor: str = "w", **entries: str | None) -> onnx.TensorProto:
    made = TensorProto(name=tensor, dims=[SIZE, SIZE], data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        if value is not None:
            made.external_data.add(key=key, value=value)
    return made


def secret(folder: Path) -> Path:
    """A file outside of the model's folder."""
    path = folder.parent / "secret"
    path.write_bytes(weight().raw_data)
    return path


@malicious
def absolute_path(folder: Path) -> None:
    write(folder, model(initializers=[reference(location=str(secret(folder)))]))


@malicious
def system_file(folder: Path) -> None:
    write(folder, model(initializers=[reference(location="/etc/passwd")]))


@malicious
def parent_folder(folder: Path) -> None:
    secret(folder)
    write(folder, model(initializers=[reference(location="../secret")]))


@malicious
def parent_folder_in_the_middle(folder: Path) -> None:
    secret(folder)
    (folder / "a").mkdir()
    write(folder, model(initializers=[reference(location="a/../../secret")]))


@malicious
def windows_path(folder: Path) -> None:
    write(folder, model(initializers=[reference(location="C:\\Windows\\win.ini")]))


@malicious
def windows_parent_folder(folder: Path) -> None:
    secret(folder)
    write(folder, model(initializers=[reference(location="..\\secret")]))


@malicious
def link_to_outside(folder: Path) -> None:
    (folder / "w.bin").symlink_to(secret(folder))
    write(folder, model(initializers=[reference(location="w.bin")]))


@malicious
def link_inside(folder: Path) -> None:
    external(folder, name="real.bin")
    (folder / "w.bin").symlink_to("real.bin")
    write(folder, model(initializers=[reference(location="w.bin")]))


@malicious
def linked_folder(folder: Path) -> None:
    secret(folder)
    (folder / "sub").symlink_to(folder.parent)
    write(folder, model(initializers=[reference(location="sub/secret")]))


@malicious
def cache_link_to_outside(folder: Path) -> None:
    """A model that is a link into ``blobs``, as in the cache of Hugging Face, with data that leads elsewhere."""
    (folder / "blobs").mkdir()
    write(folder, model(initializers=[reference(location="w.bin")]))
    (folder / "model.onnx").rename(folder / "blobs" / "0001")
    (folder / "model.onnx").symlink_to("blobs/0001")
    (folder / "w.bin").symlink_to(secret(folder))


@malicious
def hard_link(folder: Path) -> None:
    (folder / "w.bin").hardlink_to(secret(folder))
    write(folder, model(initializers=[reference(location="w.bin")]))


@malicious
def pipe(folder: Path) -> None:
    os.mkfifo(folder / "w.bin")
    write(folder, model(initializers=[reference(location="w.bin")]))


@malicious
def device(folder: Path) -> None:
    (folder / "w.bin").symlink_to("/dev/zero")
    write(folder, model(initializers=[reference(location="w.bin")]))


@malicious
def device_by_path(folder: Path) -> None:
    write(folder, model(initializers=[reference(location="/dev/zero")]))


@malicious
def data_is_a_folder(folder: Path) -> None:
    (folder / "w.bin").mkdir()
    write(folder, model(initializers=[reference(location="w.bin")]))


@malicious
def missing_data(folder: Path) -> None:
    write(folder, model(initializers=[reference(location="w.bin")]))


@malicious
def memory_address(folder: Path) -> None:
    """How onnxruntime marks a tensor that lies at an address in its own memory."""
    write(folder, model(initializers=[reference(location="*/_ORT_MEM_ADDR_/*", offset="4096", length="16384")]))


@malicious
def memory_address_with_a_file(folder: Path) -> None:
    """A file of that name exists, but the runtime does not look for one."""
    (folder / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    (folder / "*" / "_ORT_MEM_ADDR_" / "*").write_bytes(bytes(1 << 16))
    write(folder, model(initializers=[reference(location="*/_ORT_MEM_ADDR_/*", offset="4096", length="16384")]))


@malicious
def nul_in_location(folder: Path) -> None:
    external(folder)
    write(folder, model(initializers=[reference(location="w.bin\0.txt")]))


@malicious
def two_locations(folder: Path) -> None:
    tensor = external(folder)
    tensor.external_data.add(key="location", value="../secret")
    write(folder, model(initializers=[tensor]))


@malicious
def offset_beyond_the_end(folder: Path) -> None:
    write(folder, model(initializers=[external(folder, offset="4096")]))


@malicious
def negative_offset(folder: Path) -> None:
    write(folder, model(initializers=[external(folder, offset="-4096")]))


@malicious
def offset_that_overflows(folder: Path) -> None:
    write(folder, model(initializers=[external(folder, offset=str(2**64 - 16384))]))


@malicious
def offset_of_many_digits(folder: Path) -> None:
    write(folder, model(initializers=[external(folder, offset="9" * 100_000)]))


@malicious
def length_too_small(folder: Path) -> None:
    write(folder, model(initializers=[external(folder, length="4")]))


@malicious
def length_too_large(folder: Path) -> None:
    write(folder, model(initializers=[external(folder, length=str(1 << 50))]))


@malicious
def truncated_data(folder: Path) -> None:
    tensor = external(folder)
    (folder / "w.bin").write_bytes(bytes(100))
    write(folder, model(initializers=[tensor]))


@malicious
def overlapping_ranges(folder: Path) -> None:
    first, second = external(folder), reference("v", location="w.bin", offset="4096", length="16384")
    (folder / "w.bin").write_bytes(bytes(4096 + 16384))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    write(folder, model(nodes, [first, second]))


@malicious
def external_text(folder: Path) -> None:
    tensor = external(folder)
    tensor.data_type = TensorProto.STRING
    write(folder, model(initializers=[tensor]))


@malicious
def escape_in_a_function(folder: Path) -> None:
    secret(folder)
    constant = helper.make_node("Constant", [], ["c"], value=reference("", location="../secret"))
    body = [constant, helper.make_node("MatMul", ["a", "c"], ["b"])]
    function = helper.make_function("f", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    write(folder, model([helper.make_node("F", ["x"], ["y"], domain="f")], functions=[function]))


@malicious
def escape_in_an_attribute(folder: Path) -> None:
    secret(folder)
    constant = helper.make_node("Constant", [], ["w"], value=reference("", location="../secret"))
    write(folder, model([constant, helper.make_node("MatMul", ["x", "w"], ["y"])], []))


@malicious
def escape_in_a_sparse_tensor(folder: Path) -> None:
    secret(folder)
    values = reference("w", location="../secret")
    values.dims[:] = [SIZE * SIZE]
    sparse = helper.make_sparse_tensor(values, int64s("", *range(SIZE * SIZE)), [SIZE, SIZE])
    write(folder, model(initializers=[], sparse=[sparse]))


@malicious
def escape_in_training_information(folder: Path) -> None:
    secret(folder)
    proto = model()
    part = proto.training_info.add()
    part.algorithm.name = "a"
    part.algorithm.initializer.append(reference("t", location="../secret"))
    write(folder, proto)


# -- damaged and wrong files -----------------------------------------------------------------------------------------


@malicious
def empty_file(folder: Path) -> None:
    write(folder, b"")


@malicious
def truncated_file(folder: Path) -> None:
    write(folder, model().SerializeToString()[:-5000])


@malicious
def random_bytes(folder: Path) -> None:
    write(folder, np.random.default_rng(0).bytes(10_000))


@malicious
def length_beyond_the_file(folder: Path) -> None:
    write(folder, b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(100))


@malicious
def zip_archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.onnx", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data.pkl", bytes(1 << 20))


@malicious
def gzip_archive(folder: Path) -> None:
    write(folder, gzip.compress(model().SerializeToString()))


@malicious
def no_graph(folder: Path) -> None:
    write(folder, onnx.ModelProto(ir_version=9))


@malicious
def no_opset(folder: Path) -> None:
    proto = model()
    del proto.opset_import[:]
    write(folder, proto)


@malicious
def opset_of_the_future(folder: Path) -> None:
    write(folder, model(opset=2**40))


@malicious
def version_of_the_future(folder: Path) -> None:
    write(folder, model(ir_version=2**40))


@malicious
def names_that_are_no_utf8(folder: Path) -> None:
    write(folder, model().SerializeToString().replace(b"product", b"prod\xff\xfe\xfd"))


@malicious
def nul_in_a_name(folder: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h\0h"]), helper.make_node("Relu", ["h\0h"], ["y"])]
    write(folder, model(nodes))


@malicious
def cycle(folder: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    write(folder, model([*nodes, helper.make_node("Relu", ["b"], ["y"])], []))


@malicious
def node_that_reads_itself(folder: Path) -> None:
    write(folder, model([helper.make_node("Add", ["x", "y"], ["y"])], []))


@malicious
def two_nodes_write_one_tensor(folder: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["y"])]
    write(folder, model(nodes, []))


@malicious
def unknown_operator(folder: Path) -> None:
    write(folder, model([helper.make_node("Launch", ["x"], ["y"])], []))


@malicious
def attribute_of_the_wrong_type(folder: Path) -> None:
    write(folder, model([helper.make_node("LeakyRelu", ["x"], ["y"], alpha="steep")], []))


@malicious
def function_that_calls_itself(folder: Path) -> None:
    body = [helper.make_node("F", ["a"], ["b"], domain="f")]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    function = helper.make_function("f", "F", ["a"], ["b"], body, imports)
    write(folder, model([helper.make_node("F", ["x"], ["y"], domain="f")], [], functions=[function]))


@malicious
def functions_that_call_each_other(folder: Path) -> None:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    functions = [
        helper.make_function("f", name, ["a"], ["b"], [helper.make_node(other, ["a"], ["b"], domain="f")], imports)
        for name, other in (("F", "G"), ("G", "F"))
    ]
    write(folder, model([helper.make_node("F", ["x"], ["y"], domain="f")], [], functions=functions))


@malicious
def functions_that_double(folder: Path) -> None:
    """Each function calls the next one twice: 2^40 nodes once they are inlined."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    functions = []
    for level in range(40):
        name = f"F{level + 1}"
        body = [helper.make_node(name, ["a"], ["h"], domain="f"), helper.make_node(name, ["h"], ["b"], domain="f")]
        functions.append(helper.make_function("f", f"F{level}", ["a"], ["b"], body, imports))
    functions.append(helper.make_function("f", "F40", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], imports))
    write(folder, model([helper.make_node("F0", ["x"], ["y"], domain="f")], [], functions=functions))


# -- tensors ---------------------------------------------------------------------------------------------------------


@malicious
def raw_data_too_short(folder: Path) -> None:
    tensor = weight()
    tensor.raw_data = tensor.raw_data[:-4]
    write(folder, model(initializers=[tensor]))


@malicious
def small_raw_data_too_short(folder: Path) -> None:
    tensor = numpy_helper.from_array(np.ones(SIZE, np.float32), "w")
    tensor.raw_data = tensor.raw_data[:-4]
    write(folder, model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor]))


@malicious
def float_data_too_short(folder: Path) -> None:
    tensor = TensorProto(name="w", dims=[SIZE], data_type=FLOAT, float_data=[1.0] * 3)
    write(folder, model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor]))


@malicious
def negative_dimension(folder: Path) -> None:
    tensor = weight()
    tensor.dims[0] = -SIZE
    write(folder, model(initializers=[tensor]))


@malicious
def dimensions_that_overflow(folder: Path) -> None:
    tensor = weight()
    tensor.dims[:] = [1 << 32, 1 << 32]
    write(folder, model(initializers=[tensor]))


@malicious
def giant_tensor_without_data(folder: Path) -> None:
    tensor = TensorProto(name="w", dims=[SIZE, 1 << 50], data_type=FLOAT)
    write(folder, model(initializers=[tensor]))


@malicious
def unknown_type(folder: Path) -> None:
    tensor = weight()
    tensor.data_type = 99
    write(folder, model(initializers=[tensor]))


@malicious
def packed_type_too_short(folder: Path) -> None:
    tensor = TensorProto(name="w", dims=[4001], data_type=TensorProto.INT4, raw_data=bytes(100))
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"])
    scale = numpy_helper.from_array(np.float32(1), "s")
    write(folder, model([node], [tensor, scale], opset=21, ir_version=10, outputs=[info("y", shape=[4001])]))


@malicious
def sparse_index_out_of_range(folder: Path) -> None:
    values = numpy_helper.from_array(np.ones(2, np.float32), "w")
    sparse = helper.make_sparse_tensor(values, int64s("", 0, 1 << 40), [SIZE, SIZE])
    write(folder, model(initializers=[], sparse=[sparse]))


@malicious
def giant_sparse_tensor(folder: Path) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    sparse = helper.make_sparse_tensor(values, int64s("", 0), [SIZE, 1 << 40])
    write(folder, model(initializers=[], sparse=[sparse]))


# -- bombs: small files that ask for more memory or time than there is -------------------------------------------------

MEMORY = {"ONNXCOMPRESS_PROBE_MEMORY": "1e9"}


def bomb(folder: Path, nodes: Sequence[onnx.NodeProto], *initializers: onnx.TensorProto) -> None:
    """``nodes`` make ``big``, of 2^34 elements; the output is its sum and the input's."""
    total = helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0)
    nodes = [*nodes, total, helper.make_node("Add", ["x", "sum"], ["y"])]
    write(folder, model(nodes, [*initializers, numpy_helper.from_array(np.ones(1, np.float32), "one")]))


@limited(**MEMORY)
def bomb_constant_of_shape(folder: Path) -> None:
    bomb(folder, [helper.make_node("ConstantOfShape", ["s"], ["big"])], int64s("s", 1 << 17, 1 << 17))


@limited(**MEMORY)
def bomb_expand(folder: Path) -> None:
    bomb(folder, [helper.make_node("Expand", ["one", "s"], ["big"])], int64s("s", 1 << 17, 1 << 17))


@limited(**MEMORY)
def bomb_tile(folder: Path) -> None:
    bomb(folder, [helper.make_node("Tile", ["one", "s"], ["big"])], int64s("s", 1 << 34))


@limited(**MEMORY)
def bomb_pad(folder: Path) -> None:
    bomb(folder, [helper.make_node("Pad", ["one", "s"], ["big"])], int64s("s", 0, 1 << 34))


@limited(**MEMORY)
def bomb_range(folder: Path) -> None:
    limits = [numpy_helper.from_array(np.float32(v), n) for n, v in (("a", 0), ("b", 1 << 34), ("c", 1))]
    bomb(folder, [helper.make_node("Range", ["a", "b", "c"], ["big"])], *limits)


@limited(**MEMORY)
def bomb_that_depends_on_the_input(folder: Path) -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Expand", ["m", "s"], ["big"]),
    ]
    bomb(folder, nodes, int64s("s", 1 << 17, 1 << 17))


@limited(**MEMORY)
def giant_input(folder: Path) -> None:
    """What a made-up sample of this shape would take."""
    proto = model([helper.make_node("Relu", ["x"], ["y"])], [])
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = 1 << 40
    write(folder, proto)


@limited(**MEMORY)
def giant_symbolic_shape(folder: Path) -> None:
    """Every dimension is small, their product is not."""
    proto = model([helper.make_node("Relu", ["x"], ["y"])], [])
    for value in (*proto.graph.input, *proto.graph.output):
        del value.type.tensor_type.shape.dim[:]
        for _ in range(6):
            value.type.tensor_type.shape.dim.add(dim_value=1000)
    write(folder, proto)


@limited(ONNXCOMPRESS_PROBE_SECONDS="4")
def endless_loop(folder: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Cos", ["h"], ["i"])],
        "body",
        [info("n", INT64, []), info("c", TensorProto.BOOL, []), info("h")],
        [info("d", TensorProto.BOOL, []), info("i")],
    )
    count, go = int64s("count", 1 << 62), numpy_helper.from_array(np.array(True), "go")
    count.dims[:] = []
    write(folder, model([helper.make_node("Loop", ["count", "go", "x"], ["y"], body=body)], [count, go]))


def nested(depth: int) -> onnx.GraphProto:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y0"])], "g0", [], [info("y0")])
    for level in range(1, depth):
        other = helper.make_graph([helper.make_node("Abs", ["x"], [f"z{level}"])], "o", [], [info(f"z{level}")])
        node = helper.make_node("If", ["go"], [f"y{level}"], then_branch=graph, else_branch=other)
        graph = helper.make_graph([node], f"g{level}", [], [info(f"y{level}")])
    return graph


@malicious
def deep_nesting(folder: Path) -> None:
    """Graphs in graphs, deeper than protobuf reads; written by hand, since it does not write them either."""
    inner = nested(2).SerializeToString()

    def field(number: int, data: bytes) -> bytes:
        length = len(data)
        head = bytearray([number << 3 | 2])
        while length > 0x7F:
            head.append(length & 0x7F | 0x80)
            length >>= 7
        return bytes(head) + bytes([length]) + data

    for _ in range(300):
        attribute = field(1, b"then_branch") + field(6, inner) + b"\xa0\x01\x05"
        inner = field(1, field(2, b"y") + field(4, b"If") + field(5, attribute)) + field(2, b"g")
    write(folder, b"\x08\x09" + field(7, inner) + field(8, b"\x10\x11"))
