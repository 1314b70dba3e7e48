"""Synthetic inputs: real sessions must be able to run on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.data import synthetic_data
from onnxcompress.errors import DataError, UsageError
from onnxcompress.graph import Graph, InputSpec, input_specs
from onnxcompress.proto import from_proto
from onnxcompress.session import Session

F32 = np.dtype(np.float32)
I64 = np.dtype(np.int64)
TYPES = {"f": TensorProto.FLOAT, "i": TensorProto.INT64, "b": TensorProto.BOOL, "u": TensorProto.UINT8}


def model(
    inputs: dict[str, tuple[str, Sequence[int | str | None] | None]],
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, NDArray[Any]] | None = None,
    output: str = "y",
    shape: Sequence[int | str | None] | None = None,
    kind: str = "f",
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, TYPES[k], s) for name, (k, s) in inputs.items()],
        [helper.make_tensor_value_info(output, TYPES[kind], shape)],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def feeds_of(proto: onnx.ModelProto, **options: Any) -> list[dict[str, NDArray[Any]]]:
    """Feeds for ``proto``, each of which was run."""
    graph: Graph = from_proto(proto)
    session = Session(proto)
    feeds = []
    for batch in synthetic_data(input_specs(graph), graph=graph, **options):
        session.run(batch.feeds)
        feeds.append(batch.feeds)
    return feeds


TABLE = np.random.default_rng(0).random((7, 4), np.float32)


@pytest.mark.parametrize(
    "path",
    [
        [],
        [("Cast", {"to": TensorProto.INT32})],
        [("Unsqueeze", {}), ("Squeeze", {})],
        [("Identity", {}), ("Transpose", {"perm": [1, 0]})],
        [("Reshape", {})],
        [("Slice", {})],
        [("Add", {})],
        [("Sub", {})],
    ],
)
def test_indices_stay_inside_their_table(path: list[tuple[str, dict[str, Any]]]) -> None:
    """A value outside makes the runtime refuse; the bound must be reached, so that it is not simply tiny."""
    extra = {"Unsqueeze": ["one"], "Squeeze": ["one"], "Reshape": ["flat"], "Slice": ["one", "two"]}
    extra |= {"Add": ["three"], "Sub": ["minus"]}
    nodes, last = [], "ids"
    for number, (op, attributes) in enumerate(path):
        nodes.append(helper.make_node(op, [last, *extra.get(op, [])], [f"t{number}"], **attributes))
        last = f"t{number}"
    nodes.append(helper.make_node("Gather", ["table", last], ["y"], axis=0))
    constants = {
        "table": TABLE,
        "one": np.array([1]),
        "two": np.array([3]),
        "flat": np.array([-1]),
        "three": np.array(3),
        "minus": np.array(-3),
    }
    proto = model({"ids": ("i", ["N", "L"])}, nodes, constants)
    values = np.concatenate([f["ids"].reshape(-1) for f in feeds_of(proto, samples=40)])
    highest = 3 if path and path[0][0] in ("Add", "Sub") else 6
    assert values.min() == 0 and values.max() == highest


def test_bounds_of_other_indexing_operators() -> None:
    gather_elements = helper.make_node("GatherElements", ["table", "ids"], ["y"], axis=1)
    proto = model({"ids": ("i", [7, 2])}, [gather_elements], {"table": TABLE})
    assert max(f["ids"].max() for f in feeds_of(proto, samples=14)) == 3
    gather_nd = helper.make_node("GatherND", ["table", "ids"], ["y"])
    proto = model({"ids": ("i", ["N", 2])}, [gather_nd], {"table": TABLE})
    assert max(f["ids"].max() for f in feeds_of(proto, samples=40)) == 3
    scatter = helper.make_node("ScatterElements", ["table", "ids", "updates"], ["y"], axis=0)
    updates = np.zeros((1, 4), np.float32)
    proto = model({"ids": ("i", [1, 4])}, [scatter], {"table": TABLE, "updates": updates})
    assert max(f["ids"].max() for f in feeds_of(proto, samples=40)) == 6


def test_table_that_is_computed() -> None:
    nodes = [helper.make_node("Neg", ["table"], ["n"]), helper.make_node("Gather", ["n", "ids"], ["y"])]
    values = [f["ids"].max() for f in feeds_of(model({"ids": ("i", ["N"])}, nodes, {"table": TABLE}), samples=60)]
    assert max(values) == 6


def test_smallest_of_two_tables_counts() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"]),
        helper.make_node("Gather", ["small", "ids"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    proto = model({"ids": ("i", ["N", 5])}, nodes, {"table": TABLE, "small": TABLE[:3]})
    assert max(f["ids"].max() for f in feeds_of(proto, samples=40)) == 2


def test_inputs_of_a_text_model() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["a"]),
        helper.make_node("Gather", ["small", "token_type_ids"], ["b"]),
        helper.make_node("Gather", ["places", "position_ids"], ["c"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["d"]),
        helper.make_node("Sum", ["a", "b", "c", "d"], ["y"]),
    ]
    constants = {"table": TABLE, "small": TABLE[:2], "places": np.tile(TABLE, (3, 1)), "last": np.array([-1])}
    names = ("input_ids", "token_type_ids", "position_ids", "attention_mask")
    proto = model({name: ("i", ["batch", "length"]) for name in names}, nodes, constants)
    feeds = feeds_of(proto, samples=4, batch=2, dynamic={"length": 11})
    assert len(feeds) == 2 and all(f[name].shape == (2, 11) for f in feeds for name in names)
    assert (feeds[0]["attention_mask"] == 1).all() and (feeds[0]["token_type_ids"] == 0).all()
    assert feeds[0]["position_ids"][1].tolist() == list(range(11))
    assert feeds_of(proto, samples=1)[0]["input_ids"].shape == (1, 16)


@pytest.mark.parametrize("size", [28, 32, 224])
@pytest.mark.parametrize("dims", [("H", "W"), (None, None), ("H", "fixed")])
def test_image_size_is_what_the_graph_demands(size: int, dims: tuple[Any, Any]) -> None:
    free = [size if d == "fixed" else d for d in dims]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[4, 4]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Gemm", ["f", "g"], ["y"]),
    ]
    features = 2 * (size // 4) ** 2
    constants = {"w": np.ones((2, 3, 4, 4), np.float32), "g": np.ones((features, 5), np.float32)}
    proto = model({"x": ("f", ["N", "C", *free])}, nodes, constants, shape=["N", 5])
    assert feeds_of(proto, samples=2)[0]["x"].shape == (1, 3, size, size)


def test_reshape_that_hides_a_wrong_size() -> None:
    """``Reshape [-1, 128]`` makes more samples of a larger image: only the output's batch tells."""
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["r"]), helper.make_node("MatMul", ["r", "g"], ["y"])]
    constants = {"shape": np.array([-1, 3 * 32 * 32]), "g": np.ones((3 * 32 * 32, 5), np.float32)}
    proto = model({"x": ("f", ["N", 3, "H", "W"])}, nodes, constants, shape=["N", 5])
    assert feeds_of(proto, samples=1)[0]["x"].shape == (1, 3, 32, 32)


def test_fully_convolutional_images_are_224() -> None:
    proto = model({"x": ("f", ["N", 3, "H", "W"])}, [helper.make_node("Relu", ["x"], ["y"])])
    assert feeds_of(proto, samples=1)[0]["x"].shape == (1, 3, 224, 224)
    channels_last = model({"x": ("f", ["N", "H", "W", 3])}, [helper.make_node("Relu", ["x"], ["y"])])
    assert feeds_of(channels_last, samples=1)[0]["x"].shape == (1, 224, 224, 3)


@pytest.mark.parametrize(
    ("node", "constant", "shape"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"]), np.ones((6, 2), np.float32), (1, 6)),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), np.ones((2, 6), np.float32), (1, 6)),
        (helper.make_node("Add", ["x", "w"], ["y"]), np.ones(9, np.float32), (1, 9)),
    ],
)
def test_features_are_what_the_weights_demand(
    node: onnx.NodeProto, constant: NDArray[Any], shape: tuple[int, ...]
) -> None:
    proto = model({"x": ("f", ["N", "F"])}, [node], {"w": constant})
    assert feeds_of(proto, samples=1)[0]["x"].shape == shape


def test_values_by_type() -> None:
    specs = [
        InputSpec("f", F32, ("N", 1000)),
        InputSpec("h", np.dtype(np.float16), ("N", 10)),
        InputSpec("pixels", np.dtype(np.uint8), ("N", 1000)),
        InputSpec("signed", np.dtype(np.int8), ("N", 1000)),
        InputSpec("flag", np.dtype(bool), ("N", 100)),
        InputSpec("mask", np.dtype(bool), ("N", 5)),
        InputSpec("count", I64, ()),
        InputSpec("words", np.dtype(object), ("N", 2)),
        InputSpec("scale", F32, (), optional=True),
    ]
    feeds = synthetic_data(specs, samples=2, batch=2).first().feeds
    assert abs(feeds["f"].mean()) < 0.1 and abs(feeds["f"].std() - 1) < 0.1 and feeds["f"].dtype == F32
    assert feeds["h"].dtype == np.float16
    assert (feeds["pixels"].min(), feeds["pixels"].max()) == (0, 255)
    assert (feeds["signed"].min(), feeds["signed"].max()) == (-128, 127)
    assert set(feeds["flag"].reshape(-1).tolist()) == {True, False} and feeds["mask"].all()
    assert feeds["count"].shape == () and feeds["count"] == 1
    assert feeds["words"].tolist() == [["a", "a"], ["a", "a"]] and "scale" not in feeds


def test_samples_depend_on_seed_and_number_only() -> None:
    specs = [InputSpec("x", F32, ("N", 4))]
    data = synthetic_data(specs, samples=10, batch=3, seed=1)
    assert data.synthetic and data.take(3).synthetic and data.split(0.5)[0].synthetic
    assert [b.samples for b in data] == [3, 3, 3, 1]
    assert data.fingerprint() == synthetic_data(specs, samples=10, batch=7, seed=1).fingerprint()
    assert data.fingerprint() != synthetic_data(specs, samples=10, batch=3, seed=2).fingerprint()
    values = np.concatenate([b.feeds["x"] for b in data])
    assert len(np.unique(values)) == 40
    np.testing.assert_array_equal(data.take(4).rebatch(4).first().feeds["x"], values[:4])


def test_fixed_batch_is_filled() -> None:
    data = synthetic_data([InputSpec("x", F32, (4, 2))], samples=6, batch=1)
    assert [b.samples for b in data] == [4, 4]


def test_recurrent_states_and_sums_of_symbols() -> None:
    nodes = [
        helper.make_node("ReduceSum", ["state"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    proto = model({"x": ("f", ["batch", "time"]), "state": ("f", [2, "batch", 3])}, nodes)
    feeds = feeds_of(proto, samples=6, batch=3)
    assert [(f["x"].shape, f["state"].shape) for f in feeds] == [((3, 16), (2, 3, 3))] * 2
    specs = [InputSpec("ids", I64, ("N", "new")), InputSpec("mask", I64, ("N", "past + new"))]
    first = synthetic_data(specs, dynamic={"new": 3}, samples=1).first().feeds
    assert first["ids"].shape == (1, 3) and first["mask"].shape == (1, 19)


def test_control_inputs_are_ones() -> None:
    proto = model({"x": ("f", ["N", 4]), "repeats": ("i", [2])}, [helper.make_node("Tile", ["x", "repeats"], ["y"])])
    assert feeds_of(proto, samples=1)[0]["repeats"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("specs", "options", "kind", "message"),
    [
        ([InputSpec("x", F32, None)], {}, DataError, "'x' declares no rank"),
        ([InputSpec("x", np.dtype(np.complex64), ("N",))], {}, DataError, "complex64 cannot be made up"),
        ([InputSpec("x", F32, ("N",))], {"samples": 0}, UsageError, "samples is 0; expected 1 or more"),
        ([InputSpec("x", F32, ("N", "L"))], {"dynamic": {"M": 2}}, UsageError, "no dimension 'M'; they have 'L', 'N'"),
        ([InputSpec("x", F32, ("N", "L"))], {"dynamic": {"L": 0}}, UsageError, "L is 0"),
        ([InputSpec("x", F32, (0, 3))], {}, DataError, "batches of 0 samples"),
    ],
)
def test_what_cannot_be_made_up(
    specs: list[InputSpec], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        synthetic_data(specs, **options)
