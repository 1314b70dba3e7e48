"""Load and save models: safely, atomically, and with everything in the file that graphsurgeon would drop.

Reading trusts nothing. External data is opened relative to the model's folder, component by component and without
following links, so that what was checked is what is read. Sizes are checked against the file before anything is
allocated. Weights go from the file into arrays of their own (external ones as memory maps), never through protobuf.

Writing is atomic (:mod:`onnxcompress.atomic`): external data first, under a name that carries the hash of its contents,
the model last. Whatever fails, no new file stays behind and an old one stays as it was.

https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import posixpath
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message

from onnxcompress.atomic import Transaction, flush, write_error
from onnxcompress.errors import ModelError, OnnxCompressError, ResourceError, UnsafeModelError, UsageError
from onnxcompress.expansion import MOST_NODES, expanded_nodes
from onnxcompress.graph import Graph, model_info, release
from onnxcompress.proto import Skeleton, checkable, dense_tensors, from_proto, storage_bytes, to_skeleton
from onnxcompress.version import __version__
from onnxcompress.wire import Bytes, Payload, Split, WireError, join, split

__all__ = [
    "SavedModel",
    "content_sha256",
    "copy_linked",
    "file_sha256",
    "load",
    "model_bytes",
    "model_files",
    "model_sha256",
    "save",
    "serialize",
    "write_files",
]

#: the oldest opset whose operators the passes know
MIN_OPSET = 7
#: weights beyond this many bytes are written to external data: protobuf ends at 2 GiB
INLINE_LIMIT = 3 << 29
#: protobuf's limit on one message
PROTOBUF_LIMIT = (1 << 31) - 1
#: weights below this many bytes stay in the model file
EXTERNAL_FROM = 1024
# Large tensors start on a page, so that a runtime can map them one by one; the others on a cache line.
_PAGE_FROM, _PAGE, _LINE = 1 << 20, 4096, 64

#: bytes that are copied at a time
_COPIED = 1 << 24

#: onnxruntime takes external data at ``*/_ORT_MEM_ADDR_/*`` for a pointer, also where a file of that name exists
_MEMORY_ADDRESS = "_ORT_MEM_ADDR_"
_IS_LINK = {errno.ELOOP, errno.ENOTDIR, errno.EMLINK}
_PROVENANCE = "onnxcompress."
# Flags and calls that Windows lacks are left out there: links are then looked for by name.
_READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)


@dataclass(frozen=True)
class SavedModel:
    """What :func:`save` wrote: the model and its external data, their total size and :func:`model_sha256`."""

    path: Path
    files: tuple[Path, ...]
    bytes: int
    sha256: str


# ---------------------------------------------------------------------------------------------------------------------
# Load


def load(path: str | os.PathLike[str], *, trusted: bool = False) -> Graph:
    """Read, check and import a model.

    Args:
        path: the model file, or a symbolic link to it. External data is looked for next to the link, then next to
            the file; it may itself be a link only into the folder where the model file really is, which is how the
            Hugging Face cache keeps its files.
        trusted: accept external data that has more than one name (hard links), which untrusted models may use to
            reach files outside their folder.

    Raises:
        UsageError: no such file, or it cannot be read.
        UnsafeModelError: external data that leaves the model's folder or is no regular file.
        ModelError: not an ONNX model, damaged, invalid, too old or too new.
        ResourceError: not enough memory.
    """
    path = Path(path)
    try:
        with _open_model(path) as file:
            parts = _split(path, file)
            model = _parse(path, file, parts)
            _check_versions(path, model)
            digests = [_digest(file)]
        external = _ExternalData(path, trusted, hashed=True)
        if _may_have_external_data(parts.skeleton):
            external.attach(model, parts)
        _check_size(path, model)
        _check(path, model, parts.token)
        try:
            graph = from_proto(model, payloads=parts.payloads)
        except UnicodeDecodeError as error:
            raise ModelError(f"{path} has a name that is no UTF-8 ({error}); the file is damaged") from error
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
    except MemoryError as error:
        raise ResourceError(f"not enough memory to load {path}") from error
    info = model_info(graph)
    digests += external.digests()
    info.source_sha256 = _combined(digests)
    info.external_data = bool(external.files)
    info.files = (path.absolute(), *external.paths())
    return graph


def model_files(path: str | os.PathLike[str]) -> list[Path]:
    """The model file and its external data, which is checked as :func:`load` does; weights are not read.

    Raises:
        UsageError, UnsafeModelError, ModelError: as :func:`load`.
    """
    path = Path(path)
    with _open_model(path) as file:
        parts = _split(path, file, skip=True)
        model = _parse(path, file, parts)
    external = _ExternalData(path, trusted=True, hashed=False)
    if _may_have_external_data(parts.skeleton):
        for tensor in _external_tensors(model):
            external.map(external.location(tensor), tensor)
    return [path, *external.paths()]


def copy_linked(path: str | os.PathLike[str], folder: str | os.PathLike[str], *, trusted: bool = False) -> Path:
    """``path``, or a copy of the model in ``folder`` where its external data is a link, which ONNX Runtime refuses.

    Args:
        path: a model file.
        folder: an existing, empty folder, which the copy lies in, external data where the model expects it.
        trusted: accept external data with more than one name, as :func:`load` does.

    Raises:
        UsageError, UnsafeModelError, ModelError: as :func:`load`.
        ResourceError: the disk is full.
    """
    path = Path(path)
    with _open_model(path) as file:
        parts = _split(path, file, skip=True)
        if not _may_have_external_data(parts.skeleton):
            return path
        model = _parse(path, file, parts)
        external = _ExternalData(path, trusted, hashed=False)
        for tensor in _external_tensors(model):
            external.map(external.location(tensor), tensor)
        if not any(f.path.is_symlink() or f.path.stat().st_nlink > 1 for f in external.files.values()):
            return path
        copy = Path(folder) / path.name
        try:
            file.seek(0)
            with copy.open("wb") as out:
                shutil.copyfileobj(file, out)
            for location, source in external.files.items():
                target = copy.parent / location
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    for start in range(0, source.contents.nbytes, _COPIED):
                        piece = source.contents[start : start + _COPIED]
                        out.write(piece.data)
                        release(piece)
        except OSError as error:
            raise write_error(copy, error) from error
    return copy


def model_bytes(path: str | os.PathLike[str]) -> int:
    """Size on disk in bytes, external data included."""
    return sum(file.stat().st_size for file in model_files(path))


def model_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the model file; with external data, of the list of the hashes of all its files."""
    return _combined([file_sha256(file) for file in model_files(path)])


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of one file, hexadecimal, read in pieces.

    Raises:
        UsageError: no such file, or it cannot be read.
    """
    with _open_model(Path(path)) as file:
        return _digest(file)


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _combined(digests: list[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


@contextlib.contextmanager
def _open_model(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file; O_NONBLOCK keeps a pipe of that name from blocking for ever."""
    try:
        descriptor = os.open(path, _READ | _NONBLOCK)
    except FileNotFoundError as error:
        kind = "is a broken link" if path.is_symlink() else "does not exist"
        raise UsageError(f"{path} {kind}; expected an ONNX model") from error
    except ValueError as error:  # an embedded null byte
        raise UsageError(f"{str(path)!r} is no file name: {error}") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UsageError(f"{path} is {kind}; expected an ONNX model file")
    with os.fdopen(descriptor, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _split(path: Path, file: BinaryIO, *, skip: bool = False) -> Split:
    if os.fstat(file.fileno()).st_size == 0:
        raise ModelError(f"{path} is empty; expected an ONNX model")
    try:
        return split(file, EXTERNAL_FROM, skip=skip)
    except WireError as error:
        raise ModelError(f"{path} is no ONNX model or is cut off: {error}{_hint(file)}") from error


def _parse(path: Path, file: BinaryIO, parts: Split) -> onnx.ModelProto:
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(parts.skeleton)
    except DecodeError as error:
        raise ModelError(f"{path} is no ONNX model: protobuf cannot read it{_hint(file)}") from error
    if not model.HasField("graph"):
        raise ModelError(f"{path} holds no graph; expected an ONNX model{_hint(file)}")
    return model


_SIGNATURES = {
    b"version https://git-lfs": "a Git LFS pointer, run 'git lfs pull'",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint, export it to ONNX first",
    b"\x89HDF": "an HDF5 file, convert it to ONNX first",
    b"<!DOCTYPE": "a web page, download the model itself",
    b"<html": "a web page, download the model itself",
    b"\x1f\x8b": "a gzip archive, unpack it first",
}


def _hint(file: BinaryIO) -> str:
    """What the file is instead, where its first bytes tell."""
    file.seek(0)
    head = file.read(32)
    if head[4:8] == b"ORTM":
        return "; it is a model in ONNX Runtime's own format, use the ONNX file that it was made from"
    return next((f"; it is {kind}" for signature, kind in _SIGNATURES.items() if head.startswith(signature)), "")


def _check_versions(path: Path, model: onnx.ModelProto) -> None:
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{path} has IR version {model.ir_version}, but onnx {onnx.__version__} knows up to {onnx.IR_VERSION}; "
            "upgrade onnx"
        )
    if not model.opset_import:
        raise ModelError(f"{path} imports no operator set; expected at least one in opset_import, export it again")
    newest = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            continue
        if entry.version > newest:
            raise ModelError(
                f"{path} uses opset {entry.version}, but onnx {onnx.__version__} knows up to {newest}; upgrade onnx"
            )
        if entry.version < MIN_OPSET:
            raise ModelError(
                f"{path} uses opset {entry.version}, but {MIN_OPSET} is the oldest that is supported; convert it "
                "first with onnx.version_converter"
            )


def _check_size(path: Path, model: onnx.ModelProto) -> None:
    try:
        nodes = expanded_nodes(model)
    except ModelError as error:
        raise ModelError(f"{path} is no valid ONNX model: {error}") from error
    if nodes > MOST_NODES:
        raise ModelError(
            f"{path} has {nodes} nodes once its functions are inlined; expected at most {MOST_NODES}, export it "
            "without functions"
        )


def _check(path: Path, model: onnx.ModelProto, token: bytes) -> None:
    reason = _invalid(model, token)
    if reason is not None:
        raise ModelError(f"{path} is no valid ONNX model: {reason}")


def _invalid(model: onnx.ModelProto, token: bytes) -> str | None:
    """Why ONNX's checker refuses a skeleton, in one line; None where it does not."""
    try:
        onnx.checker.check_model(checkable(model, token))
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())[:500]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# External data


def _may_have_external_data(skeleton: bytes) -> bool:
    """False where no tensor can refer to external data: every reference has the key ``location``."""
    return b"location" in skeleton


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every TensorProto below ``message``, in sparse tensors, functions and training information too."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        for item in (value,) if isinstance(value, Message) else value:
            yield from _tensors(item)


def _external_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    return (tensor for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL)


@dataclass(frozen=True)
class _ExternalFile:
    path: Path
    contents: Bytes
    #: empty where it was not asked for
    sha256: str


class _ExternalData:
    """Opens the external data of one model, each file once, as read-only memory maps."""

    def __init__(self, path: Path, trusted: bool, hashed: bool) -> None:
        self._model = path
        self._trusted = trusted
        self._hashed = hashed
        self._folders = [path.parent]
        #: where links may lead: the folder of the model file, where the model itself is a link
        self._blobs: Path | None = None
        if path.is_symlink():
            self._blobs = Path(os.path.realpath(path)).parent
            self._folders.append(self._blobs)
        self.files: dict[str, _ExternalFile] = {}
        #: by file, where tensors start and end
        self._ranges: dict[str, dict[tuple[int, int], str]] = {}

    def paths(self) -> list[Path]:
        """The files that were opened, sorted by location."""
        return [self.files[name].path for name in sorted(self.files)]

    def digests(self) -> list[str]:
        """SHA-256 of each file that was opened, sorted by location."""
        return [self.files[name].sha256 for name in sorted(self.files)]

    def attach(self, model: onnx.ModelProto, parts: Split) -> None:
        """Give every external tensor of ``model`` its data: a marker for a memory map, bytes where that cannot be."""
        for tensor in dense_tensors(model.graph):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                data = self.read(tensor)
                _forget_location(tensor)
                if data.nbytes:
                    marker = parts.marker()
                    parts.payloads[marker] = data
                    tensor.raw_data = marker
        for tensor in _external_tensors(model):
            data = self.read(tensor)
            _forget_location(tensor)
            tensor.raw_data = data.tobytes()
        self._check_overlap()

    def _check_overlap(self) -> None:
        """Tensors may share a range, but not a part of one: no tool writes that, and a file of it unpacks to many."""
        for location, ranges in self._ranges.items():
            last_end, last_name = 0, ""
            for (start, end), name in sorted(ranges.items()):
                if start < last_end:
                    raise ModelError(
                        f"tensors {last_name!r} and {name!r} of {self._model} overlap in {location!r} from byte {start}"
                        f" to {min(end, last_end)}; expected ranges that are apart or the same, the file is damaged"
                    )
                last_end, last_name = end, name

    def read(self, tensor: onnx.TensorProto) -> Bytes:
        """The raw bytes of an external tensor, checked against its type, its shape and the size of the file."""
        location = self.location(tensor)
        try:
            expected = storage_bytes(tensor.data_type, tensor.dims)
        except ModelError as error:
            raise ModelError(f"tensor {tensor.name!r} of {self._model}: {error}") from error
        entries = {entry.key: entry.value for entry in tensor.external_data}
        offset = self._number(tensor, "offset", entries.get("offset", "0"))
        length = self._number(tensor, "length", entries.get("length", str(expected)))
        if length != expected:
            raise ModelError(
                f"tensor {tensor.name!r} of {self._model} has {length} bytes of external data, but {expected} are "
                f"expected for its type and shape {list(tensor.dims)}; the file is damaged"
            )
        contents = self.map(location, tensor).contents
        if offset + length > contents.nbytes:
            raise ModelError(
                f"tensor {tensor.name!r} of {self._model} lies at {offset} to {offset + length} in {location!r}, which "
                f"has {contents.nbytes} bytes; the file is cut off or damaged"
            )
        if length:
            self._ranges.setdefault(location, {}).setdefault((offset, offset + length), tensor.name)
        return contents[offset : offset + length]

    def location(self, tensor: onnx.TensorProto) -> str:
        """Where the file says that the tensor's data is."""
        keys = [entry.key for entry in tensor.external_data]
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value and len(keys) == len(set(keys)):
                return str(entry.value)
        raise ModelError(
            f"tensor {tensor.name!r} of {self._model} has external data without exactly one location; the file is "
            "damaged"
        )

    def _number(self, tensor: onnx.TensorProto, key: str, value: str) -> int:
        if not (value.isascii() and value.isdigit() and len(value) <= 19):
            raise ModelError(
                f"tensor {tensor.name!r} of {self._model} has the external {key} {value[:40]!r}; expected a number "
                "of bytes, 0 or more"
            )
        return int(value)

    def map(self, location: str, tensor: onnx.TensorProto) -> _ExternalFile:
        """The file at ``location``, mapped; each file once."""
        where = f"external data {location[:200]!r} of tensor {tensor.name[:200]!r} in {self._model}"
        normal = posixpath.normpath(location)
        if _MEMORY_ADDRESS in normal:
            raise UnsafeModelError(f"{where} names an address in memory, which no file may; the file is not safe")
        foreign = os.sep != "/" and os.sep in normal  # Windows would take it for a path, too
        if foreign or normal.startswith("/") or normal.split("/")[0] == ".." or "\0" in normal or normal[1:2] == ":":
            raise UnsafeModelError(f"{where} leaves the model's folder; expected a relative path below it")
        known = self.files.get(normal)
        if known is None:
            known = self.files[normal] = self._open(normal.split("/"), where)
        return known

    def _open(self, parts: list[str], where: str) -> _ExternalFile:
        for folder in self._folders:
            try:
                descriptor, path = self._open_below(folder, parts, where)
            except FileNotFoundError:
                continue
            except OSError as error:
                # too long a name, or a socket: what the file says is wrong, not how it was called
                kind = ModelError if error.errno in (errno.ENAMETOOLONG, errno.ENXIO) else UsageError
                raise kind(f"cannot read {where}: {error.strerror}") from error
            try:
                self._check_file(os.fstat(descriptor), where)
            except UnsafeModelError:
                os.close(descriptor)
                raise
            with os.fdopen(descriptor, "rb") as file:
                return self._map(file, path)
        raise ModelError(f"{where} does not exist; expected it in {self._model.parent}, put it there")

    def _open_below(self, folder: Path, parts: list[str], where: str) -> tuple[int, Path]:
        """Open a file below ``folder`` without following a link, so that it cannot be swapped after a check."""
        path = folder.joinpath(*parts)
        if os.open not in os.supports_dir_fd:
            return self._open_by_name(folder, parts, where), path
        parent = os.open(folder, _READ | _DIRECTORY)
        try:
            for part in parts[:-1]:
                try:
                    inner = os.open(part, _READ | _DIRECTORY | _NOFOLLOW, dir_fd=parent)
                except OSError as error:
                    if error.errno not in _IS_LINK:
                        raise
                    raise UnsafeModelError(f"{where} passes through a link; expected folders, copy the data") from error
                os.close(parent)
                parent = inner
            try:
                return os.open(parts[-1], _READ | _NOFOLLOW | _NONBLOCK, dir_fd=parent), path
            except OSError as error:
                if error.errno not in _IS_LINK:
                    raise
                return os.open(self._blob(path, where), _READ | _NOFOLLOW | _NONBLOCK), path
        finally:
            os.close(parent)

    def _open_by_name(self, folder: Path, parts: list[str], where: str) -> int:
        """As :meth:`_open_below` where files cannot be opened relative to an open folder."""
        path = folder
        for part in parts[:-1]:
            path /= part
            if path.is_symlink() or (hasattr(path, "is_junction") and path.is_junction()):
                raise UnsafeModelError(f"{where} passes through a link; expected folders, copy the data")
        path /= parts[-1]
        return os.open(self._blob(path, where) if path.is_symlink() else path, _READ | _NONBLOCK)

    def _blob(self, path: Path, where: str) -> Path:
        """What the link ``path`` leads to, which must lie beside the file that the model itself is a link to."""
        real = Path(os.path.realpath(path))
        if self._blobs is None or real.parent != self._blobs:
            raise UnsafeModelError(f"{where} is a link that leaves the model's folder; expected a file, copy it there")
        return real

    def _check_file(self, status: os.stat_result, where: str) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeModelError(f"{where} is no regular file; expected one")
        if status.st_nlink > 1 and not self._trusted:
            raise UnsafeModelError(
                f"{where} has {status.st_nlink} names (hard links), so it may belong to something else; copy it, or "
                "use --allow-hard-links (load with trusted=True)"
            )

    def _map(self, file: BinaryIO, path: Path) -> _ExternalFile:
        contents: Bytes = np.empty(0, np.uint8)
        if os.fstat(file.fileno()).st_size:  # nothing cannot be mapped
            contents = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return _ExternalFile(path, contents, _digest(file) if self._hashed else "")


def _forget_location(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("data_location")
    tensor.ClearField("external_data")


# ---------------------------------------------------------------------------------------------------------------------
# Save


def save(
    graph: Graph,
    path: str | os.PathLike[str],
    *,
    provenance: Mapping[str, str] | None = None,
    overwrite: bool = True,
    source: str | os.PathLike[str] | None = None,
) -> SavedModel:
    """Write ``graph`` atomically; the same graph gives the same bytes.

    Weights go to ``<stem>-<hash>.data`` next to the model where they exceed 1.5 GiB or where the source kept them so.
    The name says what is in it, so the data of the model that is replaced stays until the new model is in place; it
    is removed then, where no other model in the folder reads it.

    Args:
        graph: what to write; not changed.
        path: the model file, in a folder that exists.
        provenance: written to metadata_props as ``onnxcompress.<key>``; ``version`` and, where it is known,
            ``source_sha256`` are added. None leaves metadata_props as they are.
        overwrite: replace an existing file.
        source: a model that must not be overwritten, beside the files that ``graph`` was loaded from.

    Raises:
        UsageError: the destination is the source, a folder, exists (``overwrite=False``) or cannot be written.
        ResourceError: the disk is full.
        OnnxCompressError: the graph is no valid model, so a pass has made a mistake.
    """
    path = Path(path)
    info = model_info(graph)
    protected = [*info.files, *(_known_files(Path(source)) if source is not None else ())]
    _check_destination(path, protected, overwrite)
    skeleton = to_skeleton(graph, threshold=EXTERNAL_FROM)
    if provenance is not None:
        _stamp(skeleton.model, info.source_sha256, provenance)
    reason = _invalid(skeleton.model, skeleton.token)
    if reason is not None:
        raise OnnxCompressError(f"the result is no valid ONNX model, please report this: {reason}")
    external = bool(skeleton.weights) and (info.external_data or skeleton.weight_bytes > INLINE_LIMIT)
    try:
        with Transaction(path) as transaction:
            data = _write_external(transaction, path, skeleton, protected) if external else None
            with transaction.create() as file:
                size, digest = _write_pieces(file, _pieces(skeleton, external))
                flush(file)
            outdated = _own_data(path, protected)
            transaction.commit(overwrite)
            _remove_unread(outdated - {data.path if data is not None else path}, path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    except MemoryError as error:
        raise ResourceError(f"not enough memory to write {path}; nothing was written") from error
    if data is None:
        return SavedModel(path, (path,), size, digest)
    return SavedModel(path, (path, data.path), size + data.size, _combined([digest, data.sha256]))


def serialize(graph: Graph) -> bytes | None:
    """The model as the bytes of one protobuf message; None above its limit of 2 GiB (see :func:`write_files`).

    Needs memory for one copy of the weights beside the graph.
    """
    skeleton = to_skeleton(graph, threshold=EXTERNAL_FROM)
    if skeleton.weight_bytes + skeleton.model.ByteSize() > PROTOBUF_LIMIT:
        return None
    return b"".join(_pieces(skeleton, False))


def content_sha256(graph: Graph) -> str:
    """SHA-256 of the model as one message with all its weights, of any size, hexadecimal."""
    digest = hashlib.sha256()
    for piece in _pieces(to_skeleton(graph, threshold=EXTERNAL_FROM), False):
        digest.update(piece)
    return digest.hexdigest()


def write_files(graph: Graph, folder: str | os.PathLike[str]) -> Path:
    """Write ``graph`` with external data into ``folder``, for a runtime to open; not atomic, not checked.

    Raises:
        UsageError, ResourceError: the folder cannot be written, or the disk is full.
    """
    path = Path(folder) / "model.onnx"
    skeleton = to_skeleton(graph, threshold=EXTERNAL_FROM)
    try:
        with (path.parent / "model.data").open("wb") as file:
            places, _, _ = _write_weights(file, skeleton)
        _refer(places, "model.data")
        path.write_bytes(skeleton.model.SerializeToString(deterministic=True))
    except OSError as error:
        raise write_error(path, error) from error
    return path


def _known_files(source: Path) -> list[Path]:
    """The files of a model; where it cannot be read, the model file alone."""
    try:
        return model_files(source)
    except OnnxCompressError:
        return [source]


def _check_destination(path: Path, protected: list[Path], overwrite: bool) -> None:
    if path.name in ("", ".", "..") or path.is_dir():
        raise UsageError(f"{path} is a folder; expected the name of a model file to write")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist; create it, or write somewhere else")
    if not os.path.lexists(path):
        return
    for file in protected:
        if path.exists() and file.exists() and path.samefile(file):
            raise UsageError(f"{path} is the input itself, which is never overwritten; choose another output")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file; choose another output")
    if not overwrite:
        raise UsageError(f"{path} exists; choose another output or allow overwriting")


def _own_data(path: Path, protected: list[Path]) -> set[Path]:
    """The external data of the model at ``path`` that an earlier :func:`save` to this place wrote."""
    if not path.is_file() or path.is_symlink():
        return set()
    mine = re.compile(re.escape(path.stem) + r"-[0-9a-f]{16}\.data")
    found = {file for file in _known_files(path)[1:] if file.parent == path.parent and mine.fullmatch(file.name)}
    return {file for file in found if not any(known.exists() and file.samefile(known) for known in protected)}


def _remove_unread(files: set[Path], folder: Path) -> None:
    """Remove what no model in ``folder`` reads any more; where one cannot be read, or on an error, all stay."""
    if not files:
        return
    with contextlib.suppress(OSError, OnnxCompressError):
        for model in folder.glob("*.onnx"):
            files = files.difference(model_files(model))
        for file in files:
            if file.stat(follow_symlinks=False).st_nlink == 1:
                file.unlink()


def _stamp(model: onnx.ModelProto, source_sha256: str | None, provenance: Mapping[str, str]) -> None:
    stamps = {"version": __version__}
    if source_sha256 is not None:
        stamps["source_sha256"] = source_sha256
    properties = {p.key: p.value for p in model.metadata_props}
    properties.update((_PROVENANCE + key, str(value)) for key, value in (stamps | dict(provenance)).items())
    del model.metadata_props[:]
    for key, value in properties.items():
        model.metadata_props.add(key=key, value=value)


_Places = list[tuple[onnx.TensorProto, int, int]]


@dataclass(frozen=True)
class _DataFile:
    path: Path
    size: int
    sha256: str


def _write_external(transaction: Transaction, path: Path, skeleton: Skeleton, protected: list[Path]) -> _DataFile:
    with transaction.create() as file:
        places, size, digest = _write_weights(file, skeleton)
        flush(file)
    data = path.with_name(f"{path.stem}-{digest[:16]}.data")
    if not _holds(data, digest):
        for known in protected:
            if data.exists() and known.exists() and data.samefile(known):
                raise UsageError(f"{data} belongs to the input, which is never overwritten; choose another output")
        transaction.place(data, lambda: data in _known_files(path))
    _refer(places, data.name)
    return _DataFile(data, size, digest)


def _holds(path: Path, digest: str) -> bool:
    """True where ``path`` is a plain file with these contents, which can be left alone."""
    return path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1 and file_sha256(path) == digest


def _write_weights(file: BinaryIO, skeleton: Skeleton) -> tuple[_Places, int, str]:
    """Write every weight; where each one is, the size of the file and its SHA-256."""
    digest = hashlib.sha256()
    places: _Places = []
    position = 0
    for tensor, payload in skeleton.weights:
        padding = bytes(-position % (_PAGE if payload.nbytes >= _PAGE_FROM else _LINE))
        places.append((tensor, position + len(padding), payload.nbytes))
        data = payload.read()
        for piece in (padding, data.data):
            file.write(piece)
            digest.update(piece)
        release(data)
        position += len(padding) + payload.nbytes
    return places, position, digest.hexdigest()


def _refer(places: _Places, location: str) -> None:
    """Replace markers by references to external data."""
    for tensor, offset, length in places:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)


def _pieces(skeleton: Skeleton, external: bool) -> Iterator[bytes | memoryview]:
    payloads: dict[bytes, Payload] = {} if external else skeleton.payloads
    return join(skeleton.model.SerializeToString(deterministic=True), skeleton.token, payloads)[1]


def _write_pieces(file: BinaryIO, pieces: Iterator[bytes | memoryview]) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    for piece in pieces:
        file.write(piece)
        digest.update(piece)
        size += len(piece)
    return size, digest.hexdigest()
