"""Weights rounded to integers so that their errors cancel where inputs are correlated.

With ``G = X X'`` of a layer's inputs, the integers ``q`` of each filter are sought for which
``(q - w) G (q - w)'`` is small: each column is rounded in turn, its error being spread over the columns still to come
by the inverse of ``G``, and the result is improved by coordinate descent.

Source: E. Frantar, D. Alistarh, "Optimal Brain Compression", NeurIPS 2022, and E. Frantar et al., "GPTQ", ICLR 2023.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcompress.patches import damped
from onnxcompress.quantization.observers import Watcher

__all__ = ["DAMPING", "GramWatcher", "integer_bounds", "most_rows", "round_columns"]

Floats = NDArray[np.float64]

#: ridge of the Gram matrix that rounding errors are spread by, relative to the mean input power
DAMPING = 0.003
_LARGEST = 127
#: up to this many columns coordinate descent is tried from both ends
_FEW = 64
#: sweeps of coordinate descent; most integers come to rest in the first
_SWEEPS = 2
#: columns that are rounded one by one before what follows from it is worked into all the others at once
_BLOCK = 32
#: products that one Gram matrix may take; at least four rows a column are used all the same
_PRODUCTS = 2e10


def most_rows(columns: int) -> int:
    """How many rows a Gram matrix of ``columns`` is summed over at most."""
    return max(int(_PRODUCTS / max(columns, 1) ** 2), 4 * columns)


class GramWatcher(Watcher):
    """Sums ``X' X`` over the rows of a tensor [..., columns], of the first batches as far as that is worth its time."""

    def __init__(self) -> None:
        self._sum: Floats | None = None
        self._rows = 0

    def update(self, *values: NDArray[Any]) -> None:
        rows = values[0].reshape(-1, values[0].shape[-1])
        columns = rows.shape[1]
        left = most_rows(columns) - self._rows
        rows = rows[: max(left, 0)]
        if len(rows):
            self._rows += len(rows)
            product = (rows.T @ rows).astype(np.float64)
            self._sum = product if self._sum is None else self._sum + product

    @property
    def gram(self) -> Floats | None:
        """Mean of the products, [columns, columns]; None where no values were seen, or some that are not finite."""
        if self._sum is None or not np.isfinite(self._sum).all() or not self._sum.any():
            return None
        return self._sum / self._rows


def integer_bounds(start: Floats, largest_pair: int | None) -> tuple[Floats, Floats]:
    """(smallest, largest) integer allowed at each place of ``start``, [groups, filters, columns].

    Where two products must not saturate, the integers of one sign may not sum to more than ``largest_pair``, any two of
    a filter. The largest one may stay what it is, and the others must leave room for it.
    """
    if largest_pair is None:
        return np.full(start.shape, -float(_LARGEST)), np.full(start.shape, float(_LARGEST))
    ends = []
    for values in (-start, start):
        place = values.argmax(axis=-1)[..., None]
        first = np.maximum(np.take_along_axis(values, place, axis=-1), largest_pair // 2)
        limit = np.broadcast_to(np.minimum(largest_pair - first, _LARGEST), values.shape).copy()
        np.put_along_axis(limit, place, np.minimum(first, _LARGEST), axis=-1)
        ends.append(np.maximum(limit, 0.0))
    return -ends[0], ends[1]


def round_columns(wanted: Floats, gram: Floats, start: Floats, bounds: tuple[Floats, Floats] | None = None) -> Floats:
    """Integers ``q`` within ``bounds`` for which ``(q - wanted) gram (q - wanted)'`` is small, for each row by itself.

    Columns are rounded in the order of falling input power, each error being made up for by the columns that follow,
    and the result is improved one integer at a time until none helps. A row for which ``start`` is better keeps it.

    Args:
        wanted: real weights in units of the scale, [groups, filters, columns].
        gram: positive definite, [groups, columns, columns].
        start: integers to be beaten, [groups, filters, columns].
        bounds: smallest and largest integer allowed at each place; -127 and 127 by default.
    """
    low, high = bounds if bounds is not None else integer_bounds(start, None)
    result = _spread_errors(wanted, gram, low, high)
    result = _descend(result, wanted, gram, low, high)
    other = _descend(start, wanted, gram, low, high) if gram.shape[-1] <= _FEW else start
    worse = _objective(result, wanted, gram) > _objective(other, wanted, gram)
    result[worse] = other[worse]
    return result


def _spread_errors(wanted: Floats, gram: Floats, low: Floats, high: Floats) -> Floats:
    """Each column rounded in turn, its error made up for by the columns that follow."""
    order = np.argsort(-np.diagonal(gram, axis1=1, axis2=2), axis=1, kind="stable")
    sorted_gram = np.take_along_axis(np.take_along_axis(gram, order[:, :, None], 1), order[:, None, :], 2)
    # Row i of the upper factor of the inverse says how the error of column i is spread over the columns after it.
    sorted_gram = (sorted_gram + sorted_gram.swapaxes(1, 2)) / 2
    try:
        spread = np.linalg.cholesky(np.linalg.inv(sorted_gram)).swapaxes(1, 2)
    except np.linalg.LinAlgError:  # of a channel that is all but constant, the mean taken off leaves rounding only
        spread = np.linalg.cholesky(np.linalg.inv(damped(sorted_gram, 1.0))).swapaxes(1, 2)
    # [groups, columns, filters], so that a column is a piece of memory
    places = order[:, :, None]
    rest, least, most = (np.take_along_axis(v.swapaxes(1, 2), places, 1) for v in (wanted, low, high))
    columns = rest.shape[1]
    integers = np.empty_like(rest)
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = np.empty((len(rest), end - begin, rest.shape[2]))
        for i in range(begin, end):
            here = integers[:, i]
            np.rint(rest[:, i], out=here)
            np.maximum(here, least[:, i], out=here)
            np.minimum(here, most[:, i], out=here)
            error = errors[:, i - begin]
            np.divide(rest[:, i] - here, spread[:, i, i, None], out=error)
            rest[:, i:end] -= spread[:, i, i:end, None] * error[:, None]
        rest[:, end:] -= spread[:, begin:end, end:].swapaxes(1, 2) @ errors
    result = np.empty_like(integers)
    np.put_along_axis(result, places, integers, 1)
    return np.ascontiguousarray(result.swapaxes(1, 2))


def _objective(integers: Floats, wanted: Floats, gram: Floats) -> Floats:
    away = integers - wanted
    values: Floats = np.einsum("gij,gij->gi", away @ gram, away)
    return values


def _descend(integers: Floats, wanted: Floats, gram: Floats, low: Floats, high: Floats) -> Floats:
    """Coordinate descent: each integer in turn becomes the best one for the others as they are."""
    # [groups, columns, filters], so that a column is a piece of memory
    found, least, most = (np.ascontiguousarray(v.swapaxes(1, 2)) for v in (integers, low, high))
    gradient = gram @ (found - wanted.swapaxes(1, 2))
    power = np.diagonal(gram, axis1=1, axis2=2)[:, :, None]
    columns = gram.shape[-1]
    steps = np.empty_like(found)
    for _ in range(_SWEEPS):
        for begin in range(0, columns, _BLOCK):
            end = min(begin + _BLOCK, columns)
            near = gradient[:, begin:end].copy()  # follows each step at once, the rest does after the block
            for i in range(begin, end):
                old, step = found[:, i], steps[:, i]
                np.divide(near[:, i - begin], power[:, i], out=step)
                np.rint(old - step, out=step)
                np.maximum(step, least[:, i], out=step)
                np.minimum(step, most[:, i], out=step)
                step -= old
                if i + 1 < end and step.any():
                    near[:, i + 1 - begin :] += gram[:, i + 1 : end, i, None] * step[:, None]
            found[:, begin:end] += steps[:, begin:end]
            gradient += gram[:, :, begin:end] @ steps[:, begin:end]
        if not steps.any():
            break
    return np.ascontiguousarray(found.swapaxes(1, 2))
