from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.graph import Graph
from onnxcompress.passes.quantize_embeddings import QuantizeEmbeddings
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.session import Session

Array = NDArray[Any]


def build(table: Array, nodes: list[onnx.NodeProto] | None = None, outputs: tuple[str, ...] = ("y",)) -> Graph:
    kind = helper.np_dtype_to_tensor_dtype(table.dtype)
    graph = helper.make_graph(
        nodes or [helper.make_node("Gather", ["table", "ids"], ["y"], name="look_up")],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", "S"])],
        [helper.make_tensor_value_info(n, kind, ["A", "B", "C"] if n != "z" else ["A", "B"]) for n in outputs],
        [numpy_helper.from_array(table, "table")],
    )
    return from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def table(rng: np.random.Generator, rows: int = 200, width: int = 96) -> Array:
    return (rng.normal(size=(rows, width)) * np.geomspace(0.01, 10, rows)[:, None]).astype(np.float32)


IDS = {"ids": np.array([[0, 3, 199], [-1, 7, 0]], np.int64)}


@pytest.mark.parametrize("magnitude", [1.0, 1e-7, 1e8])
def test_every_entry_is_within_half_a_step_of_its_row(rng: np.random.Generator, magnitude: float) -> None:
    values = table(rng) * np.float32(magnitude)
    values[5] = 0
    graph = build(values)
    before = to_proto(graph).SerializeToString()
    result = QuantizeEmbeddings()(graph)
    assert to_proto(graph).SerializeToString() == before
    written = to_proto(result.graph)
    onnx.checker.check_model(written, full_check=True)
    everything = {"ids": np.arange(len(values), dtype=np.int64)[None]}
    found = Session(result.graph, optimization="disabled").run(everything)["y"][0]
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - values) <= 0.502 * step + 1e-30).all()
    assert len(written.SerializeToString()) < 0.32 * len(before)
    assert [c.node for c in result.report.changes] == ["look_up"]


def test_the_optimised_session_agrees(rng: np.random.Generator) -> None:
    result = QuantizeEmbeddings()(build(table(rng)))
    plain = Session(result.graph, optimization="disabled").run(IDS)["y"]
    np.testing.assert_allclose(Session(result.graph).run(IDS)["y"], plain, rtol=1e-6)


def test_a_table_of_two_readers_is_stored_once(rng: np.random.Generator) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"], name="first"),
        helper.make_node("Gather", ["table", "ids"], ["b"], name="second", axis=0),
    ]
    result = QuantizeEmbeddings()(build(table(rng), nodes, ("a", "b")))
    stored = [t for t in to_proto(result.graph).graph.initializer if t.data_type == TensorProto.INT8]
    assert len(stored) == 1 and len(result.report.changes) == 2


@pytest.mark.parametrize("case", ["small", "columns", "shared", "half", "not finite"])
def test_what_cannot_be_stored_is_left_alone_with_the_reason(rng: np.random.Generator, case: str) -> None:
    values = table(rng, rows=4 if case == "small" else 200)
    nodes = None
    outputs: tuple[str, ...] = ("y",)
    if case == "columns":
        nodes = [helper.make_node("Gather", ["table", "ids"], ["y"], name="look_up", axis=1)]
    if case == "shared":
        nodes = [
            helper.make_node("Gather", ["table", "ids"], ["y"], name="look_up"),
            helper.make_node("Relu", ["table"], ["z"], name="other"),
        ]
        outputs = ("y", "z")
    if case == "half":
        values = rng.normal(size=(400, 96)).astype(np.float16)
    if case == "not finite":
        values[3, 3] = np.inf
    result = QuantizeEmbeddings()(build(values, nodes, outputs))
    assert not result.report.changed
    assert len(result.report.refusals) == (0 if case == "small" else 1)
    assert all(r.node == "look_up" and "'table'" in r.reason for r in result.report.refusals)


def test_a_second_run_changes_nothing(rng: np.random.Generator) -> None:
    once = QuantizeEmbeddings()(build(table(rng)))
    again = QuantizeEmbeddings()(once.graph)
    assert not again.report.changed and not again.report.refusals
