"""Where files may be written: checked before any work is done, so that a long run is not lost to a typing mistake."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from onnxcompress.errors import UsageError

__all__ = ["checked_destination"]


def checked_destination(path: str | os.PathLike[str], others: Mapping[str, Any]) -> Path:
    """``path`` as one that a file can be moved to.

    Args:
        path: the file to write; it may exist.
        others: {what it is: a path}: files that are read or written too and must not be replaced, under whatever name.
            ``file.py:function`` stands for the file; what is no path (arrays, None) and no file is passed over.

    Raises:
        UsageError: a folder, a device, in a folder that is missing or cannot be written to, or one of ``others``.
    """
    if not os.fspath(path):
        raise UsageError("no output file was given; name one with -o")
    target = Path(path)
    try:
        os.fspath(target).encode()
        with suppress(FileNotFoundError, NotADirectoryError):
            target.lstat()
        there = target.exists()
        if target.is_dir():
            raise UsageError(f"{target}: is a folder; give the name of the file to write")
        if there and not target.is_file():
            raise UsageError(f"{target}: is no regular file and cannot be replaced; name another one")
        if not target.parent.is_dir():
            raise UsageError(f"{target}: its folder does not exist; create {target.parent} first")
    except (OSError, ValueError) as error:  # too long, a null byte, or bytes that are no UTF-8
        reason = error.strerror if isinstance(error, OSError) else error
        if isinstance(error, UnicodeError):
            reason = "its name is no UTF-8"
        elif "\0" in str(target):
            reason = "its name holds a null byte"
        raise UsageError(f"{str(target)[:100]!r} cannot be a file: {reason}; name another one") from error
    if not os.access(target.parent, os.W_OK):
        raise UsageError(f"{target}: its folder cannot be written to; choose another one")
    for what, other in others.items():
        if isinstance(other, str | os.PathLike) and _same(target, there, os.fspath(other)):
            raise UsageError(f"{target}: is {what} itself, which is not overwritten; name another output")
    return target


def _same(target: Path, there: bool, other: str | bytes) -> bool:
    if not isinstance(other, str) or not other:
        return False
    for name in dict.fromkeys((other, other.rpartition(":")[0])):
        if not name:
            continue
        try:
            path = Path(name)
            if (there and path.is_file() and target.samefile(path)) or target.resolve() == path.resolve():
                return True
        except (OSError, ValueError, RuntimeError):  # no path, or a loop, which whoever reads it tells better
            continue
    return False
