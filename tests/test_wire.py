"""Weights are cut out of a protobuf stream and put back byte for byte."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.wire import Payload, Split, WireError, join, split


def nested_model(sizes: list[int]) -> onnx.ModelProto:
    """Weights as initializers, in a branch, and in attributes."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.random(n).astype(np.float32), f"w{n}") for n in sizes]
    inner = helper.make_graph([], "inner", [], [], weights)
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=inner, number=-5),
        helper.make_node("Odd", [], ["z"], **({"tensors": weights, "one": weights[0]} if weights else {})),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], weights, doc_string="x" * 3000))
    model.metadata_props.add(key="k", value="v" * 5000)
    return model


def split_bytes(tmp_path: Path, data: bytes, threshold: int = 1024, *, skip: bool = False) -> Split:
    path = tmp_path / "model"
    path.write_bytes(data)
    with path.open("rb") as file:
        return split(file, threshold, skip=skip)


def rejoined(parts: Split) -> bytes:
    payloads = {key: Payload(data.nbytes, lambda data=data: data) for key, data in parts.payloads.items()}
    size, pieces = join(parts.skeleton, parts.token, payloads)
    out = b"".join(pieces)
    assert len(out) == size
    return out


@pytest.mark.parametrize("sizes", [[], [0], [10], [255, 256, 257], [300, 5000, 70000]])
def test_split_and_join(tmp_path: Path, sizes: list[int]) -> None:
    data = nested_model(sizes).SerializeToString()
    parts = split_bytes(tmp_path, data)
    large = [n for n in sizes if n * 4 >= 1024]
    assert len(parts.payloads) == 3 * len(large) + (1 if large and large[0] == sizes[0] else 0)
    assert len(parts.skeleton) < len(data) - 3 * 4 * sum(large) + 200 + 100 * len(parts.payloads)
    assert rejoined(parts) == data
    onnx.ModelProto.FromString(parts.skeleton)
    for payload in parts.payloads.values():
        assert not payload.flags.writeable
        assert payload.flags.aligned


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 600), max_size=4), st.integers(1, 2000))
def test_any_threshold(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], threshold: int) -> None:
    data = nested_model(sizes).SerializeToString()
    assert rejoined(split_bytes(tmp_path_factory.mktemp("wire"), data, threshold)) == data


def test_skipped_weights_are_not_read(tmp_path: Path) -> None:
    data = nested_model([5000]).SerializeToString()
    parts = split_bytes(tmp_path, data, skip=True)
    assert parts.skeleton[:20] == split_bytes(tmp_path, data).skeleton[:20]
    assert [p.nbytes for p in parts.payloads.values()] == [0, 0, 0, 0]


def test_every_truncation_is_noticed_or_leaves_a_whole_message(tmp_path: Path) -> None:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Abs", ["w"], ["y"])], "g", [], [], [numpy_helper.from_array(np.ones(400), "w")]
        )
    )
    data = model.SerializeToString()
    whole = 0
    for end in range(len(data)):
        try:
            parts = split_bytes(tmp_path, data[:end])
        except WireError:
            continue
        assert rejoined(parts) == data[:end]
        whole += 1
    assert whole < 10


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff" * 11, "64 bits"),
        (b"\x3b", "wire type 3"),
        (b"\x00\x01", "number 0"),
        (b"\x3a\xff\xff\xff\xff\x0f", "beyond the end"),
        (b"\x0d\x00", "beyond the end"),
        (b"\x08", "too early"),
    ],
)
def test_what_is_no_protobuf(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        split_bytes(tmp_path, data)


def test_graphs_nested_without_end(tmp_path: Path) -> None:
    graph = helper.make_graph([], "leaf" * 500, [], [])
    data = graph.SerializeToString()

    def wrapped(number: int, inner: bytes) -> bytes:
        length, head = len(inner), bytearray([number << 3 | 2])
        while length > 127:
            head.append(length & 127 | 128)
            length >>= 7
        return bytes([*head, length]) + inner

    for _ in range(60):  # graph -> node -> attribute -> graph
        data = wrapped(1, wrapped(5, wrapped(6, data)))
    with pytest.raises(WireError, match="nested deeper"):
        split_bytes(tmp_path, wrapped(7, data))


def test_a_marker_in_the_file_is_only_data(tmp_path: Path) -> None:
    """Tokens are drawn anew for each file, so what looks like the marker of another file is carried as it is."""
    first = split_bytes(tmp_path, nested_model([500]).SerializeToString())
    marker = next(iter(first.payloads))
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[len(marker)], raw_data=marker)
    data = helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString()
    parts = split_bytes(tmp_path, data)
    assert not parts.payloads
    assert rejoined(parts) == data


def test_split_needs_a_real_file() -> None:
    with pytest.raises(io.UnsupportedOperation):
        split(io.BytesIO(b"\x08\x01"), 1024)


def test_more_fields_than_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.wire._MOST_FIELDS", 1000)
    for count in (900, 1001):
        path = tmp_path / f"{count}.onnx"
        nodes = b"\x0a\x00" * count
        path.write_bytes(b"\x3a" + bytes([len(nodes) & 127 | 128, len(nodes) >> 7]) + nodes)
        with path.open("rb") as file:
            if count > 1000:
                with pytest.raises(WireError, match="more than 1000 fields"):
                    split(file, 1024)
            else:
                assert split(file, 1024).skeleton == path.read_bytes()
