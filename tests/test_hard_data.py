"""Data that is damaged, hostile or degenerate, through the whole of the main job: one clear line, or a sound result."""

from __future__ import annotations

import io
import itertools
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_cnn import CLASSES, write_model

import onnxcompress as oc
from onnxcompress.data import columns, open_data
from onnxcompress.errors import DataError, OnnxCompressError, ResourceError
from onnxcompress.graph import InputSpec

ROW = [InputSpec("x", np.dtype(np.float32), ("n", 2))]


def images(samples: int = 32, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(samples, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., oc.CompressResult]:
    model = write_model(tmp_path / "model.onnx")

    def compress(data: Any, **options: Any) -> oc.CompressResult:
        settings = {"benchmark": False, "trusted": True, "recipe": "int8"} | options
        return oc.compress(model, data, tmp_path / "out.onnx", **settings)

    return compress


def spoiled(value: float) -> NDArray[np.float32]:
    data = images()
    data[17, 1, 2, 3] = value
    return data


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite(run: Callable[..., oc.CompressResult], value: float, tmp_path: Path) -> None:
    """The line names the array and the sample, and nothing is written."""
    with pytest.raises(DataError, match=r"'x'.*17|17.*'x'") as caught:
        run({"x": spoiled(value)})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()


def test_one_value_that_is_not_finite_among_what_judges(run: Callable[..., oc.CompressResult]) -> None:
    with pytest.raises(DataError, match="17"):
        run({"x": images()}, eval_data={"x": spoiled(np.nan)})


def test_one_sample(run: Callable[..., oc.CompressResult], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 sample cannot be split"):
        run({"x": images(1)})
    result = run({"x": images(1)}, eval_data={"x": images(1, seed=1)}, force=True)
    assert result.verification is not None and np.isfinite(result.verification.outputs[0].sqnr_db)


def test_samples_of_one_class(run: Callable[..., oc.CompressResult]) -> None:
    """A metric that cannot tell anything is no reason to crash or to divide by zero."""
    labels = np.full(32, 1, np.int64)
    result = run({"x": images()}, eval_data={"x": images(32, 1), "labels": labels}, force=True)
    (metric,) = [m for m in result.metrics if m.name == "top-1"]
    assert 0 <= metric.original <= 1 and 0 <= metric.result <= 1


def test_labels_that_are_no_classes(run: Callable[..., oc.CompressResult]) -> None:
    labels = np.full(32, CLASSES + 5, np.int64)
    with pytest.raises(DataError, match="label"):
        run({"x": images()}, eval_data={"x": images(32, 1), "labels": labels})


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
@pytest.mark.parametrize("recipe", ["int8", "int8-accurate", "prune-int8"])
def test_constant_inputs(run: Callable[..., oc.CompressResult], value: float, recipe: str, tmp_path: Path) -> None:
    """Ranges without width: the result is finite and close, or the budget says no."""
    data = {"x": np.full((32, 3, 8, 8), value, np.float32)}
    try:
        result = run(data, eval_data=data, recipe=recipe)
    except OnnxCompressError as error:
        assert error.exit_code in (2, 4) and "\n" not in str(error)
        assert not (tmp_path / "out.onnx").exists()
        return
    assert result.verification is not None
    assert result.verification.outputs[0].sqnr_db > 10
    answer = oc.Session(tmp_path / "out.onnx").run({"x": images(4)})["y"]
    assert np.isfinite(answer).all()


@pytest.mark.parametrize("data", [{"x": images(0)}, [], {}, iter(())])
def test_no_data(run: Callable[..., oc.CompressResult], data: Any) -> None:
    with pytest.raises(DataError) as caught:
        run(data)
    assert "\n" not in str(caught.value)


# -- archives ---------------------------------------------------------------------------------------------------------


def npy_header(version: int, length: int) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(2 if version == 1 else 4, "little")


@pytest.mark.parametrize(("version", "length"), [(1, 60_000), (2, 200_000_000)])
def test_giant_headers(tmp_path: Path, version: int, length: int) -> None:
    """Not even read: the second one would unpack to 200 MB."""
    header = npy_header(version, length) + b" " * length
    (tmp_path / "x.npy").write_bytes(header[:100_000])
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(DataError, match=f"its header has {length} bytes"):
            open_data(tmp_path / name, ROW)


def test_an_archive_that_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_BOMB_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1 << 20, 2), np.float32))
    with pytest.raises(DataError, match=r"unpacks from .* to 8388736 bytes"):
        open_data(tmp_path / "x.npz", ROW)
    np.savez_compressed(tmp_path / "y.npz", x=np.random.default_rng(0).random((1 << 18, 2), np.float32))
    assert open_data(tmp_path / "y.npz", ROW).samples == 1 << 18


def test_a_directory_that_lies_about_the_size(tmp_path: Path) -> None:
    """The archive says that there is more than its stream unpacks to."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f4", "fortran_order": False, "shape": (9, 2)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content.getvalue() + bytes(32))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = (1 << 20).to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(bytes(data))
    with pytest.raises(DataError) as caught:
        list(open_data(tmp_path / "x.npz", ROW))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95", b"PK\x05\x06" + bytes(18), b"\x93NUMPY", b"\x1f\x8b" * 100])
def test_files_that_are_something_else(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_data(tmp_path / name, ROW)
    assert "\n" not in str(caught.value)


# -- sources without an end -----------------------------------------------------------------------------------------


def endless() -> Iterator[dict[str, NDArray[Any]]]:
    return itertools.repeat({"x": np.ones((4, 2), np.float32)})


def test_batches_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MOST_BATCHES", 100)
    with pytest.raises(DataError, match=r"more than 100 batches .* --samples"):
        open_data(endless(), ROW, work_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert open_data(endless(), ROW, work_dir=tmp_path, limit=50).samples == 50


def test_batches_that_would_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(columns.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(ResourceError, match="half of the free space"):
        open_data(endless(), ROW, work_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [b"[" * 9000, b"{'shape': (" + b"-" * 8000 + b"1,)}", b"(" * 90 + b"1" + b")" * 90])
def test_headers_that_are_deep(tmp_path: Path, text: bytes) -> None:
    header = text + b" " * (-(len(text) + 11) % 64) + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(DataError, match="not a NumPy array"):
        open_data(tmp_path / "x.npy", ROW)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1, (1 << 63) - 1, 1 << 40])
def test_members_beyond_the_file(tmp_path: Path, compressed: bool, offset: int) -> None:
    path = tmp_path / "x.npz"
    (np.savez_compressed if compressed else np.savez)(path, x=np.zeros((4, 2), np.float32))
    data = bytearray(path.read_bytes())
    entry, end = data.rfind(b"PK\x01\x02"), data.rfind(b"PK\x05\x06")
    extra = struct.pack("<HHQ", 1, 8, offset)
    place = entry + 46 + struct.unpack("<H", data[entry + 28 : entry + 30])[0]
    size = struct.unpack("<I", data[end + 12 : end + 16])[0] + len(extra)
    data[end + 12 : end + 16] = struct.pack("<I", size)
    data[entry + 30 : entry + 32] = struct.pack("<H", len(extra))
    data[entry + 42 : entry + 46] = b"\xff" * 4
    data[place:place] = extra
    path.write_bytes(data)
    with pytest.raises(DataError):
        open_data(path, ROW)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names")
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_pipes_are_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="no regular file"):
        open_data(tmp_path / name, ROW)


def test_objects_that_cannot_become_arrays() -> None:
    class Broken:
        def __array__(self, *given: Any, **more: Any) -> NDArray[Any]:
            raise KeyError("lost")

    with pytest.raises(DataError, match="Broken is no array"):
        open_data({"x": Broken()}, ROW)
