"""The one way in which files are written: whole and in place, or not at all, whenever the process ends.

A file is written under a temporary name in the destination's folder, flushed to the disk and renamed. What ends the
process before the rename (an error, Ctrl-C, SIGKILL, a full disk, no more power) leaves the old file as it was. Errors
and interrupts leave nothing else behind; a killed process leaves its temporary file, which the next one that writes to
that folder removes: whoever writes holds a lock (``flock``) that ends with its process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import BinaryIO

from onnxcompress.errors import OnnxCompressError, ResourceError, UsageError

__all__ = [
    "NO_ROOM",
    "Transaction",
    "flush",
    "remove_abandoned",
    "replacing",
    "staging_folder",
    "write_error",
    "write_file",
]

#: error numbers that say that the machine is out of something, not that the place is wrong
NO_ROOM = frozenset(
    {errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, getattr(errno, "EDQUOT", -1)}
)

_PREFIX = ".onnxcompress-"
#: seconds before what another process left is removed: there is a moment between making a file and locking it
_ABANDONED_AFTER = 60.0
# Windows lacks some of these and needs another one.
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
for _name in ("O_CLOEXEC", "O_NOFOLLOW", "O_BINARY"):
    _WRITE |= getattr(os, _name, 0)


def write_error(path: Path, error: OSError) -> OnnxCompressError:
    """The error to raise where ``path`` could not be written: one of resources, or of the place that was chosen."""
    reason = error.strerror or str(error)
    if error.errno in NO_ROOM:
        return ResourceError(f"{path}: cannot be written: {reason}; nothing was written, free some space")
    return UsageError(f"{path}: cannot be written: {reason}; nothing was written, choose another output")


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``, all or nothing.

    Raises:
        UsageError: the file cannot be written there.
        ResourceError: the disk is full.
    """
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file to write to, which takes the place of ``path`` when the block ends without an exception.

    Raises:
        UsageError: the file cannot be written there.
        ResourceError: the disk is full.
    """
    target = Path(path)
    try:
        with Transaction(target) as transaction:
            with transaction.create() as file:
                yield file
                flush(file)
            transaction.commit(overwrite=True)
    except OSError as error:
        raise write_error(target, error) from error


@contextlib.contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder in ``parent`` that is gone after the block, and what killed processes left there now.

    Raises:
        UsageError: no folder can be made there.
        ResourceError: the disk is full.
    """
    remove_abandoned(parent)
    try:
        folder = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent)
    except OSError as error:
        raise write_error(parent, error) from error
    with folder as name:
        lock = _lock_folder(name)
        try:
            yield Path(name)
        finally:
            if lock is not None:
                os.close(lock)


def flush(file: BinaryIO) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


class Transaction:
    """Files that take their places together, the destination last, or not at all."""

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self._temporary: list[Path] = []
        #: files that were not there before, and whether something refers to them by now
        self._placed: list[tuple[Path, Callable[[], bool]]] = []
        self._locks: list[int] = []
        self._identity: tuple[int, int] | None = None
        #: what was at the destination when the last file was placed
        self._found: tuple[int, int] | None = None

    def create(self) -> BinaryIO:
        """A new file in the destination's folder, with the permissions of any new file."""
        path = self._destination.with_name(f"{_PREFIX}{secrets.token_hex(8)}.tmp")
        descriptor = os.open(path, _WRITE, 0o666)
        self._temporary.append(path)
        file = os.fdopen(descriptor, "wb")
        if _locked(descriptor):
            self._locks.append(os.dup(descriptor))  # the lock lasts until the last descriptor is closed
        return file

    def place(self, path: Path, wanted: Callable[[], bool] = lambda: False) -> None:
        """Rename the last file to ``path``, which the destination is going to refer to.

        It is removed again where this transaction fails, unless another process has written the destination meanwhile
        and ``wanted()``: it may refer to the same file.
        """
        self._found = self._status()
        if not os.path.lexists(path):
            self._placed.append((path, wanted))
        self._temporary[-1].replace(path)
        self._sync_folder()

    def commit(self, overwrite: bool) -> None:
        """Rename the last file to the destination.

        Raises:
            UsageError: the destination exists and must not be overwritten.
        """
        status = self._temporary[-1].stat()
        self._identity = status.st_dev, status.st_ino
        if not overwrite and os.path.lexists(self._destination):
            raise UsageError(f"{self._destination} exists; choose another output or allow overwriting")
        self._temporary[-1].replace(self._destination)
        # The file is whole and in place: a folder that cannot be synchronised is no reason to report a failure.
        with contextlib.suppress(OSError):
            self._sync_folder()

    def _sync_folder(self) -> None:
        if not hasattr(os, "O_DIRECTORY"):  # Windows: a folder cannot be opened
            return
        descriptor = os.open(self._destination.parent, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _is_committed(self) -> bool:
        """Ask the disk, because an interrupt may come right after the rename."""
        status = self._status()
        return status is not None and status == self._identity

    def _status(self) -> tuple[int, int] | None:
        """Device and number of the file at the destination; None where there is none."""
        try:
            status = self._destination.stat(follow_symlinks=False)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def __enter__(self) -> Transaction:
        remove_abandoned(self._destination.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leftover = list(self._temporary)
        if not self._is_committed():
            changed = self._status() != self._found
            leftover += [path for path, wanted in self._placed if not (changed and wanted())]
        for path in leftover:
            with contextlib.suppress(OSError):
                path.unlink()
        for descriptor in self._locks:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _fcntl() -> ModuleType | None:
    """The module for locks; None on Windows, where nothing is locked and so nothing is taken for abandoned."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


def _locked(descriptor: int) -> bool:
    """Lock an open file or folder for the time that it is open; False where it is, or cannot be."""
    module = _fcntl()
    if module is None:
        return False
    try:
        module.flock(descriptor, module.LOCK_EX | module.LOCK_NB)
    except OSError:
        return False
    return True


def _lock_folder(name: str) -> int | None:
    """A locked descriptor of a folder; None where folders cannot be opened or locked."""
    try:
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return None
    if _locked(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes of this user left in ``folder``; what cannot be removed stays without a word."""
    module = _fcntl()
    if module is None:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX):
                with contextlib.suppress(OSError):
                    _remove_abandoned(Path(entry.path))


def _remove_abandoned(path: Path) -> None:
    status = path.lstat()
    if status.st_uid != os.geteuid() or time.time() - status.st_mtime < _ABANDONED_AFTER:
        return
    is_folder = stat.S_ISDIR(status.st_mode)
    if not is_folder and not (stat.S_ISREG(status.st_mode) and path.suffix == ".tmp"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not _locked(descriptor):
            return
        if is_folder:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        os.close(descriptor)
