"""Models are read without trust and written all or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress import io
from onnxcompress.errors import ModelError, OnnxCompressError, ResourceError, UnsafeModelError, UsageError
from onnxcompress.graph import constant_value, copy_graph, input_specs, model_info
from onnxcompress.io import SavedModel, file_sha256, load, model_bytes, model_files, model_sha256, save, serialize
from onnxcompress.proto import dense_tensors, from_proto, to_proto
from onnxcompress.session import Session
from onnxcompress.version import __version__

FLOAT = TensorProto.FLOAT
ROWS = 300


def weights(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def a_model() -> onnx.ModelProto:
    """MatMul, Add, and a weight in a Constant node and in a branch."""
    then = helper.make_graph(
        [helper.make_node("Add", ["h", "inner"], ["t"], "t_add")],
        "then",
        [],
        [helper.make_tensor_value_info("t", FLOAT, ["n", ROWS])],
        [numpy_helper.from_array(weights(1, ROWS), "inner")],
    )
    other = helper.make_graph(
        [helper.make_node("Mul", ["h", "c"], ["e"], "e_mul")],
        "else",
        [],
        [helper.make_tensor_value_info("e", FLOAT, ["n", ROWS])],
    )
    nodes = [
        helper.make_node("Constant", [], ["c"], "c", value=numpy_helper.from_array(weights(2, 1, ROWS), "value")),
        helper.make_node("MatMul", ["x", "w"], ["h"], "matmul"),
        helper.make_node("If", ["flag"], ["i"], "if", then_branch=then, else_branch=other),
        helper.make_node("Add", ["i", "b"], ["y"], "add"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", FLOAT, ["n", ROWS]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", FLOAT, ["n", ROWS])],
        [numpy_helper.from_array(weights(3, ROWS, ROWS), "w"), numpy_helper.from_array(weights(4, 1), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="tests")
    model.metadata_props.add(key="author", value="someone")
    return model


def feeds() -> dict[str, np.ndarray[Any, Any]]:
    return {"x": weights(5, 2, ROWS), "flag": np.array(True)}


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(a_model(), path)
    return path


@pytest.fixture
def external_path(tmp_path: Path) -> Path:
    folder = tmp_path / "external"
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(
        a_model(), path, save_as_external_data=True, location="model.data", size_threshold=0, convert_attribute=True
    )
    return path


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below ``folder`` with what is in it."""
    return {
        str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink() else p.read_bytes() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


def same(left: onnx.ModelProto, right: onnx.ModelProto) -> bool:
    return bool(left.SerializeToString(deterministic=True) == right.SerializeToString(deterministic=True))


# -- load ----------------------------------------------------------------------------------------------------------


def test_load_then_save_gives_the_same_bytes(model_path: Path, tmp_path: Path) -> None:
    graph = load(model_path)
    saved = save(graph, tmp_path / "out.onnx")
    assert saved.path.read_bytes() == model_path.read_bytes()
    assert saved == SavedModel(
        tmp_path / "out.onnx", (tmp_path / "out.onnx",), model_path.stat().st_size, file_sha256(model_path)
    )
    info = model_info(graph)
    assert info.source_sha256 == hashlib.sha256(model_path.read_bytes()).hexdigest()
    assert info.metadata == {"author": "someone"}
    assert not info.external_data
    assert info.files == (model_path,)
    assert model_files(model_path) == [model_path]
    assert model_bytes(model_path) == model_path.stat().st_size


def test_weights_are_read_only_arrays_of_their_own(model_path: Path) -> None:
    graph = load(model_path)
    weight = constant_value(graph.nodes[1].inputs[1])
    assert weight is not None
    assert not weight.flags.writeable
    assert weight.flags.aligned
    assert weight is constant_value(graph.nodes[1].inputs[1])
    np.testing.assert_array_equal(weight, weights(3, ROWS, ROWS))


@pytest.mark.parametrize("name", ["missing.onnx", "broken.onnx", "folder", "pipe", "nul\0.onnx"])
def test_what_is_no_file_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.onnx").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for function in (load, model_files, file_sha256):
        with pytest.raises(UsageError) as caught:
            function(tmp_path / name)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_to_read(model_path: Path) -> None:
    model_path.chmod(0)
    with pytest.raises(UsageError, match="Permission denied"):
        load(model_path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(60), "PyTorch"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\x1c\0\0\0ORTM" + bytes(30), "ONNX Runtime's own format"),
        (b"not a model at all", "no ONNX model"),
        (b"\x08\x08", "holds no graph"),
    ],
)
def test_what_is_no_model(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=reason) as caught:
        load(path)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [0.01, 0.3, 0.9, 0.999])
def test_a_truncated_model(model_path: Path, part: float) -> None:
    data = model_path.read_bytes()
    model_path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ModelError, match=r"model\.onnx"):
        load(model_path)


def no_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


def broken_edge(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "nowhere"


def too_short(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]


def too_long(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data += b"0000"


def negative_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -1


def unknown_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_opset, "opset_import"),
        (lambda m: m.opset_import[0].__setattr__("version", 6), "convert it first"),
        (lambda m: m.opset_import[0].__setattr__("version", 999), "upgrade onnx"),
        (lambda m: m.__setattr__("ir_version", 999), "upgrade onnx"),
        (broken_edge, "topologically sorted, however input 'nowhere'"),
        (too_short, "359996 bytes of data, but 360000"),
        (too_long, "360004 bytes of data, but 360000"),
        (negative_shape, "no dimension can be negative"),
        (unknown_type, "data_type .*99"),
    ],
)
def test_invalid_models(model_path: Path, change: Callable[[onnx.ModelProto], None], reason: str) -> None:
    model = a_model()
    change(model)
    model_path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=reason) as caught:
        load(model_path)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert str(model_path) in str(caught.value)


def test_damaged_models_give_clear_errors(model_path: Path, rng: np.random.Generator) -> None:
    """Whatever byte is hit: the model loads and can be exported, or the error is one of ours."""
    data = model_path.read_bytes()
    structure = [*range(120), *range(len(data) - 400, len(data))]
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for position in rng.choice(structure, size=2):
            damaged[position] = rng.integers(256)
        model_path.write_bytes(damaged)
        try:
            to_proto(load(model_path))
        except ModelError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 100 < refused < 400


def test_names_that_are_no_utf8(model_path: Path) -> None:
    model_path.write_bytes(model_path.read_bytes().replace(b"matmul", b"mat\xff\xfe\xfd"))
    with pytest.raises(ModelError, match=r"model\.onnx"):
        load(model_path)


def test_custom_domains_are_fine(tmp_path: Path) -> None:
    model = a_model()
    model.graph.node[1].domain = "com.example"
    model.opset_import.add(domain="com.example", version=3)
    onnx.save(model, tmp_path / "m.onnx")
    assert same(to_proto(load(tmp_path / "m.onnx")), model)


def test_the_default_domain_by_its_other_name(tmp_path: Path) -> None:
    """onnxruntime takes ai.onnx for the default domain; ONNX's checker does not know it."""
    model = a_model()
    for index in (1, 3):
        model.graph.node[index].domain = "ai.onnx"
    for imports in (["ai.onnx"], ["ai.onnx", ""], [""]):
        del model.opset_import[:]
        model.opset_import.extend(helper.make_opsetid(domain, 17) for domain in imports)
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        graph = load(tmp_path / "m.onnx")
        assert same(to_proto(graph), model)
        assert (tmp_path / "m.onnx").read_bytes() == save(graph, tmp_path / "out.onnx").path.read_bytes()
        assert np.isfinite(Session(graph).run(feeds())["y"]).all()


def test_a_model_with_an_overridable_initializer(tmp_path: Path) -> None:
    model = a_model()
    model.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [ROWS, ROWS]))
    onnx.save(model, tmp_path / "m.onnx")
    graph = load(tmp_path / "m.onnx")
    assert [(s.name, s.optional) for s in input_specs(graph)] == [("x", False), ("flag", False), ("w", True)]
    saved = save(graph, tmp_path / "out.onnx")
    assert same(onnx.load(saved.path), model)
    session = Session(graph)
    assert (session.input_names, session.optional_names) == (["x", "flag"], ["w"])
    plain = session.run(feeds())["y"]
    np.testing.assert_array_equal(session.run({**feeds(), "w": weights(3, ROWS, ROWS)})["y"], plain)
    assert not np.array_equal(session.run({**feeds(), "w": weights(9, ROWS, ROWS)})["y"], plain)


# -- external data -------------------------------------------------------------------------------------------------


def test_external_data_is_mapped(external_path: Path, tmp_path: Path) -> None:
    graph = load(external_path)
    info = model_info(graph)
    data = external_path.with_name("model.data")
    assert info.external_data
    assert info.files == (external_path, data)
    assert model_files(external_path) == [external_path, data]
    assert model_bytes(external_path) == external_path.stat().st_size + data.stat().st_size
    assert info.source_sha256 == model_sha256(external_path) != file_sha256(external_path)
    weight = constant_value(graph.nodes[1].inputs[1])
    assert weight is not None
    assert not weight.flags.writeable
    assert same(to_proto(graph), a_model())


def test_external_data_is_not_copied_by_loading(external_path: Path) -> None:
    """The array is the page cache: a change of the file shows."""
    weight = constant_value(load(external_path).nodes[1].inputs[1])
    assert weight is not None
    assert weight[0, 0] != 0
    with external_path.with_name("model.data").open("r+b") as file:
        file.seek(int(onnx_offset(external_path, "w")))
        file.write(bytes(4))
    assert weight[0, 0] == 0


def onnx_offset(path: Path, name: str) -> str:
    model = onnx.load(path, load_external_data=False)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    return next((e.value for e in tensor.external_data if e.key == "offset"), "0")


def change_entry(path: Path, key: str, value: str | None, *, name: str = "w") -> None:
    """Replace (or remove) one entry of the external data of one initializer."""
    model = onnx.load(path, load_external_data=False)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    kept = [(e.key, e.value) for e in tensor.external_data if e.key != key]
    del tensor.external_data[:]
    for k, v in [*kept, *([(key, value)] if value is not None else [])]:
        tensor.external_data.add(key=k, value=v)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../secret", "a/../../secret", "..", "C:\\secret", "./../external/../secret"]
)
def test_external_data_outside_the_folder(external_path: Path, location: str) -> None:
    (external_path.parent.parent / "secret").write_bytes(bytes(400_000))
    change_entry(external_path, "location", location)
    for function in (load, model_files, lambda path: load(path, trusted=True)):
        with pytest.raises(UnsafeModelError, match="leaves the model's folder") as caught:
            function(external_path)
        assert caught.value.exit_code == 3
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["sub/w.bin", "./sub/w.bin", "sub/../sub/w.bin", "sub//w.bin"])
def test_external_data_in_a_folder_below(external_path: Path, location: str) -> None:
    (external_path.parent / "sub").mkdir()
    (external_path.parent / "sub" / "w.bin").write_bytes(weights(3, ROWS, ROWS).tobytes())
    change_entry(external_path, "location", location)
    change_entry(external_path, "offset", None)
    np.testing.assert_array_equal(load(external_path).nodes[1].inputs[1].values, weights(3, ROWS, ROWS))


def link_out(folder: Path, data: Path) -> None:
    data.rename(folder.parent / "outside.data")
    data.symlink_to("../outside.data")


def link_inside(folder: Path, data: Path) -> None:
    data.rename(folder / "other.data")
    data.symlink_to("other.data")


def link_folder(folder: Path, data: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    data.rename(folder.parent / "elsewhere" / "model.data")
    (folder / "sub").symlink_to("../elsewhere")
    change_entry(folder / "model.onnx", "location", "sub/model.data")


def fifo(folder: Path, data: Path) -> None:
    data.unlink()
    os.mkfifo(data)


def device(folder: Path, data: Path) -> None:
    data.unlink()
    data.symlink_to("/dev/zero")


def a_folder(folder: Path, data: Path) -> None:
    data.unlink()
    data.mkdir()


@pytest.mark.parametrize("attack", [link_out, link_inside, link_folder, fifo, device, a_folder])
def test_external_data_that_is_no_plain_file(external_path: Path, attack: Callable[[Path, Path], None]) -> None:
    attack(external_path.parent, external_path.with_name("model.data"))
    for trusted in (False, True):
        with pytest.raises(UnsafeModelError) as caught:
            load(external_path, trusted=trusted)
        assert "\n" not in str(caught.value)


def test_hard_links_need_trust(external_path: Path) -> None:
    external_path.with_name("second").hardlink_to(external_path.with_name("model.data"))
    with pytest.raises(UnsafeModelError, match="hard links"):
        load(external_path)
    assert same(to_proto(load(external_path, trusted=True)), a_model())


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("offset", "-4", "a number"),
        ("offset", "1e3", "a number"),
        ("offset", "٣", "a number"),
        ("offset", " 0", "a number"),
        ("offset", "9" * 5000, "a number"),
        ("offset", "1000000000000000", "cut off"),
        ("length", "-1", "a number"),
        ("length", "1000000000000000", "360000 are expected"),
        ("length", "4", "360000 are expected"),
        ("location", None, "exactly one location"),
        ("location", "", "exactly one location"),
        ("location", "missing.data", "does not exist"),
    ],
)
def test_external_data_of_the_wrong_size_or_place(
    external_path: Path, key: str, value: str | None, reason: str
) -> None:
    change_entry(external_path, key, value)
    with pytest.raises(ModelError, match=reason) as caught:
        load(external_path)
    assert not isinstance(caught.value, UnsafeModelError)
    assert len(str(caught.value)) < 500


def test_a_giant_shape(external_path: Path) -> None:
    model = onnx.load(external_path, load_external_data=False)
    model.graph.initializer[0].dims[:] = [1 << 40, 1 << 40]
    external_path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="are expected"):
        load(external_path)


def test_tensors_may_share_a_range_and_omit_its_length(external_path: Path) -> None:
    change_entry(external_path, "length", None)
    model = onnx.load(external_path, load_external_data=False)
    twin = model.graph.initializer.add()
    twin.CopyFrom(next(t for t in model.graph.initializer if t.name == "w"))
    twin.name = "twin"
    external_path.write_bytes(model.SerializeToString())
    graph = load(external_path)
    (unread,) = model_info(graph).unread
    np.testing.assert_array_equal(unread.values, weights(3, ROWS, ROWS))


def test_tensors_may_not_share_a_part_of_a_range(external_path: Path) -> None:
    change_entry(external_path, "offset", onnx_offset(external_path, "w"), name="b")
    with pytest.raises(ModelError, match=r"'w' and 'b' .* overlap|'b' and 'w' .* overlap"):
        load(external_path)


def test_external_strings_are_refused(external_path: Path) -> None:
    model = onnx.load(external_path, load_external_data=False)
    model.graph.initializer[0].data_type = TensorProto.STRING
    external_path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="string"):
        load(external_path)


def test_external_data_in_rare_places(tmp_path: Path) -> None:
    """In functions, sparse tensors and TENSORS attributes, of types below a byte, and unaligned."""
    values = np.arange(600, dtype=np.float32)
    packed = numpy_helper.from_array(
        (np.arange(4001) % 8).astype(helper.tensor_dtype_to_np_dtype(TensorProto.INT4)), "q"
    )
    data = b"!" + values.tobytes() + packed.raw_data
    (tmp_path / "d").write_bytes(data)

    def reference(proto: onnx.TensorProto, offset: int) -> onnx.TensorProto:
        out = onnx.TensorProto(name=proto.name or None, dims=proto.dims, data_type=proto.data_type)
        out.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "d"), ("offset", str(offset)), ("length", str(len(proto.raw_data)))):
            out.external_data.add(key=key, value=value)
        return out

    def build(place: Callable[[onnx.TensorProto, int], onnx.TensorProto]) -> onnx.ModelProto:
        v, q = place(numpy_helper.from_array(values, ""), 1), place(packed, 1 + values.nbytes)
        named = onnx.TensorProto()
        named.CopyFrom(v)
        named.name = "s"
        indices = numpy_helper.from_array(np.arange(600), "")
        nodes = [
            helper.make_node("Odd", ["q", "s"], ["y"], "odd", domain="my", tensors=[v, v]),
            helper.make_node("F", [], ["z"], "f", domain="my"),
        ]
        function = helper.make_function(
            "my", "F", [], ["o"], [helper.make_node("Constant", [], ["o"], value=v)], [helper.make_opsetid("", 21)]
        )
        graph = helper.make_graph(
            nodes,
            "g",
            [],
            [helper.make_tensor_value_info("z", FLOAT, [600])],
            [q],
            sparse_initializer=[helper.make_sparse_tensor(named, indices, [600])],
        )
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("my", 1)]
        return helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)

    (tmp_path / "m.onnx").write_bytes(build(reference).SerializeToString())
    graph = load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(graph.nodes[0].inputs[0].values, numpy_helper.to_array(packed))
    assert same(to_proto(load(tmp_path / "m.onnx")), build(lambda proto, _: proto))
    saved = save(load(tmp_path / "m.onnx"), tmp_path / "out.onnx")
    assert len(saved.files) == 2
    assert same(to_proto(load(saved.path)), build(lambda proto, _: proto))


def hugging_face_cache(folder: Path, model: Path) -> Path:
    """models--x/snapshots/rev/onnx/model.onnx -> ../../../blobs/<hash>, and so its external data."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "rev" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in model_files(model):
        blob = blobs / file_sha256(file)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../../blobs/{blob.name}")
    return snapshot / model.name


def test_the_hugging_face_cache(external_path: Path, tmp_path: Path) -> None:
    link = hugging_face_cache(tmp_path / "models--x", external_path)
    before = contents(tmp_path)
    graph = load(link)
    assert same(to_proto(graph), a_model())
    assert model_bytes(link) == model_bytes(external_path)
    assert model_info(graph).source_sha256 == model_sha256(external_path)
    assert contents(tmp_path) == before


def test_a_link_in_the_cache_may_only_lead_to_the_blobs(external_path: Path, tmp_path: Path) -> None:
    link = hugging_face_cache(tmp_path / "models--x", external_path)
    data = link.with_name("model.data")
    data.unlink()
    data.symlink_to(external_path.with_name("model.data"))
    with pytest.raises(UnsafeModelError, match="link"):
        load(link)


def test_a_link_to_a_model_with_its_data_beside_it(external_path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.onnx"
    link.symlink_to(external_path)
    assert same(to_proto(load(link)), a_model())


# -- save ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "INLINE_LIMIT", 1000)


def test_a_model_that_came_with_external_data_is_saved_so(external_path: Path, tmp_path: Path) -> None:
    saved = save(load(external_path), tmp_path / "out.onnx")
    model_file, data = saved.files
    assert model_file == saved.path == tmp_path / "out.onnx"
    assert data.name == f"out-{file_sha256(data)[:16]}.data"
    assert saved.bytes == model_bytes(saved.path) == model_file.stat().st_size + data.stat().st_size
    assert saved.sha256 == model_sha256(saved.path) == model_info(load(saved.path)).source_sha256
    assert model_files(saved.path) == list(saved.files)
    onnx.checker.check_model(saved.path)
    reopened = onnx.load(saved.path)
    for tensor in dense_tensors(reopened.graph):
        tensor.ClearField("data_location")
    assert same(reopened, a_model())
    assert same(to_proto(load(saved.path)), a_model())
    expected = Session(external_path, optimization="disabled").run(feeds())["y"]
    np.testing.assert_array_equal(Session(saved.path, optimization="disabled").run(feeds())["y"], expected)


@pytest.mark.usefixtures("small_limit")
def test_large_models_get_external_data(model_path: Path, tmp_path: Path) -> None:
    saved = save(load(model_path), tmp_path / "out.onnx")
    assert len(saved.files) == 2
    out = onnx.load(saved.path, load_external_data=False)
    assert [t.data_location for t in out.graph.initializer] == [TensorProto.EXTERNAL, TensorProto.DEFAULT]
    assert saved.path.stat().st_size < 2000


@pytest.mark.usefixtures("small_limit")
def test_large_tensors_start_on_a_page(tmp_path: Path) -> None:
    constants = [gs.Constant(f"w{i}", weights(i, n)) for i, n in enumerate((300, 1 << 18, 5, 301, (1 << 18) + 1))]
    graph = gs.Graph(
        nodes=[gs.Node("Sum", "sum", inputs=constants, outputs=[gs.Variable("y", np.float32)])],
        outputs=[gs.Variable("z", np.float32, [1])],
        opset=17,
    )
    graph.nodes.append(gs.Node("Relu", "relu", inputs=graph.nodes[0].outputs, outputs=graph.outputs))
    out = onnx.load(save(graph, tmp_path / "m.onnx").path, load_external_data=False)
    places = {t.name: {e.key: e.value for e in t.external_data} for t in out.graph.initializer}
    assert not places["w2"]
    offsets = {name: int(entry["offset"]) for name, entry in places.items() if entry}
    assert offsets["w1"] % 4096 == offsets["w4"] % 4096 == 0
    assert all(offset % 64 == 0 for offset in offsets.values())
    for constant in load(tmp_path / "m.onnx").nodes[0].inputs:
        np.testing.assert_array_equal(constant.values, constants[int(constant.name[1:])].values)


def test_saving_is_deterministic(external_path: Path, model_path: Path, tmp_path: Path) -> None:
    for source in (external_path, model_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            save(copy_graph(load(source)), tmp_path / name / "m.onnx", provenance={"recipe": "r"})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_provenance(model_path: Path, tmp_path: Path) -> None:
    graph = load(model_path)
    saved = save(graph, tmp_path / "out.onnx", provenance={"recipe": "version: 1\n"})
    again = load(saved.path)
    assert model_info(again).metadata == {
        "author": "someone",
        "onnxcompress.version": __version__,
        "onnxcompress.source_sha256": file_sha256(model_path),
        "onnxcompress.recipe": "version: 1\n",
    }
    assert model_info(graph).metadata == {"author": "someone"}
    twice = load(save(again, tmp_path / "twice.onnx", provenance={"recipe": "other"}).path)
    assert model_info(twice).metadata["onnxcompress.recipe"] == "other"
    assert model_info(twice).metadata["onnxcompress.source_sha256"] == saved.sha256


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(external_path: Path, tmp_path: Path, mask: int) -> None:
    graph = load(external_path)
    old = os.umask(mask)
    try:
        saved = save(graph, tmp_path / "out.onnx")
    finally:
        os.umask(old)
    for file in saved.files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_the_input_is_never_overwritten(external_path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.onnx").symlink_to(external_path)
    (tmp_path / "hard.onnx").hardlink_to(external_path)
    before = contents(tmp_path)
    graph = load(external_path)
    targets = (external_path, external_path.with_name("model.data"), tmp_path / "link.onnx", tmp_path / "hard.onnx")
    for target in targets:
        with pytest.raises(UsageError, match="never overwritten") as caught:
            save(copy_graph(graph), target)
        assert caught.value.exit_code == 2
        with pytest.raises(UsageError, match="never overwritten"):
            save(from_proto(a_model()), target, source=external_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("target", ["", "missing/out.onnx", "model.onnx/out.onnx", "pipe"])
def test_destinations_that_cannot_be(model_path: Path, tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError) as caught:
        save(from_proto(a_model()), tmp_path / target)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "pipe"]


def test_overwrite(model_path: Path, tmp_path: Path) -> None:
    graph = load(model_path)
    target = tmp_path / "out.onnx"
    target.write_text("old")
    with pytest.raises(UsageError, match="exists"):
        save(graph, target, overwrite=False)
    assert target.read_text() == "old"
    save(graph, target)
    assert target.read_bytes() == model_path.read_bytes()


def test_a_link_as_destination_is_replaced_not_followed(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("old")
    (tmp_path / "out.onnx").symlink_to("precious")
    save(load(model_path), tmp_path / "out.onnx")
    assert (tmp_path / "precious").read_text() == "old"
    assert not (tmp_path / "out.onnx").is_symlink()


def test_an_invalid_graph_is_an_internal_error(model_path: Path, tmp_path: Path) -> None:
    graph = copy_graph(load(model_path))
    graph.nodes.reverse()
    with pytest.raises(OnnxCompressError, match="please report") as caught:
        save(graph, tmp_path / "out.onnx")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out.onnx").exists()


class Failing:
    """Raises on the n-th call of a function and works otherwise."""

    def __init__(self, real: Callable[..., Any], number: int, error: BaseException) -> None:
        self.real, self.number, self.error, self.calls = real, number, error, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.number:
            raise self.error
        return self.real(*args, **options)


FAILURES = [
    pytest.param(name, number, error, id=f"{name}-{number}-{type(error).__name__}")
    for name, calls in (("fsync", 3), ("replace", 2), ("open", 3))
    for number in range(1, calls + 1)
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt())
]


@pytest.mark.parametrize(("name", "number", "error"), FAILURES)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_the_folder_as_it_was(
    external_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
    error: BaseException,
    existing: bool,
) -> None:
    graph = load(external_path)
    target = tmp_path / "out.onnx"
    if existing:
        target.write_text("old")
    before = contents(tmp_path)
    owner, attribute = (Path, "replace") if name == "replace" else (os, name)
    real = getattr(owner, attribute)
    failing = Failing(real, number, error)
    monkeypatch.setattr(owner, attribute, lambda *args, **options: failing(*args, **options))
    with pytest.raises(ResourceError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        save(graph, target)
    monkeypatch.undo()
    assert failing.calls == number
    assert contents(tmp_path) == before
    if isinstance(error, OSError):
        assert caught.value.exit_code == 7  # type: ignore[union-attr]
        assert "nothing was written" in str(caught.value)
    save(graph, target)


def test_an_interrupt_after_the_rename_keeps_both_files(
    external_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = load(external_path)
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        real(self, target)
        if target.name == "out.onnx":
            raise KeyboardInterrupt
        return target

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save(graph, tmp_path / "out.onnx")
    assert same(to_proto(load(tmp_path / "out.onnx")), a_model())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, UsageError), (errno.EROFS, UsageError), (errno.ENOSPC, ResourceError)]
)
def test_folders_that_cannot_be_written(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[OnnxCompressError]
) -> None:
    graph = load(model_path)
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(kind, match=os.strerror(number)):
        save(graph, tmp_path / "out.onnx")


def test_external_data_of_the_same_contents_is_left_alone(external_path: Path, tmp_path: Path) -> None:
    graph = load(external_path)
    first = save(graph, tmp_path / "out.onnx")
    identity = first.files[1].stat().st_ino
    again = save(load(first.path), tmp_path / "out2.onnx")
    assert again.files[1] != first.files[1]
    second = save(graph, tmp_path / "out.onnx")
    assert second == first
    assert first.files[1].stat().st_ino == identity
    first.files[1].write_bytes(b"damaged")
    save(load(external_path), tmp_path / "out.onnx")
    assert same(to_proto(load(tmp_path / "out.onnx")), a_model())


# -- running -------------------------------------------------------------------------------------------------------


def test_serialize_is_what_save_writes(model_path: Path, tmp_path: Path) -> None:
    graph = load(model_path)
    assert serialize(graph) == save(graph, tmp_path / "out.onnx").path.read_bytes()


def test_a_session_of_a_graph_beyond_protobuf(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = load(model_path)
    expected = Session(model_path, optimization="disabled").run(feeds())["y"]
    np.testing.assert_array_equal(Session(graph, optimization="disabled").run(feeds())["y"], expected)
    monkeypatch.setattr(io, "PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = contents(tmp_path)
    assert serialize(graph) is None
    session = Session(graph, optimization="disabled")
    assert contents(tmp_path) == before
    np.testing.assert_array_equal(session.run(feeds())["y"], expected)


def test_weights_are_held_once(tmp_path: Path) -> None:
    """Peak memory of load and save stays near the weights, measured in a process of its own."""
    size = 64 << 20
    array = np.zeros((1 << 14, size >> 16), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "m")
    model = helper.make_model(
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", FLOAT, [1, array.shape[0]])],
            [helper.make_tensor_value_info("y", FLOAT, [1, array.shape[1]])],
            [numpy_helper.from_array(array, "w")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "m.onnx")
    code = (
        "import re, sys\n"
        "from onnxcompress import io\n"
        "from onnxcompress.graph import copy_graph\n"
        "from onnxcompress.shapes import infer_shapes\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "start = peak()\n"
        "graph = copy_graph(io.load(sys.argv[1]))\n"
        "infer_shapes(graph)\n"
        "io.save(graph, sys.argv[2])\n"
        "print(peak() - start)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert size * 0.9 < int(done.stdout) < size * 1.3


@pytest.mark.cases
def test_real_models(cases: Mapping[str, Any], tmp_path: Path) -> None:
    for name, case in cases.items():
        path = Path(case.model)
        graph = load(path)
        saved = save(graph, tmp_path / f"{name}.onnx")
        rng = np.random.default_rng(0)
        batch = {}
        for spec in input_specs(graph):
            shape = [d if isinstance(d, int) else 2 for d in spec.shape or ()]
            floating = spec.dtype.kind == "f"
            batch[spec.name] = rng.standard_normal(shape).astype(spec.dtype) if floating else np.ones(shape, spec.dtype)
        expected = Session(path, optimization="disabled").run(batch)
        for candidate in (saved.path, graph):
            actual = Session(candidate, optimization="disabled").run(batch)
            assert all(np.array_equal(actual[key], expected[key]) for key in expected)


# -- any opset, any name ---------------------------------------------------------------------------------------------


def plain_model(opset: int, name: str = "x") -> onnx.ModelProto:
    """MatMul, Relu and Add, which are the same in all opsets but for their types."""
    nodes = [
        helper.make_node("MatMul", [name, "w"], ["h"], "product"),
        helper.make_node("Relu", ["h"], ["r"], "positive"),
        helper.make_node("Add", ["r", "r"], ["y"], "twice"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, FLOAT, ["n", ROWS])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", ROWS])],
        [numpy_helper.from_array(weights(3, ROWS, ROWS), "w")],
    )
    imports = [helper.make_opsetid("", opset)]
    ir_version = max(4, helper.find_min_ir_version_for(imports))  # 4: weights need not be inputs
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


@pytest.mark.parametrize("opset", range(io.MIN_OPSET, onnx.defs.onnx_opset_version() + 1))
def test_every_opset(opset: int, tmp_path: Path) -> None:
    """From the oldest to the newest that onnx knows, as far as onnxruntime does, too."""
    path = tmp_path / "m.onnx"
    onnx.save(plain_model(opset), path)
    graph = load(path)
    assert graph.opset == opset
    saved = save(graph, tmp_path / "out.onnx")
    assert onnx.load(saved.path).opset_import[0].version == opset
    try:
        expected = Session(path, optimization="disabled").run({"x": weights(5, 2, ROWS)})["y"]
    except ModelError as error:
        assert "opset" in str(error).lower() or "ir version" in str(error).lower()
        return
    np.testing.assert_array_equal(
        Session(saved.path, optimization="disabled").run({"x": weights(5, 2, ROWS)})["y"], expected
    )


@pytest.mark.parametrize("name", ["größe", "入力", "🙂", "a b/c:0", "\u202eevil", "x" * 5000])
def test_names_of_any_kind(name: str, tmp_path: Path) -> None:
    """Of tensors and of files; whatever is no null character."""
    path = tmp_path / f"{name[:50].replace('/', '_')}.onnx"
    onnx.save(plain_model(17, name), path)
    graph = load(path)
    assert [spec.name for spec in input_specs(graph)] == [name]
    saved = save(graph, path.with_name(f"out {path.name}"))
    feeds = {name: weights(5, 2, ROWS)}
    np.testing.assert_array_equal(Session(saved.path).run(feeds)["y"], Session(path).run(feeds)["y"])


def test_an_interrupt_takes_nothing_from_another_process(
    external_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal contents have one name: what this process placed may be what a model of another one refers to by now."""
    graph, path = load(external_path), tmp_path / "out.onnx"
    commit = io.Transaction.commit

    def interrupted(self: io.Transaction, overwrite: bool) -> None:
        monkeypatch.setattr(io.Transaction, "commit", commit)
        save(graph, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(io.Transaction, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(graph, path)
    assert model_sha256(path)
    assert len(model_files(path)) == 2
