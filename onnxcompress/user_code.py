"""Functions in the user's own files, named ``file.py:function`` on the command line."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxcompress.errors import DataError, OnnxCompressError, ResourceError, UsageError

__all__ = ["UserFunction", "is_function_reference", "load_function", "user_errors"]

#: functions that a message lists
_NAMES = 10

_REFERENCE = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)")


def is_function_reference(text: str) -> bool:
    """True for ``file.py:function``."""
    return _REFERENCE.fullmatch(text) is not None


def load_function(reference: str) -> UserFunction:
    """Import ``file.py:function``. The file's folder is importable while the file and the function run.

    Raises:
        UsageError: not of that form, no such file or function.
        DataError: the file raises while it is imported.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UsageError(f"{reference!r} does not name a function; expected file.py:function")
    name = match["name"]
    try:
        path = Path(match["file"]).resolve()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, or a loop of links
        there = False
    if not there:
        raise UsageError(f"{match['file'][:200]}: no such file; expected file.py:function")
    # A name of its own, so that the user's `data.py` cannot shadow, nor be shadowed by, another module.
    module_name = "_onnxcompress_user_" + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None:
        raise UsageError(f"{match['file']}: cannot be imported; expected a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look modules up by name
    try:
        with user_errors(path), _importable(path.parent), redirect_stdout(sys.stderr):
            # Compiled here, not by the loader: no cache is left beside the user's file, and none that is stale is run.
            exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except BaseException:
        sys.modules.pop(module_name, None)
        raise
    function = getattr(module, name, None)
    if not callable(function):
        found = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module_name]
        told = ", ".join(found[:_NAMES]) + (f" and {len(found) - _NAMES} more" if len(found) > _NAMES else "")
        raise UsageError(f"{match['file']}: has no function {name!r}; found {told or 'no functions'}")

    return UserFunction(path, function)


@dataclass(frozen=True)
class UserFunction:
    """A function of the user's file. What it returns may run more of the user's code: see :meth:`running`."""

    path: Path
    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        """Call the function.

        Raises:
            DataError: the function raised; the line names its file and line.
        """
        with self.running():
            return self.function(*arguments)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context for running the user's code: its errors become one line and its neighbours can be imported.

        What it prints goes to stderr: stdout may belong to JSON.
        """
        with user_errors(self.path), _importable(self.path.parent), redirect_stdout(sys.stderr):
            yield


@contextmanager
def user_errors(path: Path | None = None) -> Iterator[None]:
    """Turn an exception of the user's code into one line with its file and line.

    ``path`` is the user's file; where it is None, or has no part in the traceback, the innermost frame is named.

    Raises:
        DataError: the user's code raised something that is no error of onnxcompress.
        ResourceError: it ran out of memory.
    """
    try:
        yield
    except OnnxCompressError:
        raise
    except MemoryError as error:
        raise ResourceError(f"{_place(error, path)}: out of memory; use fewer samples at a time") from error
    except (Exception, SystemExit) as error:
        raise DataError(f"{_place(error, path)}: {type(error).__name__}: {_one_line(error)}") from error


def _place(error: BaseException, path: Path | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if path is not None and Path(f.filename) == path]
    frame = (own or frames)[-1]
    if path is not None and Path(frame.filename) == Path(__file__):  # never entered: called with wrong arguments
        return str(path)
    return f"{frame.filename}, line {frame.lineno}"


def _one_line(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(text.split())[:300] or "no message"


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the user's file import its neighbours, as it could if Python ran it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
