"""Data sets: every kind of source, every misfit in one line, views that compose, memory that does not grow."""

from __future__ import annotations

import contextlib
import gc
import io
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxcompress.data import Batch, Dataset, open_data
from onnxcompress.data.columns import Spool
from onnxcompress.errors import DataError, ResourceError, UsageError
from onnxcompress.graph import InputSpec

Save = Callable[..., None]

F32 = np.dtype(np.float32)
I64 = np.dtype(np.int64)
IMAGE = [InputSpec("x", F32, ("N", 3, 4, 4))]
TEXT = [InputSpec("ids", I64, ("batch", "length")), InputSpec("mask", I64, ("batch", "length"))]
ROW = [InputSpec("x", F32, ("N", 2))]


def numbered(samples: int, *shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    """An array whose every value tells its sample."""
    return (np.arange(samples).reshape(-1, *[1] * len(shape)) + np.zeros((samples, *shape))).astype(dtype)


def seen(dataset: Dataset, name: str = "x") -> list[int]:
    """Numbers of the samples in the order of iteration."""
    return [int(row.flat[0]) for batch in dataset for row in batch.feeds[name]]


def sizes(dataset: Dataset) -> list[int]:
    return [batch.samples for batch in dataset]


# -- npz ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_yields_all_samples_in_order(tmp_path: Path, save: Save) -> None:
    images = np.random.default_rng(0).random((37, 3, 4, 4), np.float32)
    save(tmp_path / "data.npz", x=images)
    dataset = open_data(tmp_path / "data.npz", IMAGE)
    for _ in range(2):  # re-iterable
        batches = list(dataset)
        assert [b.samples for b in batches] == [16, 16, 5] and len(dataset) == 3 and dataset.samples == 37
        np.testing.assert_array_equal(np.concatenate([b.feeds["x"] for b in batches]), images)
    assert not dataset.has_labels and not dataset.synthetic and dataset.notes == ()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_names_with_odd_characters_are_found(tmp_path: Path, save: Save) -> None:
    names = ["a/b:0", "x.y.npy", "übung", "module::in[0]"]
    save(tmp_path / "data.npz", **{name: numbered(3, 2) + i for i, name in enumerate(names)})
    dataset = open_data(tmp_path / "data.npz", [InputSpec(name, F32, ("N", 2)) for name in names])
    for i, name in enumerate(names):
        assert dataset.first().feeds[name][:, 0].tolist() == [i, i + 1, i + 2]


def test_stored_members_are_read_by_range(tmp_path: Path) -> None:
    """A value broken behind the rows that are read does no harm: they are never touched."""
    images = numbered(64, 3, 4, 4)
    images[50, 0, 0, 0] = np.nan
    np.savez(tmp_path / "data.npz", x=images)
    dataset = open_data(tmp_path / "data.npz", IMAGE, batch=8)
    assert seen(dataset.take(40)) == list(range(40))
    with pytest.raises(DataError, match=r"'x', sample 50: NaN"):
        seen(dataset)


BIG = [InputSpec("x", F32, ("N", 3, 128, 128))]


def peak_memory(work: Callable[[], None]) -> int:
    """Bytes allocated at most while ``work`` runs."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path, save: Save) -> None:
    def use(samples: int) -> None:
        dataset = open_data(tmp_path / f"{samples}.npz", BIG, batch=8)
        for part in (dataset, *dataset.split(0.2)):
            part.fingerprint()

    for samples in (64, 1000):
        save(tmp_path / f"{samples}.npz", x=np.zeros((samples, 3, 128, 128), np.float32))
    use(64)  # imports and caches are no part of the comparison
    assert peak_memory(lambda: use(1000)) <= 1.1 * peak_memory(lambda: use(64))


def test_spooling_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    def use(samples: int) -> None:
        source = ({"x": np.zeros((8, 3, 128, 128), np.float32)} for _ in range(0, samples, 8))
        with open_data(source, BIG, work_dir=tmp_path) as dataset:
            dataset.fingerprint()

    use(64)
    assert peak_memory(lambda: use(1000)) <= 1.1 * peak_memory(lambda: use(64))


def test_default_batch_is_bounded_by_memory() -> None:
    spec = [InputSpec("x", F32, ("N", 3, 1024, 1024))]  # 12 MiB a sample
    dataset = open_data({"x": np.zeros((5, 3, 1024, 1024), np.float32)}, spec)
    assert sizes(dataset) == [2, 2, 1]
    assert sizes(open_data({"x": np.zeros((5, 3, 1024, 1024), np.float32)}, spec, batch=4)) == [4, 1]


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("dtype", [">f4", "<f4"])
def test_npy_of_any_order_and_endianness(tmp_path: Path, fortran: bool, dtype: str) -> None:
    values = np.random.default_rng(1).random((11, 3, 4, 4)).astype(dtype)
    np.save(tmp_path / "x.npy", np.asfortranarray(values) if fortran else values)
    dataset = open_data(tmp_path / "x.npy", IMAGE, batch=4)
    read = np.concatenate([b.feeds["x"] for b in dataset])
    assert read.dtype == F32 and read.dtype.isnative
    np.testing.assert_array_equal(read, values)
    rest, held_out = dataset.split(0.3)
    assert rest.samples + held_out.samples == 11 and dataset.notes == ()


def test_npz_in_fortran_order(tmp_path: Path) -> None:
    values = np.asfortranarray(np.random.default_rng(1).random((9, 2), np.float32))
    np.savez(tmp_path / "x.npz", x=values)
    read = np.concatenate([b.feeds["x"] for b in open_data(tmp_path / "x.npz", ROW, batch=2)])
    np.testing.assert_array_equal(read, values)
    np.savez_compressed(tmp_path / "y.npz", x=values)
    with pytest.raises(DataError, match="compressed and column-major"):
        open_data(tmp_path / "y.npz", ROW)


def test_two_iterations_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "data.npz", x=numbered(20, 2))
    dataset = open_data(tmp_path / "data.npz", ROW, batch=4)
    for a, b in zip(dataset, dataset, strict=True):
        np.testing.assert_array_equal(a.feeds["x"], b.feeds["x"])


def test_npy_needs_a_model_with_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbered(3, 2))
    with pytest.raises(DataError, match=r"one array but the model takes 2 inputs; expected a \.npz with 'ids'"):
        open_data(tmp_path / "x.npy", TEXT)


# -- unsafe and broken files --------------------------------------------------------------------------------------


class Bomb:
    """Pickled, it would write a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
def test_pickles_are_refused_and_not_run(tmp_path: Path, name: str) -> None:
    array = np.array([Bomb(tmp_path / "ran")], object)
    if name == "x.npz":
        np.savez(tmp_path / name, x=array)
    else:
        np.save(tmp_path / name, array, allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        open_data(tmp_path / name, ROW)
    assert not (tmp_path / "ran").exists()


def test_no_zip_file(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"not a \.npz file"):
        open_data(tmp_path / "x.npz", ROW)


def test_member_that_is_no_array(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", b"hello")
    with pytest.raises(DataError, match="not a NumPy array"):
        open_data(tmp_path / "x.npz", ROW)


def test_empty_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz")
    with pytest.raises(DataError, match="holds no arrays"):
        open_data(tmp_path / "x.npz", ROW)


def test_truncated_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbered(100, 2))
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[:-10])
    with pytest.raises(DataError, match="790 bytes of values are there, 800 expected"):
        open_data(tmp_path / "x.npy", ROW)


def test_header_that_promises_more_than_the_member_holds(tmp_path: Path) -> None:
    """A shape of 8 TB is told by the header alone; nothing is allocated."""
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 2)})
        with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive:
            archive.writestr("x.npy", header.getvalue() + b"\0" * 64)
        with pytest.raises(DataError, match="64 bytes of values are there, 8000000000000 expected"):
            open_data(tmp_path / "x.npz", ROW)


def test_corrupt_compressed_member(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.random.default_rng(0).random((4000, 2), np.float32))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[15000:15040] = b"\xff" * 40
    (tmp_path / "x.npz").write_bytes(bytes(content))
    dataset = open_data(tmp_path / "x.npz", ROW)
    with pytest.raises(DataError, match=r"member 'x\.npy' cannot be decompressed"):
        seen(dataset)


def test_file_that_vanishes(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbered(4, 2))
    dataset = open_data(tmp_path / "x.npy", ROW)
    (tmp_path / "x.npy").unlink()
    with pytest.raises(DataError, match="cannot be read any more: No such file"):
        dataset.first()


def test_file_that_shrinks(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbered(4000, 2))
    dataset = open_data(tmp_path / "x.npy", ROW)
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content[:1000])
    with pytest.raises(DataError, match="ends early"):
        seen(dataset)


def test_structured_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros(3, [("a", "f4")]))
    with pytest.raises(DataError, match="structured type"):
        open_data(tmp_path / "x.npz", ROW)


# -- misfits ------------------------------------------------------------------------------------------------------

MISFITS = [
    (
        {"images": numbered(4, 3, 4, 4)},
        IMAGE,
        r"no array for model input 'x'; found 'images', expected 'x' \(float32, \[",
    ),
    ({"x": numbered(4, 3, 4, 4), "z": numbered(4)}, IMAGE, r"'z' is neither a model input nor labels"),
    ({"x": numbered(4, 3, 4, 4, dtype=np.uint8)}, IMAGE, r"'x' is uint8 but the model takes float32; scale it"),
    ({"x": numbered(4, 3, 4, 4, dtype=np.int64)}, IMAGE, r"'x' is int64 but the model takes float32"),
    ({"x": numbered(4, 3, 4, 4, dtype=np.complex64)}, IMAGE, r"complex64 but the model takes float32; convert it"),
    ({"x": numbered(4, 2)}, [InputSpec("x", np.dtype(np.float16), ("N", 2))], r"float32 but the model takes float16"),
    ({"x": numbered(4, 2)}, [InputSpec("x", I64, ("N", 2))], r"float32 but the model takes int64; the fractions"),
    ({"x": numbered(4, 2)}, [InputSpec("x", np.dtype(object), ("N", 2))], r"float32 but the model takes strings"),
    ({"x": numbered(3, 4, 4)}, IMAGE, r"3 dimensions \[3, 4, 4\] but the model takes 4 \[N, 3, 4, 4\]; .*x\[None\]"),
    ({"x": numbered(2, 1, 3, 4, 4)}, IMAGE, r"5 dimensions .* remove the dimension of size 1"),
    ({"x": numbered(4, 4, 4, 3)}, IMAGE, r"shape \[4, 4, 4, 3\] but the model takes .* channels last"),
    ({"x": numbered(4, 3, 9, 9)}, [InputSpec("x", F32, ("N", 9, 9, 3))], r"channels first"),
    ({"x": numbered(4, 3, 5, 4)}, IMAGE, r"shape \[4, 3, 5, 4\] but the model takes \[N, 3, 4, 4\]; preprocess"),
    ({"x": numbered(0, 3, 4, 4)}, IMAGE, r"holds no samples"),
    ({"x": numbered(4, 0)}, [InputSpec("x", F32, ("N", "F"))], r"shape \[4, 0\] and so no values"),
    (
        {"ids": numbered(4, 5, dtype=np.int64), "mask": numbered(3, 5, dtype=np.int64)},
        TEXT,
        r"different numbers of samples: 'ids' has 4, 'mask' has 3",
    ),
    (
        {"ids": numbered(4, 5, dtype=np.int64), "mask": numbered(4, 6, dtype=np.int64)},
        TEXT,
        r"dimension 'length' is 5 in 'ids' and 6 in 'mask'",
    ),
    ({"x": numbered(4, 2), "labels": np.zeros(3, int)}, ROW, r"3 labels for 4 samples"),
    ({"x": numbered(4, 2), "y": np.zeros(4)}, ROW, r"labels are float64 \[4\]; expected one whole number a sample"),
    ({"x": numbered(4, 2), "y": np.zeros((4, 10), int)}, ROW, r"labels are int64 \[4, 10\]"),
    ({"x": numbered(4, 2), "y": np.zeros(4, int), "label": np.zeros(4, int)}, ROW, r"'y' and 'label' could both be"),
    ({"x": numbered(3, 2)}, [InputSpec("x", F32, (4, 2))], r"batches of exactly 4 samples but there are only 3"),
    (
        {"a": numbered(4, 2), "b": numbered(4, 2)},
        [InputSpec("a", F32, (2, 2)), InputSpec("b", F32, (4, 2))],
        r"demand different batches, 2 \(input 'a'\) and 4 \(input 'b'\)",
    ),
]


@pytest.mark.parametrize(("arrays", "specs", "message"), MISFITS)
def test_misfit_is_one_clear_line(
    tmp_path: Path, arrays: dict[str, NDArray[Any]], specs: list[InputSpec], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_data(arrays, specs)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_data(tmp_path / "data.npz", specs)


def test_missing_file_names_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nothing\.npz: no such file or folder; expected a \.npz or \.npy file, a folder"
    ):
        open_data(tmp_path / "nothing.npz", ROW)
    with pytest.raises(DataError, match=r"cannot be a path: .*File name too long"):
        open_data("x" * 5000 + ".npz", ROW)
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"\.csv suffix; expected"):
        open_data(tmp_path / "data.csv", ROW)
    (tmp_path / "data.py").write_text("")
    with pytest.raises(DataError, match=r"data\.py:function"):
        open_data(tmp_path / "data.py", ROW)


def test_model_without_inputs() -> None:
    with pytest.raises(DataError, match="no inputs"):
        open_data({"x": numbered(2, 2)}, [])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_name_array_and_sample(value: float) -> None:
    values = numbered(40, 2)
    values[33, 1] = value
    with pytest.raises(DataError, match=r"array 'x', sample 33: (NaN|infinity) found"):
        seen(open_data({"x": values}, ROW))


def test_sample_number_is_that_of_the_source_in_a_view() -> None:
    values = numbered(40, 2)
    values[33, 1] = np.nan
    rest, held_out = open_data({"x": values}, ROW).split(0.5, seed=3)
    broken = 0
    for part in (rest, held_out):
        try:
            seen(part)
        except DataError as error:
            broken += 1
            assert "sample 33: NaN" in str(error)
    assert broken == 1


# -- types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_type", "wanted"),
    [("f8", "f4"), ("f2", "f4"), ("f4", "f8"), ("i4", "i8"), ("i8", "i4"), ("u1", "i8"), ("i8", "?"), ("?", "i8")],
)
def test_exact_conversions_are_made_and_noted(given_type: str, wanted: str) -> None:
    values = np.array([[0, 1], [1, 0]]).astype(given_type)
    dataset = open_data({"x": values}, [InputSpec("x", np.dtype(wanted), ("N", 2))])
    read = dataset.first().feeds["x"]
    assert read.dtype == np.dtype(wanted)
    np.testing.assert_array_equal(read, [[0, 1], [1, 0]])
    noted = dataset.notes == (f"array 'x': {values.dtype.name} converted to {read.dtype.name}, which the model takes",)
    assert noted or given_type == "?"


def test_value_that_does_not_fit_is_told_with_its_sample() -> None:
    values = numbered(5, 2, dtype=np.int64)
    values[3, 1] = 2**40
    with pytest.raises(DataError, match=r"'x', sample 3: 1099511627776 does not fit into int32"):
        seen(open_data({"x": values}, [InputSpec("x", np.dtype(np.int32), ("N", 2))]))
    huge = numbered(5, 2, dtype=np.float64)
    huge[2, 0] = 1e300
    with pytest.raises(DataError, match=r"'x', sample 2: 1e\+300 does not fit into float32"):
        seen(open_data({"x": huge}, ROW))


def test_bfloat16_through_a_file(tmp_path: Path) -> None:
    values = np.array([[1.5, 2.5], [3.5, -1.0]]).astype(ml_dtypes.bfloat16)
    spec = [InputSpec("x", np.dtype(ml_dtypes.bfloat16), ("N", 2))]
    np.savez(tmp_path / "x.npz", x=values)  # NumPy keeps the bytes but not the type
    for source in (tmp_path / "x.npz", {"x": values}):
        read = open_data(source, spec).first().feeds["x"]
        assert read.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read, values)
    values[1, 1] = np.nan
    with pytest.raises(DataError, match="sample 1: NaN"):
        open_data({"x": values}, spec).first()


def test_text(tmp_path: Path) -> None:
    spec = [InputSpec("s", np.dtype(object), ("N",))]
    words = np.array(["a", "longer", "ü"])
    np.savez(tmp_path / "s.npz", s=words)
    for source in (tmp_path / "s.npz", {"s": words}, {"s": words.astype(object)}, iter([{"s": words.astype(object)}])):
        with open_data(source, spec) as dataset:
            read = dataset.first().feeds["s"]
            assert read.dtype == object and read.tolist() == ["a", "longer", "ü"]
            assert dataset.fingerprint() == open_data({"s": words}, spec).fingerprint()


def test_objects_in_memory_are_refused() -> None:
    with pytest.raises(DataError, match="Python objects"):
        open_data({"x": np.array([[1, None]], object)}, ROW)
    with pytest.raises(DataError, match="list is no array"):
        open_data({"x": [[1.0, 2.0], [3.0]]}, ROW)


def test_batches_in_memory_are_read_only() -> None:
    values = numbered(4, 2)
    read = open_data({"x": values}, ROW).first().feeds["x"]
    with pytest.raises(ValueError, match="read-only"):
        read[0, 0] = 7
    values[0, 0] = 7  # the user's own array stays theirs


# -- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["label", "labels", "target", "targets", "y", "Labels"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_labels_go_with_their_samples(tmp_path: Path, name: str, save: Save) -> None:
    save(tmp_path / "data.npz", x=numbered(30, 2), **{name: np.arange(30, dtype=np.uint8)})
    dataset = open_data(tmp_path / "data.npz", ROW, batch=7)
    assert dataset.has_labels
    for part in (dataset, *dataset.split(0.2), dataset.take(11).rebatch(4)):
        for batch in part:
            assert batch.labels is not None and batch.labels.dtype == np.int64
            np.testing.assert_array_equal(batch.labels, batch.feeds["x"][:, 0])


def test_labels_of_shape_n_1_are_flattened() -> None:
    batch = open_data({"x": numbered(3, 2), "y": np.arange(3).reshape(3, 1)}, ROW).first()
    assert batch.labels is not None and batch.labels.tolist() == [0, 1, 2]


def test_an_input_called_labels_is_an_input() -> None:
    specs = [*ROW, InputSpec("labels", I64, ("N",))]
    batch = open_data({"x": numbered(3, 2), "labels": np.arange(3)}, specs).first()
    assert batch.labels is None and batch.feeds["labels"].tolist() == [0, 1, 2]


def test_batches_that_change_their_arrays_are_refused() -> None:
    source = [{"x": numbered(2, 2), "y": np.arange(2)}, {"x": numbered(2, 2)}]
    with pytest.raises(DataError, match="batch 1: has x without labels but the batches before had x and labels"):
        open_data(source, ROW)


# -- inputs that are not batched ----------------------------------------------------------------------------------


def test_optional_inputs_may_be_missing() -> None:
    specs = [*ROW, InputSpec("scale", F32, (2,), optional=True)]
    assert list(open_data({"x": numbered(3, 2)}, specs).first().feeds) == ["x"]


def test_scalar_inputs_serve_all_samples(tmp_path: Path) -> None:
    specs = [*ROW, InputSpec("rate", I64, ())]
    np.savez(tmp_path / "data.npz", x=numbered(5, 2), rate=np.int64(16000))
    np.savez_compressed(tmp_path / "packed.npz", x=numbered(5, 2), rate=np.int64(16000))
    for source in (tmp_path / "data.npz", tmp_path / "packed.npz", {"x": numbered(5, 2), "rate": 16000}):
        for batch in open_data(source, specs, batch=2):
            assert batch.feeds["rate"].shape == () and batch.feeds["rate"] == 16000


def test_scalars_that_differ_keep_batches_apart() -> None:
    specs = [*ROW, InputSpec("rate", I64, ())]
    source = [{"x": numbered(2, 2), "rate": rate} for rate in (1, 1, 2)]
    assert [(b.samples, int(b.feeds["rate"])) for b in open_data(source, specs).rebatch(8)] == [(4, 1), (2, 2)]


def test_model_without_a_batch_axis_runs_sample_by_sample() -> None:
    dataset = open_data({"x": numbered(3, 8)}, [InputSpec("x", F32, (8,))])
    assert [b.feeds["x"].shape for b in dataset] == [(8,)] * 3 and seen(dataset.take(2)) == [0] * 8 + [1] * 8
    assert dataset.rebatch(4).fixed_batch == 1


def test_feeds_of_a_recurrent_network_are_taken_whole(tmp_path: Path) -> None:
    """``state [layers, batch, size]``: the first axes differ, so a feed is used as it is."""
    specs = [InputSpec("x", F32, ("batch", 5)), InputSpec("state", F32, (2, "batch", 3)), InputSpec("rate", I64, ())]
    feeds = [
        {"x": numbered(n, 5) + n, "state": np.full((2, n, 3), n, np.float32), "rate": np.int64(n)} for n in (4, 2, 2)
    ]
    for number, feed in enumerate(feeds):
        np.savez_compressed(tmp_path / f"{number}.npz", **feed)
    for source in (feeds, iter(feeds), tmp_path):
        with open_data(source, specs) as dataset:
            assert len(dataset) == dataset.samples == 3
            for batch, feed in zip(dataset, feeds, strict=True):
                for name, value in feed.items():
                    np.testing.assert_array_equal(batch.feeds[name], value)
            assert sum(part.samples for part in dataset.split(0.3)) == 3
    with pytest.raises(DataError, match="different numbers of samples: 'x' has 4, 'state' has 2"):
        open_data({"x": numbered(4, 5), "state": np.zeros((2, 4, 3), np.float32), "rate": 1}, specs)


def test_a_symbol_has_one_size_in_a_whole_feed() -> None:
    specs = [InputSpec("x", F32, ("batch", 5)), InputSpec("state", F32, (2, "batch", 3))]
    with pytest.raises(DataError, match="dimension 'batch' is 4 in 'x' and 3 in 'state'"):
        open_data([{"x": numbered(4, 5), "state": np.zeros((2, 3, 3), np.float32)}], specs)


# -- fixed batch --------------------------------------------------------------------------------------------------


def test_fixed_batch_of_one() -> None:
    dataset = open_data({"x": numbered(5, 2)}, [InputSpec("x", F32, (1, 2))], batch=4)
    assert sizes(dataset) == [1] * 5 and dataset.notes == ("batches of 1, not 4: the model's shapes demand it",)
    assert sizes(dataset.rebatch(3)) == [1] * 5


def test_fixed_batch_drops_the_tail_and_says_so() -> None:
    specs = [InputSpec("x", F32, (4, 2))]
    dataset = open_data({"x": numbered(11, 2)}, specs)
    assert seen(dataset) == list(range(8)) and dataset.samples == 8 and len(dataset) == 2
    assert dataset.notes == ("3 of 11 samples dropped: they do not fill a batch of 4, which the model's shapes demand",)
    assert sizes(dataset.take(7)) == [4]
    with pytest.raises(DataError, match="exactly 4 samples but there are only 3"):
        dataset.take(3)
    rest, held_out = dataset.split(0.1)
    assert rest.samples == held_out.samples == 4
    with pytest.raises(DataError, match="cannot be split into two parts, at least 8"):
        dataset.take(4).split(0.1)


def test_fixed_batch_spans_files(tmp_path: Path) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", numbered(3, 2) + 3 * number)
    dataset = open_data(tmp_path, [InputSpec("x", F32, (4, 2))])
    assert sizes(dataset) == [4, 4] and seen(dataset) == list(range(8))


# -- folders ------------------------------------------------------------------------------------------------------


def test_folder_is_read_in_natural_order_a_file_a_batch(tmp_path: Path) -> None:
    for number, samples in [(10, 3), (9, 2), (1, 4)]:
        np.savez(tmp_path / f"batch_{number}.npz", x=numbered(samples, 2) + 100 * number)
    (tmp_path / ".hidden").write_text("no data")
    (tmp_path / "README.txt").write_text("no data")
    dataset = open_data(tmp_path, ROW)
    assert sizes(dataset) == [4, 2, 3]
    assert seen(dataset) == [100, 101, 102, 103, 900, 901, 1000, 1001, 1002]
    assert sizes(dataset.rebatch(4)) == [4, 4, 1]


def test_folder_with_varying_shapes_keeps_batches_apart(tmp_path: Path) -> None:
    for number, (samples, length) in enumerate([(3, 5), (3, 7), (2, 7), (4, 5)]):
        arrays = numbered(samples, length, dtype=np.int64) + 10 * number
        np.savez(tmp_path / f"{number}.npz", ids=arrays, mask=np.ones_like(arrays))
    dataset = open_data(tmp_path, TEXT)
    assert [b.feeds["ids"].shape for b in dataset] == [(3, 5), (3, 7), (2, 7), (4, 5)]
    assert [b.feeds["ids"].shape for b in dataset.rebatch(4)] == [(3, 5), (4, 7), (1, 7), (4, 5)]
    rest, held_out = dataset.split(0.25)
    assert len(rest) == 3 and len(held_out) == 1  # whole batches
    assert sorted(seen(rest, "ids") + seen(held_out, "ids")) == sorted(seen(dataset, "ids"))


def test_folder_of_npy_named_like_the_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", numbered(6, 5, dtype=np.int64))
    np.save(tmp_path / "mask.npy", np.ones((6, 5), np.int64))
    np.save(tmp_path / "labels.npy", np.arange(6))
    dataset = open_data(tmp_path, TEXT, batch=4)
    assert dataset.has_labels and sizes(dataset) == [4, 2] and seen(dataset, "ids") == list(range(6))


def test_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither \.npz, \.npy nor images"):
        open_data(tmp_path, ROW)


def test_huge_files_of_a_folder_are_read_in_parts(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros((10, 3, 1024, 512), np.float32))  # 6 MiB a sample
    dataset = open_data(tmp_path, [InputSpec("x", F32, ("N", 3, 1024, 512))])
    assert sizes(dataset) == [5, 5]


# -- Python objects -----------------------------------------------------------------------------------------------


def batches_of(samples: int, batch: int) -> Iterator[dict[str, NDArray[Any]]]:
    values = numbered(samples, 2)
    for start in range(0, samples, batch):
        yield {"x": values[start : start + batch]}


class Reader:
    """Has the interface of onnxruntime's CalibrationDataReader."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.items = batches_of(samples, 4)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self.items, None)

    def rewind(self) -> None:
        self.items = batches_of(self.samples, 4)


class Tensor:
    """Looks like a torch tensor that needs a gradient and lies on another device."""

    def __init__(self, values: NDArray[Any], ready: int = 0) -> None:
        self.values, self.ready = values, ready

    def detach(self) -> Tensor:
        return Tensor(self.values, self.ready + 1)

    def cpu(self) -> Tensor:
        return Tensor(self.values, self.ready + 1)

    def numpy(self) -> NDArray[Any]:
        if self.ready < 2:
            raise RuntimeError("Can't call numpy() on a tensor that requires grad")
        return self.values


class Loader:
    """Like a torch DataLoader: iterable again and again, another order every time."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        for batch in batches_of(10, 4):
            yield Tensor(batch["x"] + 100 * self.passes), Tensor(batch["x"][:, 0].astype(np.int64))


def read_before() -> Reader:
    reader = Reader(10)
    while reader.get_next() is not None:
        pass
    return reader


PYTHON_SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: list(batches_of(10, 4)),
    "generator": lambda: batches_of(10, 4),
    "reader": lambda: Reader(10),
    "reader that was read before": read_before,
    "lists of numbers": lambda: [{"x": b["x"].tolist()} for b in batches_of(10, 4)],
    "tuples": lambda: [(b["x"],) for b in batches_of(10, 4)],
    "arrays": lambda: (b["x"] for b in batches_of(10, 4)),
    "tensors": lambda: ({"x": Tensor(b["x"])} for b in batches_of(10, 4)),
}


@pytest.mark.parametrize("make", PYTHON_SOURCES.values(), ids=PYTHON_SOURCES.keys())
def test_python_sources(make: Callable[[], Any], tmp_path: Path) -> None:
    with open_data(make(), ROW, work_dir=tmp_path) as dataset:
        for _ in range(2):
            assert seen(dataset) == list(range(10)) and sizes(dataset) == [4, 4, 2]
        assert dataset.fingerprint() == open_data({"x": numbered(10, 2)}, ROW).fingerprint()
    assert list(tmp_path.iterdir()) == []


def test_mappings_and_single_arrays() -> None:
    for source in (numbered(10, 2), {"x": numbered(10, 2)}, Tensor(numbered(10, 2)), {"x": Tensor(numbered(10, 2))}):
        assert seen(open_data(source, ROW)) == list(range(10))


def test_loader_is_read_once(tmp_path: Path) -> None:
    loader = Loader()
    with open_data(loader, ROW, work_dir=tmp_path) as dataset:
        first = seen(dataset)
        assert seen(dataset) == first == [100 + n for n in range(10)]
        assert loader.passes == 1 and dataset.has_labels
        assert [n for b in dataset if b.labels is not None for n in b.labels.tolist()] == list(range(10))


def test_buffers_that_are_reused_by_a_generator_are_copied() -> None:
    def source() -> Iterator[dict[str, NDArray[Any]]]:
        buffer = np.zeros((1, 2), np.float32)
        for number in range(5):
            buffer[:] = number
            yield {"x": buffer}

    with open_data(source(), ROW) as dataset:
        assert seen(dataset) == [0, 1, 2, 3, 4]


def test_endless_generator_with_a_limit() -> None:
    def endless() -> Iterator[dict[str, NDArray[Any]]]:
        while True:
            yield {"x": numbered(4, 2)}

    with open_data(endless(), ROW, limit=10) as dataset:
        assert sizes(dataset) == [4, 4, 2]


def test_spools_go_away_without_close(tmp_path: Path) -> None:
    dataset = open_data(batches_of(10, 4), ROW, work_dir=tmp_path)
    view = dataset.take(3)
    del dataset
    gc.collect()
    assert seen(view) == [0, 1, 2] and len(list(tmp_path.iterdir())) == 1
    del view
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_spool_goes_away_when_the_source_fails(tmp_path: Path) -> None:
    def source() -> Iterator[dict[str, NDArray[Any]]]:
        yield {"x": numbered(4, 2)}
        raise KeyError("gone")

    with pytest.raises(DataError, match=r"test_data\.py, line \d+: KeyError: 'gone'"):
        open_data(source(), ROW, work_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_place_for_a_spool(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cannot create a temporary file .* TMPDIR") as caught:
        open_data(batches_of(10, 4), ROW, work_dir=tmp_path / "file")
    assert caught.value.exit_code == 7


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, the device that is always full")
def test_full_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.path.unlink()
    spool.path.symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=r"cannot be kept on disk: .*No space left"):
        spool.write({"x": numbered(1000, 2)})
    spool.close()
    assert list(tmp_path.iterdir()) == [] and Path("/dev/full").exists()


def test_source_that_runs_out_of_memory(tmp_path: Path) -> None:
    def source() -> Iterator[dict[str, NDArray[Any]]]:
        yield {"x": numbered(4, 2)}
        raise MemoryError

    with pytest.raises(ResourceError, match="out of memory"):
        open_data(source(), ROW, work_dir=tmp_path)


def test_reading_after_close() -> None:
    dataset = open_data(batches_of(10, 4), ROW)
    dataset.close()
    with pytest.raises(DataError, match="cannot be read any more"):
        dataset.first()


@pytest.mark.parametrize("source", [[], iter([]), iter(()), Reader(0)])
def test_no_batches(source: Any) -> None:
    with pytest.raises(DataError, match="no batches; expected at least one"):
        open_data(source, ROW)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (42, "int cannot be read"),
        ([(numbered(2, 2), numbered(2, 2), numbered(2, 2))], "a tuple of 3 but the model takes 1 inputs"),
        ([{3: numbered(2, 2)}], "the key 3 is no text"),
        (iter([{"x": numbered(2, 3)}]), "batch 0: array 'x' has shape"),
    ],
)
def test_python_misfits(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(source, ROW)


def test_a_dataset_is_given_back() -> None:
    dataset = open_data(numbered(10, 2), ROW)
    assert open_data(dataset, ROW) is dataset
    assert sizes(open_data(dataset, ROW, batch=4, limit=7)) == [4, 3]


@pytest.mark.parametrize("options", [{"batch": 0}, {"limit": 0}, {"batch": -3}])
def test_numbers_below_one(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="expected 1 or more"):
        open_data(numbered(10, 2), ROW, **options)  # type: ignore[arg-type]
    dataset = open_data(numbered(10, 2), ROW)
    with pytest.raises(UsageError):
        dataset.take(0)
    with pytest.raises(UsageError):
        dataset.rebatch(0)
    with pytest.raises(UsageError):
        dataset.split(1.0)


# -- file.py:function ---------------------------------------------------------------------------------------------


def test_function_source(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("samples = 6\n")
    (tmp_path / "make.py").write_text(
        "import numpy as np\n"
        "from neighbour import samples\n"
        "def values():\n"
        "    return np.arange(samples).repeat(2).reshape(-1, 2).astype('float32')\n"
        "def mapping():\n"
        "    return {'x': values()}\n"
        "def batches():\n"
        "    from neighbour import samples\n"
        "    for i in range(samples):\n"
        "        yield {'x': values()[i:i + 1]}\n"
        "def nothing():\n"
        "    pass\n"
        "def broken():\n"
        "    return 1 / 0\n"
        "def breaks_later():\n"
        "    yield {'x': values()}\n"
        "    raise ValueError('two\\nlines')\n"
    )
    for function in ("values", "mapping", "batches"):
        with open_data(f"{tmp_path}/make.py:{function}", ROW) as dataset:
            assert seen(dataset) == list(range(6))
    for function, message in [
        ("nothing", r"make\.py:nothing returned None; expected an iterable"),
        ("broken", r"make\.py, line 14: ZeroDivisionError: division by zero"),
        ("breaks_later", r"make\.py, line 17: ValueError: two lines"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            open_data(f"{tmp_path}/make.py:{function}", ROW)
        assert "\n" not in str(caught.value)


# -- views --------------------------------------------------------------------------------------------------------


def test_split_is_interleaved_deterministic_and_complete() -> None:
    dataset = open_data(numbered(100, 2), ROW)
    rest, held_out = dataset.split(0.1, seed=5)
    assert held_out.samples == 10 and rest.samples == 90
    picked = seen(held_out)
    assert [n // 10 for n in picked] == list(range(10))  # one in each stretch of ten
    assert sorted(seen(rest) + picked) == list(range(100))
    assert seen(dataset.split(0.1, seed=5)[1]) == picked != seen(dataset.split(0.1, seed=6)[1])


def test_split_of_uniform_batches_closes_the_holes() -> None:
    dataset = open_data(list(batches_of(40, 8)), ROW)
    rest, held_out = dataset.split(0.1)
    assert sizes(rest) == [8, 8, 8, 8, 4] and sizes(held_out) == [4]


def test_one_batch_is_split_by_sample() -> None:
    rest, held_out = open_data([{"x": numbered(16, 2)}], ROW).split(0.1)
    assert (rest.samples, held_out.samples) == (14, 2)


def test_one_sample_cannot_be_split() -> None:
    with pytest.raises(DataError, match="1 sample cannot be split into two parts, at least 2 are needed"):
        open_data(numbered(1, 2), ROW).split(0.1)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Samples and width of each batch of a source."""
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    widths = draw(st.lists(st.integers(1, 2), min_size=len(counts), max_size=len(counts)))
    return counts, widths


@settings(deadline=None, max_examples=150)
@given(layout=layouts(), data=st.data())
def test_views_compose(layout: tuple[list[int], list[int]], data: st.DataObject) -> None:
    """Any sequence of views yields the samples that the same sequence takes from a list."""
    counts, widths = layout
    source, expected = [], []
    for count, width in zip(counts, widths, strict=True):
        numbers = [len(expected) + i for i in range(count)]
        source.append({"x": np.array(numbers, np.float32)[:, None].repeat(width, 1)})
        expected += numbers
    dataset = open_data(source, [InputSpec("x", F32, ("N", "W"))])
    for step in data.draw(st.lists(st.sampled_from(["rebatch", "take", "rest", "held out"]), max_size=4)):
        if step == "rebatch":
            dataset = dataset.rebatch(data.draw(st.integers(1, 7)))
        elif step == "take":
            number = data.draw(st.integers(1, 30))
            dataset, expected = dataset.take(number), expected[:number]
        else:
            with contextlib.suppress(DataError):
                rest, held_out = dataset.split(data.draw(st.sampled_from([0.1, 0.5])), seed=1)
                assert sorted(seen(rest) + seen(held_out)) == expected
                dataset = rest if step == "rest" else held_out
                expected = [n for n in expected if n in set(seen(dataset))]
    assert seen(dataset) == expected
    assert dataset.samples == len(expected) and sizes(dataset) == [b.samples for b in dataset]
    assert len(dataset) == len(sizes(dataset))
    for batch in dataset:
        assert batch.samples == len(batch.feeds["x"]) and (dataset.batch is None or batch.samples <= dataset.batch)


@settings(deadline=None, max_examples=40)
@given(samples=st.integers(1, 40), batch=st.integers(1, 50), other=st.integers(1, 50))
def test_fingerprint_does_not_depend_on_batches(samples: int, batch: int, other: int) -> None:
    values = np.random.default_rng(samples).random((samples, 2), np.float32)
    dataset = open_data({"x": values, "y": np.arange(samples)}, ROW)
    assert dataset.rebatch(batch).fingerprint() == dataset.rebatch(other).fingerprint() == dataset.fingerprint()


def test_fingerprint_tells_values_names_shapes_and_labels_apart() -> None:
    values = numbered(4, 2)
    free = [InputSpec("x", F32, ("N", "W"))]
    prints = {
        open_data({"x": values}, ROW).fingerprint(),
        open_data({"x": values + 1}, ROW).fingerprint(),
        open_data({"z": values}, [InputSpec("z", F32, ("N", 2))]).fingerprint(),
        open_data({"x": values, "y": np.arange(4)}, ROW).fingerprint(),
        open_data({"x": values[:, :, None]}, [InputSpec("x", F32, ("N", 2, 1))]).fingerprint(),
        open_data([{"x": values}, {"x": np.zeros((1, 3), np.float32)}], free).fingerprint(),
        open_data([{"x": values}, {"x": np.zeros((3, 1), np.float32)}], free).fingerprint(),
        open_data({"x": values}, ROW).take(3).fingerprint(),
    }
    assert len(prints) == 8


def test_first_reads_one_batch_only() -> None:
    values = numbered(40, 2)
    values[20:] = np.nan
    batch = open_data({"x": values}, ROW).first()
    assert isinstance(batch, Batch) and batch.samples == 16


@pytest.mark.cases
def test_text_of_a_real_case_keeps_its_lengths(cases: Any, tmp_path: Path) -> None:
    feeds = list(cases["minilm"].calibration(samples=96, batch=16))
    specs = [InputSpec(name, I64, ("batch", "length")) for name in feeds[0]]
    with open_data(iter(feeds), specs, work_dir=tmp_path) as dataset:
        assert len({b.feeds["input_ids"].shape for b in dataset}) > 1
        for batch, feed in zip(dataset, feeds, strict=True):
            np.testing.assert_array_equal(batch.feeds["input_ids"], feed["input_ids"])
        rest, held_out = dataset.split()
        assert rest.samples == 80 and held_out.samples == 16


@pytest.mark.cases
def test_images_of_a_real_case_stream(cases: Any, tmp_path: Path) -> None:
    specs = [InputSpec("input", F32, ("N", 3, 32, 32))]
    feeds = list(cases["resnet20"].calibration(samples=256, batch=16))
    np.savez(tmp_path / "c.npz", input=np.concatenate([f["input"] for f in feeds]))
    dataset = open_data(tmp_path / "c.npz", specs)
    assert len(dataset) == 16 and dataset.fingerprint() == open_data(feeds, specs).fingerprint()
