"""One thread for the matrix products of NumPy, so that results do not depend on how many processors a machine has.

OpenBLAS, which NumPy's wheels bring, splits a product among threads and adds up in another order for every number of
them: the last bit of a bias then differs from machine to machine, and with it the file's hash. The library is the one
that NumPy has loaded; with another one, such as Accelerate, there is nothing to set.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

__all__ = ["one_blas_thread"]

_FOLDERS = ("numpy.libs", "numpy/.dylibs")
_NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads")


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within the block NumPy multiplies matrices with one thread."""
    functions = _thread_functions()
    if functions is None:
        yield
        return
    get, put = functions
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)


@cache
def _thread_functions() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """What reads and sets the number of threads of NumPy's OpenBLAS; None where it uses another library."""
    root = Path(np.__file__).parent.parent
    for path in (file for folder in _FOLDERS for file in sorted((root / folder).glob("*openblas*"))):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        for name in _NAMES:
            with contextlib.suppress(AttributeError):
                return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return None
