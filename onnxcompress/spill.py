"""Weights that passes made of a large model, moved from memory into a temporary file.

What a model file holds is mapped and can leave memory again. What a pass computes cannot, so a recipe that changes
every weight would hold them all once, beside the runtime's own copy in every session.
"""

from __future__ import annotations

import mmap
import tempfile
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.graph import Graph, map_below, walk_constants

__all__ = ["SPILLED_FROM", "spill_weights"]

#: bytes of weights in memory from which they are moved
SPILLED_FROM = 1 << 26
#: smaller ones are left alone
_LEAST = 1 << 16


def spill_weights(graph: Graph) -> int:
    """Let constants of ``graph`` read their values from a temporary file, where much of them lies in memory.

    The file has no name, so that it goes when nothing reads it any more, whatever happens to the process. On a full
    disk the weights stay in memory.

    Returns:
        The bytes that were moved.
    """
    held: dict[int, list[gs.Constant]] = {}
    for constant in walk_constants(graph):
        values = constant._values
        if isinstance(values, np.ndarray) and _movable(values):
            held.setdefault(id(values), []).append(constant)
    arrays = [constants[0]._values for constants in held.values()]
    size = sum(int(array.nbytes) for array in arrays)
    if size < SPILLED_FROM:
        return 0
    try:
        mapped, places = _written(arrays)
    except OSError:
        return 0
    for constants, array, offset in zip(held.values(), arrays, places, strict=True):
        moved = np.frombuffer(mapped, array.dtype, array.size, offset).reshape(array.shape)
        for constant in constants:
            constant._values = moved
    return size


def _movable(values: NDArray[Any]) -> bool:
    return values.nbytes >= _LEAST and not values.dtype.hasobject and map_below(values) is None


def _written(arrays: list[NDArray[Any]]) -> tuple[mmap.mmap, list[int]]:
    """A map of a file with these arrays, each on a page of its own, and where each of them starts."""
    places = []
    with tempfile.TemporaryFile(prefix="onnxcompress-") as file:
        for array in arrays:
            places.append(file.seek(-(-file.tell() // mmap.PAGESIZE) * mmap.PAGESIZE))
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), places
