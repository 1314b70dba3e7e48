"""Columns: one array per model input whose rows are samples, read a few rows at a time.

A column knows its shape and type without reading its values. Where the values are decides the class: a ``.npy`` file,
an uncompressed member of a ``.npz`` or a spool (:class:`FileColumn`), a compressed member (:class:`CompressedColumn`),
or memory (:class:`MemoryColumn`). Nothing is ever unpickled: arrays of Python objects are refused.
"""

from __future__ import annotations

import io
import lzma
import os
import shutil
import struct
import tempfile
import tokenize
import weakref
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from onnxcompress.errors import DataError, ResourceError

__all__ = [
    "Column",
    "CompressedColumn",
    "FileColumn",
    "MemoryColumn",
    "Rows",
    "Spool",
    "npy_column",
    "npz_columns",
]

#: sample numbers, ascending
Rows = NDArray[np.int64]


#: batches of a one-shot source; more are taken for a source without an end
MOST_BATCHES = 200_000
#: bytes of the header of an array; numpy itself refuses to parse longer ones
_MOST_HEADER_BYTES = 10_000
#: what numpy's parser of headers, which are Python literals, makes of damaged ones; the last two where they are deep
_BAD_HEADER = (ValueError, EOFError, OSError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)
#: what reading a damaged or unsupported member of an archive raises; positions of 64 bits do not fit where they go
_BAD_MEMBER = (
    *(zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error, zlib.error, lzma.LZMAError),
    *(ValueError, OverflowError),
)
#: a compressed member of more bytes than this that grows by more than this factor is a bomb
_BOMB_BYTES, _BOMB_RATIO = 1 << 34, 100


class Column(ABC):
    """An array whose first axis is the sample. Reading goes through :meth:`open`, which may keep a position."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def rows(self, index: Rows) -> NDArray[Any]:
        """The samples ``index`` (ascending), stacked on axis 0. The result may be a view and must not be written to."""

    @abstractmethod
    def whole(self) -> Column:
        """The same values as one sample: shape ``(1, *shape)``."""

    def open(self) -> Column:
        """A reader for one pass over the samples; readers of one column do not disturb each other."""
        return self

    def close(self) -> None:  # noqa: B027 - only readers with a position hold something
        """Release what :meth:`open` took."""


@dataclass(frozen=True, eq=False)
class MemoryColumn(Column):
    """An array in memory; it is not copied."""

    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the array."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]
        """Type of the elements."""
        return self.values.dtype

    def rows(self, index: Rows) -> NDArray[Any]:
        """See :meth:`Column.rows`."""
        if not self.shape:
            return self.values
        start, stop = int(index[0]), int(index[-1]) + 1
        taken = self.values[start:stop] if stop - start == len(index) else self.values[index]
        taken = taken.view()
        taken.flags.writeable = False
        return taken

    def whole(self) -> MemoryColumn:
        """See :meth:`Column.whole`."""
        return MemoryColumn(self.values[None])


@dataclass(frozen=True, eq=False)
class FileColumn(Column):
    """An array that lies uncompressed in a file, ``offset`` bytes from its start.

    Rows are read with one ``read`` for each run of neighbours and no memory map: mapped pages would count as memory
    of the process, and a file that shrinks under a map kills the process.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool = False

    def rows(self, index: Rows) -> NDArray[Any]:
        """See :meth:`Column.rows`."""
        try:
            if not self.shape:
                out = np.empty((), self.dtype)
                self._read(out.reshape(1), 0)
                return out
            if self.fortran:
                return self._fortran_rows(index)
            out = np.empty((len(index), *self.shape[1:]), self.dtype)
            row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
            if row_bytes == 0:
                return out
            breaks = np.flatnonzero(np.diff(index) != 1) + 1
            starts = [0, *breaks.tolist()]
            for start, stop in zip(starts, [*starts[1:], len(index)], strict=True):
                self._read(out[start:stop], int(index[start]) * row_bytes)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read any more: {error.strerror or error}") from error
        return out

    def _read(self, out: NDArray[Any], position: int) -> None:
        target = out.reshape(-1).view(np.uint8).data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + position)
            done = 0
            while done < len(target):
                count = file.readinto(target[done:])
                if not count:
                    raise DataError(f"{self.path}: the file ends early; it was truncated or is still being written")
                done += count

    def _fortran_rows(self, index: Rows) -> NDArray[Any]:
        """Rows of a column-major array are scattered over the file: here a map, closed at once, is the best way."""
        mapped = np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order="F")
        return np.array(mapped[index], order="C", subok=False)

    def whole(self) -> FileColumn:
        """See :meth:`Column.whole`."""
        return replace(self, shape=(1, *self.shape))


@dataclass(frozen=True, eq=False)
class CompressedColumn(Column):
    """A compressed member of a ``.npz``, decompressed front to back while its rows are asked for."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self, index: Rows) -> NDArray[Any]:
        """See :meth:`Column.rows`; every call starts at the front, so iterate with :meth:`open`."""
        reader = self.open()
        try:
            return reader.rows(index)
        finally:
            reader.close()

    def open(self) -> Column:
        """See :meth:`Column.open`."""
        return _CompressedReader(self)

    def whole(self) -> CompressedColumn:
        """See :meth:`Column.whole`."""
        return replace(self, shape=(1, *self.shape))


class _CompressedReader(Column):
    """The position in one compressed member."""

    _PART_BYTES = 1 << 17

    def __init__(self, column: CompressedColumn) -> None:
        self.shape, self.dtype = column.shape, column.dtype
        self._column = column
        self._archive: zipfile.ZipFile | None = None
        self._stream: IO[bytes] | None = None
        self._next = 0

    def rows(self, index: Rows) -> NDArray[Any]:
        """See :meth:`Column.rows`."""
        shape = (len(index), *self.shape[1:]) if self.shape else ()
        out = np.empty(shape, self.dtype)
        try:
            if not self.shape:
                self._start()
                self._fill(out.reshape(1))
                return out
            if self._stream is None or int(index[0]) < self._next:
                self._start()
            row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
            for position, row in enumerate(index.tolist()):
                self._skip((row - self._next) * row_bytes)
                self._fill(out[position : position + 1])
                self._next = row + 1
        except (OSError, *_BAD_MEMBER) as error:
            raise DataError(
                f"{self._column.path}: member {self._column.member!r} cannot be decompressed: {error}"
            ) from error
        return out

    def whole(self) -> Column:
        """See :meth:`Column.whole`."""
        return self._column.whole()

    def close(self) -> None:
        """Close the archive."""
        if self._stream is not None:
            self._stream.close()
        if self._archive is not None:
            self._archive.close()
        self._stream = self._archive = None

    def _start(self) -> None:
        self.close()
        self._archive = zipfile.ZipFile(self._column.path)
        self._stream = self._archive.open(self._column.member)
        _npy_header(self._stream, f"{self._column.path}: member {self._column.member!r}")
        self._next = 0

    def _fill(self, out: NDArray[Any]) -> None:
        assert self._stream is not None  # set by _start
        if out.size == 0 or out.dtype.itemsize == 0:
            return
        target = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(target):
            part = self._stream.read(min(len(target) - done, self._PART_BYTES))
            if not part:
                raise EOFError("the data ends early")
            target[done : done + len(part)] = part
            done += len(part)

    def _skip(self, count: int) -> None:
        assert self._stream is not None  # set by _start
        while count > 0:
            part = self._stream.read(min(count, self._PART_BYTES))
            if not part:
                raise EOFError("the data ends early")
            count -= len(part)


def _npy_header(stream: IO[bytes], origin: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order (True: column-major) and type from the header of the ``.npy`` format; the values come next."""
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(_header(stream, 2))
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(_header(stream, 4))
        else:
            raise DataError(f"{origin}: version {version} of the .npy format is not supported; save it with numpy.save")
    except _BAD_HEADER as error:
        reason = " ".join(str(error).split())[:200] or "its header is nested too deeply"
        raise DataError(f"{origin}: not a NumPy array ({reason}); save it with numpy.save or numpy.savez") from error
    if dtype.hasobject:
        raise DataError(
            f"{origin}: holds Python objects (dtype object), which would need unpickling and could run any code; "
            "save a numeric array, or text as a fixed-width string array"
        )
    if dtype.fields is not None or dtype.subdtype is not None:
        raise DataError(f"{origin}: has the structured type {dtype}; save one plain array for each model input")
    if any(d < 0 for d in shape):
        raise DataError(f"{origin}: has the impossible shape {shape}")
    return tuple(int(d) for d in shape), bool(fortran), dtype


def _header(stream: IO[bytes], bytes_of_length: int) -> IO[bytes]:
    """The header alone: numpy reads the whole of a giant one before it refuses it."""
    start = stream.read(bytes_of_length)
    length = int.from_bytes(start, "little")
    if length > _MOST_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes")
    return io.BytesIO(start + stream.read(length))


def _check_regular(path: Path) -> None:
    """A pipe of that name would block for ever; a file that is not there is told by whoever opens it."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no regular file; save the array to one")


def npy_column(path: Path) -> FileColumn:
    """The array in a ``.npy`` file.

    Raises:
        DataError: no such array, an array of objects, or a file that is shorter than its header says.
    """
    _check_regular(path)
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = _npy_header(file, str(path))
            offset = file.tell()
            present = os.fstat(file.fileno()).st_size - offset
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror or error}") from error
    _check_length(str(path), shape, dtype, present)
    return FileColumn(path, offset, shape, dtype, fortran and len(shape) > 1)


def npz_columns(path: Path) -> dict[str, Column]:
    """The arrays in a ``.npz`` file by name. Only headers are read.

    Raises:
        DataError: no zip file, a member that is no plain array, or one that is encrypted or truncated.
    """
    columns: dict[str, Column] = {}
    _check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                name = info.filename.removesuffix(".npy")
                origin = f"{path}: array {name!r}"
                if name in columns:
                    raise DataError(f"{origin} is there twice; write the file again with numpy.savez")
                if info.flag_bits & 0x1:
                    raise DataError(f"{origin} is encrypted; write the file again with numpy.savez")
                columns[name] = _npz_column(archive, file, info, path, origin)
    except _BAD_MEMBER as error:
        raise DataError(f"{path}: not a .npz file ({error}); write it with numpy.savez") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror or error}") from error
    if not columns:
        raise DataError(f"{path}: holds no arrays; expected one for each model input, first axis the sample")
    return columns


def _npz_column(archive: zipfile.ZipFile, file: IO[bytes], info: zipfile.ZipInfo, path: Path, origin: str) -> Column:
    if info.compress_type == zipfile.ZIP_STORED:
        # The local header repeats the name and may carry other extra fields than the directory does.
        file.seek(info.header_offset)
        local = file.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise DataError(f"{origin} is not where the directory of the file says; write it again with numpy.savez")
        name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
        start = info.header_offset + 30 + name_bytes + extra_bytes
        file.seek(start)
        shape, fortran, dtype = _npy_header(file, origin)
        offset = file.tell()
        end = min(start + info.file_size, os.fstat(file.fileno()).st_size)
        _check_length(origin, shape, dtype, end - offset)
        return FileColumn(path, offset, shape, dtype, fortran and len(shape) > 1)
    if info.file_size > _BOMB_BYTES and info.file_size > _BOMB_RATIO * info.compress_size:
        raise DataError(
            f"{origin} unpacks from {info.compress_size} to {info.file_size} bytes, which is no real data; "
            "save fewer samples, or without compression (numpy.savez)"
        )
    with archive.open(info) as stream:
        shape, fortran, dtype = _npy_header(stream, origin)
        offset = stream.tell()
    _check_length(origin, shape, dtype, info.file_size - offset)
    if fortran and len(shape) > 1:
        raise DataError(
            f"{origin} is compressed and column-major, so samples cannot be read one after another; "
            "save numpy.ascontiguousarray(array)"
        )
    return CompressedColumn(path, info.filename, shape, dtype)


def _check_length(origin: str, shape: tuple[int, ...], dtype: np.dtype[Any], present: int) -> None:
    expected = prod(shape) * dtype.itemsize
    if present < expected:
        raise DataError(
            f"{origin}: {present} bytes of values are there, {expected} expected for {dtype} {shape}; "
            "the file was truncated or is still being written"
        )


class Spool:
    """One temporary file that one-shot data is written to, as ``.npy`` records one after another.

    The file is removed by :meth:`close`, when the spool is collected, or when the interpreter ends.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix="onnxcompress-", suffix=".spool", dir=folder)
        except OSError as error:
            raise ResourceError(
                f"cannot create a temporary file for the data: {error}; name another place by TMPDIR"
            ) from error
        os.close(handle)
        self.path = Path(name)
        #: a source without an end must not fill the disk
        self._room = shutil.disk_usage(self.path.parent).free // 2
        self._written = self._writes = 0
        self._remove = weakref.finalize(self, _unlink, name)

    def write(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Column]:
        """Append arrays and return them as columns.

        Raises:
            ResourceError: the disk is full, or half of what was free is used up.
            DataError: there is no end of batches.
        """
        self._writes += 1
        self._written += sum(array.nbytes for array in arrays.values())
        if self._writes > MOST_BATCHES:
            raise DataError(f"the data has more than {MOST_BATCHES} batches and may have no end; limit it by --samples")
        if self._written > self._room:
            raise ResourceError(
                f"the data takes more than {self._room / 1e9:.1f} GB, half of the free space in {self.path.parent}, "
                "and may have no end; limit it by --samples, or name another place by TMPDIR"
            )
        columns: dict[str, Column] = {}
        try:
            with self.path.open("ab") as file:
                for name, array in arrays.items():
                    np.lib.format.write_array(
                        file, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False
                    )
                    columns[name] = FileColumn(self.path, file.tell() - array.nbytes, array.shape, array.dtype)
        except OSError as error:
            raise ResourceError(
                f"{self.path}: the data cannot be kept on disk: {error.strerror or error}; "
                "free some space, name another place by TMPDIR, or use fewer samples"
            ) from error
        return columns

    def close(self) -> None:
        """Remove the file; what was written can be read no more."""
        self._remove()


def _unlink(name: str) -> None:
    Path(name).unlink(missing_ok=True)
