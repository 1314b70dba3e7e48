"""Opening data: files, folders, functions and Python objects, all into one :class:`Dataset`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxcompress.data.columns import Column, MemoryColumn, Spool, npy_column, npz_columns
from onnxcompress.data.dataset import Chunk, Dataset, default_batch
from onnxcompress.data.fit import LABEL_NAMES, Fitter, describe_spec
from onnxcompress.data.order import ARRAY_SUFFIXES, IMAGE_SUFFIXES, natural_order
from onnxcompress.errors import DataError, UsageError
from onnxcompress.graph import InputSpec
from onnxcompress.user_code import is_function_reference, load_function, user_errors

if TYPE_CHECKING:
    from onnxcompress.data.images import Preprocess

__all__ = ["open_data"]

_KINDS = "a .npz or .npy file, a folder of them, a folder of images, or file.py:function"


def open_data(
    source: Any,
    specs: Sequence[InputSpec],
    *,
    batch: int | None = None,
    preprocess: Preprocess | None = None,
    work_dir: Path | None = None,
    limit: int | None = None,
) -> Dataset:
    """Open calibration or evaluation data for a model.

    Args:
        source: one of

            - a ``.npz`` file: arrays by input name, first axis the sample; streamed, never read whole
            - a ``.npy`` file, for a model with one input
            - a folder of either, a file a batch in natural order of the names, so that shapes may vary; or of one
              ``.npy`` for each input, named like it
            - a folder of images; subfolders, where there are any, are the classes (see ``preprocess``)
            - ``file.py:function``: the function is called without arguments and returns any of the following
            - a mapping of arrays by input name, or one array for a model with one input: first axis the sample
            - an iterable of batches, each a mapping of arrays, a tuple in the order of the inputs (labels may come
              last), or one array. A list stays in memory; anything else is read once and spooled to disk
            - an object with ``get_next()``, such as a CalibrationDataReader of ONNX Runtime; read once and spooled
            - a :class:`Dataset`, which is given back

            Arrays named ``label``, ``labels``, ``target``, ``targets`` or ``y`` that are no model inputs are labels.
        specs: the model's inputs, see :func:`onnxcompress.graph.input_specs`.
        batch: samples a batch. Default: as the source has them; for one file or mapping up to 16, at most 32 MiB. A
            batch dimension that the model fixes goes first; samples that do not fill such a batch are dropped.
        preprocess: how images become inputs.
        work_dir: where one-shot sources are spooled to; default: the system's temporary folder.
        limit: read no more samples than this.

    Raises:
        DataError: the data is missing, empty, unsafe or does not fit the model.
        UsageError: ``preprocess`` for data that are no images, or numbers below 1.
        RuntimeUnavailableError: images without Pillow.
        ResourceError: no room for a spool.
    """
    for name, value in (("batch", batch), ("limit", limit)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; expected 1 or more")
    dataset = _open(source, specs, preprocess, work_dir, limit)
    if batch is not None and dataset.batch != batch:
        dataset = dataset.rebatch(batch)
        if dataset.fixed_batch not in (None, batch):
            dataset.notes += (f"batches of {dataset.fixed_batch}, not {batch}: the model's shapes demand it",)
    return dataset if limit is None else dataset.take(limit)


def _open(
    source: Any, specs: Sequence[InputSpec], preprocess: Preprocess | None, work_dir: Path | None, limit: int | None
) -> Dataset:
    if isinstance(source, Dataset):
        return source
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if not isinstance(text, str):
            raise DataError(f"{text!r} is no text; expected a path")
        if not text:
            raise DataError(f"no data was given; expected {_KINDS}")
        if is_function_reference(text):
            _no_preprocess(preprocess, text)
            function = load_function(text)
            made = function()
            if made is None or isinstance(made, str | os.PathLike):
                raise DataError(f"{text} returned {made!r}; expected an iterable of {{input name: array}} or a mapping")
            return _open_object(made, specs, work_dir, limit, text, function.running)
        return _open_path(Path(text), specs, preprocess)
    _no_preprocess(preprocess, "the data")
    return _open_object(source, specs, work_dir, limit, "the data", user_errors)


# -- files and folders --------------------------------------------------------------------------------------------


def _open_path(path: Path, specs: Sequence[InputSpec], preprocess: Preprocess | None) -> Dataset:
    try:
        there = path.exists()
    except (OSError, ValueError) as error:  # too long, or a null byte
        raise DataError(f"{str(path)[:100]!r} cannot be a path: {error}") from error
    if not there:
        raise DataError(f"{path}: no such file or folder; expected {_KINDS}")
    if path.is_dir():
        try:
            return _open_folder(path, specs, preprocess)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    _no_preprocess(preprocess, str(path))
    suffix = path.suffix.lower()
    if suffix in ARRAY_SUFFIXES:
        return _rows(_file_columns(path, specs), specs, str(path))
    if suffix in IMAGE_SUFFIXES:
        raise DataError(f"{path} is a single image; give the folder that it is in")
    if suffix == ".py":
        raise DataError(f"{path}: name the function, as in {path}:function")
    raise DataError(f"{path}: {suffix or 'no'} suffix; expected {_KINDS}")


def _file_columns(path: Path, specs: Sequence[InputSpec]) -> Mapping[str, Column]:
    if path.suffix.lower() == ".npz":
        return npz_columns(path)
    return {_only_input(specs, str(path)): npy_column(path)}


def _only_input(specs: Sequence[InputSpec], origin: str) -> str:
    required = [spec for spec in specs if not spec.optional] or list(specs)
    if len(required) != 1:
        expected = ", ".join(describe_spec(spec) for spec in required)
        raise DataError(
            f"{origin}: one array but the model takes {len(required)} inputs; expected a .npz with {expected}"
        )
    return required[0].name


def _open_folder(path: Path, specs: Sequence[InputSpec], preprocess: Preprocess | None) -> Dataset:
    files = sorted((f for f in path.iterdir() if f.is_file() and not f.name.startswith(".")), key=_file_order)
    arrays = [f for f in files if f.suffix.lower() in ARRAY_SUFFIXES]
    images = any(f.suffix.lower() in IMAGE_SUFFIXES for f in path.rglob("*") if not f.name.startswith("."))
    if arrays and images:
        raise DataError(f"{path}: holds both images and arrays ({arrays[0].name}); keep one kind in a folder")
    if images:
        from onnxcompress.data.images import image_dataset

        return image_dataset(path, specs, preprocess)
    if not arrays:
        raise DataError(f"{path}: neither .npz, .npy nor images ({', '.join(IMAGE_SUFFIXES)}) in this folder")
    _no_preprocess(preprocess, str(path))
    by_input = _one_file_an_input(arrays, specs)
    if by_input is not None:
        return _rows({name: npy_column(file) for name, file in by_input.items()}, specs, str(path))
    fitter = Fitter(specs, feeds=True)
    return _feeds([fitter.fit(_file_columns(file, specs), str(file)) for file in arrays], fitter)


def _one_file_an_input(files: Sequence[Path], specs: Sequence[InputSpec]) -> dict[str, Path] | None:
    """{input or label name: file} where every file is a ``.npy`` named like an input or like labels."""
    by_name = {file.stem: file for file in files if file.suffix.lower() == ".npy"}
    names = {spec.name for spec in specs}
    required = {spec.name for spec in specs if not spec.optional}
    if len(by_name) != len(files) or not required <= set(by_name):
        return None
    if any(name not in names and name.lower() not in LABEL_NAMES for name in by_name):
        return None
    return by_name


def _file_order(path: Path) -> list[tuple[int, str]]:
    return natural_order(path.name)


def _no_preprocess(preprocess: Preprocess | None, origin: str) -> None:
    if preprocess is not None:
        raise UsageError(f"{origin}: preprocess is for folders of images; arrays are given as the model takes them")


# -- Python objects -----------------------------------------------------------------------------------------------


def _open_object(
    source: Any,
    specs: Sequence[InputSpec],
    work_dir: Path | None,
    limit: int | None,
    origin: str,
    running: Callable[[], AbstractContextManager[None]],
) -> Dataset:
    if isinstance(source, Dataset):
        return source
    if isinstance(source, Mapping):
        return _rows(_memory(source, origin), specs, origin)
    if isinstance(source, np.ndarray) or _is_tensor(source):
        return _rows(_memory({_only_input(specs, origin): source}, origin), specs, origin)
    if callable(getattr(source, "get_next", None)):
        return _spooled(_reader_items(source), specs, work_dir, limit, origin, running)
    if isinstance(source, list | tuple):
        fitter = Fitter(specs, feeds=True)
        chunks = [
            fitter.fit(_memory(_named(item, specs, where), where), where)
            for number, item in enumerate(source)
            for where in [f"{origin}, batch {number}"]
        ]
        return _feeds(chunks, fitter, origin)
    if isinstance(source, Iterable) or hasattr(source, "__getitem__"):
        return _spooled(source, specs, work_dir, limit, origin, running)
    raise DataError(f"{origin}: {type(source).__name__} cannot be read; expected an iterable of {{input name: array}}")


def _reader_items(reader: Any) -> Iterator[Any]:
    """Items of a CalibrationDataReader; one that was read before is rewound where it can be."""
    item = reader.get_next()
    if item is None and callable(getattr(reader, "rewind", None)):
        reader.rewind()
        item = reader.get_next()
    while item is not None:
        yield item
        item = reader.get_next()


def _spooled(
    source: Any,
    specs: Sequence[InputSpec],
    work_dir: Path | None,
    limit: int | None,
    origin: str,
    running: Callable[[], AbstractContextManager[None]],
) -> Dataset:
    """Read a one-shot source once, a batch at a time, and keep it on disk."""
    fitter = Fitter(specs, feeds=True)
    chunks: list[Chunk] = []
    samples = 0
    spool = Spool(work_dir)
    try:
        with running():
            items = iter(source)
        while limit is None or samples < limit:
            with running():
                item = next(items, None)
            if item is None:
                break
            where = f"{origin}, batch {len(chunks)}"
            arrays = {name: column.values for name, column in _memory(_named(item, specs, where), where).items()}
            chunks.append(fitter.fit(spool.write({name: _plain(array) for name, array in arrays.items()}), where))
            samples += chunks[-1].samples
        return _feeds(chunks, fitter, origin, spool)
    except BaseException:
        spool.close()
        raise


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """Text held as Python objects becomes fixed-width strings, which can be written without pickle."""
    return array.astype(np.str_) if array.dtype.hasobject else array


def _named(item: Any, specs: Sequence[InputSpec], where: str) -> Mapping[str, Any]:
    """{name: values} for one batch of an iterable."""
    if isinstance(item, Mapping):
        return item
    if isinstance(item, tuple | list):
        required = [spec.name for spec in specs if not spec.optional]
        if len(item) == len(required):
            return dict(zip(required, item, strict=True))
        if len(item) == len(required) + 1:
            names = {spec.name for spec in specs}
            label = next(name for name in LABEL_NAMES if name not in names)
            return dict(zip([*required, label], item, strict=True))
        raise DataError(
            f"{where}: a {type(item).__name__} of {len(item)} but the model takes {len(required)} inputs "
            f"({', '.join(required)}); expected one array for each, and labels last where there are any"
        )
    return {_only_input(specs, where): item}


def _memory(arrays: Mapping[str, Any], origin: str) -> dict[str, MemoryColumn]:
    columns = {}
    for name, value in arrays.items():
        if not isinstance(name, str):
            raise DataError(f"{origin}: the key {name!r} is no text; expected the names of the model's inputs")
        columns[name] = MemoryColumn(_array(value, f"{origin}: array {name!r}"))
    return columns


def _is_tensor(value: Any) -> bool:
    return callable(getattr(value, "numpy", None))


def _array(value: Any, where: str) -> NDArray[Any]:
    try:
        if _is_tensor(value) and not isinstance(value, np.ndarray):
            for step in ("detach", "cpu"):  # a torch tensor with a gradient, or on another device
                if callable(getattr(value, step, None)):
                    value = getattr(value, step)()
            value = value.numpy()
        array = np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:  # objects of the user convert themselves by their own code
        raise DataError(
            f"{where}: {type(value).__name__} is no array ({' '.join(str(error).split())[:200]})"
        ) from error
    if array.dtype.hasobject and not all(isinstance(item, str) for item in array.reshape(-1).tolist()):
        raise DataError(f"{where}: holds Python objects ({type(value).__name__}); expected numbers or text")
    return array


# -- data sets ----------------------------------------------------------------------------------------------------


def _rows(columns: Mapping[str, Column], specs: Sequence[InputSpec], origin: str) -> Dataset:
    """All samples in one mapping of arrays."""
    fitter = Fitter(specs, feeds=False)
    return _feeds([fitter.fit(columns, origin)], fitter, origin, rows=True)


def _feeds(
    chunks: Sequence[Chunk], fitter: Fitter, origin: str = "the data", spool: Spool | None = None, *, rows: bool = False
) -> Dataset:
    if not chunks:
        raise DataError(f"{origin}: no batches; expected at least one")
    batch = default_batch(chunks[0]) if rows else None
    dataset = Dataset(tuple(chunks), batch, fixed_batch=fitter.fixed_batch, notes=fitter.notes, _resource=spool)
    dropped = sum(chunk.samples for chunk in chunks) - dataset.samples
    if dropped:
        dataset.notes += (
            f"{dropped} of {dataset.samples + dropped} samples dropped: they do not fill a batch of "
            f"{dataset.fixed_batch}, which the model's shapes demand",
        )
    return dataset
